"""What a quantized function carries or draws: calibration states, random keys, signs, gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import SiteError, SiteFormats, ptq
from aqt_search.numerics.formats import numeric_format

# What XLA makes of the programs is not the question here: the least of LLVM's work will do.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(actual, expected, tolerance=1e-5):
    """Differs by the order of float32 sums of some tens of terms of order one."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def activations(sites, calibration, fmt="int8"):
    """An assignment with one calibration for all activations, and plain int4 weights."""
    q = aqs.Quantizer(fmt, calibration=calibration, unsigned=False)
    return aqs.assign(sites, [(".*", {"weight": "int4", "activation": q})])


def prepared(fun, params, x, calibration, **options):
    """A function with state, its assignment and first state."""
    assignment = activations(aqs.find_sites(fun, params, x), calibration)
    qfun = aqs.quantize_with_state(fun, **options)
    return qfun, assignment, qfun.init(assignment, params, x)


# --- Calibrations over three steps, by hand -------------------------------------------------------

AVERAGE = aqs.moving_average(aqs.absmax(), 0.5)


def highs(used, state):
    return [(0.0, h) for h in used], [(0.0, h) for h in state]


# From the extremes (low, high) of three batches and m = max|x|: the bounds used in each step, and
# what evaluation reads afterwards.
CALIBRATIONS = {
    "moving average": (AVERAGE, lambda e, m: highs(
        [m[0], (m[0] + m[1]) / 2, (m[0] + m[1]) / 4 + m[2] / 2],
        [(m[0] + m[1]) / 4 + m[2] / 2])),
    "plain mean": (aqs.moving_average(aqs.absmax(), None), lambda e, m: highs(
        [m[0], (m[0] + m[1]) / 2, sum(m) / 3], [sum(m) / 3])),
    "delayed": (aqs.delayed(aqs.absmax()), lambda e, m: highs([m[0], m[0], m[1]], [m[2]])),
    "delayed by two": (aqs.delayed(aqs.absmax(), 2), lambda e, m: highs(
        [m[0], m[0], max(m[:2])], [max(m[1:])])),
    "running max": (aqs.running_max(aqs.absmax()), lambda e, m: highs(
        [m[0], max(m[:2]), max(m)], [max(m)])),
    "frozen": (aqs.frozen_after(aqs.absmax(), 2), lambda e, m: highs(
        [m[0], m[1], m[1]], [m[1]])),
    "frozen average": (aqs.frozen_after(AVERAGE, 2), lambda e, m: highs(
        [m[0], (m[0] + m[1]) / 2, (m[0] + m[1]) / 2], [(m[0] + m[1]) / 2])),
    "average of min and max": (aqs.moving_average(aqs.min_max(), 0.5), lambda e, m: (
        [e[0], (e[0] + e[1]) / 2, (e[0] + e[1]) / 4 + e[2] / 2],
        [(e[0] + e[1]) / 4 + e[2] / 2])),
}  # fmt: skip


