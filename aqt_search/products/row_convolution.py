"""Convolution as matrix products over rows, for integer codes on CPU.

The taps along the last spatial axis are laid side by side, so that each of the remaining taps
(three for a 3 x 3 kernel) is one matrix product over taps times input features. XLA:CPU runs an
int8 convolution of 64 channels on 16 x 16 images in 0.77 times the float32 time, and this in 0.46
times; of 16 channels on 32 x 32 in 7.8 and 2.0 times. In floating point the convolution is faster.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.symbolic import certainly

MOST_TAPS = 49  # each is a few operations to compile


def applies(params: Mapping[str, Any], lhs_shape: Sequence[int], rhs_shape: Sequence[int]) -> bool:
    """Whether a convolution with these parameters of its primitive has a form over rows."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    ndim = len(lhs_spec)
    features_last = lhs_spec == out_spec == (0, ndim - 1, *range(1, ndim - 1))
    groups = params["feature_group_count"], params["batch_group_count"]
    padded = certainly(lambda: all(low >= 0 and high >= 0 for low, high in params["padding"]))
    if not (ndim > 2 and features_last and groups == (1, 1) and padded):
        return False
    taps = [rhs_shape[axis] for axis in rhs_spec[2:]]
    few = certainly(lambda: 0 < math.prod(taps) <= MOST_TAPS)
    return few and certainly(lambda: all(n > 0 for n in _counts(params, lhs_shape, taps)))


def _counts(params: Mapping[str, Any], lhs_shape: Sequence[int], taps: Sequence[int]) -> list[int]:
    """Positions of the kernel along each spatial axis."""
    padded = [
        max((n - 1) * dilation + 1, 0) + low + high
        for n, dilation, (low, high) in zip(
            lhs_shape[1:-1], params["lhs_dilation"], params["padding"]
        )
    ]
    return [
        (n - (k - 1) * dilation - 1) // stride + 1
        for n, k, dilation, stride in zip(
            padded, taps, params["rhs_dilation"], params["window_strides"]
        )
    ]


def row_convolution(
    lhs: jax.Array, rhs: jax.Array, params: Mapping[str, Any], accumulate: np.dtype
) -> jax.Array:
    """`conv_general_dilated` of channels-last images, summed in `accumulate`.

    Args:
      lhs: [N, *spatial, C].
      rhs: a kernel laid out as `params["dimension_numbers"]` say.
      params: of the primitive; `applies(params)` holds.
      accumulate: the result's dtype.

    Returns:
      [N, *spatial, O].
    """
    out_features, features, *spatial = params["dimension_numbers"].rhs_spec
    kernel = rhs.transpose(*spatial, features, out_features)
    *taps, width = kernel.shape[:-2]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    interior = [d - 1 for d in params["lhs_dilation"]]
    config = [(0, 0, 0), *((*p, i) for p, i in zip(params["padding"], interior)), (0, 0, 0)]
    padded = jax.lax.pad(lhs, jnp.zeros((), lhs.dtype), config)
    counts = _counts(params, lhs.shape, kernel.shape[:-2])

    def rows(x, axis, tap):
        start, stride = tap * dilation[axis], strides[axis]
        limit = start + (counts[axis] - 1) * stride + 1
        return jax.lax.slice_in_dim(x, start, limit, stride, axis=axis + 1)

    last = len(taps)
    columns = jnp.concatenate([rows(padded, last, tap) for tap in range(width)], -1)

    def term(place: tuple[int, ...]) -> jax.Array:
        part = columns
        for axis, tap in enumerate(place):
            part = rows(part, axis, tap)
        weights = kernel[place].reshape(math.prod(kernel.shape[last:-1]), kernel.shape[-1])
        return jax.lax.dot_general(
            part, weights, (((part.ndim - 1,), (0,)), ((), ())), preferred_element_type=accumulate
        )

    return functools.reduce(operator.add, map(term, itertools.product(*map(range, taps))))
