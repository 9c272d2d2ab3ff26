"""Calibrations with learned scales: LSQ, PACT and BatchQuant's quantizer.

    q = Quantizer("int4", PER_TENSOR, lsq())
    qfun = quantize_with_state(apply)
    state = qfun.init(assignment, params, x)
    learned, rest = split_learned(state)             # differentiate in `learned`
    y, state = qfun.apply(assignment, merge_learned(learned, rest), params, x)

The first tensor that `apply` sees sets a scale, which is then the optimizer's. Where formats are
searched over, `lsq("int2", "int4", "int8")` has a scale for each, picked by comparing the traced
format with those named: no branch, and every format learns its own.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.calibration import Bounds, Calibration, Over
from aqt_search.numerics.formats import Grid, as_grid, numeric_format, unsigned_twin


class Learned(NamedTuple):
    """Marks the part of a calibration's state that an optimizer moves."""

    value: jax.Array


def _is_learned(node: Any) -> bool:
    return isinstance(node, Learned)


def split_learned(state: Any) -> tuple[Any, Any]:
    """The learned leaves of calibration states, and the rest; None takes the others' places."""
    learned = jax.tree.map(lambda n: n if _is_learned(n) else None, state, is_leaf=_is_learned)
    rest = jax.tree.map(lambda n: None if _is_learned(n) else n, state, is_leaf=_is_learned)
    return learned, rest


def merge_learned(learned: Any, rest: Any) -> Any:
    """Undoes `split_learned`."""

    def is_leaf(node: Any) -> bool:
        return node is None or _is_learned(node)

    return jax.tree.map(lambda a, b: b if a is None else a, learned, rest, is_leaf=is_leaf)


@jax.custom_jvp
def scaled_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x, with a derivative of `factor`."""
    return x


@scaled_gradient.defjvp
def _scaled_gradient_jvp(primals, tangents):
    return scaled_gradient(*primals), primals[1] * tangents[0]


_FIELDS = ("min_value", "max_value", "min_power", "steps")  # what tells formats apart


@functools.cache
def _known_formats(names: tuple[str, ...]) -> np.ndarray:
    """[n, 2, 4]: of every format, and of its unsigned twin, the `_FIELDS`."""
    formats = [numeric_format(name) for name in names]
    grids = [[as_grid(f, np.dtype(np.float32)) for f in (g, unsigned_twin(g))] for g in formats]
    return np.array([[[getattr(g, f) for f in _FIELDS] for g in pair] for pair in grids])


def _row(names: tuple[str, ...], grid: Grid) -> jax.Array:
    """[n]: 1 at the format whose grid it is, else 0; NaN everywhere for a format not named."""
    if not names:
        return jnp.ones(1)
    here = jnp.stack([getattr(grid, field).astype(jnp.float32) for field in _FIELDS])
    same = jnp.any(jnp.all(_known_formats(names) == here[None, None], axis=-1), axis=-1)
    return jnp.where(jnp.any(same), same.astype(jnp.float32), jnp.nan)


def _picked(values: jax.Array, row: jax.Array) -> jax.Array:
    """[n, ...] to [...]: the values of the row's format."""
    return jnp.tensordot(row, values, 1)


def _while_unset(started: Callable, value: jax.Array, x: jax.Array) -> jax.Array:
    """`started(value, x)` as long as some of the value is 0: later steps need not look at all of x.

    Replicas have the same values, if not the same formats, so that all of them take one branch:
    `started` may sum over them.
    """
    x = jax.lax.stop_gradient(x)
    return jax.lax.cond(jnp.any(value == 0), started, lambda value, x: value, value, x)


@functools.cache
def lsq(*formats: str) -> Calibration:
    """A learned step size s: high = s * max_value (LSQ: Esser et al. 2020, arXiv 1902.08153).

    s starts at 2 E|x| / sqrt(max_value) of the first tensor, and its gradient is scaled by
    1 / sqrt(N max_value), with N elements to a scale (section 2.2). A first tensor that is zero or
    not finite is passed over.

    Args:
      formats: names of the formats that each have a step size of their own; their unsigned twins
        share it. A format not among them gives NaN. With no names there is one step size, whatever
        the format.

    Raises:
      FormatError: unknown format name.
    """
    known = _known_formats(formats) if formats else ()  # complains about unknown names
    rows = max(1, len(known))

    def init(shape):
        return {"step": Learned(jnp.zeros((rows, *shape), jnp.float32))}

    def read(state, grid):
        step = jnp.abs(_picked(state["step"].value, _row(formats, grid)))
        return Bounds(step * grid.max_value.astype(jnp.float32))

    def apply(state, x, over, grid, error):
        step = state["step"].value
        chosen = _row(formats, grid).reshape(-1, *(1,) * (step.ndim - 1)) > 0

        def started(step, x):
            mean = over.sum(jnp.abs(over.kept(x))) / over.elements(x)
            first = (2 * mean / jnp.sqrt(grid.max_value)).astype(jnp.float32)[None]
            return jnp.where(chosen & (step == 0) & jnp.isfinite(first), first, step)

        step = _while_unset(started, step, x)
        factor = jax.lax.rsqrt(over.elements(x) * grid.max_value.astype(jnp.float32))
        factor = factor if over.active is None else factor[None]  # one for every scale
        scaled = {"step": Learned(scaled_gradient(step, factor))}
        return Bounds(read(scaled, grid).high.astype(x.dtype)), {"step": Learned(step)}

    return Calibration(init, apply, read, derivative="lsq")