def int8_by_hand(x, low, high):
    """int8 between bounds, in float64: symmetric without a low bound, else with a zero point."""
    x = np.asarray(x, np.float64)
    if low == 0:
        scale = high / 127
        return np.clip(np.rint(x / scale), -127, 127) * scale
    scale = (high - low) / 254
    zero = np.clip(np.rint(-127 - low / scale), -127, 127)
    return (np.clip(np.rint(x / scale + zero), -127, 127) - zero) * scale


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_three_steps_by_hand(case):
    calibration, by_hand = CALIBRATIONS[case]
    batches = [scale * sample(6, 5, seed=n) for n, scale in enumerate((1.0, 3.0, 0.5))]
    fun, params = lambda p, x: x @ p, jnp.eye(5)
    qfun = aqs.quantize_with_state(fun)
    q = aqs.Quantizer("int8", calibration=calibration)
    assignment = {"params": SiteFormats(q)}
    state = qfun.init(assignment, params, batches[0])
    extremes = [np.array([x.min(), x.max()], np.float64) for x in batches]
    used, read = by_hand(extremes, [np.abs(e).max() for e in extremes])
    step = jit(qfun.apply)
    for x, bounds in zip(batches, used):
        y, state = step(assignment, state, params, x)
        np.testing.assert_allclose(y, int8_by_hand(x, *bounds), rtol=1e-5, atol=1e-5)
    assert step._cache_size() == 1  # the state keeps its shapes and dtypes
    frozen = "frozen" in case
    assert int(state["params"]["lhs"].updates) == (2 if frozen else 3)
    # Evaluation clips an outlier at the bounds of before: today's maximum has no say.
    x = batches[0].at[0, 0].set(1e4).at[1, 1].set(-1e4)
    y = jit(qfun.evaluate)(assignment, state, params, x)
    np.testing.assert_allclose(y, int8_by_hand(x, *read[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("calibration", [AVERAGE, aqs.delayed(aqs.absmax(), 2)])
def test_a_batch_that_tells_nothing_does_not_count(calibration, bad):
    x, params = sample(4, 5), jnp.eye(5)
    qfun, assignment, state = prepared(lambda p, x: x @ p, params, x, calibration)
    _, state = qfun.apply(assignment, state, params, x)
    y, same = qfun.apply(assignment, state, params, jnp.full_like(x, bad))
    assert_equal(same, state)
    assert np.isfinite(y).all() == np.isfinite(bad)


# --- Control flow ---------------------------------------------------------------------------------


def layer(x, w):
    return jnp.tanh(x @ w)


WEIGHTS, X = sample(3, 5, 5, seed=1), sample(4, 5)


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["w"])[0]


def unrolled(params, x):
    for w in params["w"]:
        x = layer(x, w)
    return x


def remat(params, x):
    return jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, params["w"])[0]


def nested(params, x):
    def outer(x, _):
        return scanned(params, x), None

    return jax.lax.scan(outer, x, None, length=2)[0]


def two_steps(fun, calibration, params=None):
    params = params or {"w": WEIGHTS}
    qfun, assignment, state = prepared(fun, params, X, calibration)
    step = jit(qfun.apply)
    for factor in (1.0, 2.0):
        y, state = step(assignment, state, params, factor * X)
    return y, state


@pytest.mark.parametrize("calibration", [AVERAGE, aqs.delayed(aqs.absmax(), 2)])
@pytest.mark.parametrize("fun", [scanned, remat])
def test_a_scan_has_one_state_for_each_iteration(fun, calibration):
    y, state = two_steps(fun, calibration)
    expected, rows = two_steps(unrolled, calibration)
    assert list(state) == ["w"]
    assert list(rows) == ["w#1", "w#2", "w#3"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(rows[n]["lhs"] for n in rows))
    assert_close(y, expected)
    assert_close(state["w"]["lhs"], stacked)
    assert_equal(state["w"]["lhs"].updates, jnp.full(3, 2, jnp.int32))


def test_layers_have_states_of_their_own_and_rounds_through_them_have_not():
    """The outer scan goes through the same layers twice: they move their states on twice."""
    _, state = two_steps(nested, AVERAGE)
    assert state["w"]["lhs"].high.shape == (3, 1, 1)
    assert_equal(state["w"]["lhs"].updates, jnp.full(3, 4, jnp.int32))
    weights = sample(2, 3, 5, 5, seed=1)

    def of_two(params, x):
        return jax.lax.scan(lambda x, w: (scanned({"w": w}, x), None), x, params["w"])[0]

    _, state = two_steps(of_two, AVERAGE, {"w": weights})
    assert state["w"]["lhs"].high.shape == (2, 3, 1, 1)
    assert_equal(state["w"]["lhs"].updates, jnp.full((2, 3), 2, jnp.int32))


def recurrent(params, x):
    """x is a sequence: [steps, batch, 5]."""

    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1]


