"""Tensors on their way into a format, and the codes that come of them.

`Quantized` is one value that holds all that quantizing a tensor takes. What it comes to is computed
where it is wanted: as values in floating point (`aqt_search.numerics.fake_quant`), in storage
(`aqt_search.numerics.qtensor`), or as codes in a native product (`aqt_search.products.native`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import Bounds, tells_nothing
from aqt_search.numerics.explicit_axes import replicated, sharded_as
from aqt_search.numerics.formats import (
    Grid,
    NumericFormat,
    as_grid,
    is_known_integer,
    known_format,
    known_grid,
    round_to_grid,
    unsigned_twin,
)
from aqt_search.numerics.granularity import split_blocks
from aqt_search.numerics.outline import where
from aqt_search.numerics.quantizer import Quantizer, Recipe
from aqt_search.numerics.scale import Scale, scale_of


def pack_grids(
    formats: Sequence[NumericFormat], dtype: np.dtype, unsigned: Sequence[bool] = ()
) -> jax.Array:
    """The grids of n formats as one array [n, 7] of `dtype`: a single kernel makes them all.

    Where `unsigned` is set, that of the format's unsigned twin.
    """
    columns = zip(*formats)
    stacked = NumericFormat(*(jnp.stack([jnp.asarray(v) for v in column]) for column in columns))
    if any(unsigned):
        mask = np.array(unsigned)
        twins = unsigned_twin(stacked)
        stacked = NumericFormat(*(jnp.where(mask, t, v) for t, v in zip(twins, stacked)))
    return jnp.stack(as_grid(stacked, dtype), axis=1)


def carrier_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that values of `dtype` are rounded in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A tensor with all that quantizing it takes: its format, bounds, random key and recipe."""

    x: jax.Array  # any shape, floating point; None for a gradient, which is still to come
    # [n, 7], of `pack_grids`, and the format's row, [], int32; None where `known` tells it.
    grids: jax.Array | None
    row: jax.typing.ArrayLike | None
    bounds: Bounds | None  # as a calibration with state gave them; None for one without
    key: jax.Array | None  # for stochastic rounding
    active: jax.Array | None  # which elements calibrations count, broadcasts to x; None: all
    how: Recipe = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})  # that x is rounded in
    # The format, where its numbers are part of the program: fewer kernels, one program a format.
    known: NumericFormat | None = dataclasses.field(default=None, metadata={"static": True})
    # Whether the format is known to be an integer one, which takes less to round to.
    integer: bool = dataclasses.field(default=False, metadata={"static": True})

    def grid(self) -> Grid:
        """The format as its arithmetic needs it."""
        if self.known is not None:
            return Grid(*map(jnp.asarray, known_grid(self.known, self.dtype)))
        assert self.grids is not None
        assert self.row is not None
        packed = jax.lax.dynamic_index_in_dim(self.grids, self.row, keepdims=False)
        return Grid(*(packed[field] for field in range(len(Grid._fields))))

    def blocks(self) -> jax.Array:
        """x in the dtype it is rounded in, split into blocks.

        Raises:
          ValueError: the last block is short and the calibration would count what fills it up.
        """
        size, axis = self.how.granularity.block_size, self.how.granularity.block_axis
        counts = self.how.calibration.counts
        if counts and size is not None and axis is not None and self.x.shape[axis] % size:
            raise ValueError(
                f"percentile and mean_deviation need full blocks: {size} does not divide axis"
                f" {axis} of shape {self.x.shape}. Choose a size that does, or absmax, min_max or"
                " mse."
            )
        return split_blocks(self.x.astype(self.dtype), self.how.granularity)

    def active_blocks(self) -> jax.Array | None:
        """Which elements of `blocks` count."""
        if self.active is None or self.how.granularity.block_size is None:
            return self.active
        return split_blocks(jnp.broadcast_to(self.active, self.x.shape), self.how.granularity)


def built_in_format(formats: Sequence[NumericFormat], how: Recipe) -> NumericFormat | None:
    """The format of these that is part of a program, see `Quantized.known`.

    None where they differ or are traced; and where more than one number of a format is a factor, or
    one is divided by: XLA multiplies constants with one another first, and by the inverse of one,
    so that the last bits would not be those of a format that is data.
    """
    learned = how.calibration.derivative is not None or how.gradient.error_scaling
    if learned or how.calibration.centred or how.scale_format == "e4m3":
        return None
    return known_format(formats)


def in_one_format(
    x: jax.Array | None, q: Quantizer, how: Recipe, bounds: Bounds | None = None
) -> Quantized:
    """A tensor on its way into the format of `q`, which is packed for it alone.

    In a program a format known when that is traced is part of it; outside all share one.
    """
    dtype = np.dtype(np.float32) if x is None else carrier_dtype(x.dtype)
    tensor = cast(jax.Array, x)  # None for a gradient
    traced = x is None or isinstance(x, jax.core.Tracer)
    known = built_in_format([q.fmt], how) if traced else None
    grids, row = (None, None) if known else (pack_grids([q.fmt], dtype), np.int32(0))
    integer = is_known_integer(q.fmt)
    return Quantized(tensor, grids, row, bounds, q.key, q.active, how, dtype, known, integer)


# --- Bounds ---------------------------------------------------------------------------------------


