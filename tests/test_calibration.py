"""Calibrations against numpy in float64, their states step by step, and their edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.calibration import Bounds, Over, is_asymmetric

# What XLA makes of the programs is not the question here: what compiles fastest will do.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0},
)
KEEP = {"keepdims": True}


def sample(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bounds_of(calibration, x, axes):
    """Bounds by a calibration that asks for no errors."""
    return calibration.apply((), jnp.asarray(x), Over(axes), None, None)[0]


# --- Without state --------------------------------------------------------------------------------


def clipping(x, axes, mean, deviation, exclude_zeros):
    counted = (x != 0) | (not exclude_zeros)
    count = np.maximum(np.sum(counted, axes, **KEEP), 1)
    magnitude, square = (np.sum(v, axes, **KEEP) / count for v in (np.abs(x), x**2))
    return mean * magnitude + deviation * np.sqrt(square)


# Calibration and its bound `high` in numpy; low is -high, or min(x, 0) for min_max.
CALIBRATIONS = {
    "absmax": (aqs.absmax(), lambda x, axes: np.max(np.abs(x), axes, **KEEP)),
    "min_max": (aqs.min_max(), lambda x, axes: np.maximum(np.max(x, axes, **KEEP), 0)),
    **{
        f"percentile {share}": (
            aqs.percentile(share),
            lambda x, axes, share=share: np.percentile(np.abs(x), share, axes, **KEEP),
        )
        for share in (100, 99.9, 50, 0.5)
    },
    **{
        f"mean_deviation {arguments}": (
            aqs.mean_deviation(*arguments),
            lambda x, axes, arguments=arguments: clipping(x, axes, *arguments),
        )
        for arguments in ((0.0, 3.0, False), (1.5, 0.5, False), (1.0, 2.0, True))
    },
    "fixed": (aqs.fixed(2.5), lambda x, axes: np.full_like(np.max(x, axes, **KEEP), 2.5)),
}


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2), (1,), ()])
def test_bounds_against_numpy(axes):
    x = sample(4, 5, 6)
    x[np.abs(x) < 0.2] = 0
    found = jit(lambda x: {k: bounds_of(c, x, axes) for k, (c, _) in CALIBRATIONS.items()})(x)
    for name, (_, expected) in CALIBRATIONS.items():
        high = expected(x.astype(np.float64), axes)
        np.testing.assert_allclose(found[name].high, high, rtol=1e-5, err_msg=name)
        assert found[name].high.dtype == np.float32
        if name == "min_max":
            low = np.minimum(np.min(x, axes, **KEEP), 0)
            np.testing.assert_array_equal(found[name].low, low)
        else:
            assert found[name].low is None


def test_fixed_bounds_on_either_side():
    found = bounds_of(aqs.fixed(2.0, -1.0), sample(3, 4), (0,))
    np.testing.assert_array_equal(found.high, np.full((1, 4), 2))
    np.testing.assert_array_equal(found.low, np.full((1, 4), -1))


@pytest.mark.parametrize("name", ["int3", "e2m1"])
def test_mse_is_the_best_of_its_candidates(name):
    x = sample(3, 200) ** 3
    candidates, smallest = 12, 0.2
    q = aqs.Quantizer(name, aqs.per_channel(0), aqs.mse(candidates, smallest))
    found = np.asarray(jit(lambda x: aqs.fake_quant(x, q))(x), np.float64)
    largest = float(aqs.numeric_format(name).max_value)
    errors = []
    for share in np.linspace(1, smallest, candidates):
        scale = share * np.abs(x).max(1, keepdims=True) / largest
        values = np.asarray(aqs.round_to_format((x / scale).astype(np.float32), name)) * scale
        errors.append(np.square(values - x).sum(1))
    assert np.min(errors, 0).min() < 0.9 * errors[0].min()  # clipping pays here
    np.testing.assert_allclose(np.square(found - x).sum(1), np.min(errors, 0), rtol=1e-4)


def test_gradient_is_zero_outside_of_the_bounds():
    x = sample(6, 40)

    def gradients(x):
        return {
            name: jax.grad(
                lambda x, c=c: aqs.fake_quant(x, aqs.Quantizer("int4", aqs.per_channel(0), c)).sum()
            )(x)
            for name, (c, _) in CALIBRATIONS.items()
        }

    found = jit(gradients)(x)
    for name, (_, expected) in CALIBRATIONS.items():
        if name == "min_max":
            inside = np.ones_like(x)
        else:
            inside = np.abs(x) <= expected(x.astype(np.float64), (1,)) * (1 + 1e-6)
        np.testing.assert_array_equal(found[name], inside, err_msg=name)
    low_and_high = jax.grad(
        lambda x: aqs.fake_quant(x, aqs.Quantizer("int4", calibration=aqs.fixed(1.0, -0.25))).sum()
    )(x)
    np.testing.assert_array_equal(low_and_high, (x <= 1) & (x >= -0.25))


@pytest.mark.parametrize("name", [name for name in CALIBRATIONS if name != "fixed"])
def test_bounds_grow_with_the_tensor(name):
    """Squares of such values leave float32: bounds must not."""
    x, (calibration, _) = sample(8, 8), CALIBRATIONS[name]
    expected = np.asarray(bounds_of(calibration, x, (0, 1)).high, np.float64)
    for factor in (2.0**60, 2.0**122, 2.0**-60, 2.0**-100):
        found = bounds_of(calibration, x * np.float32(factor), (0, 1)).high
        np.testing.assert_allclose(found, expected * factor, rtol=1e-5)


# --- With state -----------------------------------------------------------------------------------


def follow(calibration, tensors):
    """High bounds applied at each step, and the states after it."""
    state, highs, states = calibration.init((1,)), [], []
    apply = jit(lambda state, x: calibration.apply(state, x, Over((0,)), None, None))
    for x in tensors:
        bounds, state = apply(state, x)
        highs.append(float(bounds.high[0]))
        states.append(state)
    return np.array(highs), states


TENSORS = [sample(7, seed=n) * np.float32(1 + n % 3) for n in range(7)]
TODAY = np.array([np.abs(x).max() for x in TENSORS], np.float64)


def moving(momentum):
    average, averages = TODAY[0], []
    for n, today in enumerate(TODAY):
        keep = n / (n + 1) if momentum is None else momentum
        average = average * keep + today * (1 - keep) if n else today
        averages.append(average)
    return np.array(averages)


# Calibration, what it applies at each step.
HISTORIES = {
    "average": (aqs.moving_average(aqs.absmax(), 0.75), moving(0.75)),
    "momentum 0": (aqs.moving_average(aqs.absmax(), 0.0), TODAY),
    "mean": (aqs.moving_average(aqs.absmax(), None), np.cumsum(TODAY) / np.arange(1, 8)),
    "running_max": (aqs.running_max(aqs.absmax()), np.maximum.accumulate(TODAY)),
    "delayed": (aqs.delayed(aqs.absmax()), np.append(TODAY[0], TODAY[:-1])),
    "delayed by 3": (
        aqs.delayed(aqs.absmax(), 3),
        [TODAY[0], *(TODAY[max(0, n - 3) : n].max() for n in range(1, 7))],
    ),
    "delayed average": (
        aqs.delayed(aqs.moving_average(aqs.absmax(), 0.75)),
        np.append(TODAY[0], moving(0.75)[:-1]),
    ),
    "frozen": (aqs.frozen_after(aqs.absmax(), 1), np.full(7, TODAY[0])),
    "frozen average": (
        aqs.frozen_after(aqs.moving_average(aqs.absmax(), 0.75), 4),
        np.append(moving(0.75)[:4], np.full(3, moving(0.75)[3])),
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_history_step_by_step(name):
    calibration, expected = HISTORIES[name]
    highs, states = follow(calibration, TENSORS)
    np.testing.assert_allclose(highs, expected, rtol=1e-6)
    # What is read from the state is what the next step would apply, or today's where it moves on.
    if "delayed" not in name:
        for state, high in zip(states, highs):
            np.testing.assert_allclose(calibration.read(state).high, [high], rtol=1e-6)


@pytest.mark.parametrize("name", HISTORIES)
def test_tensors_of_zeros_or_bad_values_do_not_count(name):
    calibration, _ = HISTORIES[name]
    bad = np.full(7, np.nan, np.float32)
    infinite = np.array([1, np.inf, 0, 0, 0, 0, 0], np.float32)
    zero = np.zeros(7, np.float32)
    _, clean = follow(calibration, TENSORS[:3])
    _, mixed = follow(
        calibration, [zero, bad, TENSORS[0], infinite, TENSORS[1], zero, bad, TENSORS[2], bad]
    )
    high = np.asarray(calibration.read(mixed[-1]).high)
    np.testing.assert_allclose(high, calibration.read(clean[-1]).high, rtol=1e-6)
    assert int(mixed[-1].updates) == int(clean[-1].updates)


def test_both_bounds_are_remembered():
    calibration = aqs.moving_average(aqs.min_max(), 0.5)
    x, y = np.array([-1, 3], np.float32), np.array([-2, 1], np.float32)
    _, states = follow(calibration, [x, y])
    np.testing.assert_array_equal(states[1].low, [-1.5])
    np.testing.assert_array_equal(states[1].high, [2])
    wider = aqs.running_max(aqs.min_max())
    _, states = follow(wider, [x, y])
    assert (float(states[1].low[0]), float(states[1].high[0])) == (-2, 3)
    delayed = aqs.delayed(aqs.min_max(), 2)
    _, states = follow(delayed, [x, y])
    assert delayed.read(states[1]) == Bounds(jnp.array([3.0]), jnp.array([-2.0]))
    for inner, asymmetric in ((aqs.absmax(), False), (aqs.fixed(1.0), False), (wider, True)):
        assert is_asymmetric(aqs.moving_average(inner)) is asymmetric


def test_evaluation_reads_the_state_alone_and_a_bad_value_stays_visible():
    q = aqs.Quantizer("int8", calibration=aqs.moving_average(aqs.absmax()))
    state = aqs.init_state(q, (3,))
    _, state = aqs.fake_quant_with_state(np.array([1.0, -2.0, 0.5], np.float32), q, state)
    x = np.array([100.0, np.nan, 0.5], np.float32)
    y, same = aqs.fake_quant_with_state(x, q, state, update=False)
    assert same is state
    np.testing.assert_allclose(y, [2, np.nan, 0.5], atol=1 / 127)
    y, after = aqs.fake_quant_with_state(x, q, state)
    assert np.isnan(y[1])
    np.testing.assert_array_equal(after.high, state.high)


def test_a_calibration_made_twice_is_one():
    """So that quantizers compare equal and functions of them are compiled once."""
    assert aqs.percentile(99.0) is aqs.percentile(99.0)
    assert aqs.delayed(aqs.absmax(), 2) is aqs.delayed(aqs.absmax(), 2)
    assert aqs.Quantizer("int8", None, aqs.mse()) == aqs.Quantizer("int8", None, aqs.mse())


def test_wrong_arguments():
    for share in (0, -1, 100.5, float("nan")):
        with pytest.raises(ValueError, match="percent above 0 and at most 100; got"):
            aqs.percentile(share)
    for bounds in ((0.0,), (-1.0,), (float("nan"),), (1.0, 0.5), (1.0, float("nan")), (np.inf,)):
        with pytest.raises(ValueError, match="Fixed bounds are high > 0 and low <= 0; got high"):
            aqs.fixed(*bounds)
    for candidates in (0, -1, 10**9):
        with pytest.raises(
            ValueError, match=f"candidates to try one after another; got {candidates}"
        ):
            aqs.mse(candidates)
    for smallest in (0.0, -0.5, 2.0, float("nan")):
        with pytest.raises(ValueError, match=f"smallest share .* got {smallest}"):
            aqs.mse(10, smallest)
    for weights in ((float("nan"), 1.0), (0.0, np.inf)):
        with pytest.raises(ValueError, match="mean_deviation takes finite weights"):
            aqs.mean_deviation(*weights)
    for momentum in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match=r"A momentum lies in \[0, 1\), or is None; got"):
            aqs.moving_average(aqs.absmax(), momentum)
    with pytest.raises(ValueError, match="frozen after at least one tensor; got 0"):
        aqs.frozen_after(aqs.absmax(), 0)
    with pytest.raises(ValueError, match="look back at least one tensor; got 0"):
        aqs.delayed(aqs.absmax(), 0)
