"""Calibration: how the range of values that a format has to hold is chosen.

A calibration is a pair of pure functions, as in optax: `init` makes its state, `apply` looks at a
tensor and returns the bounds with the state for the next one. Which scale follows from the bounds
is the quantizer's business (`aqt_search.numerics.quantizer`).

    calibration = moving_average(absmax(), 0.9)
    state = calibration.init(scale_shape)
    bounds, state = calibration.apply(state, x, over, grid, error)
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.formats import Grid, as_grid, leading_power, numeric_format


class Bounds(NamedTuple):
    """The range a scale is made for, one for every scale; `low` is None where it is -high."""

    high: jax.Array  # shape of the scales, the tensor's dtype; at least 0
    low: jax.Array | None = None  # the same; at most 0


class Over(NamedTuple):
    """What a bound is shared over: axes of the tensor and, under vmap or pmap, a mapped axis.

    `active` says which elements count, where some are cut out of a subnet: a calibration that
    counts or averages takes `elements` and `kept`. Others need it not: what is cut is 0.
    """

    axes: tuple[int, ...]
    axis_name: Hashable | None = None
    active: jax.Array | None = None  # bool, broadcasts to the tensor; None: all elements count

    def max(self, x: jax.Array) -> jax.Array:
        """The largest value, at least 0; 0 for no values."""
        largest = jax.lax.reduce_max(x, self.axes)
        largest = jax.lax.expand_dims(jax.lax.max(largest, jnp.zeros_like(largest)), self.axes)
        return largest if self.axis_name is None else jax.lax.pmax(largest, self.axis_name)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum."""
        total = jnp.sum(x, self.axes, keepdims=True)
        return total if self.axis_name is None else jax.lax.psum(total, self.axis_name)

    def kept(self, x: jax.Array, fill: float = 0.0) -> jax.Array:
        """x, with `fill` in place of the elements that do not count."""
        return x if self.active is None else jnp.where(self.active, x, jnp.asarray(fill, x.dtype))

    def elements(self, x: jax.Array) -> int | jax.Array:
        """How many elements share a bound, at least 1: float32, broadcasts, if not all of them."""
        if self.active is None:
            replicas = 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)
            return max(1, math.prod(x.shape[axis] for axis in self.axes) * replicas)
        # Along axes that the mask has not each element is one of many.
        times = math.prod(x.shape[a] for a in self.axes if self.active.shape[a] == 1)
        found = jnp.sum(self.active, self.axes, keepdims=True, dtype=np.int32)
        found = found.astype(np.float32) * times
        if self.axis_name is not None:
            found = jax.lax.psum(found, self.axis_name)
        return jnp.maximum(found, 1)

    def any_active(self) -> jax.typing.ArrayLike:
        """Whether any element counts: bool, []."""
        if self.active is None:
            return True
        found = jnp.any(self.active)
        return found if self.axis_name is None else jax.lax.pmax(found, self.axis_name)

    def values(self, x: jax.Array) -> jax.Array:
        """All values that share a bound, in a last axis of their own: [scale shape..., n]."""
        if self.axis_name is not None:
            x = jax.lax.all_gather(x, self.axis_name)
            axes = (0, *(axis + 1 for axis in self.axes))
        else:
            axes = self.axes
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        count = math.prod(x.shape[axis] for axis in axes)
        flat = x.transpose(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), count)
        return jax.lax.expand_dims(flat, self.axes)


class Calibration(NamedTuple):
    """How bounds are chosen. States are pytrees of arrays; () for a calibration without one.

    `apply(state, x, over, grid, error) -> (bounds, state)`: x is the tensor, float32 or float64;
    `grid` the format that the bounds are for, and `error(bounds)` the squared error of quantizing x
    under other bounds, shared as the bounds are.
    """

    init: Callable[[tuple[int, ...]], Any]  # from the shape of the bounds
    apply: Callable[[Any, jax.Array, Over, Grid, Callable[[Bounds], jax.Array]], tuple[Bounds, Any]]
    # Bounds for a grid from the state alone; None: it has no state.
    read: Callable[[Any, Grid], Bounds] | None = None
    covers: bool = False  # whether the bounds hold all of x, so that nothing is ever clipped
    counts: bool = False  # whether zeros that fill up a short block would change the bounds
    # Bounds with a gradient: "lsq" or "pact" (`fake_quant.straight_through`); None: without one.
    derivative: str | None = None
    # Whether the bounds hold an even number of levels around 0 (`centred`).
    centred: bool = False


