"""One contract table: formats x granularities x calibrations x operations x executions.

The full product has millions of rows, so `CASES` holds every pair of values of two axes at least
once. Each case is one compiled function, and all its contracts are read off one call.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs

# What XLA makes of the programs is not the question here: what compiles fastest will do.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0},
)


def sample(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- Operations -----------------------------------------------------------------------------------


class Operation(NamedTuple):
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    quantized: Any  # (lhs, rhs, **formats) -> result
    plain: Any  # (lhs, rhs) -> result, by lax
    contracting: tuple[tuple[int, ...], tuple[int, ...]]  # blocks run along the last
    terms: int  # products summed per output


def dot(lhs, rhs, contracting, batch, terms):
    dimensions = contracting, batch
    return Operation(
        (lhs, rhs),
        lambda a, b, **formats: aqs.dot_general(a, b, dimensions, **formats),
        lambda a, b: jax.lax.dot_general(a, b, dimensions),
        contracting, terms,
    )  # fmt: skip


def einsum(subscripts, lhs, rhs, contracting, terms):
    return Operation(
        (lhs, rhs),
        lambda a, b, **formats: aqs.einsum(subscripts, a, b, **formats),
        lambda a, b: jnp.einsum(subscripts, a, b),
        contracting, terms,
    )  # fmt: skip


def convolution(lhs, rhs, **further):
    spatial = "DHW"[3 - (len(lhs) - 2) :]
    arguments = {
        "window_strides": (1,) * len(spatial),
        "padding": [(1, 2)] * len(spatial),
        "dimension_numbers": (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        **further,
    }
    return Operation(
        (lhs, rhs),
        lambda a, b, **formats: aqs.conv_general_dilated(a, b, **arguments, **formats),
        lambda a, b: jax.lax.conv_general_dilated(a, b, **arguments),
        (tuple(range(1, len(lhs))), tuple(range(len(rhs) - 1))),
        int(np.prod(rhs[:-1])),
    )


ROWS = np.array([[2, 0], [1, 1], [3, -1]], np.int32)
OPERATIONS = {
    "fake_quant": Operation(
        ((4, 4), (4,)),
        lambda a, b, lhs_format, **_: aqs.fake_quant(a, lhs_format),
        lambda a, b: a + 0 * b.sum(),
        ((1,), (0,)), 0,
    ),
    "take": Operation(
        ((4, 4), (4,)),
        lambda a, b, lhs_format, **_: aqs.take(a, ROWS, table_format=lhs_format),
        lambda a, b: jnp.take(a, ROWS, axis=0) + 0 * b.sum(),
        ((1,), (0,)), 0,
    ),
    "dot": dot((3, 4), (4, 5), ((1,), (0,)), ((), ()), 4),
    "batched dot": dot((2, 3, 3, 4), (3, 2, 4, 2), ((1, 3), (0, 2)), ((0,), (1,)), 12),
    "einsum": einsum("bqhd,bhdk->bhqk", (2, 3, 2, 4), (2, 2, 4, 2), ((3,), (2,)), 4),
    "convolution": convolution((1, 5, 4, 4), (3, 2, 4, 3)),
    "strided, dilated 3-D": convolution(
        (1, 5, 3, 4, 4), (2, 1, 2, 4, 2), rhs_dilation=(2, 1, 2), window_strides=(2, 1, 1)
    ),
    "depthwise 1-D": convolution((2, 7, 4), (3, 1, 4), feature_group_count=4),
    "transposed, grouped": convolution(
        (1, 3, 3, 4), (2, 2, 2, 6), lhs_dilation=(2, 2), feature_group_count=2
    ),
}  # fmt: skip
CONVOLUTIONS = list(OPERATIONS)[5:]


# --- The other axes -------------------------------------------------------------------------------

# Formats of lhs and rhs; those of a name with "traced" are arguments of the compiled function.
FORMATS = {
    "int2 x uint4": ("int2", "uint4"),
    "int8 x int4": ("int8", "int4"),
    "uint8 x int8": ("uint8", "int8"),
    "e2m1 x e5m2": ("e2m1", "e5m2"),
    "e4m3 x e2m1": ("e4m3", "e2m1"),
    "bf16 x int8": ("bf16", "int8"),
    "traced int8 x int3": ("int8", "int3"),
    "traced e4m3 x e2m3": ("e4m3", "e2m3"),
}
GRANULARITIES = {
    "per tensor": (aqs.PER_TENSOR, aqs.PER_TENSOR),
    "per channel": (aqs.PER_CHANNEL, aqs.PER_CHANNEL),
    "per token": (aqs.PER_TOKEN, aqs.PER_CHANNEL),
    "named axes": (aqs.per_channel(0), aqs.per_channel(-1)),
    "contracted axis": (aqs.per_channel(-1), aqs.PER_CHANNEL),
    "blocks": (aqs.per_block(2), aqs.per_block(2)),
    "short blocks": (aqs.per_block(3), aqs.per_block(3)),
}
CALIBRATIONS = {
    "absmax": aqs.absmax(),
    "min_max": aqs.min_max(),
    "percentile": aqs.percentile(80.0),
    "mean_deviation": aqs.mean_deviation(0.5, 1.0),
    "mse": aqs.mse(5),
    "fixed": aqs.fixed(1.5, -0.5),
    "moving_average": aqs.moving_average(aqs.absmax()),
    "running_max": aqs.running_max(aqs.absmax()),
    "delayed": aqs.delayed(aqs.absmax(), 2),
    "frozen_after": aqs.frozen_after(aqs.moving_average(aqs.absmax()), 1),
}
ASYMMETRIC = ("min_max", "fixed")
AXES = {
    "operation": tuple(OPERATIONS),
    "formats": tuple(FORMATS),
    "calibration": tuple(CALIBRATIONS),
    "granularity": tuple(GRANULARITIES),
    "execution": ("emulated", "native", "int8", "fp8", "bf16", "auto"),
    "scale_format": ("float32", "e8m0", "e4m3"),
    "rounding": ("nearest_even", "stochastic", "floor"),
    "edge": ("max_value", "half_step"),
}


class Case(NamedTuple):
    operation: str
    formats: str
    calibration: str
    granularity: str
    execution: str
    scale_format: str
    rounding: str
    edge: str

    def __str__(self):
        return ", ".join(self)


def is_refused(case):
    """Whether the execution has no form for the product, as `dot_general` documents."""
    if case.execution in ("emulated", "auto"):
        return False
    asymmetric = case.calibration in ASYMMETRIC
    # The transformation sees the dot_general inside of an einsum.
    dot = case.operation == "dot" or (case.operation == "einsum" and has_state(case))
    return (
        case.granularity == "contracted axis"
        or ("blocks" in case.granularity and (asymmetric or not dot))
        or (case.operation in CONVOLUTIONS and asymmetric)
    )


def does_not_fit(case):
    """Whether no carrier of the execution's dtype holds the formats."""
    if case.execution == "int8":
        return not all("int" in name for name in FORMATS[case.formats])
    return case.execution == "fp8" and ("int8" in case.formats or "bf16" in case.formats)


