"""Statistics of weights against numpy in float64, and against the weights that are stored."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.formats import FormatError
from aqt_search.numerics.signal_to_noise import noise_to_signal, sqnr_db
from aqt_search.tracing.sites import SiteError
from aqt_search.weights.statistics import BINS, weight_statistics

RNG = np.random.default_rng(0)
X = jax.ShapeDtypeStruct((2, 12), np.float32)
RUNNING_MAX = aqs.running_max(aqs.absmax())
OF_FORMAT = ("sqnr_db", "clipped", "codes", "codes_used", "code_entropy", "after")


def apply(params, x):
    return x @ params["w"]


def statistics_of(w, spec, **options):
    """Of the single weight w [12, n] in one scale per column."""
    formats = None if spec is None else aqs.quantizer(spec)
    assignment = {"w": aqs.SiteFormats(rhs=formats)}
    return weight_statistics(apply, assignment, {"w": w}, X, **options)["w"]


def heavy_tailed(scale=1.0):
    return (scale * RNG.standard_t(3, (12, 40))).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_spread_is_that_of_numpy(scale):
    w = heavy_tailed(scale)
    found, w = statistics_of(w, None), w.astype(float)
    centred = (w - w.mean()) / w.std()
    assert found.weights == 480
    assert found.largest == pytest.approx(abs(w).max(), rel=1e-7)
    assert found.deviation == pytest.approx(w.std(), rel=1e-5)
    assert found.range_to_deviation == pytest.approx(abs(w).max() / w.std(), rel=1e-5)
    assert found.kurtosis == pytest.approx((centred**4).mean(), rel=1e-5)
    assert found.outliers == (abs(centred) > 3).mean() > 0
    assert [getattr(found, name) for name in OF_FORMAT] == [None] * 6


def test_spread_of_known_distributions():
    """Normal: kurtosis 3 and 0.27 % beyond three deviations; uniform: 1.8, none, sqrt(3)."""
    n = 250_000  # deviations of the estimates: sqrt(24 / n) = 0.01; sqrt(0.0027 / n) = 1e-4
    normal = RNG.normal(size=(12, n // 12)).astype(np.float32)
    uniform = RNG.uniform(-1, 1, size=(12, n // 12)).astype(np.float32)
    assert statistics_of(normal, None).kurtosis == pytest.approx(3, abs=0.05)
    assert statistics_of(normal, None).outliers == pytest.approx(0.0027, abs=5e-4)
    found = statistics_of(uniform, None)
    assert (found.kurtosis, found.outliers) == (pytest.approx(1.8, abs=0.02), 0)
    assert found.range_to_deviation == pytest.approx(3**0.5, abs=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_by_hand(bits):
    w = heavy_tailed()
    found, w = statistics_of(w, f"int{bits}"), w.astype(float)
    most = 2 ** (bits - 1) - 1
    scale = abs(w).max(0, keepdims=True) / most
    codes = np.round(w / scale)
    noise = np.square(w - codes * scale).sum() / np.square(w).sum()
    counts = np.unique(codes, return_counts=True)[1]
    shares = counts / counts.sum()
    # A value in 480 may be rounded the other way in float32, where both are as near.
    assert found.sqnr_db == pytest.approx(-10 * np.log10(noise), abs=1e-3)
    assert (found.codes, found.clipped) == (2 * most + 1, 0)
    assert found.codes_used == pytest.approx(len(counts), abs=1)
    assert found.code_entropy == pytest.approx(-(shares * np.log2(shares)).sum(), abs=0.02)


def test_clipped_weights_lie_half_a_step_beyond_the_grid():
    """Bounds of +-1 in steps of 1/3: beyond 1 + 1/6 no rounding leads to 1."""
    w = np.linspace(-2, 2, 480, dtype=np.float32).reshape(12, 40)
    found = statistics_of(w, aqs.Quantizer("int3", calibration=aqs.fixed(1.0)))
    assert found.clipped == pytest.approx((abs(w) > 7 / 6).mean(), abs=2 / 480)
    half = aqs.Quantizer("int3", calibration=aqs.fixed(1.0), edge="half_step")
    assert statistics_of(w, half).clipped == pytest.approx((abs(w) > 1).mean(), abs=2 / 480)


QUANTIZERS = {
    "per tensor": aqs.Quantizer("int3", aqs.PER_TENSOR),
    "percentile": aqs.Quantizer("int2", calibration=aqs.percentile(90)),
    "zero point": aqs.Quantizer("uint4", calibration=aqs.min_max()),
    "e4m3": aqs.Quantizer("e4m3"),
    "bf16": aqs.Quantizer("bf16"),
    "blocks": aqs.Quantizer("e2m1", aqs.per_block(5), scale_format="e8m0"),
    "nvfp4": aqs.quantizer("nvfp4"),
}


@pytest.fixture(scope="module")
def stored_and_found():
    """A weight in every quantizer: as it is stored, and its statistics."""
    weights = {name: heavy_tailed() for name in QUANTIZERS}
    assignment = {name: aqs.SiteFormats(rhs=q) for name, q in QUANTIZERS.items()}

    def fun(params, x):
        return [x @ w for w in params.values()]

    frozen = aqs.freeze(fun, assignment, weights, X)
    return weights, frozen.weights, weight_statistics(fun, assignment, weights, X)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_after_is_as_served(stored_and_found, name):
    """The stored weight (`freeze`) comes by another way: packed codes and scales."""
    weights, stored, found = (part[name] for part in stored_and_found)
    served = np.asarray(stored["rhs"].dequantize())
    noise = np.square(weights - served, dtype=float).sum() / np.square(weights, dtype=float).sum()
    assert found.sqnr_db == pytest.approx(-10 * np.log10(noise), abs=1e-4)
    bound = max(abs(weights).max(), abs(served).max())
    assert found.bound == pytest.approx(bound, rel=1e-6)
    edges = (np.arange(BINS + 1) - BINS / 2) / (BINS // 2) * float(bound)
    for counts, values in ((found.before, weights), (found.after, served)):
        expected = np.histogram(values.astype(float), edges)[0]
        assert sum(counts) == 480
        # A value on the border of two bins may be in either; a row of the grid, of 40 at most.
        assert np.abs(np.cumsum(np.array(counts) - expected)).max() <= 40
    bits = QUANTIZERS[name].bits
    if bits <= 8:
        codes = np.unique(np.asarray(stored["rhs"].codes(np.float32)) + 0.0)
        assert found.codes_used == len(codes) <= found.codes <= 2**bits
    else:
        assert found.codes is None


def test_levels_of_formats():
    w = heavy_tailed()
    # e4m3 has 256 codes less two of NaN and the second zero; uint1 two.
    counts = {"int2": 3, "uint4": 16, "e4m3": 253, "e2m1": 15, "uint1": 2}
    assert {name: statistics_of(w, name).codes for name in counts} == counts


def middle_bin(count):
    return [count if place == BINS // 2 else 0 for place in range(BINS)]


@pytest.mark.parametrize("spec", ["int4", None])
@pytest.mark.parametrize(
    "value, expected",
    [
        (0.0, {"largest": 0, "bound": 0, "deviation": 0, "outliers": 0, "sqnr_db": None}),
        (-0.25, {"largest": 0.25, "deviation": 0, "outliers": 0}),
        (np.nan, dict.fromkeys(("largest", "deviation", "outliers", "bound", "before"))),
        (np.inf, dict.fromkeys(("largest", "deviation", "outliers", "bound", "before"))),
    ],
)
def test_odd_weights_are_told_and_are_json(value, expected, spec):
    found = statistics_of(np.full((12, 3), value, np.float32), spec)
    assert (found.range_to_deviation, found.kurtosis) == (None, None)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.weights == 36
    json.dumps(found._asdict(), allow_nan=False)
    if value == 0:
        assert found.before == middle_bin(36)
    if spec is not None and np.isfinite(value):
        assert (found.codes_used, found.clipped, found.code_entropy) == (1, 0, 0)
        assert sum(found.after) == 36


class Standardized(nn.Module):
    """A kernel that is standardized and cast on its way to the product."""

    @nn.compact
    def __call__(self, x, train=False):
        kernel = self.param("kernel", nn.initializers.normal(3.0), (3, 3, 2, 8))
        kernel = (kernel - kernel.mean()) / kernel.std()
        x = jax.lax.conv_general_dilated(
            x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x.astype(jnp.float32))
        return nn.Embed(5, 4, name="table")(jnp.argmax(x.mean((1, 2)), -1) % 5)


def test_a_weight_is_what_enters_its_site():
    model, x = Standardized(), jnp.zeros((1, 4, 4, 2))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    sites = aqs.find_sites(model.apply, variables, x)
    assignment = aqs.assign(sites, [("kernel", "int4"), (".*", {"weight": "int8"})])
    found = weight_statistics(model.apply, assignment, variables, x, train=False)
    assert list(found) == list(sites) == ["kernel", "table/embedding"]
    kernel = np.asarray(variables["params"]["kernel"], float)
    expected = (kernel - kernel.mean()) / kernel.std()
    expected = expected.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float)
    # The standardized kernel may round to the next bfloat16 number, 2^-8 away.
    assert found["kernel"].largest == pytest.approx(abs(expected).max(), rel=2**-8)
    assert found["kernel"].deviation == pytest.approx(expected.std(), rel=1e-4)
    table = np.asarray(variables["params"]["table"]["embedding"])
    scale = abs(table).max(1, keepdims=True) / 127  # a scale for each row
    noise = noise_to_signal(table, np.round(table / scale) * scale)
    assert found["table/embedding"].sqnr_db == pytest.approx(float(sqnr_db(noise)), abs=1e-2)


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def test_a_scan_has_a_row_for_each_iteration():
    w = RNG.normal(size=(3, 12, 12)).astype(np.float32) * np.float32([1, 2, 4]).reshape(3, 1, 1)
    bounds = aqs.moving_average(aqs.absmax())
    assignment = {"w": aqs.SiteFormats(rhs=aqs.Quantizer("int4", calibration=bounds))}
    stateful = aqs.quantize_with_state(scanned)
    state = stateful.init(assignment, {"w": w}, X)
    _, state = stateful.apply(assignment, state, {"w": w}, jnp.ones(X.shape))
    found = weight_statistics(scanned, assignment, {"w": w}, X, state=state)
    assert [(label, one.site) for label, one in found.items()] == [
        (f"w[{i}]", "w") for i in range(3)
    ]
    for one, own in zip(found.values(), w):
        alone = statistics_of(own, "int4")
        assert one == alone._replace(site="w")


def test_bounds_in_the_state_are_followed():
    """Bounds of weights half as large: at int2 all values above half of them are clipped."""
    w = heavy_tailed()
    q = aqs.Quantizer("int2", calibration=RUNNING_MAX)
    assignment = {"w": aqs.SiteFormats(rhs=q)}
    stateful = aqs.quantize_with_state(apply)
    first = stateful.init(assignment, {"w": w}, X)
    _, state = stateful.apply(assignment, first, {"w": w / 2}, jnp.ones(X.shape))
    found = weight_statistics(apply, assignment, {"w": w}, X, state=state)["w"]
    bound = abs(w).max(0, keepdims=True) / 2
    assert found.clipped == (abs(w) > 1.5 * bound).mean() > 0
    noise = noise_to_signal(w, np.clip(np.round(w / bound), -1, 1) * bound)
    assert found.sqnr_db == pytest.approx(float(sqnr_db(noise)), abs=1e-3)


def test_before_is_of_the_float_parameters():
    """Weights on a grid, as of AdaRound, lose nothing more: the float ones tell what is lost."""
    w = heavy_tailed()
    scale = np.abs(w).max(0, keepdims=True) / np.float32(7)
    rounded = np.ceil(w / scale - np.float32(1e-3)) * scale  # another rounding than the nearest
    alone = statistics_of(rounded, "int4")
    found = statistics_of(rounded, "int4", float_params={"w": w})
    assert alone.sqnr_db is None or alone.sqnr_db > 100
    noise = noise_to_signal(w, rounded)
    assert found.sqnr_db == pytest.approx(float(sqnr_db(noise)), abs=1e-3)
    assert found.largest == pytest.approx(abs(w).max())
    assert found.before == statistics_of(w, None).before
    assert found.after != found.before


def test_what_cannot_be_found_is_left_out():
    def fun(params, x):
        w = params["grown"]

        def grow(carry, _):
            x, w = carry
            return (x @ w, w * 2), None  # depends on the iteration before

        (x, _), _ = jax.lax.scan(grow, (x, w), None, length=2)
        return jax.nn.relu(x @ params["w"] @ jnp.ones((12, 12)))

    params = {"grown": np.eye(12, dtype=np.float32), "w": heavy_tailed()[:, :12]}
    assert set(weight_statistics(fun, {}, params, X)) == {"w"}


def test_signal_to_noise():
    x = np.array([3.0, 4.0])
    assert noise_to_signal(x, x + [0.3, -0.4]) == pytest.approx(0.01)
    np.testing.assert_allclose(sqnr_db([0.01, 0.0, np.nan]), [20, np.nan, np.nan])
    assert np.isnan([noise_to_signal(0 * x, x), noise_to_signal(np.inf * x, x)]).all()


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda w: weight_statistics(apply, {"v": aqs.SiteFormats()}, {"w": w}, X), SiteError,
         ["'v'", "Nearest: w"]),
        (lambda w: statistics_of(w, aqs.Quantizer("int4", calibration=RUNNING_MAX)), SiteError,
         ["'w'", "rhs has state"]),
        (lambda w: jax.jit(functools.partial(statistics_of, w))(aqs.numeric_format("int4")),
         FormatError, ["concrete format"]),
        (lambda w: statistics_of(w, "int4", float_params={"w": w[:2]}), ValueError,
         ["float_params", "same shapes"]),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call(heavy_tailed())
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("spec", ["int3", aqs.quantizer("mxfp4"), None])
def test_a_weight_that_the_batch_repeats_counts_once(batch, spec):
    """A learned query [4, 12], one for every example."""
    probe, x = heavy_tailed()[:, :4].T, np.ones((batch, 3, 12), np.float32)

    def fun(params, x):
        repeated = jnp.broadcast_to(params["probe"][None], (len(x), 4, 12))
        return jnp.einsum("bqd,bkd->bqk", repeated, x)

    (site,) = aqs.find_sites(fun, {"probe": probe}, x).values()
    side = "lhs" if site.lhs is site.weight else "rhs"
    assignment = {} if spec is None else {"probe": aqs.SiteFormats(**{side: aqs.quantizer(spec)})}
    found = weight_statistics(fun, assignment, {"probe": probe}, x)["probe"]
    assert (found.weights, sum(found.before)) == (48, 48)
    assert found.deviation == pytest.approx(probe.std(), rel=1e-5)
    if spec is not None:
        assert sum(found.after) == 48
        values = np.asarray(aqs.fake_quant(probe, spec, () if spec != "int3" else (0,)))
        noise = np.square(probe - values).sum() / np.square(probe).sum()
        assert found.sqnr_db == pytest.approx(-10 * np.log10(noise), abs=1e-3)
