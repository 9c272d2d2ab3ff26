"""Gradient rules: what stands for the derivative of rounding, which is zero almost everywhere.

Quantizer("int2", gradient=ewgs(0.02))
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class GradientRule(NamedTuple):
    """The derivative of quantizing x with respect to x."""

    clips: bool = True  # whether it is 0 outside of the bounds, or 1 there, too
    error_scaling: float = 0.0  # EWGS's delta; 0 for none


# Bengio et al. 2013, arXiv 1308.3432: 1 inside of the bounds, as of a clipped identity.
STRAIGHT_THROUGH = GradientRule()
# 1 everywhere, as DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160) has it for weights: what is
# clipped still moves.
PASS_THROUGH = GradientRule(clips=False)


def ewgs(delta: float, *, clips: bool = True) -> GradientRule:
    """Element-wise gradient scaling (Lee et al. 2021, arXiv 2104.00903, equation 4).

        dL/dx = g * (1 + delta * sign(g) * (x - y) / (high - low)),   g = dL/dy

    A gradient that would take x further from its rounded value y counts for less, one that would
    bring it there for more. Errors are in units of the range of the format, so that delta has the
    paper's meaning. The rule depends on the sign of g: there is no forward derivative.

    Args:
      delta: at least 0; the paper takes 1e-3 on ImageNet.
      clips: whether the gradient is 0 outside of the bounds.

    Raises:
      ValueError: a delta that is below 0 or not finite.
    """
    if not 0 <= delta < math.inf:
        raise ValueError(f"ewgs takes a finite delta of at least 0; got {delta}.")
    return GradientRule(clips, float(delta))


@jax.custom_vjp
def scaled_by_error(x: jax.Array, error: jax.Array, delta: float) -> jax.Array:
    """x, with the gradient g of it replaced by g * (1 + delta * sign(g) * error)."""
    return x


def _forward(x, error, delta):
    return x, (error, delta)


def _backward(saved, g):
    error, delta = saved
    scaled = g * (1 + delta * jnp.sign(g) * error)
    return scaled.astype(g.dtype), jnp.zeros_like(error), jnp.zeros_like(jnp.asarray(delta))


scaled_by_error.defvjp(_forward, _backward)