def test_a_recurrent_network_has_one_state_that_every_step_moves_on():
    params = {"in": WEIGHTS[0], "recurrent": WEIGHTS[1]}
    running = aqs.running_max(aqs.absmax())
    x = sample(7, 4, 5)
    qfun, assignment, state = prepared(recurrent, params, x, running)
    y, state = jit(qfun.apply)(assignment, state, params, x)
    high = np.float64(np.abs(x)).max()
    np.testing.assert_allclose(state["in"]["lhs"].high, [[high]], rtol=1e-6)
    seen = max(np.abs(np.float64(y[:-1])).max(), 0)  # what enters: all states but the last
    np.testing.assert_allclose(state["recurrent"]["lhs"].high, [[seen]], rtol=1e-5)
    frozen = aqs.freeze(recurrent, assignment, params, x, state=state)
    for steps in (7, 3, 12):  # any length
        x = sample(steps, 4, 5, seed=steps)
        expected = jit(qfun.evaluate)(assignment, state, params, x)
        served = jit(aqs.serve(recurrent, execution="emulated"))(frozen, x)
        np.testing.assert_array_equal(served, expected)
    # After calibration, too: the first step's state is zero, the others' are not.
    int8 = aqs.assign(aqs.find_sites(recurrent, params, x), [(".*", "int8")])
    static, calibrated = ptq.calibrate(recurrent, int8, params, [x, 2 * x])
    assert set(calibrated["recurrent"]) == {"lhs", "rhs"}
    frozen = aqs.freeze(recurrent, static, params, x, state=calibrated)
    assert frozen.nbytes == 2 * (25 + 4 * 5) + 2 * 8  # codes and scales, a bound and a count each
    longer = aqs.freeze(recurrent, static, params, sample(70, 4, 5), state=calibrated)
    assert longer.nbytes == frozen.nbytes


def experts(params, x):
    """The second expert is reached by rows whose first number is above 0."""
    chosen = x[:, :1] > 0
    first, second = (jnp.tanh(jnp.where(chosen == use, x, 0.0) @ params[name])
                     for name, use in (("left", False), ("right", True)))  # fmt: skip
    return first + second


@pytest.mark.parametrize(
    "calibration", [AVERAGE, aqs.delayed(aqs.absmax(), 2), aqs.lsq(), aqs.pact(), aqs.batch_quant()]
)
def test_what_was_never_calibrated_takes_a_scale_of_each_batch(calibration):
    params = {"left": WEIGHTS[0], "right": WEIGHTS[1]}
    seen = X.at[:, 0].set(-1.0)  # no row for the second expert
    sites = aqs.find_sites(experts, params, seen)
    q = aqs.Quantizer("int8", aqs.PER_TENSOR, calibration, unsigned=False)
    assignment = aqs.assign(sites, [(".*", {"weight": "int4", "activation": q})])
    qfun = aqs.quantize_with_state(experts)
    state = qfun.init(assignment, params, seen)
    x = X.at[:2, 0].set(1.0)
    untold, _ = jit(qfun.apply)(assignment, state, params, x)  # its own batch's
    assert_close(jit(qfun.evaluate)(assignment, state, params, x), untold)
    _, state = jit(qfun.apply)(assignment, state, params, seen)
    first = aqs.fake_quant(jnp.where(x[:, :1] > 0, x, 0.0), "int8")
    if calibration is AVERAGE:
        right = jnp.tanh(first @ aqs.fake_quant(params["right"], "int4", (1,)))
        y = jit(qfun.evaluate)(assignment, state, params, x)
        assert_close(y[:2], right[:2])  # the first expert has nothing of these rows
    with pytest.warns(aqs.NotCalibrated, match=r"nothing of right \(lhs\): served with a scale"):
        frozen = aqs.freeze(experts, assignment, params, x, state=state)
    expected = jit(qfun.evaluate)(assignment, state, params, x)
    assert_close(jit(aqs.serve(experts, execution="emulated"))(frozen, x), expected)
    traced = jax.jit(lambda s: aqs.freeze(experts, assignment, params, x, state=s))(state)
    assert_close(jit(aqs.serve(experts, execution="emulated"))(traced, x), expected)


