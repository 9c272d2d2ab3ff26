"""Axes of a traced function that must have one size: channels that are cut together, or not at all.

Every equation says which axes of its operands and results are the same channels, and where an axis
is more than a list of channels: summed over outside of a product, counted, cut into windows, split.
Union-find over (value, axis) of the whole graph gives the groups. All of it is exact: an equation
that is not known here freezes every axis that it touches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from aqt_search.tracing.channels import MOVES, POOLS, Channels, moved
from aqt_search.tracing.flat_graph import FlatGraph, Node, Value

# Every element of the result is a function of the elements at its place.
ELEMENTWISE = frozenset((
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh"),
    *("cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div"),
    *("eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg"),
    *("nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n"),
    *("sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
))  # fmt: skip

Axis = tuple[Value, int]


class Same(NamedTuple):
    """Two axes that are the same channels."""

    one: Axis
    other: Axis


class Frozen(NamedTuple):
    """An axis that cannot be cut."""

    axis: Axis
    reason: str


class Axes:
    """The groups of the axes of a graph.

    Args:
      graph: a function in evaluation mode, as `trace_graph` gives it.
    """

    def __init__(self, graph: FlatGraph):
        self._parent: dict[Axis, Axis] = {}
        self._reason: dict[Axis, str] = {}
        facts = list(_facts(graph))
        for fact in facts:
            if isinstance(fact, Same):
                self._join(*fact)
        for fact in facts:
            if isinstance(fact, Frozen):
                self._reason.setdefault(self.group(fact.axis), fact.reason)

    def group(self, axis: Axis) -> Axis:
        """One axis of the group, the same for all of its axes."""
        root = axis
        while (parent := self._parent.get(root, root)) != root:
            root = parent
        while axis != root:
            axis, self._parent[axis] = self._parent.get(axis, axis), root
        return root

    def frozen(self, axis: Axis) -> str | None:
        """Why the group of an axis cannot be cut, as far as its equations tell."""
        return self._reason.get(self.group(axis))

    def _join(self, one: Axis, other: Axis) -> None:
        one, other = self.group(one), self.group(other)
        self._parent[max(one, other)] = min(one, other)


def _facts(graph: FlatGraph) -> Iterator[Same | Frozen]:
    for value in graph.outputs:
        yield from _all_frozen(graph, value, "it is an axis of the function's result")
    made = {value for node in graph.nodes.values() for value in node.outputs}
    for value in graph.consumers:
        if value in graph.constants:
            yield from _all_frozen(graph, value, "it is an axis of a constant of the function")
        elif value not in graph.leaves and value not in made:
            yield from _all_frozen(graph, value, "it is an axis of the data")
    for node in graph.nodes.values():
        yield from _relations(graph, node)


def _all_frozen(graph: FlatGraph, value: Value, reason: str) -> Iterator[Frozen]:
    for axis, size in enumerate(graph.shape(value)):
        if size > 1:
            yield Frozen((value, axis), reason)


def _relations(graph: FlatGraph, node: Node) -> Iterator[Same | Frozen]:
    if node.primitive in ELEMENTWISE:
        for value in node.inputs:
            for axis in range(len(graph.shape(value))):
                yield Same((value, axis), (node.outputs[0], axis))
    elif node.primitive == "broadcast_in_dim":
        yield from _broadcast(graph, node)
    elif node.primitive in (*MOVES, *POOLS):
        yield from _moved(graph, node)
    elif node.primitive == "dot_general":
        yield from _dot(graph, node)
    elif node.primitive == "conv_general_dilated":
        yield from _convolution(graph, node)
    else:
        for value in (*node.inputs, *node.outputs):
            yield from _all_frozen(graph, value, f"it enters {node.primitive!r}")


def _broadcast(graph: FlatGraph, node: Node) -> Iterator[Same]:
    before, after = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    for axis, new in enumerate(node.eqn.params["broadcast_dimensions"]):
        if before[axis] == after[new]:
            yield Same((node.inputs[0], axis), (node.outputs[0], new))


def _moved(graph: FlatGraph, node: Node) -> Iterator[Same | Frozen]:
    """Every axis goes to one of the result, or is summed over, split, merged or cut."""
    operand, result = node.inputs[0], node.outputs[0]
    reached = set()
    for axis, size in enumerate(graph.shape(operand)):
        if size == 1:
            continue
        at = moved(graph, node, Channels(axis, size))
        if at is not None and at.inner == 1 and graph.shape(result)[at.axis] == size:
            reached.add(at.axis)
            yield Same((operand, axis), (result, at.axis))
        else:
            yield Frozen(
                (operand, axis), f"it is summed, split, merged or cut by {node.primitive!r}"
            )
    for axis, size in enumerate(graph.shape(result)):
        if size > 1 and axis not in reached:
            yield Frozen((result, axis), f"it is made by {node.primitive!r}")


def _dot(graph: FlatGraph, node: Node) -> Iterator[Same]:
    (lhs, rhs), (result,) = node.inputs[:2], node.outputs
    contracting, batch = node.eqn.params["dimension_numbers"]
    yield from (Same((lhs, a), (rhs, b)) for a, b in zip(*contracting))
    for number, (a, b) in enumerate(zip(*batch)):
        yield Same((lhs, a), (result, number))
        yield Same((rhs, b), (result, number))
    place = len(batch[0])
    for value, summed, shared in zip((lhs, rhs), contracting, batch):
        for axis in range(len(graph.shape(value))):
            if axis not in (*summed, *shared):
                yield Same((value, axis), (result, place))
                place += 1


def _convolution(graph: FlatGraph, node: Node) -> Iterator[Same | Frozen]:
    (x, kernel), (result,) = node.inputs, node.outputs
    params = node.eqn.params
    of_x, of_kernel, of_result = params["dimension_numbers"]
    for value, places in ((x, of_x), (kernel, of_kernel), (result, of_result)):
        for axis in places[2:]:
            if graph.shape(value)[axis] > 1:
                yield Frozen((value, axis), "it is an axis of space")
    yield Same((x, of_x[0]), (result, of_result[0]))
    yield Same((kernel, of_kernel[0]), (result, of_result[1]))
    groups = params["feature_group_count"]
    if groups == 1:
        yield Same((x, of_x[1]), (kernel, of_kernel[1]))
    elif is_depthwise(graph, node):
        yield Same((x, of_x[1]), (result, of_result[1]))
    else:
        reason = f"it is cut into {groups} groups of a convolution"
        for axis in ((x, of_x[1]), (kernel, of_kernel[1]), (result, of_result[1])):
            yield Frozen(axis, reason)
    if params["batch_group_count"] > 1:
        yield Frozen((x, of_x[0]), "it is cut into groups of a convolution")
        yield Frozen((result, of_result[1]), "it is cut into groups of a convolution")


def is_depthwise(graph: FlatGraph, node: Node) -> bool:
    """Whether a convolution has one group, with one output, for each channel of its input."""
    of_x, _, of_result = node.eqn.params["dimension_numbers"]
    channels = graph.shape(node.inputs[0])[of_x[1]]
    outputs = graph.shape(node.outputs[0])[of_result[1]]
    return node.eqn.params["feature_group_count"] == channels == outputs


class Loop(NamedTuple):
    """One of the loops of a product's multiply-accumulates: the axes that it runs along."""

    lhs: int | None  # of the equation's first operand
    rhs: int | None

    @property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """(operand, axis)."""
        return tuple((i, axis) for i, axis in enumerate(self) if axis is not None)