def has_state(case):
    return CALIBRATIONS[case.calibration].read is not None


def exists(case):
    """Whether there is such a case: what quantizers refuse is tested beside them."""
    if case.operation in ("fake_quant", "take") and case.execution != "emulated":
        return False
    if has_state(case) and (case.operation == "take" or case.granularity == "per token"):
        return False
    if case.calibration in ASYMMETRIC and case.scale_format == "e4m3":
        return False  # scales in two levels go with no zero point
    short = case.granularity == "short blocks" or (
        case.granularity == "blocks" and case.operation == "depthwise 1-D"
    )
    return not (short and case.calibration in ("percentile", "mean_deviation"))


def pairwise(axes, accept, draws=40000):
    """Cases that hold every pair of values of two axes, as far as an accepted case has it."""
    rng = np.random.default_rng(0)
    pool = np.stack([rng.integers(len(values), size=draws) for values in axes.values()], 1)
    cases = [Case(*(v[i] for v, i in zip(axes.values(), row))) for row in pool]
    keep = [n for n, case in enumerate(cases) if accept(case)]
    pool, cases = pool[keep], [cases[n] for n in keep]
    pairs = list(itertools.combinations(range(len(axes)), 2))
    ids = np.stack([(n * 16 + pool[:, a]) * 16 + pool[:, b] for n, (a, b) in enumerate(pairs)], 1)
    uncovered = np.zeros(len(pairs) * 256, bool)
    uncovered[ids] = True
    chosen, slow = [], np.array([0.5 * (case.rounding == "stochastic") for case in cases])
    while uncovered.any():
        best = int(np.argmax(uncovered[ids].sum(1) - slow))
        chosen.append(cases[best])
        uncovered[ids[best]] = False
    return chosen


CASES = pairwise(AXES, lambda c: exists(c) and not is_refused(c) and not does_not_fit(c))


# --- The contracts --------------------------------------------------------------------------------

BATCH = ("normal", "integers", "zero", "huge", "nan", "infinite")


def quantizers(case, formats):
    """The quantizers of lhs and rhs."""
    return [
        aqs.Quantizer(
            fmt, granularity, CALIBRATIONS[case.calibration], case.scale_format, case.edge,
            case.rounding, key=jax.random.key(side, impl="rbg"),  # it compiles fast
        )
        for side, (fmt, granularity) in enumerate(zip(formats, GRANULARITIES[case.granularity]))
    ]  # fmt: skip


def function(case, formats):
    """The quantized operation, (lhs, rhs) -> result."""
    operation = OPERATIONS[case.operation]
    lhs, rhs = quantizers(case, formats)
    if case.operation == "fake_quant":
        return lambda a, b: quantize_one(a, operand_quantizer(case, formats, 0))
    if not has_state(case):
        return lambda a, b: operation.quantized(
            a, b, lhs_format=lhs, rhs_format=rhs,
            **({} if case.operation == "take" else {"execution": case.execution}),
        )  # fmt: skip
    stateful = aqs.quantize_with_state(
        lambda params, x: operation.plain(x, params["w"]), execution=case.execution
    )

    def run(a, b):
        (site,) = aqs.find_sites(lambda params, x: operation.plain(x, params["w"]), {"w": b}, a)
        assignment = {site: aqs.SiteFormats(lhs, rhs)}
        state = seen_one(stateful.init(assignment, {"w": b}, a))
        return stateful.apply(assignment, state, {"w": b}, a)[0]

    return run


