"""Which values of a jaxpr are known never to be negative: one rule per primitive.

Such a value can be stored unsigned: with the sign's bit left to the magnitude. The rules hold in
floating-point arithmetic, with rounding, underflow and overflow to infinity. NaN and -0.0 count as
non-negative, and nothing is said of a division by zero. A primitive without a rule gives False.
`aqt_search.tracing.sites` applies the rules along a function and enters the jaxprs that equations
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

_LARGEST_CONSTANT = 4096  # elements; larger ones are not read
_KNOWN = (bool, int, float, np.generic, np.ndarray, jax.Array)

# Never negative on real numbers, whatever the operand.
_ALWAYS = ("abs", "exp", "exp2", "logistic", "rsqrt", "sqrt", "square")
# Not negative if no operand is.
_ALL = ("add", "add_any", "concatenate", "div", "min", "pad", "stack")
# Not negative if the first operand is not: its elements moved, summed up, or mapped by a function
# that keeps the sign. (The others are indices.)
_FIRST = (
    *("broadcast_in_dim", "copy", "dynamic_slice", "name", "reshape", "rev", "sharding_constraint"),
    *("slice", "split", "squeeze", "stop_gradient", "tile", "top_k", "transpose", "unstack"),
    *("cummax", "cummin", "cumprod", "cumsum", "reduce_min", "reduce_prod", "reduce_sum"),
    *("reduce_precision", "reduce_window_min", "reduce_window_sum"),
    *("ceil", "erf", "expm1", "floor", "log1p", "round", "sign", "tanh"),
)
# Each result like the operand at its place.
_EACH = ("device_put", "optimization_barrier", "sort")
# Where signed integers may leave their range and come back negative.
_WRAPS = (
    *("abs", "add", "add_any", "cumprod", "cumsum", "integer_pow", "mul", "pow", "reduce_prod"),
    *("reduce_sum", "reduce_window_sum", "scatter-add", "scatter-mul", "square"),
)


def is_unsigned(aval) -> bool:
    """Whether values of this type cannot be negative: unsigned integers and booleans."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.unsignedinteger)
    )


def is_nonnegative_constant(value) -> bool:
    """Whether no element of a known value is < 0; False for one that is large or not at hand."""
    # Leaves out tracers, and references, whose content changes.
    known = isinstance(value, _KNOWN) and not isinstance(value, jax.core.Tracer)
    if not known or np.size(value) > _LARGEST_CONSTANT:
        return False
    if not getattr(value, "is_fully_addressable", True):
        return False
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        return False
    with np.errstate(invalid="ignore"):  # NaN
        return not np.any(np.asarray(value) < 0)


def nonnegative_results(eqn: jex_core.JaxprEqn, inputs: Sequence[bool]) -> list[bool]:
    """Which results of an equation are known never to be negative.

    Args:
      eqn: the equation; of the jaxprs it may hold nothing is known here.
      inputs: which of its operands are known never to be negative.

    Returns:
      A bool for every result; False if it is not known.
    """
    name = eqn.primitive.name
    if name in _EACH:
        flags = list(inputs)
    else:
        rule = _RULES.get(name)
        flags = [rule is not None and rule(eqn, inputs)] * len(eqn.outvars)
    return [
        is_unsigned(v.aval) or (flag and _rules_hold(name, v.aval))
        for flag, v in zip(flags, eqn.outvars, strict=True)
    ]


def _rules_hold(name: str, aval) -> bool:
    if jnp.issubdtype(aval.dtype, jnp.integer):
        return name not in _WRAPS
    return jnp.issubdtype(aval.dtype, jnp.floating)


# --- Rules that look at more than which operands are non-negative ---------------------------------


def _clamp(eqn, inputs) -> bool:
    low, x, high = inputs
    return high and (low or x)


def _convert(eqn, inputs) -> bool:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(new, jnp.integer):
        return inputs[0]
    # Out of the new type's range an integer wraps around; a float does what the backend does.
    fits = jnp.issubdtype(old, jnp.bool_) or (
        jnp.issubdtype(old, jnp.integer) and jnp.iinfo(old).max <= jnp.iinfo(new).max
    )
    return inputs[0] and fits


def _gather(eqn, inputs) -> bool:
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return inputs[0]
    fill = eqn.params["fill_value"]
    if fill is None:  # NaN, or the least integer
        return inputs[0] and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return inputs[0] and is_nonnegative_constant(fill)


def _integer_pow(eqn, inputs) -> bool:
    return inputs[0] or eqn.params["y"] % 2 == 0


def _iota(eqn, inputs) -> bool:
    aval = eqn.outvars[0].aval
    if not jnp.issubdtype(aval.dtype, jnp.integer):
        return True
    return aval.shape[eqn.params["dimension"]] - 1 <= jnp.iinfo(aval.dtype).max


def _mul(eqn, inputs) -> bool:
    return all(inputs) or eqn.invars[0] is eqn.invars[1]


def _pow(eqn, inputs) -> bool:
    exponent = eqn.invars[1]
    is_even = isinstance(exponent, jex_core.Literal) and np.all(np.asarray(exponent.val) % 2 == 0)
    return inputs[0] or bool(is_even)


def _reduce_max(eqn, inputs) -> bool:
    return inputs[0] and eqn.invars[0].aval.size > 0  # the maximum of nothing is -inf


def _reduce_window_max(eqn, inputs) -> bool:
    """Every window has to reach an element: the maximum of padding alone is -inf."""
    params = eqn.params
    dimensions = zip(
        eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, params["window_dimensions"],
        params["window_strides"], params["padding"], params["base_dilation"],
        params["window_dilation"], strict=True,
    )  # fmt: skip
    return inputs[0] and all(_windows_reach(*dimension) for dimension in dimensions)


def _windows_reach(size, windows, taps, stride, padding, base_dilation, window_dilation) -> bool:
    starts = stride * np.arange(windows)[:, None] - padding[0]
    positions = starts + window_dilation * np.arange(taps)
    inside = (positions >= 0) & (positions <= (size - 1) * base_dilation)
    return bool(np.all(np.any(inside & (positions % base_dilation == 0), axis=1)))


_RULES: dict[str, Callable[[jex_core.JaxprEqn, Sequence[bool]], bool]] = {
    **dict.fromkeys(_ALWAYS, lambda eqn, inputs: True),
    **dict.fromkeys(_ALL, lambda eqn, inputs: all(inputs)),
    **dict.fromkeys(_FIRST, lambda eqn, inputs: inputs[0]),
    "clamp": _clamp,
    "convert_element_type": _convert,
    "dynamic_update_slice": lambda eqn, inputs: inputs[0] and inputs[1],
    "gather": _gather,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "max": lambda eqn, inputs: any(inputs),
    "mul": _mul,
    "pow": _pow,
    "reduce_max": _reduce_max,
    "reduce_window_max": _reduce_window_max,
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter-mul"), lambda eqn, inputs: inputs[0] and inputs[2]
    ),
    "select_n": lambda eqn, inputs: all(inputs[1:]),
}
