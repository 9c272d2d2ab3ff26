"""Depthwise convolution as a sum of shifted products, in floating point on CPU.

Without a sum over input features it is elementwise work: for every tap of the kernel, a shifted
slice of the images times that tap. XLA:CPU runs it as a convolution of many groups instead. On
two busy cores of a 2.5 GHz Xeon with jax 0.10.2 (`python -m benchmarks.depthwise`) shifted products
took 0.02 to 0.12 times as long forward, and 0.03 to 0.36 times with gradients. With gradients they
take 0.2 to 1 s longer to compile for a 3 x 3 kernel, 4 s for 7 x 7.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.outline import outline
from aqt_search.numerics.symbolic import certainly

MOST_TAPS = 49  # each is a few operations to compile: 7 x 7 is the largest that was measured


class _Windows(NamedTuple):
    """The part of a convolution's parameters that shifted products read; hashable."""

    dimension_numbers: jax.lax.ConvDimensionNumbers
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]  # of the kernel
    result: np.dtype | None  # None: that of the images

    def counts(self, lhs_shape: Sequence[int], rhs_shape: Sequence[int]) -> list[int]:
        """Positions of the kernel along each spatial axis."""
        lhs_spec, rhs_spec, _ = self.dimension_numbers
        sizes = [lhs_shape[axis] for axis in lhs_spec[2:]]
        taps = [rhs_shape[axis] for axis in rhs_spec[2:]]
        padded = [n + low + high for n, (low, high) in zip(sizes, self.padding)]
        return [
            (n - (k - 1) * dilation - 1) // stride + 1
            for n, k, dilation, stride in zip(padded, taps, self.dilation, self.strides)
        ]


def _windows(params: Mapping[str, Any]) -> _Windows:
    return _Windows(
        params["dimension_numbers"],
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["rhs_dilation"]),
        params["preferred_element_type"],
    )


def applies(params: Mapping[str, Any], lhs_shape: Sequence[int], rhs_shape: Sequence[int]) -> bool:
    """Whether a convolution with these parameters of its primitive has this form."""
    lhs_spec, rhs_spec, _ = params["dimension_numbers"]
    depthwise = 1 < params["feature_group_count"] == lhs_shape[lhs_spec[1]]
    taps = math.prod(rhs_shape[axis] for axis in rhs_spec[2:])
    plain_images = all(d == 1 for d in params["lhs_dilation"])
    few = certainly(lambda: 0 < taps <= MOST_TAPS)
    if not (depthwise and plain_images and few):
        return False
    counts = _windows(params).counts(lhs_shape, rhs_shape)
    return certainly(lambda: all(count > 0 for count in counts))


def shifted_products(lhs: jax.Array, rhs: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """`conv_general_dilated` with one input feature per group.

    out[n, p, c * m + j] = sum over taps t of lhs[n, p * stride + t * dilation - low, c]
    * rhs[t, 0, c * m + j], with zeros beyond the images.

    Args:
      lhs: [N, *spatial, C] in the order of `params["dimension_numbers"]`; floating point.
      rhs: [*window, 1, C * m] in theirs.
      params: of the primitive; `applies(params, lhs.shape, rhs.shape)` holds.

    Returns:
      As of the primitive, up to the order of summation; summed in float32 or wider.
    """
    return _shifted_products(lhs, rhs, _windows(params))


# Outlined: fused into what reads the result, the sum would be computed once for each reader, and
# what gives its gradient once for each tap. Checkpointed: a residual per tap would be kept.
@functools.partial(outline, static_argnums=(2,))
@functools.partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)
def _shifted_products(lhs: jax.Array, rhs: jax.Array, windows: _Windows) -> jax.Array:
    lhs_spec, rhs_spec, out_spec = windows.dimension_numbers
    dtype = jnp.promote_types(lhs.dtype, np.float32)
    taps = [rhs.shape[axis] for axis in rhs_spec[2:]]
    kernel = rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0]).astype(dtype)
    kernel = kernel.reshape(math.prod(taps), -1)
    padding = dict(zip(lhs_spec[2:], windows.padding))
    config = [(*padding.get(axis, (0, 0)), 0) for axis in range(lhs.ndim)]
    images = jax.lax.pad(lhs, jnp.zeros((), lhs.dtype), config)
    images = jnp.repeat(images, kernel.shape[1] // lhs.shape[lhs_spec[1]], axis=lhs_spec[1])
    counts, stride = windows.counts(lhs.shape, rhs.shape), [1] * lhs.ndim
    for axis, step in zip(lhs_spec[2:], windows.strides):
        stride[axis] = step

    def term(weights: jax.Array, tap: tuple[int, ...]) -> jax.Array:
        start, limit = [0] * lhs.ndim, list(images.shape)
        for place, axis in enumerate(lhs_spec[2:]):
            start[axis] = tap[place] * windows.dilation[place]
            limit[axis] = start[axis] + (counts[place] - 1) * stride[axis] + 1
        part = jax.lax.slice(images, start, limit, stride).astype(dtype)
        return part * jax.lax.broadcast_in_dim(weights, part.shape, lhs_spec[1:2])

    terms = map(term, jnp.unstack(kernel), itertools.product(*map(range, taps)))
    total = functools.reduce(operator.add, terms)
    order = [source for _, source in sorted(zip(out_spec, lhs_spec))]
    return total.transpose(order).astype(windows.result or lhs.dtype)
