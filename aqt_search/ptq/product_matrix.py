"""Products as matrix products: patches times a kernel, rows times columns.

    out[g, row, o] = sum_k inputs[g, row, k] weight[g, o, k]

g counts groups (feature groups of a convolution, batch axes of a dot_general), a row is an example
at one place of the output, o an output channel of the group, k an element of a patch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp

from aqt_search.tracing.origins import array_type


class ProductMatrix(NamedTuple):
    """The axes of a product whose one operand is a weight, rearranged; elements are only moved."""

    inputs: Callable[[jax.Array], jax.Array]  # the other operand to [groups, rows, patch]
    weight: Callable[[jax.Array], jax.Array]  # the weight to [groups, outputs, patch]
    outputs: Callable[[jax.Array], jax.Array]  # the product to [groups, rows, outputs]


class NoMatrix(Exception):
    """A product that has no such form; the message says why."""


def product_matrix(eqn: jex_core.JaxprEqn, weight_side: int) -> ProductMatrix:
    """The matrix form of a dot_general or a convolution with the weight on `weight_side`.

    Raises:
      NoMatrix: a product of another kind, or a convolution with batch groups or whose weight is its
        left operand.
    """
    if eqn.primitive.name == "dot_general":
        return _of_contraction(eqn, weight_side)
    if eqn.primitive.name != "conv_general_dilated":
        raise NoMatrix(f"a {eqn.primitive.name} is a product for each of its groups")
    if weight_side == 0:
        raise NoMatrix("its weight is the left operand of a convolution")
    if eqn.params["batch_group_count"] > 1:
        raise NoMatrix("it is a convolution with batch groups")
    return _of_convolution(eqn)


def _of_contraction(eqn: jex_core.JaxprEqn, weight_side: int) -> ProductMatrix:
    contracting, batch = eqn.params["dimension_numbers"]

    def to_matrix(side: int) -> Callable[[jax.Array], jax.Array]:
        shape = array_type(eqn.invars[side]).shape
        fixed = (*batch[side], *contracting[side])
        free = [axis for axis in range(len(shape)) if axis not in fixed]
        order = (*batch[side], *free, *contracting[side])
        groups, patch = (
            math.prod(shape[a] for a in axes) for axes in (batch[side], contracting[side])
        )
        return lambda x: x.transpose(order).reshape(groups, -1, patch)

    lhs, rhs = to_matrix(0), to_matrix(1)
    weight = rhs if weight_side == 1 else lhs
    groups, columns, _ = jax.eval_shape(weight, eqn.invars[weight_side].aval).shape

    def outputs(out: jax.Array) -> jax.Array:
        # The product's axes are those of the batch, then what is free of lhs, then of rhs.
        if weight_side == 1:
            return out.reshape(groups, -1, columns)
        return out.reshape(groups, columns, -1).swapaxes(1, 2)

    return ProductMatrix(lhs if weight_side == 1 else rhs, weight, outputs)


def _of_convolution(eqn: jex_core.JaxprEqn) -> ProductMatrix:
    lhs_spec, rhs_spec, out_spec = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    kernel = array_type(eqn.invars[1]).shape
    taps = [kernel[axis] for axis in rhs_spec[2:]]
    features = kernel[rhs_spec[1]]  # of one group

    def inputs(x: jax.Array) -> jax.Array:
        x = x.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
        found = _patches(x, taps, eqn.params)  # [batch, *places, taps, all features]
        found = found.reshape(-1, math.prod(taps), groups, features)
        return found.transpose(2, 0, 1, 3).reshape(groups, -1, math.prod(taps) * features)

    def weight(w: jax.Array) -> jax.Array:
        w = w.transpose(rhs_spec[0], *rhs_spec[2:], rhs_spec[1])
        return w.reshape(groups, -1, math.prod(taps) * features)

    def outputs(y: jax.Array) -> jax.Array:
        y = y.transpose(out_spec[0], *out_spec[2:], out_spec[1])
        return y.reshape(-1, groups, y.shape[-1] // groups).swapaxes(0, 1)

    return ProductMatrix(inputs, weight, outputs)


def _patches(x: jax.Array, taps: Sequence[int], params) -> jax.Array:
    """What each tap of a kernel meets: [batch, *places, taps, features].

    x is [batch, *space, features]. Slices, because `conv_general_dilated_patches` is slow on CPU.
    """
    spread = [
        (low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"])
    ]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    # How far the kernel can move along each axis.
    slack = [n - (t - 1) * d - 1 for n, t, d in zip(x.shape[1:-1], taps, dilation)]
    found = []
    for tap in itertools.product(*map(range, taps)):
        start = [t * d for t, d in zip(tap, dilation)]
        stop = [first + far + 1 for first, far in zip(start, slack)]
        limits = (0, *start, 0), (x.shape[0], *stop, x.shape[-1])
        found.append(jax.lax.slice(x, *limits, (1, *strides, 1)))
    return jnp.stack(found, axis=-2)
