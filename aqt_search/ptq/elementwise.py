"""Elementwise functions of one value: found in the graph, and judged by what they compute.

An activation is whatever elementwise equations turn one value, and constants, into one other value.
How it was written does not matter: its values on a line say whether f(s x) = s f(x) for all s > 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.tracing.flat_graph import FlatGraph, Node, Value

_SAME = ("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient")
_ELEMENTWISE = (
    *("abs", "add", "add_any", "and", "cbrt", "ceil", "clamp", "cos", "div", "eq", "erf"),
    *("erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite"),
    *("le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
    *("round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh", *_SAME),
)
_HALF = np.geomspace(1e-3, 1e3, 25)
_LINE = np.concatenate([-_HALF[::-1], np.zeros(1), _HALF])
_TOLERANCE = 1e-4
_SAME_NAME = 2e-2  # the constants of a function may be rounded to bfloat16


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """y = f(x) for every element, as float32 arrays of any shape."""

    nodes: tuple[Node, ...] = dataclasses.field(repr=False)
    source: Value
    result: Value
    graph: FlatGraph = dataclasses.field(repr=False)

    def __call__(self, x: jax.typing.ArrayLike) -> jax.Array:
        """f(x), in float32."""
        env = {self.source: jnp.asarray(x, jnp.float32)}
        shape = env[self.source].shape

        def read(value: Value, dtype) -> jax.Array:
            found = env.get(value)
            return jnp.full(shape, self._constant(value), dtype) if found is None else found

        for node in self.nodes:
            avals = [self.graph.avals[value] for value in node.inputs]
            operands = [read(v, _computed(a.dtype)) for v, a in zip(node.inputs, avals)]
            (result,) = node.outputs
            dtype = _computed(self.graph.avals[result].dtype)
            if node.primitive in _SAME:
                env[result] = operands[0].astype(dtype)
            else:
                env[result] = node.eqn.primitive.bind(*operands, **node.eqn.params)
        return env[self.result]

    @functools.cached_property
    def positive_homogeneous(self) -> bool:
        """Whether f(s x) = s f(x) for every s > 0: a line on either side of f(0) = 0."""
        left, right = -self._at(-1), self._at(1)
        return self._matches(lambda x: np.where(x < 0, left * x, right * x), _TOLERANCE)

    @functools.cached_property
    def name(self) -> str:
        """The name of a known function, or "an elementwise function"."""
        known = _KNOWN.items()
        found = next((name for name, f in known if self._matches(f, _SAME_NAME)), None)
        if found is None and self.positive_homogeneous:
            return "a scaling" if self._at(-1) == -self._at(1) else "leaky_relu"
        return found or "an elementwise function"

    @functools.cached_property
    def _values(self) -> np.ndarray:
        return np.asarray(self(_LINE), np.float64)

    def _constant(self, value: Value) -> Any:
        number = self.graph.scalar(value)
        assert number is not None  # what its equations read beside its source is constant
        return number

    def _at(self, x: float) -> float:
        return float(self._values[np.argmin(np.abs(_LINE - x))])

    def _matches(self, function: Callable[[np.ndarray], np.ndarray], tolerance: float) -> bool:
        expected = function(_LINE)
        return np.allclose(self._values, expected, rtol=tolerance, atol=tolerance**2)


def _computed(dtype) -> np.dtype:
    return np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


_KNOWN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "gelu": lambda x: x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2,
    "swish": lambda x: x * _sigmoid(x),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}


def elementwise(graph: FlatGraph, value: Value) -> Elementwise | None:
    """The longest elementwise function of `value` that is all that becomes of it; None if none."""
    shape, made, nodes, longest = graph.shape(value), {value}, [], None
    waiting = {node.index for node in graph.consumers.get(value, ())}
    while waiting and len(nodes) < 100:
        node = graph.nodes[min(waiting)]
        known = all(v in made or graph.scalar(v) is not None for v in node.inputs)
        if node.primitive not in _ELEMENTWISE or not known or graph.shape(node.outputs[0]) != shape:
            break
        nodes.append(node)
        made.update(node.outputs)
        done = {n.index for n in nodes}
        waiting = {n.index for v in made for n in graph.consumers.get(v, ())} - done
        last = [v for v in made if _is_read_outside(graph, v, done)]
        if len(last) == 1 and last[0] != value and _is_floating(graph, last[0]):
            longest = Elementwise(tuple(nodes), value, last[0], graph)
    return longest


def single(graph: FlatGraph, node: Node) -> Elementwise | None:
    """One equation as a function of its one operand that is no constant; None if it is not that."""
    sources = {v for v in node.inputs if graph.scalar(v) is None}
    if node.primitive not in _ELEMENTWISE or len(sources) != 1:
        return None
    (source,), (result,) = sources, node.outputs
    same = graph.shape(source) == graph.shape(result)
    floating = _is_floating(graph, source) and _is_floating(graph, result)
    return Elementwise((node,), source, result, graph) if same and floating else None


def _is_read_outside(graph: FlatGraph, value: Value, inside: set[int]) -> bool:
    reads = graph.consumers.get(value, ())
    return value in graph.outputs or any(node.index not in inside for node in reads)


def _is_floating(graph: FlatGraph, value: Value) -> bool:
    return jnp.issubdtype(graph.avals[value].dtype, jnp.floating)