def operand_quantizer(case, formats, side):
    """The quantizer of an operand with the axes that the product would give it."""
    operation, q = OPERATIONS[case.operation], quantizers(case, formats)[side]
    ndim, contracting = len(operation.shapes[side]), operation.contracting[side]
    free = tuple(a for a in range(ndim) if a not in contracting)
    granularity = q.granularity
    if granularity in (aqs.PER_CHANNEL, aqs.PER_TOKEN):
        granularity = aqs.per_channel(*free)
    elif granularity.block_size is not None:
        granularity = aqs.per_block(granularity.block_size, contracting[-1])
    return aqs.Quantizer(
        q.fmt, granularity, q.calibration, q.scale_format, q.edge, q.rounding, key=q.key
    )


def quantize_one(x, q):
    """`fake_quant`, under a calibration with state after `seen_one`."""
    if q.calibration.read is None:
        return aqs.fake_quant(x, q)
    return aqs.fake_quant_with_state(x, q, seen_one(aqs.init_state(q, x.shape)))[0]


def seen_one(state):
    """A calibration's state after a tensor with bounds of 1: all its fields start at 0."""
    return jax.tree.map(lambda field: field + 1, state)


def batches(case):
    """Operands [len(BATCH), ...]: rows for the contracts."""
    shapes = OPERATIONS[case.operation].shapes
    lhs, rhs = (sample(*shape, seed=side) for side, shape in enumerate(shapes))
    whole = [np.clip(np.rint(2 * x), -3, 3) for x in (lhs, rhs)]
    zero = [np.zeros_like(x) for x in (lhs, rhs)]
    spoilt = []
    for bad in (np.nan, np.inf):
        x = lhs.copy()
        x[0, ..., 1] = bad
        spoilt.append((x, rhs))
    rows = [(lhs, rhs), whole, zero, (lhs * np.float32(1e38), rhs * np.float32(1e-38)), *spoilt]
    return [np.stack(side).astype(np.float32) for side in zip(*rows)]


class Found(NamedTuple):
    result: jax.Array
    tangents: tuple  # of the result, along a direction in lhs alone and in rhs alone
    gradients: tuple
    values: tuple  # of the quantized operands
    passes: tuple  # where their gradient passes


def measure(case, traced, lhs, rhs, directions, cotangent):
    formats = traced if "traced" in case.formats else FORMATS[case.formats]
    result, along = jax.linearize(function(case, formats), lhs, rhs)
    zeros = jnp.zeros_like(lhs), jnp.zeros_like(rhs)
    tangents = along(directions[0], zeros[1]), along(zeros[0], directions[1])
    gradients = jax.linear_transpose(along, lhs, rhs)(cotangent)
    values, passes = [], []
    for side, x in enumerate((lhs, rhs)):
        q = operand_quantizer(case, formats, side)
        value, derivative = jax.linearize(lambda x, q=q: quantize_one(x, q), x)
        values.append(value)
        passes.append(derivative(jnp.ones_like(x)))
    return Found(result, tangents, gradients, tuple(values), tuple(passes))


@functools.cache
def exact_product(name):
    """The operation in float64 on stacks of operands."""
    batched = jit(jax.vmap(OPERATIONS[name].plain))

    def product(*pairs):
        with jax.enable_x64(True):
            sides = (np.stack([np.asarray(x, np.float64) for x in side]) for side in zip(*pairs))
            return np.asarray(batched(*sides))

    return product


@functools.cache
def run(case):
    """The measurements of a case, with its directions and cotangent."""
    operation = OPERATIONS[case.operation]
    lhs, rhs = batches(case)
    directions = [sample(*shape, seed=2 + n) for n, shape in enumerate(operation.shapes)]
    out = jax.eval_shape(operation.plain, lhs[0], rhs[0])
    cotangent = sample(*out.shape, seed=4)
    traced = [jax.tree.map(jnp.asarray, aqs.numeric_format(f)) for f in FORMATS[case.formats]]
    batched = jit(jax.vmap(functools.partial(measure, case), (None, 0, 0, None, None)))
    found = batched(traced, lhs, rhs, directions, cotangent)
    assert (found.result.shape, found.result.dtype) == ((len(BATCH), *out.shape), np.float32)
    return jax.tree.map(np.asarray, found), directions, cotangent


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contracts(case):
    found, directions, cotangent = run(case)
    terms = OPERATIONS[case.operation].terms
    rows = [Found(*jax.tree.map(lambda x, n=n: x[n], tuple(found))) for n in range(len(BATCH))]
    normal, integers, zero, huge, nan, infinite = rows
    (left, right), (lpass, rpass) = normal.values, normal.passes
    assert set(np.unique(normal.passes[0])) <= {0, 1}

    # The straight-through model is x + stop_gradient(q(x) - x) within the bounds and constant
    # outside. The product is linear in either operand, so central differences are exact.
    ldelta, rdelta = 0.5 * lpass * directions[0], 0.5 * rpass * directions[1]
    largest = [np.abs(v) + np.abs(d) for v, d in zip((left, right), directions)]
    expected, whole, size, lhigh, llow, rhigh, rlow = exact_product(case.operation)(
        (left, right), integers.values, largest,
        (left + ldelta, right), (left - ldelta, right),
        (left, right + rdelta), (left, right - rdelta),
    )  # fmt: skip
    # A float32 sum of n products is off by n roundings of the sum of their magnitudes, and native
    # scales and quantized values add a few; twice that to be safe.
    error = (terms + 8) * 2.0**-23 * size.max()
    np.testing.assert_allclose(normal.result, expected, rtol=0, atol=error)
    for side, slope in enumerate((lhigh - llow, rhigh - rlow)):
        np.testing.assert_allclose(normal.tangents[side], slope, rtol=0, atol=error)
        along = np.sum(normal.gradients[side].astype(np.float64) * directions[side])
        bound = (1 + cotangent.size) * error * np.abs(cotangent).max()
        np.testing.assert_allclose(along, np.sum(cotangent * slope), rtol=0, atol=bound)

    if case.scale_format == "e8m0":  # every product and sum is exact
        np.testing.assert_array_equal(integers.result, whole.astype(np.float32))
    np.testing.assert_array_equal(zero.result, np.zeros_like(zero.result))
    # The codes of an unscaled format are the values themselves: scales cannot tame them.
    if "bf16" not in case.formats or case.execution in ("emulated", "auto"):
        assert np.isfinite(huge.result).all()
    assert np.isnan(nan.result).any()
    assert np.isnan(infinite.result).any()


