"""What surrounds every site: its weight, the affine operations behind it, and who reads the result.

    flows = dataflow(apply, variables, images)      # by site, in program order; nothing is computed
    flows["stem/kernel"].tail.gain                  # (var + eps)^-1/2 * scale, of BatchNorm
    flows["stem/kernel"].consumers[0].site          # "block1/conv/kernel"

All of it follows from the jaxpr of the function in evaluation mode, whatever modules wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aqt_search.ptq.affine import Factor, Leaves, Reader, Term, negated
from aqt_search.ptq.elementwise import Elementwise, elementwise
from aqt_search.ptq.site_weights import Axes, SiteWeight, product_axes, read_weight
from aqt_search.tracing.channels import MOVES, POOLS, Channels, moved
from aqt_search.tracing.flat_graph import FlatGraph, Leaf, Node, Value, trace_graph

OUTPUT = "its result is an output of the function"
_AFFINE = ("add", "add_any", "sub", "mul", "div")


@dataclasses.dataclass(frozen=True)
class Shift:
    """What is added to every channel: coefficient * leaf * product of `through`."""

    leaf: Leaf
    coefficient: float
    through: Term  # the gains that the leaf goes through; Term() where it comes after all of them

    def value(self, leaves: Leaves) -> np.ndarray:
        """What is added: float64, shape [channels]."""
        return self.coefficient * Factor(self.leaf).value(leaves) * self.through.value(leaves)


@dataclasses.dataclass(frozen=True)
class Tail:
    """The per-channel affine operations by parameters on a product: y = gain * product + shifts.

    Those of a convolution's bias and of BatchNorm, in whichever order and form they come.
    """

    gain: Term
    shifts: tuple[Shift, ...]  # in program order
    value: Value  # y
    channels: Channels
    product_axis: int  # where the product has them
    refused: str | None  # why its leaves cannot be changed
    nodes: frozenset[int] = dataclasses.field(repr=False)  # equations it is made of

    @property
    def has_gain(self) -> bool:
        """Whether the product is multiplied by parameters."""
        return bool(self.gain.factors)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A site that reads a value as its activation."""

    site: str
    channels: Channels  # of the site's activation operand: on the axis that it sums over
    functions: tuple[Elementwise, ...]  # between the value and the site
    value: Value  # the operand


@dataclasses.dataclass(frozen=True)
class SiteFlow:
    """A site with a weight, and what surrounds it.

    Where something is None, `reason` says why.
    """

    name: str
    weight: SiteWeight | None
    tail: Tail | None
    consumers: tuple[Consumer, ...]  # sites reached through elementwise functions and pooling
    obstacles: tuple[str, ...]  # what else becomes of the result: why it cannot be scaled freely
    axes: Axes  # where the channels of its operands and its product are
    activation: Value | None  # the other operand
    reason: str | None = None


def dataflow(apply: Callable, variables: Any, *args: Any) -> dict[str, SiteFlow]:
    """What surrounds every site of `apply(variables, *args)` that has a weight.

    Args:
      apply: a function of variables and data, in evaluation mode.
      variables: its first argument; may be abstract, as the data may.
      *args: the data.
    """
    return site_flows(trace_graph(apply, variables, *args))


def site_flows(graph: FlatGraph) -> dict[str, SiteFlow]:
    """`dataflow` of a graph."""
    nodes = graph.site_nodes()
    found = {}
    for name, site in graph.sites.items():
        if site.weight is None or site.kind == "gather":
            continue
        if name not in nodes:
            reason = "it is inside a loop, a conditional or a function that is not entered"
            axes = Axes(1 if site.weight is site.rhs else 0)
            found[name] = SiteFlow(name, None, None, (), (), axes, None, reason)
        else:
            found[name] = _site_flow(graph, name, nodes[name])
    return found


def _site_flow(graph: FlatGraph, name: str, node: Node) -> SiteFlow:
    site = graph.sites[name]
    side = 1 if site.weight is site.rhs else 0
    axes, activation = product_axes(graph, node, side), node.inputs[1 - side]
    weight, reason = read_weight(graph, node, side), None
    if isinstance(weight, str):
        weight, reason = None, weight
    if axes.product is None:
        reason = reason or "its output channels are not a single axis"
        return SiteFlow(name, weight, None, (), (reason,), axes, activation, reason)
    (product,) = node.outputs
    tail = _tail(graph, product, Channels(axes.product, graph.shape(product)[axes.product]))
    consumers, obstacles = read_by(graph, tail.value, tail.channels)
    return SiteFlow(name, weight, tail, consumers, obstacles, axes, activation, reason)


def why_not_changeable(flow: SiteFlow) -> str | None:
    """Why the weight of a site or its tail cannot be changed."""
    return flow.reason or (flow.tail.refused if flow.tail else None)


