"""Gradient rules, and binary and centred quantizers, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics.calibration import centred, mean_deviation
from aqt_search.numerics.gradient_rules import PASS_THROUGH, STRAIGHT_THROUGH, ewgs
from aqt_search.numerics.learned_scales import lsq
from aqt_search.numerics.quantizer import FormatError, Quantizer

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
G = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)


def gradient(q, x=X):
    return jax.jit(jax.grad(lambda x: jnp.sum(aqs.fake_quant(x, q) * G)))(x)


def test_binary_is_the_sign_times_the_mean_magnitude_per_channel():
    y = jax.jit(lambda x: aqs.fake_quant(x, "binary", (-1,)))(X)
    expected = np.where(X > 0, 1, -1) * np.abs(X.astype(np.float64)).mean(0)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient("binary"), G)


def test_binary_zeros_stay_nearly_zero():
    y = aqs.fake_quant(np.zeros((3, 2), np.float32), "binary")
    np.testing.assert_allclose(y, 0, atol=1e-30)


@pytest.mark.parametrize("fmt, bits", [("uint1", 1), ("uint2", 2), ("uint4", 4)])
def test_a_centred_grid_has_evenly_spaced_levels_between_the_bounds(fmt, bits):
    q = Quantizer(fmt, calibration=centred(aqs.absmax()))
    x = np.linspace(-3, 3, 401).astype(np.float32)
    levels = np.linspace(-3, 3, 2**bits)
    # Between two levels, ties aside, the nearer one.
    distance = np.abs(x.astype(np.float64)[:, None] - levels)
    tie = np.sort(distance)[:, 1] - np.sort(distance)[:, 0] < 1e-5
    y = np.asarray(aqs.fake_quant(x, q))
    np.testing.assert_allclose(y[~tie], levels[distance.argmin(1)][~tie], rtol=1e-5, atol=1e-6)
    assert len(np.unique(y)) == 2**bits


@pytest.mark.parametrize("fmt", ["int2", "int4", "e2m1", "bf16"])
def test_centring_leaves_formats_that_hold_zero_in_the_middle(fmt):
    q = Quantizer(fmt, calibration=centred(aqs.absmax()))
    np.testing.assert_array_equal(aqs.fake_quant(X, q), aqs.fake_quant(X, fmt))


@pytest.mark.parametrize("name", ["binary", "uint2"])
def test_stored_and_served_codes_are_the_emulated_values(name):
    q = aqs.quantizer("binary")
    q = q if name == "binary" else Quantizer(name, calibration=centred(aqs.mse()))
    stored = aqs.quantize_tensor(X, q, (-1,))
    # Means are summed in another order under jit.
    np.testing.assert_allclose(stored.dequantize(), aqs.fake_quant(X, q, (-1,)), rtol=1e-6)
    assert stored.nbytes == -(-X.size * int(q.bits) // 8) + 4 * X.shape[1]  # no zero points

    def apply(params, x):
        return x @ params["w"]

    assignment = {"w": aqs.SiteFormats(rhs=q)}
    frozen = aqs.freeze(apply, assignment, {"w": X}, G.T)
    emulated = aqs.quantize(apply)(assignment, {"w": X}, G.T)
    np.testing.assert_allclose(aqs.serve(apply)(frozen, G.T), emulated, rtol=1e-6)
    with pytest.raises((ValueError, FormatError), match="centred"):
        aqs.quantize(apply, execution="int8")({"w": aqs.SiteFormats("int8", q)}, {"w": X}, G.T)


def test_a_centred_format_may_be_traced():
    table = aqs.stack_formats(["uint1", "int2", "e2m1"])

    def at(index):
        fmt = jax.tree.map(lambda column: jnp.asarray(column)[index], table)
        return aqs.fake_quant(X, Quantizer(fmt, calibration=centred(aqs.absmax())))

    traced = jax.jit(jax.vmap(at))(jnp.arange(3))
    for y, fmt in zip(traced, ["uint1", "int2", "e2m1"]):
        one = Quantizer(fmt, calibration=centred(aqs.absmax()))
        np.testing.assert_array_equal(y, aqs.fake_quant(X, one))


CLIPPING = mean_deviation(0.0, 1.0)


@pytest.mark.parametrize("delta", [0.0, 0.5])
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("fmt", ["int3", "e2m1"])
def test_gradients_follow_the_rule(delta, clips, fmt):
    rule = ewgs(delta, clips=clips)
    q = Quantizer(fmt, calibration=CLIPPING, gradient=rule)
    x, g = X.astype(np.float64), G.astype(np.float64)
    high = np.sqrt(np.mean(x**2))
    error = (x - np.asarray(aqs.fake_quant(X, q))) / (2 * high)
    expected = g * (1 + delta * np.sign(g) * error)
    if clips:
        expected = np.where(np.abs(x) <= high, expected, 0)
    np.testing.assert_allclose(gradient(q), expected, rtol=2e-5, atol=1e-6)
    # The same through a product of the whole function, emulated and on codes.
    for execution in ("emulated", "int8") if fmt == "int3" else ("emulated",):
        product = jax.grad(
            lambda x, execution=execution: jnp.sum(
                aqs.dot_general(
                    x, jnp.eye(5), (((1,), (0,)), ((), ())),
                    lhs_format=q, rhs_format="int8", execution=execution,
                ) * G
            )
        )(X)  # fmt: skip
        np.testing.assert_allclose(product, expected, rtol=2e-5, atol=1e-6)


def test_the_rule_is_batched_and_needs_no_error_without_a_delta():
    q = Quantizer("int3", calibration=CLIPPING, gradient=ewgs(0.5))
    both = jax.vmap(lambda x: gradient(q, x))(np.stack([X, 2 * X]))
    np.testing.assert_allclose(both[0], gradient(q), rtol=1e-6)
    assert ewgs(0.0) == STRAIGHT_THROUGH
    assert ewgs(0.0, clips=False) == PASS_THROUGH


def test_a_step_towards_the_level_counts_for_more():
    q = Quantizer("int8", calibration=aqs.absmax(), gradient=ewgs(1.0))
    x = np.array([127.0, 10.4], np.float32)  # 10.4 lies above its level, 10
    gradients = {
        sign: jax.grad(lambda x, s=sign: s * aqs.fake_quant(x, q)[1])(x)[1] for sign in (1, -1)
    }
    # Descent along a gradient of +1 lowers x, towards the level: |gradient| above 1.
    assert gradients[1] > 1 > -gradients[-1] > 0


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: ewgs(-1.0), "at least 0"),
        (lambda: Quantizer("int4", calibration=lsq(), gradient=PASS_THROUGH), "Learned bounds"),
        (lambda: centred(aqs.min_max()), "symmetric"),
        (lambda: aqs.numeric_format("int1"), "uint1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()
