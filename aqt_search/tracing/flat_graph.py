"""A traced function as one flat list of equations, with calls inlined.

The steps of post-training quantization read it to see what stands around a site. Bodies of jit,
remat and custom derivative rules are inlined; loops and conditionals stay single opaque equations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

from aqt_search.tracing.control_flow import Body, Call, Custom, Path, Remat, control_flow
from aqt_search.tracing.sites import Site, parameter_name
from aqt_search.tracing.trace import Trace, is_array, trace_function

Value = int  # values are numbered in program order


class Leaf(NamedTuple):
    """An array leaf of the variables."""

    index: int  # in jax.tree.leaves(variables)
    name: str  # without the collection "params", as sites are named


class Node(NamedTuple):
    """An equation whose operands and results are values of the flat graph."""

    index: int
    eqn: jex_core.JaxprEqn
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    site: str | None

    @property
    def primitive(self) -> str:
        """The name of its primitive."""
        return self.eqn.primitive.name


@dataclasses.dataclass(frozen=True)
class FlatGraph:
    """Equations whose results are used, and who makes and reads every value."""

    sites: dict[str, Site]
    avals: list[Any]
    leaves: dict[Value, Leaf]
    constants: dict[Value, Any]
    nodes: dict[int, Node]  # live ones, by index, in program order
    producer: dict[Value, Node]
    consumers: dict[Value, tuple[Node, ...]]  # one entry for each operand
    outputs: frozenset[Value]
    from_data: frozenset[Value]  # values that depend on data

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self.avals[value].shape)

    def site_nodes(self) -> dict[str, Node]:
        """The equation of every site outside of loops and conditionals, in program order."""
        return {node.site: node for node in self.nodes.values() if node.site is not None}

    def only_consumer(self, value: Value) -> Node | None:
        """The one equation that reads a value; None if it is read twice, or is an output."""
        consumers = self.consumers.get(value, ())
        return consumers[0] if len(consumers) == 1 and value not in self.outputs else None

    def scalar(self, value: Value) -> Any | None:
        """The number that every element of a constant value has; None if there is none."""
        if value in self.constants:
            constant = np.asarray(self.constants[value])
            return constant.reshape(-1)[0] if constant.size == 1 else None
        node = self.producer.get(value)
        if node is None or node.primitive not in ("broadcast_in_dim", "convert_element_type"):
            return None
        return self.scalar(node.inputs[0])


def trace_graph(apply: Callable, variables: Any, *args: Any) -> FlatGraph:
    """The flat graph of `apply(variables, *args)`; nothing is computed, arrays may be abstract.

    Raises:
      SiteError: `apply` names a mapped axis that is not bound.
    """
    trace = trace_function(apply, variables, args, {}, {})
    builder = _Builder(trace)
    inputs = [builder.new(v.aval) for v in trace.closed.jaxpr.invars]
    outputs = builder.run(Body(trace.closed.jaxpr, trace.closed.consts), inputs, ())
    return builder.graph(_leaves(variables, inputs), inputs, outputs)


def _leaves(variables: Any, inputs: list[Value]) -> dict[Value, Leaf]:
    paths = jax.tree_util.tree_flatten_with_path(variables)[0]
    arrays = [
        Leaf(index, parameter_name(path))
        for index, (path, leaf) in enumerate(paths)
        if is_array(leaf)
    ]
    return dict(zip(inputs, arrays))


class _Builder:
    def __init__(self, trace: Trace):
        self.trace = trace
        self.avals: list[Any] = []
        self.constants: dict[Value, Any] = {}
        self.nodes: list[Node] = []

    def new(self, aval) -> Value:
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, aval, value) -> Value:
        number = self.new(aval)
        self.constants[number] = value
        return number

    def run(self, body: Body, inputs: list[Value], path: Path) -> list[Value]:
        """Appends the equations of a body; the values of its results."""
        jaxpr = body.jaxpr
        env = {v: self.constant(v.aval, c) for v, c in zip(jaxpr.constvars, body.consts)}
        env.update(zip(jaxpr.invars, inputs))

        def read(atom) -> Value:
            if isinstance(atom, jex_core.Literal):
                return self.constant(atom.aval, atom.val)
            return env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            results = self._equation(eqn, [read(v) for v in eqn.invars], (*path, index))
            env.update(zip(eqn.outvars, results))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn, inputs: list[Value], path: Path) -> list[Value]:
        match control_flow(eqn):
            case Call(body) | Remat(body) | Custom(body):
                return self.run(body, inputs, body.under(path))
        outputs = [self.new(v.aval) for v in eqn.outvars]
        site = self.trace.site_paths.get(path)
        self.nodes.append(Node(len(self.nodes), eqn, tuple(inputs), tuple(outputs), site))
        return outputs

    def graph(self, leaves: dict[Value, Leaf], inputs, outputs) -> FlatGraph:
        live = self._live(outputs)
        consumers: dict[Value, tuple[Node, ...]] = {}
        from_data = {value for value in inputs if value not in leaves}
        for node in live:
            for value in node.inputs:
                consumers[value] = (*consumers.get(value, ()), node)
            if not from_data.isdisjoint(node.inputs):
                from_data.update(node.outputs)
        return FlatGraph(
            sites=self.trace.sites,
            avals=self.avals,
            leaves=leaves,
            constants=self.constants,
            nodes={node.index: node for node in live},
            producer={value: node for node in live for value in node.outputs},
            consumers=consumers,
            outputs=frozenset(outputs),
            from_data=frozenset(from_data),
        )

    def _live(self, outputs) -> list[Node]:
        used, live = set(outputs), []
        for node in reversed(self.nodes):
            if not used.isdisjoint(node.outputs) or node.eqn.effects:
                used.update(node.inputs)
                live.append(node)
        return live[::-1]
