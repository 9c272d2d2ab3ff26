"""Statistics of weights before and after quantization: what a format has to hold, what it loses.

    rows = weight_statistics(apply, assignment, variables, x)     # {site: WeightStatistics}

A weight whose largest value is many times its deviation has outliers, on which a format of few bits
spends its codes (R2-Loss: arXiv 2303.08253).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.formats import NumericFormat, code_values, leading_power, numeric_format
from aqt_search.numerics.granularity import join_blocks
from aqt_search.numerics.qtensor import concrete_format
from aqt_search.numerics.quantized import (
    calibrated,
    carrier_dtype,
    codes_of_tensor,
    in_one_format,
)
from aqt_search.numerics.quantizer import Quantizer, Recipe, quantizer
from aqt_search.numerics.signal_to_noise import noise_to_signal, sqnr_db
from aqt_search.tracing.control_flow import Path
from aqt_search.tracing.interpreter import MISSING, Held, Interpreter, Stacks, visit_bodies
from aqt_search.tracing.layers import by_stack, layer_indices, layer_name
from aqt_search.tracing.plans import Plan, init_states, make_plans, stacks_of
from aqt_search.tracing.sites import SIDES, Key, Site, SiteError, SiteFormats
from aqt_search.tracing.trace import Trace, is_array, trace_function
from aqt_search.tracing.transform import (
    Assignment,
    CalibrationState,
    check_assignment,
    flat_state,
)
from aqt_search.tracing.uniform_axes import one_of

# An outlier lies more than three deviations from the mean: 0.27 % of a normal distribution do.
OUTLIER_DEVIATIONS = 3.0
# An odd number, so that 0 is the middle of a bin; from bin to bin 1/21 of the range, in which the
# steps of int2 and int4 (1 and 7 to a side) are whole numbers of bins.
BINS = 43


class WeightStatistics(NamedTuple):
    """Of one weight w and of q, its values as served.

    What is not defined is None: range to deviation and kurtosis of a constant weight, all that is
    of q where w is not quantized, the codes of formats of more than 8 bits, and everything where w
    or q is not finite.
    """

    site: str
    operand: str  # which of the site's it is: "lhs" or "rhs"
    weights: int  # how many
    largest: float | None  # max|w|
    deviation: float | None  # std(w)
    range_to_deviation: float | None  # max|w| / std(w)
    kurtosis: float | None  # mean ((w - mean w) / std w)^4: of a normal distribution 3
    outliers: float | None  # share with |w - mean w| > OUTLIER_DEVIATIONS std(w)
    sqnr_db: float | None  # 20 log10(||w|| / ||w - q||); None, too, where nothing is lost
    clipped: float | None  # share more than half a step beyond the ends of the grid
    codes: int | None  # different codes of the format
    codes_used: int | None  # those of them that occur
    code_entropy: float | None  # of the shares of the codes, bits
    bound: float | None  # the largest of |w| and |q|
    before: list[int] | None  # histogram of w: BINS bins, centred at -bound, ..., 0, ..., bound
    after: list[int] | None  # histogram of q in the same bins


def weight_statistics(
    fun: Callable,
    assignment: Assignment,
    params: Any,
    *args: Any,
    state: CalibrationState | None = None,
    float_params: Any = None,
    **kwargs: Any,
) -> dict[str, WeightStatistics]:
    """Statistics of the weight of every site, as it enters the site's product.

    What is computed of parameters on the way (casts, weight standardization, LoRA sums) is part of
    the weight. Refused sites, weights of no elements and those that depend on what an earlier
    iteration of a loop left are no part of the result.

    Weights are quantized by programs that those of equal shapes share, whatever their formats.
    Sums are taken on the host, in float64: compiling them would take longer than they do.

    Args:
      fun, assignment, params, args, kwargs: as for `freeze`: formats must be concrete, data may be
        abstract.
      state: of `quantize_with_state(fun)`, for weights whose calibrations have one; the rest of it
        is not read.
      float_params: the parameters before they were put on a grid, as by AdaRound: w is then of
        these, q of `params`. None: both are of `params`.

    Returns:
      Statistics by site, in network order; inside of scans by "site[iteration]", of a scan in a
      scan "site[outer][inner]".

    Raises:
      SiteError: the assignment is not of this function; a weight's calibration has state, and none
        is given.
      FormatError: a format is traced.
      ValueError: `float_params` has not the leaves of `params`.
    """
    trace = trace_function(fun, params, args, kwargs, {})
    check_assignment(assignment, trace.sites)
    quantizers = _weight_quantizers(trace, assignment)
    concrete = _as_assignment(trace, quantizers)
    plans = make_plans(trace, concrete, None)
    states = _weight_states(trace, plans, state or {})
    stacks = stacks_of(trace.sites, concrete)
    weights = before = _operands(trace, plans, stacks, params)
    if float_params is not None:
        _check_alike(float_params, params)
        before = _operands(trace, plans, stacks, float_params)
    found = {}
    for key in (key for key in quantizers if key in weights):
        scans = [path for other, path in sorted(stacks, key=lambda pair: pair[1]) if other == key]
        tensors = before[key], (weights[key], states.get(key, ()))
        if plans[key].layers:
            parts = _layers(trace.sites[key[0]], scans, tensors)
            each = list(zip(plans[key].layers, quantizers[key]))
        else:
            parts, each = [(key[0], tensors, len(scans))], [(plans[key], quantizers[key][0])]
        for (name, (weight, tensors), loops), (plan, spec) in zip(parts, each):
            quantized = None
            if spec is not None:
                own = dataclasses.replace(plan.quantizer, fmt=_as_arrays(plan.quantizer.fmt))
                quantized = _served(*tensors, own, plan.how, loops)
            for label, w, served in _slices(name, weight, quantized, loops):
                found[label] = _statistics(key, w, served, plan.quantizer.fmt)
    return found


def _layers(site: Site, scans: Sequence[Path], tensors: Any) -> list[tuple[str, Any, int]]:
    """(name, what a layer takes of tensors stacked by scans, 0) of each layer."""
    found = []
    for index in layer_indices(site):
        of_scans = dict(zip((path for path, _ in site.layers), index))
        place = tuple(of_scans[path] for path in scans)
        own = jax.tree.map(lambda leaf, p=place: leaf[p], tensors)
        found.append((layer_name(site.name, index), own, 0))
    return found


# --- Finding the weights --------------------------------------------------------------------------


# By site and operand: one for all, or one for each layer of a stack; None: it is not quantized.
Quantizers = dict[Key, tuple[Quantizer | None, ...]]


def _weight_quantizers(trace: Trace, assignment: Assignment) -> Quantizers:
    """How every weight is quantized."""
    assigned, chosen = by_stack(assignment, trace.sites), Quantizers()
    for name, site in trace.sites.items():
        if site.weight is None or site.weight.size == 0 or site.refused:
            continue
        side = next(s for s in reversed(SIDES) if getattr(site, s) is site.weight)
        specs = [getattr(formats, side) for formats in assigned.get(name, (SiteFormats(),))]
        chosen[name, side] = tuple(spec if spec is None else _concrete(spec) for spec in specs)
    return chosen


def _concrete(spec: Any) -> Quantizer:
    q = quantizer(spec)
    return dataclasses.replace(q, fmt=concrete_format(q.fmt, "weight_statistics"))


def _as_assignment(trace: Trace, quantizers: Quantizers) -> dict[str, SiteFormats]:
    """A format for each weight: those without one would not be found."""
    found = {}
    for (name, side), specs in quantizers.items():
        indices = layer_indices(trace.sites[name]) if len(specs) > 1 else [()]
        given = any(spec is not None for spec in specs)
        for index, q in zip(indices, specs):
            # A layer without one takes what the others' quantizers make of it.
            spec = q if given else numeric_format("fp32")
            found[layer_name(name, index)] = SiteFormats(**{side: spec})
    return found


def _weight_states(
    trace: Trace, plans: Mapping[Key, Plan], state: CalibrationState
) -> dict[Key, Any]:
    held = flat_state(state)
    for name, field in init_states(trace, plans):
        if (name, field) not in held:
            raise SiteError(
                f"Site {name!r}: the calibration of {field} has state, and none was given. Pass"
                " state=..., as quantize_with_state(fun).apply returned it."
            )
    return {key: held[key] for key in held if key in plans}


def _operands(
    trace: Trace, keys: Collection[Key], stacks: Stacks, params: Any
) -> dict[Key, jax.Array]:
    """Weights of sites as they enter them, one where the batch repeats them.

    Inside of scans a stack, if each iteration has one.
    """
    known = [leaf for leaf in jax.tree.leaves(params) if is_array(leaf)]
    inputs = [*known, *[MISSING] * (len(trace.inputs) - len(known))]

    def at_site(name, eqn, operands, held):
        found = {}
        for side, x in zip(trace.sites[name].equation_sides, operands):
            key, operand = (name, side), getattr(trace.sites[name], side)
            if key in keys and not held.is_stacked(key):
                found[key] = x if x is MISSING else one_of(x, operand.uniform)
        return [MISSING] * len(eqn.outvars), found

    names = {name for name, _ in keys}
    trace = trace._replace(inputs=inputs)
    found = Interpreter(trace, names, at_site, visit_bodies).run(Held({}, {}, stacks))[1]
    return {key: x for key, x in found.items() if x is not MISSING}


def _check_alike(float_params: Any, params: Any) -> None:
    first, second = (
        (jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (float_params, params)
    )
    if first != second:
        raise ValueError(
            "float_params must have the leaves of params, in the same shapes: give the tree that"
            " the quantized parameters were made of."
        )


# --- One weight -----------------------------------------------------------------------------------


class _Served(NamedTuple):
    """A weight as served."""

    values: np.ndarray | jax.Array  # of the weight's shape
    codes: np.ndarray | jax.Array  # the same, bfloat16, which holds those of 8 bits or fewer
    clipped: np.ndarray | jax.Array  # the same, bool


def _as_arrays(fmt: NumericFormat) -> NumericFormat:
    """The format as arrays: one compiled program serves all formats."""
    dtypes = (np.int32, np.int32, np.float32, np.float32, np.int32)
    return NumericFormat(*(np.asarray(field, dtype) for field, dtype in zip(fmt, dtypes)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _served(weight, state, q: Quantizer, how: Recipe, loops: int) -> _Served:
    """Quantizes a weight, or under `loops` leading axes a stack of them."""

    def one(weight, state) -> _Served:
        tensor, _ = calibrated(in_one_format(weight, q, how), state, update=False)
        grid = tensor.grid()
        found = codes_of_tensor(tensor, grid)
        steps = tensor.blocks() * (1 / found.scale.value())
        if found.scale.zero_point is not None:
            steps = steps + found.scale.zero_point
        # Beyond half of the last step no rounding explains it.
        slack = 0.501 * leading_power(grid.max_value) * grid.step
        clipped = (steps > grid.max_value + slack) | (steps < grid.min_value - slack)
        parts = found.values().astype(weight.dtype), found.codes.astype(jnp.bfloat16), clipped
        return _Served(*(join_blocks(p, how.granularity, weight.shape) for p in parts))

    for _ in range(loops):
        one = jax.vmap(one)
    return one(weight, state)


def _slices(
    site: str, weight: jax.Array, quantized: _Served | None, loops: int
) -> Iterator[tuple[str, np.ndarray, _Served | None]]:
    """(label, weight, quantized weight) of a site, or of its every iteration."""
    weight, quantized = jax.device_get((weight, quantized))
    for place in np.ndindex(*weight.shape[:loops]):
        label = layer_name(site, place)
        w, q = jax.tree.map(lambda leaf, place=place: leaf[place], (weight, quantized))
        yield label, w, q


def _statistics(
    key: Key, w: np.ndarray, quantized: _Served | None, fmt: NumericFormat
) -> WeightStatistics:
    carrier = carrier_dtype(w.dtype)
    w, q = w.astype(carrier), None if quantized is None else np.asarray(quantized.values, carrier)
    known = [x for x in (w, q) if x is not None]
    found: dict[str, Any] = dict.fromkeys(WeightStatistics._fields)
    found |= {"site": key[0], "operand": key[1], "weights": w.size}
    if not all(np.isfinite(x).all() for x in known):
        return WeightStatistics(**found)
    bound = float(max(np.max(np.abs(x)) for x in known))
    found |= _spread(w) | {"bound": bound, "before": _histogram(w, bound)}
    if quantized is not None and q is not None:
        found["sqnr_db"] = _number(sqnr_db(noise_to_signal(w, q)))
        found["clipped"] = float(np.mean(quantized.clipped))
        found["after"] = _histogram(q, bound)
        if fmt.bits <= 8:
            found |= _code_use(np.asarray(quantized.codes), fmt)
    return WeightStatistics(**found)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _spread(w: np.ndarray) -> dict[str, float]:
    """How far the values lie apart, and how many far out."""
    largest = float(np.max(np.abs(w)))
    if np.ptp(w) == 0:
        return {"largest": largest, "deviation": 0.0, "outliers": 0.0}
    # In units of the largest, so that no power overflows.
    centred = w / largest - np.mean(w / largest, dtype=np.float64)
    square = np.square(centred)
    variance = np.mean(square)
    return {
        "largest": largest,
        "deviation": float(largest * np.sqrt(variance)),
        "range_to_deviation": float(1 / np.sqrt(variance)),
        "kurtosis": float(np.mean(np.square(square)) / variance**2),
        "outliers": float(np.mean(square > OUTLIER_DEVIATIONS**2 * variance)),
    }


def _code_use(codes: np.ndarray, fmt: NumericFormat) -> dict[str, Any]:
    """How many codes there are and occur, and the entropy of their shares."""
    values = code_values(fmt)
    # Adding 0 makes -0 one code with 0; the 16 bits of a bfloat16 number index a table.
    counts = np.bincount((codes + codes.dtype.type(0)).view(np.uint16).ravel())
    shares = counts[counts > 0] / codes.size
    return {
        "codes": np.unique(values[np.isfinite(values)]).size,
        "codes_used": shares.size,
        "code_entropy": float(np.sum(shares * np.log2(1 / shares))),
    }


def _histogram(x: np.ndarray, bound: float) -> list[int]:
    """Counts in BINS bins whose centres go from -bound to bound."""
    half = BINS // 2
    place = np.rint(x / (bound or 1.0) * half).astype(int) + half
    return np.bincount(place.ravel(), minlength=BINS).tolist()