def counts_elements(calibration: Calibration) -> bool:
    """Whether zeros beside what a tensor has would change bounds, or the gradient in them."""
    return calibration.counts or calibration.derivative == "lsq"


def _stateless(bounds: Callable, covers: bool = False, counts: bool = False) -> Calibration:
    def apply(state, x, over, grid, error):
        return bounds(x, over, error), ()

    return Calibration(lambda shape: (), apply, None, covers, counts)


@functools.cache
def absmax() -> Calibration:
    """high = max|x|: nothing is clipped."""
    return _stateless(lambda x, over, error: Bounds(over.max(jax.lax.abs(x))), covers=True)


@functools.cache
def min_max() -> Calibration:
    """low = min(x, 0), high = max(x, 0): an integer format gets a zero point; nothing is clipped.

    A float format, which has no zero point, is scaled for max(-low, high).
    """
    return _stateless(
        lambda x, over, error: Bounds(over.max(x), jax.lax.neg(over.max(jax.lax.neg(x)))),
        covers=True,
    )


@functools.cache
def percentile(share: float) -> Calibration:
    """high = the `share`-th percentile of |x|, interpolated linearly as numpy does.

    Args:
      share: in percent, 0 < share <= 100.
    """
    if not 0 < share <= 100:
        raise ValueError(f"percentile takes percent above 0 and at most 100; got {share}.")

    def bounds(x, over, error):
        values = over.values(jnp.abs(x))
        if not values.size:
            return Bounds(jnp.zeros(values.shape[:-1], x.dtype))
        quantile = np.asarray(share / 100, x.dtype)
        if over.active is None:
            return Bounds(jnp.quantile(values, quantile, axis=-1))
        active = over.values(jnp.broadcast_to(over.active, x.shape))
        return Bounds(_quantile_of(values, active, quantile))

    return _stateless(bounds, counts=True)


def _quantile_of(values: jax.Array, active: jax.Array, quantile: np.ndarray) -> jax.Array:
    """A quantile along the last axis of the elements that are active; 0 where there are none."""
    nan = jnp.asarray(jnp.nan, values.dtype)
    found = jnp.nanquantile(jnp.where(active, values, nan), quantile, axis=-1)
    found = jnp.where(jnp.any(active & jnp.isnan(values), -1), nan, found)
    return jnp.where(jnp.any(active, -1), found, jnp.zeros_like(found))


@functools.cache
def mean_deviation(
    mean: float = 0.0, deviation: float = 3.0, exclude_zeros: bool = False
) -> Calibration:
    """high = mean * E|x| + deviation * sqrt(E x^2): AQT's automatic clipping (arXiv 2105.03536).

    Args:
      mean: weight of the mean magnitude.
      deviation: weight of the root mean square.
      exclude_zeros: leave exact zeros out of both means, as after a relu.

    Raises:
      ValueError: a weight that is not finite.
    """
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        raise ValueError(f"mean_deviation takes finite weights; got {mean} and {deviation}.")

    def bounds(x, over, error):
        x = over.kept(x)
        if over.active is None or exclude_zeros:
            counted = jnp.where(x == 0, 0.0, 1.0) if exclude_zeros else jnp.ones_like(x)
            count = jnp.maximum(over.sum(counted.astype(x.dtype)), 1)
        else:
            count = over.elements(x)
        # In units of the largest power of two, so that squares stay within the dtype.
        unit = leading_power(over.max(jnp.abs(x)))
        unit = jnp.clip(unit, 2.0**-120, 2.0**120).astype(x.dtype)
        x = x / unit
        magnitude, square = over.sum(jnp.abs(x)) / count, over.sum(x * x) / count
        return Bounds((mean * magnitude + deviation * jnp.sqrt(square)) * unit)

    return _stateless(bounds, counts=True)


_MOST_CANDIDATES = 10_000


@functools.cache
def mse(candidates: int = 40, smallest: float = 0.1) -> Calibration:
    """The share of max|x| under which quantizing has the least squared error.

    `candidates` shares from `smallest` to 1 are tried one after another, so memory stays that of
    one quantization.

    Args:
      candidates: at least 1 and at most 10,000; with 1 it is `absmax`.
      smallest: above 0 and at most 1.

    Raises:
      ValueError: a number out of its range.
    """
    if not 1 <= operator.index(candidates) <= _MOST_CANDIDATES:
        raise ValueError(
            f"mse takes 1 to {_MOST_CANDIDATES} candidates to try one after another; got"
            f" {candidates}."
        )
    if not 0 < smallest <= 1:
        raise ValueError(f"mse takes a smallest share above 0 and at most 1; got {smallest}.")
    shares = np.linspace(1, smallest, candidates)

    def bounds(x, over, error):
        largest = over.max(jnp.abs(x))

        def attempt(best, share):
            found = error(Bounds(largest * share))
            better = found < best[0]
            return (jnp.where(better, found, best[0]), jnp.where(better, share, best[1])), None

        start = (error(Bounds(largest)), jnp.ones_like(largest))
        (_, share), _ = jax.lax.scan(attempt, start, jnp.asarray(shares[1:], x.dtype))
        return Bounds(largest * share)

    return _stateless(bounds)