def test_a_branch_that_is_not_taken_keeps_its_state():
    def fun(params, x):
        return jax.lax.cond(
            x[0, 0] > 0, lambda x: x @ params["left"], lambda x: x @ params["right"], x
        )

    params = {"left": WEIGHTS[0], "right": WEIGHTS[1]}
    x = X.at[0, 0].set(1.0)
    qfun, assignment, first = prepared(fun, params, x, AVERAGE)
    step = jit(qfun.apply)
    _, state = step(assignment, first, params, x)
    assert_equal(state["right"], first["right"])
    np.testing.assert_array_equal(state["left"]["lhs"].high, np.abs(x).max()[None, None])
    other = 3 * x.at[0, 0].set(-1.0)
    y, after = step(assignment, state, params, other)
    assert_equal(after["left"], state["left"])
    np.testing.assert_array_equal(after["right"]["lhs"].high, np.abs(other).max()[None, None])
    assert_close(y, aqs.fake_quant(other, "int8") @ aqs.fake_quant(params["right"], "int4", (1,)))


def test_linen_model_eager_and_compiled():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))

    model, x = Net(), sample(6, 5)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    qfun, assignment, state = prepared(model.apply, variables, x, AVERAGE)
    eager = qfun.apply(assignment, state, variables, x)
    assert_close(jit(qfun.apply)(assignment, state, variables, x), eager)
    # The first batch has the scales of absmax.
    plain = activations(aqs.find_sites(model.apply, variables, x), aqs.absmax())
    assert_close(eager[0], aqs.quantize(model.apply)(plain, variables, x))


# --- Derivatives ----------------------------------------------------------------------------------


def test_gradient_beside_the_state():
    params, x = {"w": WEIGHTS[0]}, sample(4, 5, seed=3)
    fun = lambda p, x: x @ p["w"]  # noqa: E731
    qfun, assignment, state = prepared(fun, params, x, aqs.delayed(aqs.absmax()))
    _, state = qfun.apply(assignment, state, params, 0.5 * x)
    cotangent = sample(4, 3, seed=4) @ sample(3, 5, seed=5)

    def loss(params, x, state):
        y, state = qfun.apply(assignment, state, params, x)
        return jnp.sum(y * cotangent), state

    step = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, after), (by_params, by_x) = step(params, x, state)
    bound = float(0.5 * np.abs(x).max())
    left = np.clip(np.rint(np.float64(x) / (bound / 127)), -127, 127) * (bound / 127)
    right = np.float64(aqs.fake_quant(params["w"], "int4", (1,)))
    assert_close(value, jnp.float32(np.sum(left @ right * cotangent)), 1e-4)
    assert_close(by_params["w"], jnp.asarray(left.T @ cotangent, jnp.float32))
    # Straight through inside of the bounds, nothing beyond them.
    inside = np.abs(x) <= bound
    assert 0 < np.sum(~inside) < inside.size / 2
    assert_close(by_x, jnp.asarray((cotangent @ right.T) * inside, jnp.float32))
    np.testing.assert_array_equal(after["w"]["lhs"].high, np.abs(x).max()[None, None, None])


def test_gradient_of_a_scan_with_remat_beside_its_state():
    params = {"w": WEIGHTS}
    found = []
    for fun in (remat, unrolled):
        qfun, assignment, state = prepared(fun, params, X, aqs.running_max(aqs.absmax()))

        def loss(params, state, qfun=qfun, assignment=assignment):
            y, state = qfun.apply(assignment, state, params, X)
            return jnp.sum(jnp.sin(y)), state

        (value, _), gradient = jit(jax.value_and_grad(loss, has_aux=True))(params, state)
        found.append((value, gradient))
    assert_close(*found)


# --- Several devices ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calibration",
    [
        AVERAGE,
        aqs.delayed(aqs.absmax(), 2),
        aqs.moving_average(aqs.min_max(), 0.5),
        aqs.moving_average(aqs.mean_deviation(), 0.5),
        aqs.moving_average(aqs.percentile(90), 0.5),
    ],
)
def test_devices_share_the_state_that_one_device_has(calibration):
    params, x = {"w": WEIGHTS}, sample(6, 5, seed=2).at[0].multiply(3.0)
    whole, assignment, state = prepared(scanned, params, x, calibration)
    shard = aqs.quantize_with_state(scanned, axis_name="batch")
    sharded = jax.pmap(functools.partial(shard.apply, assignment), "batch", in_axes=(None, None, 0))
    apply = jit(whole.apply)
    parts = state
    for factor in (1.0, 0.5):
        y, state = apply(assignment, state, params, factor * x)
        ys, states = sharded(parts, params, factor * x.reshape(2, 3, 5))
        parts = jax.tree.map(lambda leaf: leaf[0], states)
        assert_equal(jax.tree.map(lambda leaf: leaf[1], states), parts)
        assert_close(parts, state)
        assert_close(ys.reshape(6, 5), y)