@pytest.mark.parametrize("case", CASES[::30], ids=str)
def test_jit_is_eager_and_vmap_is_a_loop(case):
    formats = [aqs.numeric_format(f) for f in FORMATS[case.formats]]
    lhs, rhs = (x[:2] for x in batches(case))
    loop = np.stack([function(case, formats)(*pair) for pair in zip(lhs, rhs)])
    # As above, for operands within 4: the order of summation may differ.
    terms = OPERATIONS[case.operation].terms
    error = (terms + 8) * 2.0**-23 * 16 * max(terms, 1)
    np.testing.assert_allclose(run(case)[0].result[:2], loop, rtol=0, atol=error)


# Every pair that no execution on codes has a form for, or no carrier.
REFUSED = pairwise(
    {
        **AXES,
        "execution": ("native", "int8", "fp8", "bf16"),
        "calibration": ("absmax", "min_max", "frozen_after"),
        "scale_format": ("float32",),
        "rounding": ("floor",),
        "edge": ("max_value",),
    },
    lambda c: exists(c) and (is_refused(c) or (does_not_fit(c) and "traced" not in c.formats)),
    draws=4000,
)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_has_no_native_form_is_refused_and_auto_falls_back(case):
    lhs, rhs = batches(case)
    message = "runs products on codes, but .* Use 'emulated'|cannot hold the formats"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(function(case, FORMATS[case.formats]), lhs[0], rhs[0])
    jax.eval_shape(function(case._replace(execution="auto"), FORMATS[case.formats]), lhs[0], rhs[0])


@pytest.mark.parametrize("execution, name", [("int8", "e4m3"), ("int8", "uint8"), ("fp8", "int8")])
def test_a_traced_format_that_does_not_fit_its_carrier_gives_nan(execution, name):
    case = Case(
        "dot", "", "absmax", "per tensor", execution, "float32", "nearest_even", "max_value"
    )
    lhs, rhs = (x[0] for x in batches(case))
    traced = jit(lambda formats: function(case, formats)(lhs, rhs))
    fits = {"int8": "int4", "fp8": "e2m1"}[execution]
    assert np.isnan(traced([aqs.numeric_format(name), aqs.numeric_format(fits)])).all()
    assert np.isfinite(traced([aqs.numeric_format(fits), aqs.numeric_format(fits)])).all()


def test_without_formats_an_operation_is_exactly_that_of_lax():
    for name, operation in OPERATIONS.items():
        if name != "fake_quant":
            operands = [sample(*shape) for shape in operation.shapes]
            if name == "take":
                ours = jax.make_jaxpr(lambda x: aqs.take(x, ROWS))(operands[0])
                plain = jax.make_jaxpr(lambda x: jnp.take(x, ROWS, axis=0))(operands[0])
            else:
                ours = jax.make_jaxpr(operation.quantized)(*operands)
                plain = jax.make_jaxpr(operation.plain)(*operands)
            assert str(ours) == str(plain), name


@pytest.mark.parametrize("name", OPERATIONS)
def test_bf16_inputs_give_bf16_outputs(name):
    operation = OPERATIONS[name]
    operands = [sample(*shape).astype(jnp.bfloat16) for shape in operation.shapes]
    executions = ("emulated", "native", "fp8") if operation.terms else ("emulated",)
    results = {}
    for execution in executions:
        formats = ("e4m3", "e2m1") if execution == "fp8" else ("int8", "int4")
        rest = ("absmax", "per channel", execution, "float32", "nearest_even", "max_value")
        case = Case(name, "", *rest)
        results[execution] = function(case, formats)
    for result in jit(lambda a, b: {k: f(a, b) for k, f in results.items()})(*operands).values():
        assert result.dtype == jnp.bfloat16
        if operation.terms:
            # Two int4 or e2m1 operands are off by a quarter at most, all else by far less.
            floats = [x.astype(np.float32) for x in operands]
            sizes = operation.plain(*map(np.abs, floats))
            error = np.abs(np.asarray(result, np.float32) - operation.plain(*floats))
            assert np.all(error <= 0.5 * np.max(sizes))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("name", list(OPERATIONS)[2:])
