"""Stored layers of a stack that have formats of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.formats import NumericFormat
from aqt_search.numerics.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedStack:
    """Tensors of one shape, each stored in its format: layer i is `groups[group[i]]` at `place[i]`.

    Layers of one format are a `QTensor` with an axis more in front of all its arrays. The bytes are
    those of the layers stored one by one.
    """

    groups: tuple[QTensor, ...]
    group: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of every layer
    place: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a layer."""
        return self.groups[0].shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a layer."""
        return self.groups[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the stored data and scales."""
        return sum(group.nbytes for group in self.groups)

    @property
    def formats(self) -> tuple[NumericFormat, ...]:
        """The format of every layer."""
        return tuple(self.groups[number].fmt for number in self.group)

    def transposed(self, order: Sequence[int]) -> MixedStack:
        """The layers with their axes in another order; the data stay as they are stored."""
        groups = tuple(group.transposed(order) for group in self.groups)
        return dataclasses.replace(self, groups=groups)

    def dequantize(self, number: jax.typing.ArrayLike) -> jax.Array:
        """The values of layer `number`, [], int, which may be traced."""

        def read(group: QTensor):
            return lambda place: jax.tree.map(lambda leaf: leaf[place], group).dequantize()

        group, place = (jnp.asarray(table, np.int32)[number] for table in (self.group, self.place))
        return jax.lax.switch(group, [read(group) for group in self.groups], place)
