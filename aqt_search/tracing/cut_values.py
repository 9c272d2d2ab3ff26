"""What values are where a group of channels is cut: a constant, or unknown.

The parameters of a channel that is cut are 0. What follows of it is computed equation by equation:
the result of a convolution is 0 there, `relu(0)` is 0, `sigmoid(0)` is 0.5, and 0 times anything is
0. A value for which nothing follows is unknown, and assumed to be finite and, where something is
divided by it, not 0. What follows may be infinite or no number: `0 / 0` where a weight is divided
by its norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from aqt_search.tracing.axis_groups import ELEMENTWISE, Axis, is_depthwise
from aqt_search.tracing.channels import MOVES, POOLS, Channels, moved
from aqt_search.tracing.flat_graph import FlatGraph, Node, Value

Number = np.ndarray | None  # of shape []; None: unknown


class CutValues:
    """The constants of a graph's values where channels are cut.

    Args:
      graph: a function in evaluation mode.
      zero: parameter leaves that are 0 everywhere.
    """

    def __init__(self, graph: FlatGraph, zero: frozenset[Value] = frozenset()):
        self._graph = graph
        self._everywhere: dict[Value, np.ndarray] = {}
        self._cut: dict[Axis, np.ndarray] = {}
        for value in graph.leaves:
            for axis in range(len(graph.shape(value))):
                self._cut[value, axis] = self._zero(value)
            if value in zero:
                self._everywhere[value] = self._zero(value)
        for value, constant in graph.constants.items():
            constant = np.asarray(constant)
            if constant.size and np.all(constant == constant.reshape(-1)[0]):
                self._everywhere[value] = constant.reshape(-1)[0:1].reshape(())
        for node in graph.nodes.values():
            self._equation(node)

    def everywhere(self, value: Value) -> Number:
        """The number that all elements of a value are; None: unknown."""
        return self._everywhere.get(value)

    def at(self, value: Value, axis: int) -> Number:
        """The number that the elements are whose channel along an axis is cut; None: unknown."""
        return self._cut.get((value, axis), self._everywhere.get(value))

    def _zero(self, value: Value) -> np.ndarray:
        return np.zeros((), self._graph.avals[value].dtype)

    def _equation(self, node: Node) -> None:
        if len(node.outputs) != 1:
            return
        (result,) = node.outputs
        everywhere = self._result(node, [self.everywhere(value) for value in node.inputs])
        if everywhere is not None:
            self._everywhere[result] = everywhere
        for axis in range(len(self._graph.shape(result))):
            number = self._at_axis(node, axis)
            if number is not None:
                self._cut[result, axis] = number

    def _at_axis(self, node: Node, axis: int) -> Number:
        """The number of the result where its own axis is cut."""
        if node.primitive in ELEMENTWISE:
            return self._result(node, [self.at(value, axis) for value in node.inputs])
        sources = _sources(self._graph, node, axis)
        numbers = [self.at(value, source) for value, source in sources]
        if node.primitive in _PRODUCTS:
            return self._zero(node.outputs[0]) if _have_no_part(numbers) else None
        return _pooled(node, numbers[0]) if numbers else None

    def _result(self, node: Node, numbers: Sequence[Number]) -> Number:
        """The result of an equation on operands that are constant, or unknown."""
        zero = self._zero(node.outputs[0])
        if node.primitive in _PRODUCTS:
            return zero if _have_no_part(numbers[:2]) else None
        if node.primitive == "mul" and _have_no_part(numbers):
            return zero
        if node.primitive == "div" and _is_zero(numbers[0]) and numbers[1] is None:
            return zero
        if node.primitive == "select_n" and _all_equal(numbers[1:]):
            return numbers[1]
        if node.primitive in (*MOVES, *POOLS) and node.primitive not in ELEMENTWISE:
            return _pooled(node, numbers[0])
        known = [number for number in numbers if number is not None]
        if node.primitive not in ELEMENTWISE or len(known) < len(numbers):
            return None
        return _evaluated(node, known)


_PRODUCTS = ("dot_general", "conv_general_dilated")
_KEEP = ("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "rev", "slice")


def _is_zero(number: Number) -> bool:
    return number is not None and number == 0


def _have_no_part(numbers: Sequence[Number]) -> bool:
    """Whether a product of numbers, or a sum of such products, is 0."""
    finite = all(number is None or np.isfinite(number) for number in numbers)
    return finite and any(_is_zero(number) for number in numbers)


def _all_equal(numbers: Sequence[Number]) -> bool:
    return all(n is not None and n == numbers[0] for n in numbers)


def _evaluated(node: Node, numbers: Sequence[np.ndarray]) -> Number:
    """What an elementwise equation gives for numbers."""
    operands = [jnp.asarray(number) for number in numbers]
    params = node.eqn.params
    if node.primitive == "convert_element_type":
        result = operands[0].astype(params["new_dtype"])
    elif node.primitive in ("copy", "copy_p", "stop_gradient", "reduce_precision"):
        result = operands[0]
    else:
        result = node.eqn.primitive.bind(*operands, **params)
    return np.asarray(result)


def _pooled(node: Node, number: Number) -> Number:
    """What moving, reducing or padding gives for operands that are all one number."""
    if number is None:
        return None
    keeps = node.primitive in (*MOVES, *_KEEP)
    return number if keeps or number == 0 else None  # sums and zeros around it


def _sources(graph: FlatGraph, node: Node, axis: int) -> list[Axis]:
    """The axes of the operands whose channels those of the result's axis are."""
    if node.primitive == "dot_general":
        return _dot_sources(graph, node, axis)
    if node.primitive == "conv_general_dilated":
        return _convolution_sources(graph, node, axis)
    if node.primitive not in (*MOVES, *POOLS):
        return []
    value, size = node.inputs[0], graph.shape(node.outputs[0])[axis]
    return [
        (value, before)
        for before, channels in enumerate(graph.shape(value))
        if channels == size and moved(graph, node, Channels(before, size)) == Channels(axis, size)
    ]


def _dot_sources(graph: FlatGraph, node: Node, axis: int) -> list[Axis]:
    (lhs, rhs), (contracting, batch) = node.inputs[:2], node.eqn.params["dimension_numbers"]
    if axis < len(batch[0]):
        return [(lhs, batch[0][axis]), (rhs, batch[1][axis])]
    free = [
        (value, place)
        for value, summed, shared in zip((lhs, rhs), contracting, batch)
        for place in range(len(graph.shape(value)))
        if place not in (*summed, *shared)
    ]
    return [free[axis - len(batch[0])]]


def _convolution_sources(graph: FlatGraph, node: Node, axis: int) -> list[Axis]:
    (x, kernel), params = node.inputs, node.eqn.params
    of_x, of_kernel, of_result = params["dimension_numbers"]
    if axis == of_result[0]:
        return [(x, of_x[0])]
    if axis != of_result[1]:
        return []
    of_input = [(x, of_x[1])] if is_depthwise(graph, node) else []
    return [(kernel, of_kernel[0]), *of_input]