@functools.cache
def fixed(high: float, low: float | None = None) -> Calibration:
    """Given bounds: what lies beyond them saturates. `low` gives an integer format a zero point.

    Raises:
      ValueError: bounds that are not finite, or on the wrong side of 0.
    """
    if not 0 < high < math.inf or (low is not None and not -math.inf < low <= 0):
        raise ValueError(f"Fixed bounds are high > 0 and low <= 0; got high {high}, low {low}.")

    def bounds(x, over, error):
        shape = tuple(1 if a in over.axes else n for a, n in enumerate(x.shape))
        lowest = None if low is None else jnp.full(shape, low, x.dtype)
        return Bounds(jnp.full(shape, high, x.dtype), lowest)

    return _stateless(bounds)


@functools.cache
def centred(calibration: Calibration) -> Calibration:
    """The same bounds, from -high to high, on a grid whose middle is 0, wherever its zero lies.

        zero_point = (min_value + max_value) / 2;  scale = 2 high / (max_value - min_value)

    An unsigned integer of b bits then has 2^b levels around 0 and none at it: -high and high for
    `uint1` (XNOR-Net's and DoReFa-Net's binary weights), -high, -high/3, high/3 and high for
    `uint2`. Signed and float formats, which have 0 in the middle, stay as they are.

    Raises:
      ValueError: a calibration with a bound of its own below.
    """
    if is_asymmetric(calibration):
        raise ValueError("centred takes a calibration whose bounds are symmetric.")
    return calibration._replace(centred=True)


# --- With state -----------------------------------------------------------------------------------


def tells_nothing(bounds: Bounds) -> jax.Array:
    """Whether bounds read from a state say that no tensor has told it anything; [], bool."""
    extent = bounds.high if bounds.low is None else bounds.high - bounds.low
    return jnp.logical_not(jnp.any(extent > 0))


class History(NamedTuple):
    """What a calibration remembers of earlier tensors."""

    high: jax.Array  # [...], float32, shape of the bounds ([n, ...] for `delayed`)
    low: jax.Array | None  # the same; None for symmetric bounds
    updates: jax.Array  # [], int32: tensors that counted
    inner: Any = ()  # state of the calibration inside


def _zeros(shape: tuple[int, ...], inner: Calibration) -> History:
    bounds = Bounds(jnp.zeros(shape, jnp.float32))
    if is_asymmetric(inner):
        bounds = Bounds(bounds.high, bounds.high)
    return History(*bounds, jnp.int32(0), inner.init(shape))


@functools.cache
def is_asymmetric(calibration: Calibration) -> bool:
    """Whether its bounds have a `low`, found by an abstract call on one element."""

    def low():
        x, state = jnp.ones(1), calibration.init((1,))
        grid = as_grid(numeric_format("int8"), np.dtype(np.float32))
        return calibration.apply(state, x, Over((0,)), grid, lambda b: b.high)[0].low

    return jax.eval_shape(low) is not None


def _map(fun: Callable, *bounds: Bounds) -> Bounds:
    lows = [b.low for b in bounds]
    return Bounds(fun(*(b.high for b in bounds)), None if lows[0] is None else fun(*lows))


def _in_dtype(bounds: Bounds, dtype: np.dtype) -> Bounds:
    return _map(lambda b: b.astype(dtype), bounds)


def _counts(calibration: Calibration, before: Any, after: Any, bounds: Bounds) -> jax.Array:
    """Whether a tensor tells anything: it is finite and not all zero.

    A calibration with a state gives old bounds for a tensor that told it nothing, so its own count
    is asked.
    """
    extent = bounds.high if bounds.low is None else bounds.high - bounds.low
    counts = jnp.all(jnp.isfinite(extent)) & jnp.any(extent > 0)
    return counts if calibration.read is None else counts & (after.updates > before.updates)