# --- Refusals -------------------------------------------------------------------------------------


def test_states_that_do_not_fit():
    params = {"w": WEIGHTS[0]}
    fun = lambda p, x: x @ p["w"]  # noqa: E731
    qfun, assignment, state = prepared(fun, params, X, AVERAGE)
    with pytest.raises(SiteError, match=r"not of this assignment: it is for nothing.*w \(lhs\)"):
        qfun.apply(assignment, {}, params, X)
    with pytest.raises(SiteError, match=r"it is for other \(lhs\)"):
        qfun.evaluate(assignment, {"other": state["w"]}, params, X)
    with pytest.raises(SiteError, match=r"needs it for nothing.*Make it with init"):
        qfun.apply({}, state, params, X)
    with pytest.raises(SiteError, match=r"'w': the calibration of lhs has state.*quantize_with"):
        aqs.quantize(fun)(assignment, params, X)
    q = aqs.Quantizer("int8", calibration=AVERAGE)
    with pytest.raises(SiteError, match="lhs_gradient takes no calibration with state"):
        aqs.quantize(fun)({"w": SiteFormats(lhs_gradient=q)}, params, X)


def test_no_state_in_a_while_loop():
    def fun(params, x):
        def body(carry):
            return carry[0] + 1, layer(carry[1], params["w"])

        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    params = {"w": WEIGHTS[0]}
    with pytest.raises(SiteError, match=r"'w' is inside a while loop.*lax.scan"):
        prepared(fun, params, X, AVERAGE)
    # Without a state there is nothing to carry.
    assignment = activations(aqs.find_sites(fun, params, X), aqs.absmax())
    by_hand = X
    for _ in range(3):
        by_hand = layer(aqs.fake_quant(by_hand, "int8"), aqs.fake_quant(params["w"], "int4", (1,)))
    assert_close(jit(aqs.quantize(fun))(assignment, params, X), by_hand)


# --- Random keys ----------------------------------------------------------------------------------


def stochastic_net(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


NET = {"a": WEIGHTS[0], "b": WEIGHTS[1]}


def stochastic_assignment(key):
    sites = aqs.find_sites(stochastic_net, NET, X)
    q = aqs.Quantizer("int4", rounding="stochastic")
    assignment = aqs.assign(sites, [(".*", {"weight": "int4", "activation": q})])
    return assignment if key is None else aqs.with_keys(assignment, jax.random.key(key))


def test_keys_decide_the_rounding():
    qfun = jit(aqs.quantize(stochastic_net))
    first, again, other = (qfun(stochastic_assignment(k), NET, X) for k in (0, 0, 1))
    assert qfun._cache_size() == 1  # keys are data
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    keys = [f.lhs.key for f in stochastic_assignment(0).values()]
    assert len({jax.random.key_data(k).tobytes() for k in keys}) == len(keys) == 2
    with pytest.raises(ValueError, match=r"Stochastic rounding needs a random key.*with_keys"):
        qfun(stochastic_assignment(None), NET, X)


def test_keys_leave_other_formats_alone():
    formats = {"a": SiteFormats(numeric_format("int4"), aqs.Quantizer("int8"))}
    assert aqs.with_keys(formats, jax.random.key(0)) == formats


def test_rounding_does_not_depend_on_how_a_batch_is_sharded():
    assignment, x = stochastic_assignment(3), sample(8, 5, seed=5)
    expected = jit(aqs.quantize(stochastic_net))(assignment, NET, x)
    shard = aqs.quantize(stochastic_net, axis_name="batch")
    mapped = jax.pmap(functools.partial(shard, assignment), "batch", in_axes=(None, 0))
    np.testing.assert_allclose(mapped(NET, x.reshape(2, 4, 5)).reshape(8, 5), expected, rtol=1e-5)


def test_stochastic_rounding_is_right_in_the_mean():
    # Each value lies between two multiples of the scale; 400 draws have a standard error of at
    # most half a step / 20, and the largest of 20 errors stays below 4 of those.
    x = sample(4, 5, seed=6)
    q = aqs.Quantizer("int4", rounding="stochastic")
    formats = {"params": SiteFormats(q)}

    def draw(key):
        return aqs.quantize(lambda p, x: x @ p)(aqs.with_keys(formats, key), jnp.eye(5), x)

    mean = jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400)).mean(0)
    np.testing.assert_allclose(mean, x, atol=4 * np.abs(x).max() / 7 / 2 / 20)