@functools.cache
def pact(start: float | None = None) -> Calibration:
    """A learned clipping level: high = alpha (PACT: Choi et al. 2018, arXiv 1805.06085).

    Only what is clipped has a gradient in alpha; the paper decays alpha like a weight.

    Args:
      start: what alpha starts at (the paper's is 10); None: max|x| of the first tensor.
    """
    if start is not None and not 0 < start < math.inf:
        raise ValueError(f"pact takes a finite start above 0, or None; got {start}.")

    def init(shape):
        return {"alpha": Learned(jnp.full(shape, start or 0.0, jnp.float32))}

    def read(state, grid):
        return Bounds(jnp.abs(state["alpha"].value))

    def apply(state, x, over, grid, error):
        def started(alpha, x):
            first = over.max(jnp.abs(x)).astype(jnp.float32)
            return jnp.where((alpha == 0) & jnp.isfinite(first), first, alpha)

        alpha = _while_unset(started, state["alpha"].value, x)
        return Bounds(jnp.abs(alpha).astype(x.dtype)), {"alpha": Learned(alpha)}

    return Calibration(init, apply, read, derivative="pact")


_SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of it is 1


class _Residuals(NamedTuple):
    """State of `batch_quant`; the residuals are of the tensor's scale and zero point."""

    gamma: Learned  # softplus(gamma) multiplies x / scale
    offset: Learned  # added to the zero point
    low: jax.Array  # the mean over the tensors seen
    high: jax.Array
    updates: jax.Array  # [], int32: tensors seen


@functools.cache
def batch_quant(channel_axis: int = -1) -> Calibration:
    """Bounds of the batch with learned residuals (BatchQuant: arXiv 2105.08952, section 3.2).

        m = min(0, mean over channels of min x);  M = max(0, mean over channels of max x)
        S = (M - m) / (max_value - min_value);  zero = min_value - m / S
        codes = round(clip(x gamma / S + zero + offset))

    m and M are the batch's, without gradient; gamma, a softplus that starts at 1, and the offset,
    which starts at 0, are learned. Evaluation takes the mean of m and M over the tensors that
    `apply` saw: gather them anew for every assignment, together with BatchNorm statistics. Tensors
    that are not finite do not count. Codes and zero point are whole numbers, as they are served.

    One scale for the tensor, of an integer format.

    Args:
      channel_axis: whose ends are averaged.

    Raises:
      TypeError: an axis that is no whole number.
    """
    operator.index(channel_axis)

    def init(shape):
        zeros = jnp.zeros(shape, jnp.float32)
        return _Residuals(
            Learned(zeros + _SOFTPLUS_ONE), Learned(zeros), zeros, zeros, jnp.int32(0)
        )

    def adjusted(state: _Residuals, low, high, grid: Grid) -> Bounds:
        # Numbers of a known format, too, are divided by as such, not multiplied by their inverse.
        grid = jax.lax.optimization_barrier(grid)
        gamma, offset = jax.nn.softplus(state.gamma.value), state.offset.value
        levels = (grid.max_value - grid.min_value).astype(jnp.float32)
        scale = (high - low) / levels
        zero = grid.min_value - low / jnp.where(scale > 0, scale, 1.0) + offset
        scale = scale / gamma
        return Bounds((grid.max_value - zero) * scale, (grid.min_value - zero) * scale)

    def read(state, grid):
        return adjusted(state, state.low, state.high, grid)

    def apply(state, x, over, grid, error):
        if len(over.axes) != x.ndim:
            raise ValueError("batch_quant has one scale for a tensor: give it PER_TENSOR.")
        ends = [_mean_end(sign * x, channel_axis, over) for sign in (-1, 1)]
        low, high = (jnp.broadcast_to(s * e, state.low.shape) for s, e in zip((-1, 1), ends))
        counts = jnp.isfinite(low + high).all()
        if over.active is not None:  # a tensor that a subnet has not tells nothing
            counts = counts & over.any_active()
        share = jnp.where(counts, 1.0 / (state.updates + 1), 0.0)
        new = state._replace(
            low=jnp.where(counts, state.low + share * (low - state.low), state.low),
            high=jnp.where(counts, state.high + share * (high - state.high), state.high),
            updates=state.updates + counts,
        )
        bounds = adjusted(state, low, high, grid)
        return jax.tree.map(lambda b: b.astype(x.dtype), bounds), new

    return Calibration(init, apply, read, derivative="lsq")


def _mean_end(x: jax.Array, channel_axis: int, over: Over) -> jax.Array:
    """max(0, mean over channels of max x), float32, over all replicas' examples."""
    axis = channel_axis % x.ndim
    others = tuple(a for a in range(x.ndim) if a != axis)
    largest = jnp.max(over.kept(x, -jnp.inf), others).astype(jnp.float32)
    if over.axis_name is not None:
        largest = jax.lax.pmax(largest, over.axis_name)
    if over.active is None:
        return jnp.maximum(jnp.mean(largest), 0)
    there = largest != -jnp.inf
    mean = jnp.sum(jnp.where(there, largest, 0.0)) / jnp.maximum(jnp.sum(there), 1)
    return jnp.maximum(mean, 0)