def _bounds_shape(shape: tuple[int, ...], how: Recipe) -> tuple[int, ...]:
    """The shape of the bounds of a tensor split into blocks."""
    split = jax.eval_shape(
        lambda x: split_blocks(x, how.granularity), jax.ShapeDtypeStruct(shape, np.float32)
    ).shape
    shared = how.over(len(shape)).axes
    return tuple(1 if axis in shared else n for axis, n in enumerate(split))


def init_bounds(shape: tuple[int, ...], how: Recipe) -> Any:
    """The first state of a calibration for tensors of `shape`."""
    return how.calibration.init(_bounds_shape(shape, how))


def calibrated(
    q: Quantized, state: Any, *, update: bool, told: bool = False
) -> tuple[Quantized, Any]:
    """The tensor with the bounds of its calibration, and the calibration's next state.

    A calibration without state looks at the tensor when it is quantized. No gradient flows to x.

    Args:
      state: of the calibration; () if it has none.
      update: whether bounds come from x and the state, or from the state alone, which then stays.
      told: whether some tensor is known to have told the state something. Else an operand that was
        never calibrated takes the bounds of x, so a scale of each batch.
    """
    if q.how.calibration.read is None:
        return q, state
    stopped = dataclasses.replace(q, x=jax.lax.stop_gradient(q.x))
    run = sharded_as(
        lambda q, state: _calibrate(q, q.blocks(), q.grid(), state),
        replicated(jax.typeof(q.x).sharding),
    )
    if update:
        bounds, state = run(stopped, state)
        return dataclasses.replace(q, bounds=bounds), state
    bounds = q.how.calibration.read(state, q.grid())
    bounds = jax.tree.map(lambda b: b.astype(q.dtype), bounds)
    if not told:
        own = tells_nothing(bounds)
        bounds = jax.lax.cond(own, lambda q: run(q, state)[0], lambda q: bounds, stopped)
    return dataclasses.replace(q, bounds=bounds), state


def _calibrate(q: Quantized, x: jax.Array, grid: Grid, state: Any) -> tuple[Bounds, Any]:
    """Bounds of x (`q.blocks()`) by the calibration, and its next state."""
    how = q.how
    over = how.over(q.x.ndim)._replace(active=q.active_blocks())
    nearest = how._replace(rounding="nearest_even")

    def error(bounds: Bounds) -> jax.Array:
        encoded = _encode(x, bounds, grid, nearest, None, q.integer)
        return over.sum(jnp.square(encoded.values() - x))

    return how.calibration.apply(state, x, over, grid, error)


# --- Codes ----------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """What a tensor is quantized to: values = (codes - scale.zero_point) * scale.value().

    Split into blocks as `codes_of_tensor` gives them, all parts broadcast. In a native product the
    codes have the tensor's shape and their carrier's dtype, the scale `granularity.scale_shape`.
    """

    codes: jax.Array  # numbers on the format's grid
    scale: Scale
    inside: jax.Array | None  # which elements lie within the bounds; None: all, or not told here

    def values(self) -> jax.Array:
        """What the codes stand for."""
        zero = self.scale.zero_point
        codes = self.codes if zero is None else self.codes - zero
        return codes * self.scale.value()


def codes_of_tensor(q: Quantized, grid: Grid) -> Codes:
    """The codes of a tensor on its grid (`q.grid()`), split into blocks.

    What is not finite becomes NaN, whatever the bounds say.
    """
    random, how, bounds = None, q.how, q.bounds
    if how.rounding == "stochastic":
        assert q.key is not None  # `check_key` saw to it
        random = _random(q.key, q.x.shape, how.axis_name, grid.max_value.dtype)
        random = split_blocks(random, how.granularity)
    x = q.blocks()
    if bounds is None:
        bounds, _ = _calibrate(q, x, grid, ())
    if q.known is not None and not how.calibration.covers:
        # They may be a multiple of something: see `built_in_format`.
        bounds = jax.lax.optimization_barrier(bounds)
    found = _encode(x, bounds, grid, how, random, q.integer)
    if how.calibration.covers:
        return found
    low = -bounds.high if bounds.low is None else bounds.low
    codes = where(jnp.isfinite(x), found.codes, jnp.nan)
    if not how.gradient.clips or how.calibration.derivative is not None:
        return Codes(codes, found.scale, None)  # learned bounds tell where they are differentiated
    inside = ((x >= low) & (x <= bounds.high)) | (grid.unscaled > 0)
    return Codes(codes, found.scale, inside)


def _encode(x: jax.Array, bounds: Bounds, grid: Grid, how: Recipe, random, integer: bool) -> Codes:
    scale = scale_of(bounds, grid, how)
    steps = x * (1 / scale.value())
    if scale.zero_point is not None:
        steps = steps + scale.zero_point
    codes = round_to_grid(steps, grid, how.rounding, random, integer=integer)
    return Codes(codes, scale, None)


def _random(key: jax.Array, shape: tuple[int, ...], axis_name: Hashable | None, dtype) -> jax.Array:
    """Uniform numbers, drawn row by row: a batch gets the same ones however it is sharded."""
    if not shape:
        return jax.random.uniform(key, shape, dtype)
    rows = jnp.arange(shape[0])
    if axis_name is not None:
        rows = rows + jax.lax.axis_index(axis_name) * shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return jax.vmap(lambda k: jax.random.uniform(k, shape[1:], dtype))(keys)
