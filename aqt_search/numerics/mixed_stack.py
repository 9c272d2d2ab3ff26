"""Stored layers of a stack that have formats of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.formats import NumericFormat, numeric_format
from aqt_search.numerics.qtensor import STORAGE_DTYPES, QTensor
from aqt_search.numerics.quantized import carrier_dtype


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

    def layer(self, number: jax.typing.ArrayLike) -> QTensor:
        """Layer `number`, [], int, which may be traced: with its codes in a dtype that holds all.

        Where there is none of 8 bits (some formats are wider, or have codes that others have not)
        the codes are its values, in the dtype that they are rounded in, and have no scale.
        """
        group, place = (jnp.asarray(table, np.int32)[number] for table in (self.group, self.place))
        fmt, first = self._common_format(), self.groups[0]

        def read(group: QTensor):
            def of(place):
                own = jax.tree.map(lambda leaf: leaf[place], group)
                if fmt is None:
                    return own.dequantize(carrier_dtype(own.dtype)), None, None, None
                codes = own.codes_as_stored(STORAGE_DTYPES[fmt])
                return codes, own.scale, own.tensor_scale, own.zero_point

            return of

        data, scale, tensor_scale, zero_point = jax.lax.switch(
            group, [read(group) for group in self.groups], place
        )
        return QTensor(
            data, scale, tensor_scale, zero_point, numeric_format("fp32") if fmt is None else fmt,
            first.granularity, first.shape, first.dtype, centred=fmt is not None and first.centred,
            order=() if fmt is None else first.order,
        )  # fmt: skip

    def _common_format(self) -> NumericFormat | None:
        """A format of 8 bits with a dtype, in which the codes of all layers are numbers."""
        kinds = {(bool(g.fmt.bits > 8), g.centred, g.zero_point is None) for g in self.groups}
        if len(kinds) > 1 or self.groups[0].fmt.bits > 8:
            return None
        narrow = (fmt for fmt in STORAGE_DTYPES if fmt.bits <= 8)
        return next((f for f in narrow if all(_holds(f, g.fmt) for g in self.groups)), None)


def _holds(wide: NumericFormat, fmt: NumericFormat) -> bool:
    """Whether every number of a format is one of another."""
    return bool(
        wide.mantissa_bits >= fmt.mantissa_bits
        and wide.min_exponent - wide.mantissa_bits <= fmt.min_exponent - fmt.mantissa_bits
        and wide.min_value <= fmt.min_value
        and wide.max_value >= fmt.max_value
    )