# --- Unsigned where it fits -----------------------------------------------------------------------

# What stands between a relu and the product, [4, 4, 5] in and [..., 5] out.
BETWEEN = {
    "relu": lambda h: h,
    "relu6": lambda h: jnp.minimum(h, 6.0),
    "max pool": lambda h: nn.max_pool(h[..., None], (2, 1), (2, 1))[..., 0],
    "average pool": lambda h: nn.avg_pool(h[..., None], (2, 1), (2, 1))[..., 0],
    "reshape": lambda h: h.transpose(1, 0, 2).reshape(16, 5),
    "pad": lambda h: jnp.pad(h, [(1, 1), (0, 0), (0, 0)]),
    "concatenate": lambda h: jnp.concatenate([h, jax.nn.sigmoid(h), h * h]),
    "jit": jax.jit(lambda h: h + 1.0),
}


def steps_of(y, x, count):
    """Whether y lies on multiples of max|x| / count."""
    steps = np.asarray(y, np.float64) / (np.abs(np.float64(x)).max() / count)
    return np.abs(steps - np.rint(steps)).max() < 1e-4, int(np.rint(steps).max())


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("case", BETWEEN)
def test_activations_that_are_never_negative_gain_a_bit(case, unsigned):
    def fun(params, x):
        stem = x @ params["stem"]
        h = BETWEEN[case](jax.nn.relu(x))
        return stem, h, h @ params["after"]

    params, x = {"stem": jnp.eye(5), "after": jnp.eye(5)}, sample(4, 4, 5)
    sites = aqs.find_sites(fun, params, x)
    assert [sites[n].lhs.nonnegative for n in ("stem", "after")] == [False, True]
    rule = {"activation": "int4", "weight": None} | ({} if unsigned else {"unsigned": False})
    assignment = aqs.assign(sites, [(".*", rule)])
    stem, h, after = jit(aqs.quantize(fun))(assignment, params, x)
    # Weights are identities, so results are the quantized activations.
    assert steps_of(stem, x, 7) == (True, int(np.rint(7 * x.max() / np.abs(x).max())))
    assert steps_of(after, h, 15 if unsigned else 7) == (True, 15 if unsigned else 7)


def test_signed_activations_stay_signed():
    for tail in (jnp.tanh, lambda h: jax.nn.relu(h) - 0.1, nn.gelu):
        fun = lambda p, x, tail=tail: tail(x) @ p  # noqa: E731
        (site,) = aqs.find_sites(fun, jnp.eye(5), X).values()
        assert not site.lhs.nonnegative
        y = aqs.quantize(fun)({"params": SiteFormats(numeric_format("int4"))}, jnp.eye(5), X)
        assert steps_of(y, tail(X), 7)[0]


def test_twins_of_traced_formats_compile_once():
    fun = lambda p, x: jax.nn.relu(x) @ p  # noqa: E731
    jitted = jit(aqs.quantize(fun))
    h = jax.nn.relu(X)
    for name, twin in (("int4", "uint4"), ("int8", "uint8"), ("uint3", "uint3"), ("e4m3", "e4m3")):
        y = jitted({"params": SiteFormats(numeric_format(name))}, jnp.eye(5), X)
        np.testing.assert_array_equal(y, aqs.fake_quant(h, twin))
    assert jitted._cache_size() == 1
    # A block format says what an element is.
    y = aqs.quantize(fun)({"params": SiteFormats(aqs.quantizer("mxint8"))}, jnp.eye(5), X)
    np.testing.assert_array_equal(y, aqs.fake_quant(h, aqs.quantizer("mxint8")))