def product_loops(graph: FlatGraph, node: Node) -> list[Loop]:
    """The loops of a product along channels and examples; none along space, or of another equation.

    The multiply-accumulates of a product are the product of their sizes, and of places and taps.
    """
    if node.primitive == "dot_general":
        contracting, batch = node.eqn.params["dimension_numbers"]
        loops = [Loop(*axes) for both in (batch, contracting) for axes in zip(*both)]
        for place, (value, *met) in enumerate(zip(node.inputs[:2], contracting, batch)):
            free = (a for a in range(len(graph.shape(value))) if a not in (*met[0], *met[1]))
            loops += [Loop(a, None) if place == 0 else Loop(None, a) for a in free]
        return loops
    if node.primitive != "conv_general_dilated":
        return []
    of_x, of_kernel, _ = node.eqn.params["dimension_numbers"]
    if is_depthwise(graph, node):
        return [Loop(of_x[0], None), Loop(of_x[1], of_kernel[0])]
    if node.eqn.params["feature_group_count"] > 1:
        return []
    return [Loop(of_x[0], None), Loop(of_x[1], of_kernel[1]), Loop(None, of_kernel[0])]


def is_summed(graph: FlatGraph, node: Node, loop: Loop) -> bool:
    """Whether a product sums over one of its loops."""
    if None in loop:
        return False
    if node.primitive == "dot_general":
        return loop.lhs in node.eqn.params["dimension_numbers"][0][0]
    return not is_depthwise(graph, node)