def weight_and_tail(flow: SiteFlow) -> tuple[SiteWeight, Tail]:
    """The weight and the tail of a site; one without a `reason` has both."""
    assert flow.weight is not None, flow.reason
    assert flow.tail is not None, flow.reason
    return flow.weight, flow.tail


# --- The tail -------------------------------------------------------------------------------------


def _tail(graph: FlatGraph, value: Value, channels: Channels) -> Tail:
    reader, used, axis = Reader(graph), set(), channels.axis
    gain, terms = Term(), ()
    found = value, channels  # behind the last affine operation
    while (node := graph.only_consumer(value)) is not None:
        if node.primitive in MOVES:
            at = moved(graph, node, channels)
            if at is None:
                break
            channels = at
        else:
            step = _affine_step(graph, reader, node, value, channels)
            if step is None:
                break
            factor, added = step
            gain, terms = gain.times(factor), (*(t.times(factor) for t in terms), *added)
            found = node.outputs[0], channels
        used.add(node.index)
        (value,) = node.outputs
    shifts, refused = _shifts(terms, gain), reader.shared(used)
    if shifts is None or len({shift.leaf for shift in shifts}) < len(shifts):
        shifts, refused = (), "what is added behind it is not one parameter for each term"
    return Tail(gain, shifts, *found, axis, refused, frozenset(used | set(reader.nodes)))


def _affine_step(
    graph: FlatGraph, reader: Reader, node: Node, value: Value, channels: Channels
) -> tuple[Term, tuple[Term, ...]] | None:
    """(factor, terms added) of value -> factor * value + terms; None if it is something else."""
    if node.primitive not in _AFFINE:
        return None
    place = node.inputs.index(value)
    if place == 1 and node.primitive in ("sub", "div"):
        return None
    operand = node.inputs[1 - place]
    if node.primitive in ("mul", "div"):
        factors = reader.read(operand, channels, most=1)
        if not factors:
            return None
        return (factors[0] if node.primitive == "mul" else factors[0].to_power(-1)), ()
    terms = reader.read(operand, channels)
    if not terms:
        return None
    return Term(), negated(terms) if node.primitive == "sub" else terms


def _shifts(terms: Sequence[Term], gain: Term) -> tuple[Shift, ...] | None:
    """Each term as one plain leaf times factors of the gain; None if one is not of this form."""
    found = []
    for term in terms:
        own = [f for f in term.factors if f not in gain.factors]
        if len(own) != 1 or not own[0].is_plain:
            return None
        through = Term(1.0, tuple(f for f in term.factors if f in gain.factors))
        found.append(Shift(own[0].leaf, term.coefficient, through))
    return tuple(found)


# --- Who reads a value ----------------------------------------------------------------------------


def read_by(
    graph: FlatGraph, value: Value, channels: Channels
) -> tuple[tuple[Consumer, ...], tuple[str, ...]]:
    """The sites that read a value through elementwise functions and pooling, and all other ends."""
    ends = list(_ends(graph, value, channels, ()))
    consumers = tuple(end for end in ends if isinstance(end, Consumer))
    return consumers, tuple(dict.fromkeys(end for end in ends if isinstance(end, str)))


def _ends(
    graph: FlatGraph, value: Value, channels: Channels, functions: tuple[Elementwise, ...]
) -> Iterator[Consumer | str]:
    function = elementwise(graph, value)
    if function is not None:
        value, functions = function.result, (*functions, function)
    if value in graph.outputs:
        yield OUTPUT
    for node in graph.consumers.get(value, ()):
        if node.site is not None:
            yield _consumer(graph, node, node.site, value, channels, functions)
            continue
        at = moved(graph, node, channels) if node.inputs[0] == value else None
        if at is not None:
            yield from _ends(graph, node.outputs[0], at, functions)
        else:
            yield _obstacle(node)


def _consumer(
    graph: FlatGraph, node: Node, name: str, value: Value, channels: Channels, functions
) -> Consumer | str:
    site = graph.sites[name]
    if site.weight is None:
        return f"it enters the product of activations {name!r}"
    side = 1 if site.weight is site.rhs else 0
    axes = product_axes(graph, node, side)
    if node.inputs[1 - side] != value or axes.activation != channels.axis:
        return f"site {name!r} does not sum over its channels"
    return Consumer(name, channels, functions, value)


def _obstacle(node: Node) -> str:
    if node.primitive in ("add", "add_any", "sub"):
        return "it is added to another value (a residual connection, or a bias behind a function)"
    if node.primitive in ("mul", "div"):
        return "it is multiplied by another value (squeeze-and-excitation, or a gate)"
    if node.primitive in (*MOVES, *POOLS):
        return f"its channels are mixed, split or cut by {node.primitive!r}"
    return f"it enters {node.primitive!r}"