def test_narrow_operands_are_multiplied_as_they_were_quantized(name, dtype):
    """The result is rounded to its dtype once, and no value before: the same in every execution."""
    operation = OPERATIONS[name]
    lhs, rhs = (jnp.asarray(sample(*shape, seed=n), dtype)
                for n, shape in enumerate(operation.shapes))  # fmt: skip
    for execution in ("emulated", "int8"):
        rest = ("absmax", "per channel", execution, "float32", "nearest_even", "max_value")
        case = Case(name, "", *rest)
        product = jit(function(case, ("int8", "int8")))
        values = [
            aqs.fake_quant(x.astype(np.float32), operand_quantizer(case, ("int8", "int8"), side))
            for side, x in enumerate((lhs, rhs))
        ]
        expected, size = exact_product(name)(values, [np.abs(v) for v in values])
        result = np.asarray(product(lhs, rhs), np.float64)
        # Half a unit of the result, and a float32 sum as in `test_contracts`.
        half = float(jnp.finfo(dtype).eps) / 2 * np.abs(expected)
        error = half + (operation.terms + 8) * 2.0**-23 * size
        np.testing.assert_array_less(np.abs(result - expected), error + 1e-30)


def empty_products():
    """Results with their shapes: batches, contractions and outputs of size zero."""
    dimensions = (((1,), (0,)), ((), ()))
    convolve = functools.partial(
        aqs.conv_general_dilated, jnp.zeros((0, 4, 4, 3)), jnp.ones((3, 3, 3, 5)), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    calibrations = [c for c in CALIBRATIONS.values() if c.read is None]
    for n, execution in enumerate(AXES["execution"] * 2):
        formats = ("e4m3", "e2m1") if execution == "fp8" else ("int8", "uint8")
        how = {"lhs_format": formats[0], "rhs_format": formats[1], "execution": execution}
        yield convolve(**how), (0, 4, 4, 5)
        for stride, groups in ((1, 1), (2, 1), (2, 2)):  # images smaller than the kernel
            small = aqs.conv_general_dilated(
                jnp.ones((1, 2, 2, 2)), jnp.ones((3, 3, 2 // groups, 2)), (stride, stride), "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups, **how,
            )  # fmt: skip
            yield small, (1, 0, 0, 2)
        lhs = aqs.Quantizer(formats[0], calibration=calibrations[n % len(calibrations)])
        how["lhs_format"] = lhs
        yield aqs.einsum("bi,io->bo", jnp.zeros((0, 4)), jnp.zeros((4, 5)), **how), (0, 5)
        for a, b in (((0, 4), (4, 5)), ((3, 0), (0, 5)), ((3, 4), (4, 0))):
            yield aqs.dot_general(jnp.zeros(a), jnp.zeros(b), dimensions, **how), (a[0], b[1])
    for spec in ("int4", "mxfp4", "nvfp4", *(aqs.Quantizer("int4", None, c) for c in calibrations)):
        yield aqs.take(jnp.zeros((4, 6)), jnp.zeros((0,), int), table_format=spec), (0, 6)
        yield aqs.take(jnp.zeros((4, 0)), ROWS, table_format=spec), (3, 2, 0)
        for shape in ((0,), (0, 3), (3, 0)):
            yield aqs.fake_quant(jnp.zeros(shape), spec), shape


def test_empty_operands():
    for result, expected in jit(lambda: [(y, jnp.zeros(s)) for y, s in empty_products()])():
        np.testing.assert_array_equal(result, expected)


# --- Replicas, caches, gradients in low precision -------------------------------------------------


def quantize_in_every_way(x, axis_name=None):
    """Values and states under all calibrations, two of them with stochastic rounding."""
    found = {}
    for name, calibration in CALIBRATIONS.items():
        rounding = "stochastic" if name in ("absmax", "delayed") else "nearest_even"
        q = aqs.Quantizer(
            "int4", aqs.per_channel(-1), calibration, rounding=rounding, key=jax.random.key(0)
        )
        if calibration.read is None:
            found[name] = aqs.fake_quant(x, q, axis_name=axis_name), ()
        else:
            state = seen_one(aqs.init_state(q, x.shape))
            found[name] = aqs.fake_quant_with_state(x, q, state, axis_name=axis_name)
    return found


def test_two_devices_are_one():
    """Scales shared over a mapped axis, and the same random bits for every row of the batch."""
    x = sample(8, 6)
    whole = jit(quantize_in_every_way)(x)
    sharded = functools.partial(quantize_in_every_way, axis_name="batch")
    halves = x.reshape(2, 4, 6)
    for mapped in (jit(jax.vmap(sharded, axis_name="batch")), jax.pmap(sharded, "batch")):
        for name, (values, state) in mapped(halves).items():
            # A sum over two devices may differ in its last bit, and a scale with it.
            np.testing.assert_allclose(values.reshape(8, 6), whole[name][0], rtol=1e-6)
            for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole[name][1])):
                np.testing.assert_allclose(ours, np.stack([theirs, theirs]), rtol=1e-6)


@pytest.mark.parametrize("granularity", [None, aqs.PER_TOKEN])
def test_a_product_on_two_devices_is_that_on_one(granularity):
    x, params = sample(8, 6), {"w": sample(6, 5, seed=1)}

    def apply(params, x):
        return x @ params["w"]

    (site,) = aqs.find_sites(apply, params, x)
    assignment = {site: aqs.SiteFormats(aqs.Quantizer("int4", granularity), aqs.quantizer("int8"))}
    whole = aqs.quantize(apply)(assignment, params, x)
    sharded = jax.pmap(
        functools.partial(aqs.quantize(apply, axis_name="batch", execution="int8"), assignment),
        "batch", in_axes=(None, 0),
    )(params, x.reshape(2, 4, 6))  # fmt: skip
    np.testing.assert_allclose(sharded.reshape(8, 5), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrap", [jax.jit, lambda fun: fun], ids=["jit", "plain"])
@pytest.mark.parametrize("order", [(None, "int8", "int2", None), ("int2", "int8", None, "int2")])
def test_functions_of_equal_shapes_and_different_formats_share_no_cached_result(wrap, order):
    # Qwix's `x @ w` stays float once it was traced so: the jit inside of matmul is in the cache.
    rows = 3 + (order[0] is None) + 2 * (wrap is jax.jit)  # shapes that no other run has
    x, params = sample(rows, 4), {"w": sample(4, 5, seed=1)}

    @wrap
    def apply(params, x):
        return x @ params["w"]

    quantized = aqs.quantize(apply)
    for name in order:
        expected, assignment = x @ params["w"], {}
        if name is None:
            np.testing.assert_allclose(apply(params, x), expected, rtol=0, atol=1e-5)
        else:
            fmt = aqs.numeric_format(name)
            expected = np.asarray(aqs.fake_quant(x, fmt)) @ aqs.fake_quant(params["w"], fmt, (1,))
            assignment = {"w": aqs.SiteFormats(fmt, fmt)}
        found = wrap(functools.partial(quantized, assignment))(params, x)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("execution", ["emulated", "int8"])
def test_quantized_gradients(execution):
    """dlhs = Q(g) rhs_hat' within lhs's bounds, and drhs = lhs_hat' Q(g) likewise."""
    lhs, rhs, g = sample(3, 4), sample(4, 5, seed=1), sample(3, 5, seed=2)
    clipped = aqs.Quantizer("int4", calibration=aqs.percentile(60.0))
    blocks = aqs.Quantizer("e2m1", aqs.per_block(2), scale_format="e8m0")

    def product(lhs, rhs):
        return aqs.dot_general(
            lhs, rhs, (((1,), (0,)), ((), ())), lhs_format=clipped, rhs_format="int8",
            lhs_gradient=blocks, rhs_gradient="e4m3", execution=execution,
        )  # fmt: skip

    dlhs, drhs = jit(lambda *o: jax.vjp(product, *o)[1](g))(lhs, rhs)
    lhs_hat, rhs_hat = aqs.fake_quant(lhs, clipped), aqs.fake_quant(rhs, "int8", (1,))
    inside = np.abs(lhs) <= np.percentile(np.abs(lhs), 60)
    # The product for dlhs sums over the result's columns, along which the blocks run.
    found = np.asarray(aqs.fake_quant(g, blocks)) @ np.asarray(rhs_hat).T
    np.testing.assert_allclose(dlhs, np.where(inside, found, 0), rtol=0, atol=1e-5)
    found = np.asarray(lhs_hat).T @ np.asarray(aqs.fake_quant(g, "e4m3"))
    np.testing.assert_allclose(drhs, found, rtol=0, atol=1e-5)


# --- Single cases that are easily wrong -----------------------------------------------------------

MATMUL = (((1,), (0,)), ((), ()))
KERNEL = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def emulated_and_native(operation, execution="native", **formats):
    emulated, native = jit(
        lambda: [operation(**formats, execution=e) for e in ("emulated", execution)]
    )()
    np.testing.assert_allclose(native, emulated, rtol=0, atol=1e-5 * np.abs(emulated).max())


def test_native_uint8_in_blocks():
    """Its codes are held shifted by 128, which the blocks' sums have to take back."""
    lhs, rhs = np.abs(sample(3, 8)), sample(8, 5, seed=1)
    lhs_format, rhs_format = (aqs.Quantizer(f, aqs.per_block(4)) for f in ("uint8", "int8"))
    product = functools.partial(aqs.dot_general, dimension_numbers=MATMUL)
    emulated_and_native(
        functools.partial(product, lhs, rhs), lhs_format=lhs_format, rhs_format=rhs_format
    )
    stored = aqs.quantize_tensor(lhs, aqs.Quantizer("uint8", aqs.per_block(4, 1)))
    emulated_and_native(functools.partial(product, stored, rhs), rhs_format=rhs_format)


@pytest.mark.parametrize("size", [4, 3])
def test_native_uint8_on_both_sides_in_short_blocks(size):
    """What fills up the last block counts for nothing, not for (0 + 128)^2."""
    lhs, rhs = np.abs(sample(3, 10)), np.abs(sample(10, 5, seed=1))
    blocks = aqs.Quantizer("uint8", aqs.per_block(size))
    product = functools.partial(aqs.dot_general, lhs, rhs, dimension_numbers=MATMUL)
    emulated_and_native(product, "int8", lhs_format=blocks, rhs_format=blocks)


# Products of more terms than int32 holds: 33,025 of two uint8, 65,793 of uint8 x int8, 131,071 of
# two int8. Terms, shapes, call.
def long_dot(terms, lhs, rhs, dimensions):
    return terms, lhs, rhs, functools.partial(aqs.dot_general, dimension_numbers=dimensions)


def long_convolution(terms, lhs, rhs, **further):
    return terms, lhs, rhs, functools.partial(
        aqs.conv_general_dilated, window_strides=(1,), padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"), **further,
    )  # fmt: skip


LONG = {
    "dot": long_dot(140_001, (2, 140_001), (140_001, 3), MATMUL),
    "batched, two contracted": long_dot(
        150_000, (2, 300, 3, 500), (500, 300, 2, 3), (((1, 3), (1, 0)), ((0,), (2,)))
    ),
    "einsum": (140_001, (1, 140_001, 3), (2, 140_001),
               lambda a, b, **how: aqs.einsum("bij,bi->jb", a, b, **how)),
    "features": long_convolution(140_002, (1, 3, 70_001), (2, 70_001, 3)),
    "window": long_convolution(140_001, (1, 140_002, 1), (140_001, 1, 2)),
    "depthwise": long_convolution(140_001, (1, 140_002, 2), (140_001, 1, 2), feature_group_count=2),
    "batch groups": long_convolution(
        140_001, (2, 140_001, 1), (140_001, 1, 2), batch_group_count=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("formats", [("int8", "int8"), ("uint8", "uint8"), ("uint8", "int8")])
@pytest.mark.parametrize("name", LONG)
def test_long_sums_do_not_wrap(name, formats):
    """All at their largest: a scale of 1, and every sum a whole number."""
    terms, *shapes, call = LONG[name]
    largest = [float(aqs.numeric_format(f).max_value) for f in formats]
    operands = [np.full(shape, n, np.float32) for shape, n in zip(shapes, largest)]
    how = {"lhs_format": formats[0], "rhs_format": formats[1], "execution": "int8"}
    found = np.asarray(jit(functools.partial(call, **how))(*operands))
    # The parts, five at most, are exact; they are added in float32 and scaled twice.
    np.testing.assert_allclose(found, terms * largest[0] * largest[1], rtol=8 * 2.0**-24)


LONG_OPERANDS = {
    "uint8": (aqs.Quantizer("uint8", aqs.PER_TENSOR), aqs.Quantizer("uint8", aqs.per_channel(1))),
    "zero point": (
        aqs.Quantizer("int8", aqs.PER_TENSOR, aqs.min_max()),
        aqs.Quantizer("uint8", aqs.per_channel(1), aqs.min_max()),
    ),
    "blocks": tuple(aqs.Quantizer("uint8", aqs.per_block(35_000, axis)) for axis in (1, 0)),
}


@pytest.mark.parametrize("execution", ["auto", "int8", "bf16"])
@pytest.mark.parametrize("name", LONG_OPERANDS)
def test_long_sums_with_zero_points_and_blocks(name, execution):
    """64 rows and columns, so that `auto` takes a native product where it may."""
    operands = [
        np.random.default_rng(side).random(shape, np.float32)
        for side, shape in enumerate([(64, 40_500), (40_500, 64)])
    ]
    lhs, rhs = LONG_OPERANDS[name]
    values = [np.asarray(aqs.fake_quant(x, q), np.float64) for x, q in zip(operands, (lhs, rhs))]
    product = functools.partial(
        aqs.dot_general, dimension_numbers=MATMUL, lhs_format=lhs, rhs_format=rhs,
        execution=execution,
    )  # fmt: skip
    # All terms are positive: a float32 sum in blocks as XLA makes it, far below n roundings.
    np.testing.assert_allclose(jax.jit(product)(*operands), values[0] @ values[1], rtol=1e-4)


@pytest.mark.parametrize("groups", [{"feature_group_count": 3}, {"batch_group_count": 2}])
def test_native_uint8_kernels_in_grouped_convolutions(groups):
    features = 2 if "feature_group_count" in groups else 6
    convolve = functools.partial(
        aqs.conv_general_dilated, sample(2, 5, 5, 6), np.abs(sample(3, 3, features, 6, seed=1)),
        (1, 1), "SAME", **KERNEL, **groups,
    )  # fmt: skip
    emulated_and_native(convolve, lhs_format="int8", rhs_format="uint8")


def test_native_convolution_of_two_fp8_formats():
    convolve = functools.partial(
        aqs.conv_general_dilated, sample(1, 5, 5, 3), sample(3, 3, 3, 2, seed=1), (1, 1), "SAME",
        **KERNEL,
    )  # fmt: skip
    emulated_and_native(convolve, lhs_format="e4m3", rhs_format="e5m2")


@pytest.mark.parametrize("sizes", [(1e37, 1e-3), (1e-3, 1e37), (1e-18, 1e-18), (1e38, 1e-38)])
def test_native_scales_neither_overflow_nor_vanish(sizes):
    operands = [sample(4, 4, seed=n) * np.float32(size) for n, size in enumerate(sizes)]
    product = functools.partial(aqs.dot_general, *operands, dimension_numbers=MATMUL)
    emulated_and_native(product, lhs_format="int8", rhs_format="int8")


@pytest.mark.parametrize(
    "name, shape, row_axes",
    [("int4", (6,), 0), ("int3", (5, 3), 0), ("int3", (5, 3), 1), ("int8", (6,), 0)],
)
def test_rows_of_a_stored_table(name, shape, row_axes):
    indices = np.array([[3, 0], [-1, 3]])

    def look_up(x):
        table = aqs.quantize_tensor(x, name, (0,), row_axes=row_axes)
        beyond = aqs.take(table, np.array([shape[0], -shape[0] - 1]))
        return table.dequantize(), aqs.take(table, indices), beyond

    values, found, beyond = jit(look_up)(sample(*shape))
    np.testing.assert_array_equal(found, values[indices])
    assert np.isnan(beyond).all()


@pytest.mark.parametrize("execution", ["emulated", "int8"])
@pytest.mark.parametrize("calibration", ["absmax", "percentile"])
def test_derivatives_of_second_order(calibration, execution):
    """Of |x_hat w_hat|^2 / 2 in the straight-through model: w_hat w_hat' within the bounds."""
    x, w = sample(3, 4), sample(4, 2, seed=1)
    lhs_format = aqs.Quantizer("int8", None, CALIBRATIONS[calibration])

    def loss(x):
        product = aqs.dot_general(
            x, w, MATMUL, lhs_format=lhs_format, rhs_format="int4", execution=execution
        )
        return jnp.sum(product**2) / 2

    rhs = np.asarray(aqs.fake_quant(w, "int4", (1,)))
    bound = np.inf if calibration == "absmax" else np.percentile(np.abs(x), 80)
    inside = np.abs(x) <= bound
    expected = np.einsum("ab,ij,ai,bj->aibj", np.eye(3), rhs @ rhs.T, inside, inside)
    orders = [jax.jacfwd(jax.jacrev(loss)), jax.jacfwd(jax.jacfwd(loss))]
    for hessian in jit(lambda x: [order(x) for order in orders])(x):
        np.testing.assert_allclose(hessian, expected, rtol=0, atol=1e-5)


# --- Errors ---------------------------------------------------------------------------------------


def product_with(lhs="int8", rhs="int8", x=None, **arguments):
    x = jnp.ones((4, 4)) if x is None else x
    return lambda: aqs.dot_general(
        x, jnp.ones((4, 4)), MATMUL, lhs_format=lhs, rhs_format=rhs, **arguments
    )


STORED = aqs.quantize_tensor(np.ones((4, 4), np.float32), "int8")
ERRORS = [
    (product_with(execution="fast"), ValueError, "Unknown execution 'fast': expected one of emul"),
    (product_with("int9"), aqs.FormatError, "Unknown format 'int9'"),
    (product_with("e4m3", execution="int8"), aqs.FormatError, "'int8' cannot hold the formats"),
    (product_with("fp16", execution="native"), aqs.FormatError, "'native' cannot hold the format"),
    (product_with(execution="fp8"), aqs.FormatError, "fp8 takes what e4m3 or e5m2 contain"),
    (product_with("fp16", execution="bf16"), aqs.FormatError, "Use execution='emulated' here"),
    (product_with(None, execution="native"), ValueError, "the left operand is not quantized"),
    (product_with(rhs=None, execution="int8"), ValueError, "the right operand is not quantized"),
    (
        product_with(aqs.Quantizer("int8", aqs.per_channel(-1)), execution="native"),
        ValueError, "left operand has a scale along an axis that the product sums over",
    ),
    (
        product_with(aqs.Quantizer("int8", aqs.per_block(2)), "mxint8", execution="native"),
        ValueError, "the operands have different blocks",
    ),
    (
        lambda: aqs.dot_general(
            jnp.ones(4), jnp.ones(4), (((), ()), ((), ())), rhs_format="int8",
            lhs_format=aqs.Quantizer("int8", aqs.per_block(2, 0)), execution="native",
        ),
        ValueError, "blocks run along an axis that the product does not sum over",
    ),
    (
        product_with(
            "mxint8", aqs.Quantizer("int8", None, aqs.min_max()), execution="native"
        ),
        ValueError, "one operand has blocks and one a zero point",
    ),
    (
        product_with(aqs.Quantizer("int8", aqs.per_channel(2))),
        ValueError, "Channel axis 2 is out of range",
    ),
    (
        product_with(aqs.Quantizer("int8", calibration=aqs.delayed(aqs.absmax()))),
        ValueError, "A calibration with state has no place in a single product",
    ),
    (
        product_with(lhs_gradient=aqs.Quantizer("int8", rounding="stochastic")),
        ValueError, "Stochastic rounding needs a random key",
    ),
    (product_with(lhs_gradient="int1"), aqs.FormatError, "Unknown format 'int1'"),
    (product_with(x=jnp.ones((4, 4), int)), TypeError, "A quantized product expects a floating-po"),
    (product_with(x=STORED), ValueError, "lhs operand is a QTensor .* leave lhs_format out"),
    (
        lambda: aqs.einsum("ii,ij->j", *[jnp.ones((4, 4))] * 2, lhs_format="int8",
                           rhs_format="int8", execution="native"),
        ValueError, "a label stands twice in one operand",
    ),
    (
        lambda: aqs.einsum("abc,cd->bd", jnp.ones((2, 4, 4)), jnp.ones((4, 4)), lhs_format="int8",
                           rhs_format="int8", execution="native"),
        ValueError, "a label is summed over in one operand alone",
    ),
    (
        lambda: aqs.conv_general_dilated(
            jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)), (1, 1), "SAME", **KERNEL,
            lhs_format="int8", rhs_format=aqs.Quantizer("int8", None, aqs.min_max()),
            execution="native",
        ),
        ValueError, "the kernel of a convolution has a zero point",
    ),
    (
        lambda: aqs.take(jnp.ones((4, 4), int), ROWS, table_format="int8"),
        TypeError, "expects a floating-point array",
    ),
    (
        lambda: aqs.take(
            jnp.ones((4, 4)), ROWS,
            table_format=aqs.Quantizer("int8", None, aqs.delayed(aqs.absmax())),
        ),
        ValueError, "This calibration has state",
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(call)


def test_native_products_take_no_float64():
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="the left operand is float64"),
    ):
        product_with(x=jnp.ones((4, 4), np.float64), execution="native")()
