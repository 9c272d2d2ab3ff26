"""The weight of a site as a matrix of input by output channels, and how it comes from its leaf."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from aqt_search.tracing.channels import MOVES
from aqt_search.tracing.flat_graph import FlatGraph, Leaf, Node, Value


class Axes(NamedTuple):
    """Which axes of a product hold the channels; None where there are several or none."""

    side: int  # the operand that is the weight
    outputs: int | None = None  # of the weight
    inputs: int | None = None
    product: int | None = None  # of the product: its output channels
    activation: int | None = None  # of the other operand: its input channels
    groups: int = 1


def known_axis(axis: int | None) -> int:
    """One of `Axes` that is a single axis: whoever has to do with its channels saw to that."""
    assert axis is not None
    return axis


@dataclasses.dataclass(frozen=True)
class SiteWeight:
    """A weight that is its leaf with axes moved, or with another shape or dtype.

    Output channel o reads the input channels of its group, g = o // (outputs / groups); the weight
    of input a of group g stands at position a of the axis of inputs.
    """

    leaf: Leaf
    axes: Axes
    shape: tuple[int, ...]  # of the operand
    moves: tuple[tuple[tuple[int, ...], tuple[int, ...] | None], ...]  # (shape, permutation)

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.shape[known_axis(self.axes.outputs)]

    @property
    def inputs(self) -> int:
        """Number of input channels, those of all groups."""
        return self.shape[known_axis(self.axes.inputs)] * self.axes.groups

    @property
    def is_matrix(self) -> bool:
        """Whether the channels of both sides are a single axis each, as `matrix` takes them."""
        return self.axes.inputs is not None and self.axes.outputs is not None

    def operand(self, leaf: np.ndarray) -> np.ndarray:
        """The operand that a leaf gives."""
        for shape, permutation in self.moves:
            leaf = leaf.reshape(shape) if permutation is None else leaf.transpose(permutation)
        return leaf.reshape(self.shape)

    def from_operand(self, operand: np.ndarray, leaf_shape: tuple[int, ...]) -> np.ndarray:
        """The leaf that gives an operand."""
        shape = leaf_shape
        shapes = []
        for target, permutation in self.moves:
            shapes.append(shape)
            shape = target if permutation is None else tuple(shape[a] for a in permutation)
        for (_, permutation), before in zip(reversed(self.moves), reversed(shapes)):
            undo = None if permutation is None else np.argsort(permutation)
            operand = operand.reshape(before) if undo is None else operand.transpose(undo)
        return operand.reshape(leaf_shape)

    def matrix(self, operand: np.ndarray) -> np.ndarray:
        """The operand as [..., inputs of a group, outputs]; a view."""
        axes = known_axis(self.axes.inputs), known_axis(self.axes.outputs)
        return np.moveaxis(operand, axes, (-2, -1))

    def of_inputs(self, values: np.ndarray) -> np.ndarray:
        """Values of input channels, [inputs], as [inputs of a group, outputs]."""
        by_group = values.reshape(self.axes.groups, -1)
        return np.repeat(by_group.T, self.outputs // self.axes.groups, axis=1)

    def magnitudes(self, leaf: np.ndarray) -> np.ndarray:
        """max|weight| over the window of a convolution: [inputs of a group, outputs]."""
        matrix = self.matrix(np.abs(self.operand(leaf)))
        return matrix.reshape(-1, *matrix.shape[-2:]).max(0)

    def input_ranges(self, leaf: np.ndarray) -> np.ndarray:
        """max|weight| of every input channel, wherever its output channels are: [inputs]."""
        if self.is_matrix:
            return self.per_input(self.magnitudes(leaf))
        operand = np.abs(self.operand(leaf))
        others = tuple(a for a in range(operand.ndim) if a != known_axis(self.axes.inputs))
        return operand.max(others)

    def per_input(self, matrix: np.ndarray) -> np.ndarray:
        """The largest number of every input channel: [inputs of a group, outputs] to [inputs]."""
        inputs, outputs = matrix.shape
        groups = self.axes.groups
        return matrix.reshape(inputs, groups, outputs // groups).max(-1).T.reshape(-1)

    def scaled(
        self, leaf: np.ndarray, inputs: np.ndarray | None = None, outputs: np.ndarray | None = None
    ) -> np.ndarray:
        """The leaf with the weights of every input and output channel times a factor each."""
        operand = self.operand(leaf).copy()
        if outputs is not None:
            operand *= _along(known_axis(self.axes.outputs), outputs, operand.ndim)
        if inputs is not None and self.axes.groups > 1:
            self.matrix(operand)[...] *= self.of_inputs(inputs)
        elif inputs is not None:
            operand *= _along(known_axis(self.axes.inputs), inputs, operand.ndim)
        return self.from_operand(operand, leaf.shape)


def _along(axis: int, values: np.ndarray, ndim: int) -> np.ndarray:
    """Values of an axis, [n], in the shape that broadcasts along it."""
    return values.reshape([-1 if a == axis else 1 for a in range(ndim)])


def product_axes(graph: FlatGraph, node: Node, side: int) -> Axes:
    """Where a site with its weight on a side has its channels."""
    if node.primitive == "dot_general":
        return _dot_axes(graph, node, side)
    if node.primitive != "conv_general_dilated" or side != 1:
        return Axes(side)
    lhs, rhs, out = node.eqn.params["dimension_numbers"]
    if node.eqn.params["batch_group_count"] != 1:
        return Axes(side)
    return Axes(1, rhs[0], rhs[1], out[1], lhs[1], node.eqn.params["feature_group_count"])


def _dot_axes(graph: FlatGraph, node: Node, side: int) -> Axes:
    contracting, batch = node.eqn.params["dimension_numbers"]
    if batch[side]:
        return Axes(side)
    ndims = [len(graph.shape(value)) for value in node.inputs]
    free = [axis for axis in range(ndims[side]) if axis not in contracting[side]]
    outputs = free[0] if len(free) == 1 else None
    place = ndims[0] - len(contracting[0]) if side == 1 else 0  # lhs comes first in the product
    single = len(contracting[side]) == 1
    inputs, activation = (contracting[s][0] if single else None for s in (side, 1 - side))
    return Axes(side, outputs, inputs, None if outputs is None else place, activation)


def read_weight(graph: FlatGraph, node: Node, side: int) -> SiteWeight | str:
    """The weight of a site; the reason why it cannot be written back, where that is so."""
    value: Value = node.inputs[side]
    shape, moves = graph.shape(value), []
    while value not in graph.leaves:
        source = graph.producer.get(value)
        if source is None or source.primitive not in MOVES or value in graph.outputs:
            return "its weight is computed from parameters, and is not a leaf as it stands"
        before, after = graph.shape(source.inputs[0]), graph.shape(value)
        if math.prod(before) != math.prod(after):
            return "its weight repeats its leaf"
        moves.append((after, source.eqn.params.get("permutation")))
        if graph.only_consumer(value) is None:
            return "its weight is used in another place, too"
        value = source.inputs[0]
    if graph.only_consumer(value) is None:
        return f"its weight {graph.leaves[value].name!r} is used in another place, too"
    return SiteWeight(graph.leaves[value], product_axes(graph, node, side), shape, (*moves[::-1],))