def _with_history(
    inner: Calibration,
    combine: Callable[[Bounds, Bounds, jax.Array], Bounds],
    keep_after: int | None = None,
) -> Calibration:
    """A calibration whose bounds are `combine(earlier bounds, today's, tensors before)`."""

    def read(state: History, grid: Grid | None = None) -> Bounds:
        return Bounds(state.high, state.low)

    def live(state: History, x, *context):
        today, inner_state = inner.apply(state.inner, x, *context)
        today = _in_dtype(today, jnp.float32)
        combined = _map(
            lambda new, first: jnp.where(state.updates == 0, first, new),
            combine(read(state), today, state.updates),
            today,
        )
        counts = _counts(inner, state.inner, inner_state, today)
        kept = _map(lambda new, old: jnp.where(counts, new, old), combined, read(state))
        return kept, History(*kept, state.updates + counts, inner_state)

    def apply(state: History, x, *context):
        if keep_after is None:
            bounds, state = live(state, x, *context)
        else:
            bounds, state = jax.lax.cond(
                state.updates < keep_after,
                lambda state, x: live(state, x, *context),
                lambda state, x: (read(state), state),
                state, x,
            )  # fmt: skip
        return _in_dtype(bounds, x.dtype), state

    def init(shape):
        return _zeros(shape, inner)

    return Calibration(init, apply, read, counts=inner.counts, centred=inner.centred)


@functools.cache
def moving_average(calibration: Calibration, momentum: float | None = 0.9) -> Calibration:
    """b <- momentum * b + (1 - momentum) * today's bounds, starting at the first.

    A momentum of None is the plain mean of all tensors seen. Tensors that are all zero, or not
    finite, do not count.
    """
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"A momentum lies in [0, 1), or is None; got {momentum}.")

    def combine(earlier, today, updates):
        keep = updates / (updates + 1.0) if momentum is None else momentum
        return _map(lambda old, new: old * keep + new * (1 - keep), earlier, today)

    return _with_history(calibration, combine)


@functools.cache
def running_max(calibration: Calibration) -> Calibration:
    """The widest bounds of all tensors seen."""

    def combine(earlier, today, _):
        low = None if today.low is None else jnp.minimum(earlier.low, today.low)
        return Bounds(jnp.maximum(earlier.high, today.high), low)

    return _with_history(calibration, combine)


@functools.cache
def frozen_after(calibration: Calibration, tensors: int) -> Calibration:
    """The bounds of `calibration` at the `tensors`-th tensor, kept from then on.

    `frozen_after(moving_average(mean_deviation(), 0.9), 7500)` is AQT's automatic clipping with
    frozen bounds; `frozen_after(absmax(), 1)` keeps the first tensor's.
    """
    if tensors < 1:
        raise ValueError(f"Bounds are frozen after at least one tensor; got {tensors}.")
    return _with_history(calibration, lambda earlier, today, _: today, keep_after=tensors)


@functools.cache
def delayed(calibration: Calibration, tensors: int = 1) -> Calibration:
    """The widest bounds of the `tensors` tensors before today's: yesterday's scale.

    Today's bounds are for tomorrow, so no reduction stands between a tensor and its quantization
    (delayed scaling: Micikevicius et al. 2022, arXiv 2209.05433). The first tensor takes its own.
    """
    if tensors < 1:
        raise ValueError(f"Delayed bounds look back at least one tensor; got {tensors}.")

    def init(shape):
        return _zeros((tensors, *shape), calibration)._replace(inner=calibration.init(shape))

    def read(state: History, grid: Grid | None = None) -> Bounds:
        low = None if state.low is None else jnp.min(state.low, 0)
        return Bounds(jnp.max(state.high, 0), low)

    def apply(state: History, x, *context):
        today, inner = calibration.apply(state.inner, x, *context)
        today = _in_dtype(today, jnp.float32)
        counts = _counts(calibration, state.inner, inner, today)

        def push(old, new):
            return jnp.where(counts, jnp.concatenate([new[None], old[:-1]]), old)

        history = _map(push, Bounds(state.high, state.low), today)
        # Only the first branch waits for a reduction over x, and it is taken once.
        bounds = jax.lax.cond(
            state.updates == 0,
            lambda x: _in_dtype(calibration.apply(state.inner, x, *context)[0], jnp.float32),
            lambda x: read(state),
            x,
        )
        new = History(*history, state.updates + counts, inner)
        return _in_dtype(bounds, x.dtype), new

    return Calibration(init, apply, read, counts=calibration.counts, centred=calibration.centred)
