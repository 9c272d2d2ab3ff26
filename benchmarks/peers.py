"""The same work in other libraries: Qwix and AQT, as their users reach them.

Both are optional (`pip install aqt-search[bench]`) and imported where they are used. Each library
keeps its own defaults: Qwix and AQT give every row of the activations a scale of its own, and
AQT's bound is 2^(bits - 1) - 0.5. Qwix is used through models (`quantize_model`) and its public
operations, AQT through its configurations. Nothing of either library is patched.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MATRIX_PRODUCT = (((1,), (0,)), ((), ()))
NHWC = ("NHWC", "HWIO", "NHWC")
PACKAGES = {"Qwix": "qwix", "AQT": "aqt", "AQT mended": "aqt"}
Binary = Callable[[jax.Array, jax.Array], jax.Array]


def is_installed(column: str) -> bool:
    """Whether the library of a column can be imported; columns of no library always can."""
    package = PACKAGES.get(column)
    return package is None or importlib.util.find_spec(package) is not None


# Qwix: `dtype` is the numeric type of both operands, such as jnp.int8.


def qwix_model(model: nn.Module, dtype: Any) -> nn.Module:
    """A Linen model for quantized training, all operands in `dtype`, gradients in float."""
    import qwix

    rule = qwix.QtRule(module_path=".*", weight_qtype=dtype, act_qtype=dtype)
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def qwix_layer(layer: nn.Module, dtype: Any) -> Binary:
    """A layer without bias as a function of (x, kernel).

    Qwix tells weights by their shape: an x that is shaped like the kernel raises.
    """
    model = qwix_model(layer, dtype)
    return lambda x, kernel: model.apply({"params": {"kernel": kernel}}, x)


def qwix_dot(dtype: Any) -> Binary:
    """x times w by Qwix's operations, which have no gradient: a scale per row and per column."""
    import qwix

    def run(x, w):
        x = qwix.quantize(x, dtype, channelwise_axes=(0,))
        return qwix.dot_general(x, qwix.quantize(w, dtype, channelwise_axes=(1,)), MATRIX_PRODUCT)

    return run


def qwix_served_dot(weights: jax.Array, dtype: Any, bound: float | None) -> tuple[Callable, Any]:
    """A product of int8 activations and stored weights: a function of (x, stored), and `stored`.

    `bound` is the fixed bound of the activations; with None every row has its own.
    """
    import qwix

    stored = qwix.quantize(weights, dtype, channelwise_axes=(1,))
    if bound is None:
        how = {"channelwise_axes": (0,)}
    else:
        how = {"calibration_method": f"fixed,{-bound},{bound}"}

    def run(x, stored):
        return qwix.dot_general(qwix.quantize(x, jnp.int8, **how), stored, MATRIX_PRODUCT)

    return run, stored


# AQT: bits of both operands (an int, or "e4m3"); gradients are float.


def aqt_dot(bits: int | str) -> Callable:
    """A quantized `lax.dot_general`."""
    from aqt.jax.v2 import aqt_dot_general

    config = aqt_dot_general.dot_general_make(lhs_bits=bits, rhs_bits=bits)
    # A function: as a field of a Linen module the configuration itself would be copied.
    return lambda lhs, rhs, dimension_numbers, precision=None: config(
        lhs, rhs, dimension_numbers, precision
    )


def aqt_conv(bits: int, mended: bool, spatial_dimensions: int = 2) -> Callable:
    """A quantized `lax.conv_general_dilated`.

    AQT's convolution rounds without a gradient rule, so both gradients are exactly zero. Mended,
    its rounding is straight-through. Of four ways tried to mend it this one gives the fastest step.
    """
    from aqt.jax.v2 import aqt_conv_general

    config = aqt_conv_general.conv_general_dilated_make(spatial_dimensions, bits, bits)
    if mended:
        for quantizer in (config.dg_quantizer.lhs, config.dg_quantizer.rhs):
            quantizer.numerics = _straight_through(quantizer.numerics)
    quantized = aqt_conv_general.make_conv_general_dilated(config)

    def conv(lhs, rhs, strides, padding, *, dimension_numbers, **options):
        # AQT takes dimension numbers in lax's resolved form only.
        numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        return quantized(lhs, rhs, strides, padding, dimension_numbers=numbers, **options)

    return conv


def _straight_through(numerics: Any) -> Any:
    """AQT's integer numerics with the identity as gradient of clipping and rounding.

    Codes stay in float, which the convolution runs in anyway.
    """
    integer = type(numerics)

    class StraightThrough(integer):
        def vjp_fwd(self, x, context):
            codes, residual = integer.vjp_fwd(self, x, context)
            return x + jax.lax.stop_gradient(codes - x), residual

    fields = {field.name: getattr(numerics, field.name) for field in dataclasses.fields(numerics)}
    return StraightThrough(**fields | {"dtype": None})


def aqt_apply(model: nn.Module, bits: int, mended: bool) -> Callable:
    """`model.apply` with AQT's operations in the fields of its Dense and Conv layers."""
    fields = {
        nn.Dense: {"dot_general": aqt_dot(bits)},
        nn.Conv: {"conv_general_dilated": aqt_conv(bits, mended)},
    }

    def inject(next_fun, args, kwargs, context):
        layer = context.module
        injected = fields.get(type(layer))
        if injected is None or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if all(getattr(layer, name) is value for name, value in injected.items()):
            return next_fun(*args, **kwargs)
        copy = layer.clone(parent=None, **injected)
        return copy.apply({"params": layer.variables["params"]}, *args, **kwargs)

    def apply(*args, **kwargs):
        with nn.intercept_methods(inject):
            return model.apply(*args, **kwargs)

    return apply


def aqt_served_dot(weights: jax.Array, bits: int, bound: float | None) -> tuple[Callable, Any]:
    """A product of int8 activations and stored weights: a function of (x, stored), and `stored`.

    `bound` is the fixed bound of the activations; with None every row has its own.
    """
    from aqt.jax.v2 import aqt_dot_general, calibration

    config = aqt_dot_general.dot_general_make(lhs_bits=8, rhs_bits=bits).fwd
    if bound is not None:
        config.dg_quantizer.lhs.calibration = functools.partial(
            calibration.ConstantCalibration, bound=bound
        )
    config.dg_quantizer.init_calibration()
    stored, _ = config.dg_quantizer.rhs.quant(weights, calibration_axes=(0,))
    # AQT wants float weights beside stored ones, and uses only their shape and dtype.
    shape, dtype = weights.shape, weights.dtype

    def run(x, stored):
        return config(x, jnp.zeros(shape, dtype), None, stored, MATRIX_PRODUCT)[0]

    return run, stored