# --- Quantized gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["emulated", "native"])
@pytest.mark.parametrize("gradients", [("int8", "int8"), ("int4", None), (None, "e5m2")])
def test_gradient_formats_by_hand(gradients, execution):
    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, use_bias=False, name="dense")(x)

    model, x, cotangent = One(), sample(6, 5), sample(6, 3, seed=8)
    variables = model.init(jax.random.key(0), x)
    rule = {"weight": "int8", "activation": "int8"}
    rule |= {k: g for k, g in zip(("lhs_gradient", "rhs_gradient"), gradients) if g}
    assignment = aqs.assign(aqs.find_sites(model.apply, variables, x), [("dense", rule)])
    qfun = functools.partial(aqs.quantize(model.apply, execution=execution), assignment)

    @jit
    def backward(variables, x):
        return jax.grad(lambda v, x: jnp.sum(qfun(v, x) * cotangent), (0, 1))(variables, x)

    by_variables, by_x = backward(variables, x)
    left = np.float64(aqs.fake_quant(x, "int8"))
    right = np.float64(aqs.fake_quant(variables["params"]["dense"]["kernel"], "int8", (1,)))
    incoming = [
        np.float64(cotangent if g is None else aqs.fake_quant(cotangent, g)) for g in gradients
    ]
    np.testing.assert_allclose(by_x, incoming[0] @ right.T, rtol=1e-5, atol=1e-5)
    kernel = by_variables["params"]["dense"]["kernel"]
    np.testing.assert_allclose(kernel, left.T @ incoming[1], rtol=1e-5, atol=1e-5)


def test_gradient_formats_on_a_net():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    model, x = Net(), sample(4, 6, 6, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: sample(*leaf.shape, seed=len(leaf.shape)), shapes)
    sites = aqs.find_sites(model.apply, variables, x)
    stochastic = aqs.Quantizer("int8", rounding="stochastic")
    rule = {"weight": "int8", "activation": "int8", "lhs_gradient": stochastic,
            "rhs_gradient": stochastic}  # fmt: skip
    assignment = aqs.assign(sites, [(".*", rule)])

    def loss(fun, variables):
        return jnp.sum(jnp.sin(fun(variables, x)))

    with pytest.raises(ValueError, match="Stochastic rounding needs a random key"):
        aqs.quantize(model.apply)(assignment, variables, x)
    expected = jit(jax.grad(functools.partial(loss, model.apply)))(variables)
    step = jit(lambda assignment, variables: jax.grad(
        functools.partial(loss, functools.partial(aqs.quantize(model.apply), assignment))
    )(variables))  # fmt: skip
    keyed = [aqs.with_keys(assignment, jax.random.key(k)) for k in (0, 0, 1)]
    first, again, other = (step(a, variables) for a in keyed)
    assert step._cache_size() == 1
    assert_equal(first, again)
    a, b, c = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (first, expected, other)
    )
    assert np.any(a != c)
    # 8 bits leave some 1e-2 of noise in each product, of which there are up to three.
    assert np.isfinite(a).all()
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


@pytest.mark.parametrize("execution", ["int8", "bf16", "native"])
def test_traced_unsigned_twins_run_on_codes(execution):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).standard_normal((8, 5)), jnp.float32)

    def fun(w, x):
        return jax.nn.relu(x) @ w

    sites = aqs.find_sites(fun, w, x)
    run = jit(aqs.quantize(fun, execution=execution))
    for name in ("int8", "int4", "int2"):
        assignment = aqs.assign(sites, [(".*", name)])
        expected = aqs.quantize(fun)(assignment, w, x)
        # Sums of 8 products, exact in both but for the scales: a few units in the last place.
        np.testing.assert_allclose(run(assignment, w, x), expected, rtol=1e-6, atol=1e-6)
        unsigned = np.asarray(aqs.fake_quant(jax.nn.relu(x), "u" + name))
        by_hand = unsigned @ np.asarray(aqs.fake_quant(w, name, (1,)))
        np.testing.assert_allclose(expected, by_hand, rtol=1e-5, atol=1e-5)
    assert run._cache_size() == 1
