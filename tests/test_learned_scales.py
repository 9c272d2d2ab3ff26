"""Learned scales against the papers' formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import PER_TENSOR, Quantizer, per_block, per_channel
from aqt_search.numerics.fake_quant import fake_quant_with_state, init_state
from aqt_search.numerics.formats import FormatError, as_grid, stack_formats
from aqt_search.numerics.learned_scales import batch_quant, lsq, merge_learned, pact, split_learned

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16)).astype(np.float32)
COTANGENT = RNG.normal(size=X.shape).astype(np.float32)


def gradients(q, state, x=X, cotangent=COTANGENT, **options):
    """Values, next state and the gradients of sum(cotangent * values) in x and the state."""

    def total(x, learned, rest):
        y, new = fake_quant_with_state(x, q, merge_learned(learned, rest), **options)
        return jnp.sum(y * cotangent), (y, new)

    slope = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (d_x, d_state), (y, new) = slope(x, *split_learned(state))
    return np.asarray(y, float), new, np.asarray(d_x, float), d_state


def lsq64(x, step, q_max, g):
    """Values, and the gradients in x and the step before it is scaled (LSQ, equations 1 to 3)."""
    v = x.astype(float) / step
    codes = np.round(np.clip(v, -q_max, q_max))
    inside = np.abs(v) <= q_max
    return codes * step, g * inside, (g * np.where(inside, codes - v, codes)).sum()


@pytest.mark.parametrize("fmt, q_max", [("int2", 1), ("int4", 7), ("int8", 127)])
def test_lsq_is_the_papers(fmt, q_max):
    q = Quantizer(fmt, PER_TENSOR, lsq())
    _, state, *_ = gradients(q, init_state(q, X.shape))
    (step,) = state["step"].value.reshape(-1)
    assert step == pytest.approx(2 * np.abs(X).mean() / np.sqrt(q_max), rel=1e-6)
    state = jax.tree.map(lambda s: 0.6 * s, state)  # so that some lie outside
    y, new, d_x, d_state = gradients(q, state)
    values, expected_x, expected_step = lsq64(X, 0.6 * float(step), q_max, COTANGENT)
    np.testing.assert_allclose(y, values, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(d_x, expected_x)
    scale = 1 / np.sqrt(X.size * q_max)
    assert d_state["step"].value == pytest.approx(scale * expected_step, rel=1e-3)
    assert new["step"].value == state["step"].value  # the optimizer's from now on


@pytest.mark.parametrize(
    "granularity, shape", [(per_channel(1), (1, 16)), (per_block(8, 0), (8, 16))]
)
def test_every_scale_learns_from_its_own_elements(granularity, shape):
    q = Quantizer("int3", granularity, lsq())
    _, state, *_ = gradients(q, init_state(q, X.shape))
    parts = X.reshape(shape[0], -1, 16)
    step = 2 * np.abs(parts).mean(1) / np.sqrt(3)
    np.testing.assert_allclose(state["step"].value.reshape(shape), step, rtol=1e-5)
    _, _, _, d_state = gradients(q, state)
    cotangents = COTANGENT.reshape(parts.shape)
    expected = [
        [lsq64(parts[i, :, j], step[i, j], 3, cotangents[i, :, j])[2] for j in range(16)]
        for i in range(shape[0])
    ]
    scale = 1 / np.sqrt(parts.shape[1] * 3)
    np.testing.assert_allclose(
        d_state["step"].value.reshape(shape), scale * np.array(expected), rtol=1e-3, atol=1e-4
    )


def test_each_format_searched_over_has_a_step_of_its_own():
    names = ("int2", "int4", "e2m1")
    table = stack_formats(names)
    calibration = lsq(*names)

    @jax.jit
    def apply(x, learned, rest, choice):
        fmt = jax.tree.map(lambda f: jnp.asarray(f)[choice], table)
        q = Quantizer(fmt, PER_TENSOR, calibration)
        y, new = fake_quant_with_state(x, q, merge_learned(learned, rest))
        return jnp.sum(y * y), new

    state = init_state(Quantizer("int2", PER_TENSOR, calibration), X.shape)
    for choice, q_max in enumerate((1, 7, 6)):
        _, state = apply(X, *split_learned(state), choice)
        steps = np.asarray(state["step"].value).reshape(-1)
        assert steps[choice] == pytest.approx(2 * np.abs(X).mean() / np.sqrt(q_max), rel=1e-6)
        assert (steps[choice + 1 :] == 0).all()
        slope = jax.grad(lambda *a: apply(*a)[0], argnums=1)(X, *split_learned(state), choice)
        assert (np.flatnonzero(slope["step"].value) == [choice]).all()
    assert apply._cache_size() == 1
    twin = calibration.read(state, as_grid(aqs.numeric_format("uint4"), np.float32))
    assert twin.high == pytest.approx(15 * steps[1], rel=1e-6)
    other = Quantizer("int8", PER_TENSOR, calibration)
    assert np.isnan(fake_quant_with_state(X, other, state)[0]).all()


@pytest.mark.parametrize("start", [None, 1.5])
def test_pact_has_a_gradient_where_it_clips(start):
    q = Quantizer("int4", PER_TENSOR, pact(start))
    _, state, *_ = gradients(q, init_state(q, X.shape))
    alpha = start or float(np.abs(X).max())
    assert state["alpha"].value == pytest.approx(alpha, rel=1e-6)
    state = jax.tree.map(lambda s: s * np.float32(1 / alpha), state)
    _, _, d_x, d_state = gradients(q, state)  # alpha is 1
    outside = np.abs(X) > 1
    np.testing.assert_array_equal(d_x, COTANGENT * ~outside)
    expected = (COTANGENT * np.sign(X) * outside).sum(dtype=float)
    assert d_state["alpha"].value == pytest.approx(expected, rel=1e-4)


def batch_quant64(x, low, high, gamma, offset, q_min, q_max, g):
    """Section 3.2 of arXiv 2105.08952, with a zero point that is a whole number."""
    scale = (high - low) / (q_max - q_min)
    zero = q_min - low / scale + offset
    codes = np.round(np.clip(x * gamma / scale + np.round(zero), q_min, q_max))
    values = (codes - np.round(zero)) * scale / gamma
    inside = (x >= (q_min - zero) * scale / gamma) & (x <= (q_max - zero) * scale / gamma)
    # d values / d gamma: -values / gamma, and where the rounding lets it through x / gamma
    slope = np.where(inside, x, 0) - values
    return values, (g * slope / gamma).sum(), -(g * ~inside).sum() * scale / gamma


@pytest.mark.parametrize("gamma, offset", [(1.0, 0.0), (1.3, 0.0), (1.2, 1.4)])
def test_batch_quant_is_the_papers(gamma, offset):
    x = X + 0.5
    low = min(0, x.min(0).astype(float).mean())
    high = max(0, x.max(0).astype(float).mean())
    q = Quantizer("int4", PER_TENSOR, batch_quant())
    state = init_state(q, x.shape)
    raw = np.log(np.expm1(gamma))
    learned = {"gamma": raw, "offset": offset}
    state = state._replace(**{
        k: type(state.gamma)(jnp.full_like(state.gamma.value, v)) for k, v in learned.items()
    })  # fmt: skip
    y, new, _, d_state = gradients(q, state, x)
    values, d_gamma, d_offset = batch_quant64(
        x.astype(float), low, high, gamma, offset, -7, 7, COTANGENT
    )
    assert np.mean(np.abs(y - values) > 1e-5) < 0.01  # a few lie within rounding of a tie
    softplus_slope = 1 / (1 + np.exp(-raw))
    tolerance = 0.02 * np.abs(COTANGENT).sum() / np.sqrt(x.size)
    assert d_state.gamma.value == pytest.approx(d_gamma * softplus_slope, abs=tolerance)
    assert d_state.offset.value == pytest.approx(d_offset, abs=tolerance)
    assert (new.low.item(), new.high.item()) == pytest.approx((low, high), rel=1e-5)


def test_batch_quant_evaluates_with_the_mean_of_what_it_saw():
    q = Quantizer("int8", PER_TENSOR, batch_quant())
    state, ends = init_state(q, X.shape), []
    for scale in (1.0, 2.0, np.nan, 4.0):
        _, state = fake_quant_with_state(scale * X, q, state)
        ends.append(scale * X.max(0).mean())
    assert state.updates == 3
    assert state.high.item() == pytest.approx(np.nanmean(ends), rel=1e-5)
    once = fake_quant_with_state(X[:1], q, state, update=False)[0]
    whole = fake_quant_with_state(X, q, state, update=False)[0]
    np.testing.assert_array_equal(once, whole[:1])  # not of the batch


@pytest.mark.parametrize("calibration", [lsq(), pact(), batch_quant()])
def test_a_sharded_batch_has_the_scale_of_the_whole(calibration):
    q = Quantizer("int4", PER_TENSOR, calibration)
    whole, expected = fake_quant_with_state(X, q, init_state(q, X.shape))
    run = functools.partial(fake_quant_with_state, axis_name="batch")
    shards = X.reshape(4, 16, 16)
    parts, states = jax.vmap(lambda x: run(x, q, init_state(q, x.shape)), axis_name="batch")(shards)
    np.testing.assert_allclose(parts.reshape(X.shape), whole, rtol=1e-5, atol=1e-6)
    for one, other in zip(jax.tree.leaves(states), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one[0], other, rtol=1e-5)


@pytest.mark.parametrize("calibration", [lsq(), pact(), batch_quant()])
def test_zero_and_broken_first_tensors_set_nothing(calibration):
    q = Quantizer("int4", PER_TENSOR, calibration)
    start = state = init_state(q, X.shape)
    for bad in (np.zeros_like(X), np.full_like(X, np.nan)):
        y, state = fake_quant_with_state(bad, q, state)
        np.testing.assert_array_equal(y, bad)
    learned = split_learned(state)[0]
    for found, first in zip(jax.tree.leaves(learned), jax.tree.leaves(split_learned(start)[0])):
        np.testing.assert_array_equal(found, first)


def net(params, x):
    # Smooth: where a sum of codes is 0, a relu's derivative hangs on the order of summation.
    return jax.nn.softplus(x @ params["a"]) @ params["b"]


PARAMS = {
    "a": RNG.normal(size=(16, 24)).astype(np.float32),
    "b": RNG.normal(size=(24, 8)).astype(np.float32),
}


@pytest.mark.parametrize("calibration", [lsq(), pact()])
@pytest.mark.parametrize("gradient", [None, "fp32"])
def test_products_on_codes_have_the_gradients_of_emulated_ones(calibration, gradient):
    sites = aqs.find_sites(net, PARAMS, X)
    q = Quantizer("int4", PER_TENSOR, calibration)
    rule = {"lhs": q, "rhs": q, "lhs_gradient": gradient, "rhs_gradient": gradient}
    assignment = aqs.assign(sites, [(".*", rule)])
    found = []
    for execution in ("emulated", "int8"):
        qnet = aqs.quantize_with_state(net, execution=execution)
        start = qnet.init(assignment, PARAMS, X)
        _, state = jax.jit(qnet.apply)(assignment, start, PARAMS, X)
        learned, rest = split_learned(jax.tree.map(lambda s: 0.7 * s, state))

        def loss(params, learned, qnet=qnet, rest=rest):
            y, _ = qnet.apply(assignment, merge_learned(learned, rest), params, X)
            return jnp.sum(jnp.square(y))

        slope = jax.jit(jax.grad(loss, argnums=(0, 1)))
        found.append(jax.tree.leaves(slope(PARAMS, learned)))
    assert len(found[0]) == 2 + 4
    for emulated, native in zip(*found):
        np.testing.assert_allclose(native, emulated, rtol=1e-3, atol=1e-4 * np.abs(emulated).max())
        assert np.abs(emulated).max() > 0


def test_learned_scales_are_served_as_trained():
    sites = aqs.find_sites(net, PARAMS, X)
    weight = Quantizer("int4", PER_TENSOR, lsq("int3", "int4"))
    rule = {"weight": weight, "activation": Quantizer("int8", PER_TENSOR, batch_quant())}
    assignment = aqs.assign(sites, [(".*", rule)])
    qnet = aqs.quantize_with_state(net)
    _, state = qnet.apply(assignment, qnet.init(assignment, PARAMS, X), PARAMS, X)
    trained = qnet.evaluate(assignment, state, PARAMS, X)
    served = aqs.serve(net)(aqs.freeze(net, assignment, PARAMS, X, state=state), X)
    np.testing.assert_allclose(served, trained, rtol=1e-5, atol=1e-5 * np.abs(trained).max())


def test_descent_stops_where_the_papers_gradient_vanishes():
    x = RNG.normal(size=100_000).astype(np.float32)
    q = Quantizer("int2", PER_TENSOR, lsq())
    steps = np.linspace(0.5, 3, 500)
    slopes = []
    for s in steps:
        values = s * np.round(np.clip(x / s, -1, 1))
        slopes.append(lsq64(x, s, 1, 2 * (values - x))[2])
    expected = np.interp(0, slopes, steps)
    state = init_state(q, x.shape)

    @jax.jit
    def descend(state):
        def loss(learned):
            y, new = fake_quant_with_state(x, q, merge_learned(learned, split_learned(state)[1]))
            return jnp.sum(jnp.square(y - x)), new

        slope, new = jax.grad(loss, has_aux=True)(split_learned(state)[0])
        return jax.tree.map(lambda s, g: s - 2e-3 * g, new, slope)

    for _ in range(200):
        state = descend(state)
    assert state["step"].value.item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: lsq("int4", "int99x"), ["int99x"]),
        (lambda: pact(0.0), ["start above 0"]),
        (lambda: gradients(Quantizer("int4", per_channel(1), batch_quant()),
                           init_state(Quantizer("int4", per_channel(1), batch_quant()), X.shape)),
         ["PER_TENSOR"]),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises((FormatError, ValueError)) as caught:
        call()
    assert all(word in str(caught.value) for word in words)
