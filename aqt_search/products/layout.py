"""Layouts: how the axes of a product's operands reach its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """How the axes of a product's operands reach its result."""

    kind: str  # the primitive, or "einsum"
    contracting: tuple[tuple[int, ...], tuple[int, ...]]  # axes of lhs and rhs summed over
    out_axes: tuple[tuple[int | None, ...], tuple[int | None, ...]]  # of each axis; None: summed
    out_ndim: int
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # axes of lhs and rhs in common
    groups: int = 1
    refused: str | None = None  # why it has no form on codes
    parameters: Mapping[str, Any] | None = None  # of a convolution's primitive, where known
    numbers: Any = None  # the dimension numbers of a dot or a convolution

    def gradient_contracting(self, side: int) -> tuple[int, ...]:
        """The result's axes that the product for the gradient of `side` sums over."""
        own = self.out_axes[side]
        return tuple(axis for axis in range(self.out_ndim) if axis not in own)


def dot_layout(lhs_ndim: int, rhs_ndim: int, dimension_numbers: Any) -> Layout:
    """The layout of `lax.dot_general`: batch axes, then free axes of lhs, then of rhs."""
    contracting, batch = ((tuple(lhs), tuple(rhs)) for lhs, rhs in dimension_numbers)
    position = len(batch[0])
    out_axes = []
    for ndim, contracted, batched in zip((lhs_ndim, rhs_ndim), contracting, batch):
        axes: list[int | None] = [None] * ndim
        for out, axis in enumerate(batched):
            axes[axis] = out
        for axis in range(ndim):
            if axis not in contracted and axis not in batched:
                axes[axis], position = position, position + 1
        out_axes.append(tuple(axes))
    lhs_axes, rhs_axes = out_axes
    return Layout(
        "dot_general", contracting, (lhs_axes, rhs_axes), position, batch,
        numbers=(contracting, batch),
    )  # fmt: skip


def ragged_layout(lhs_ndim: int, rhs_ndim: int, numbers: Any) -> Layout:
    """The layout of `lax.ragged_dot_general` with groups of rows of lhs."""
    contracting, batch = numbers.dot_dimension_numbers
    (group,) = numbers.rhs_group_dimensions
    without = dot_layout(
        lhs_ndim, rhs_ndim - 1, [(side[0], [a - (a > group) for a in side[1]]) for side in
                                 (contracting, batch)]
    )  # fmt: skip
    rhs = list(without.out_axes[1])
    rhs.insert(group, None)
    return without._replace(
        kind="ragged_dot_general", contracting=(tuple(contracting[0]), tuple(contracting[1])),
        batch=(tuple(batch[0]), tuple(batch[1])), out_axes=(without.out_axes[0], tuple(rhs)),
        refused="it is a product in groups of rows", numbers=None,
    )  # fmt: skip


def conv_layout(
    dimension_numbers: Any, groups: int, batch_groups: int, parameters: Mapping | None = None
) -> Layout:
    """The layout of a convolution from its `lax.ConvDimensionNumbers`."""
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    ndim = len(out_spec)
    lhs, rhs = [None] * ndim, [None] * ndim
    if batch_groups == 1:
        lhs[lhs_spec[0]] = out_spec[0]
    rhs[rhs_spec[0]] = out_spec[1]
    # Kernel axes: spatial first, input features last, which is where blocks run.
    contracting = (*lhs_spec[2:], lhs_spec[1]), (*rhs_spec[2:], rhs_spec[1])
    if batch_groups > 1:
        contracting = ((lhs_spec[0], *contracting[0]), contracting[1])
    return Layout(
        "conv_general_dilated", contracting, (tuple(lhs), tuple(rhs)), ndim,
        groups=max(groups, batch_groups), parameters=parameters, numbers=dimension_numbers,
    )  # fmt: skip


def einsum_layout(lhs: str, rhs: str, output: str) -> Layout:
    """The layout of `jnp.einsum` with one letter for every axis."""
    contracted = [label for label in lhs if label in rhs and label not in output]
    batched = [label for label in lhs if label in rhs and label in output]
    refused = None
    if any(labels.count(label) > 1 for labels in (lhs, rhs, output) for label in labels):
        refused = "a label stands twice in one operand"
    elif any(label not in output and label not in contracted for label in lhs + rhs):
        refused = "a label is summed over in one operand alone"

    def summed(labels: str, other: str) -> tuple[int, ...]:
        alone = (a for a, label in enumerate(labels) if label not in output + other)
        return (*alone, *map(labels.index, contracted))

    def reached(labels: str) -> tuple[int | None, ...]:
        return tuple(output.index(label) if label in output else None for label in labels)

    batch = tuple(map(lhs.index, batched)), tuple(map(rhs.index, batched))
    return Layout(
        "einsum", (summed(lhs, rhs), summed(rhs, lhs)), (reached(lhs), reached(rhs)), len(output),
        batch, refused=refused,
    )  # fmt: skip
