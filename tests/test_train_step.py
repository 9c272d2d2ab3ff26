"""The training step and the optimizers, against numpy and on one device and on two."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aqt_search as aqs
from aqt_search.training import parallel
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.parallel import AXIS, BatchShapeError
from aqt_search.training.train_step import cross_entropy, init_train_state, make_update

SHAPE = (4, 4, 2)


class Net(nn.Module):
    axis_name: str | None = AXIS

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(not train, axis_name=self.axis_name, name="bn")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def batches(count, size=16, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        images = rng.normal(size=(size, *SHAPE)).astype(np.float32)
        images[: size // 2] *= 3  # the halves differ, as do their scales and statistics
        yield {"image": images, "label": rng.integers(0, 3, size).astype(np.int32)}


def train(devices, formats, *, sync=AXIS, steps=3, net_axis=AXIS):
    """The state and metrics after some steps on so many devices."""
    model = Net(net_axis)
    optimizer = make_optimizer("sgd", 0.1, weight_decay=1e-3)
    state = init_train_state(model, optimizer, SHAPE, seed=0)
    sites = aqs.find_sites(
        Net(None).apply,
        {"params": state.params, "batch_stats": state.batch_stats},
        jnp.zeros((1, *SHAPE)),
    )
    assignment = aqs.assign(sites, [(".*", formats)])
    update = make_update(aqs.quantize(model.apply, axis_name=sync), optimizer)
    step = jax.pmap(
        lambda s, b: update(s, assignment, b)[:2],
        axis_name=AXIS,
        devices=jax.devices()[:devices],
    )
    state = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * devices), state)
    for batch in batches(steps):
        split = {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}
        state, metrics = step(state, split)
    for leaf in jax.tree.leaves((state, metrics)):
        np.testing.assert_array_equal(leaf[0], leaf[-1])  # replicas agree to the bit
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]), (state, metrics))


def largest_difference(one, other):
    """Over all leaves, relative to each leaf's largest value."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


# Sums over the batch in another order move a float32 result by some 1e-6. That may carry a value
# over a rounding threshold: of 1,536 activations an int8 step about every 1e2 steps, by 1/254 of
# the largest.
@pytest.mark.parametrize("formats, tolerance", [(None, 2e-5), ("int8", 2e-3)])
def test_two_devices_train_as_one_does(formats, tolerance):
    one, two = train(1, formats), train(2, formats)
    assert int(one[0].step) == int(two[0].step) == 3
    for a, b in ((one[0].params, two[0].params), (one[0].batch_stats, two[0].batch_stats)):
        assert largest_difference(a, b) < tolerance
    for name in ("loss", "gradient_norm"):
        assert one[1][name] == pytest.approx(two[1][name], rel=tolerance)
    assert one[1]["accuracy"] == pytest.approx(two[1]["accuracy"], abs=1 / 16 + 1e-6)


def test_the_comparison_of_devices_sees_what_is_not_shared():
    params = train(1, "int4")[0].params
    assert largest_difference(params, train(2, "int4", sync=None)[0].params) > 2e-3
    params = train(1, None)[0].params
    assert largest_difference(params, train(2, None, net_axis=None)[0].params) > 2e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_with_label_smoothing(smoothing):
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(6, 5)) * 3, rng.integers(0, 5, 6)
    targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(found, -(targets * log_p).sum(1), rtol=1e-5)


PARAMS = {
    "conv": {"kernel": np.full((2, 2), 2.0, np.float32)},
    "bn": {"scale": np.full(2, 3.0, np.float32), "bias": np.full(2, -1.0, np.float32)},
}


def gradient(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_sgd_by_hand(nesterov, clip):
    decay, momentum = 0.01, 0.9
    rate = optax.linear_schedule(0.1, 0.0, 10)
    optimizer = make_optimizer(
        "sgd", rate, momentum=momentum, nesterov=nesterov, weight_decay=decay, gradient_clip=clip
    )
    params, state = PARAMS, optimizer.init(PARAMS)
    expected = jax.tree.map(np.float64, PARAMS)
    velocity = jax.tree.map(np.zeros_like, expected)
    for t in range(4):
        grads = gradient(t)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in jax.tree.leaves(grads)))
        for module, name in (("conv", "kernel"), ("bn", "scale"), ("bn", "bias")):
            g = grads[module][name] * (min(1.0, clip / norm) if clip else 1.0)
            p, v = expected[module], velocity[module]
            g = g + (decay * p[name] if name == "kernel" else 0.0)
            v[name] = momentum * v[name] + g
            p[name] = p[name] - 0.1 * (1 - t / 10) * (
                g + momentum * v[name] if nesterov else v[name]
            )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


def test_adamw_decays_kernels_alone():
    def after(decay):
        optimizer = make_optimizer("adamw", 0.1, weight_decay=decay)
        updates, _ = optimizer.update(gradient(0), optimizer.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates)

    with_decay, without = after(0.5), after(0.0)
    moved = jax.tree.map(lambda a, b: np.asarray(b - a), with_decay, without)
    np.testing.assert_allclose(moved["conv"]["kernel"], 0.1 * 0.5 * 2.0, rtol=1e-4)
    assert not moved["bn"]["scale"].any()
    assert not moved["bn"]["bias"].any()


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match=r"'sdg'.*sgd, adamw"):
        make_optimizer("sdg", 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_numbers_that_turn_an_optimizer_around(name):
    for bad in (-1.0, float("nan"), float("inf")):
        for key in ("gradient_clip", "weight_decay", "momentum"):
            with pytest.raises(ValueError, match=f"{key} is {bad}"):
                make_optimizer(name, 0.1, **{key: bad})
        with pytest.raises(ValueError, match=f"learning_rate is {bad}"):
            make_optimizer(name, bad)
        with pytest.raises(ValueError, match=f"label_smoothing is {bad}"):
            make_update(None, make_optimizer(name, 0.1), label_smoothing=bad)
    with pytest.raises(ValueError, match="below 1"):
        make_optimizer(name, 0.1, momentum=1.0)
    with pytest.raises(ValueError, match="below 1"):
        make_update(None, make_optimizer(name, 0.1), label_smoothing=1.0)


def test_sharding():
    batch = {"image": np.arange(12.0).reshape(6, 2), "label": np.arange(6)}
    sharded = parallel.shard(batch)
    assert sharded["image"].shape == (2, 3, 2)
    np.testing.assert_array_equal(sharded["label"], [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(BatchShapeError, match=r"7 examples.*2 devices.*multiple"):
        parallel.shard({"label": np.arange(7)})


def test_replicating_there_and_back():
    tree = {"a": np.arange(3, dtype=np.int32), "b": jnp.float32(2.5), "c": np.zeros((0, 2))}
    replicated = parallel.replicate(tree)
    assert replicated["a"].shape == (2, 3)
    back = parallel.unreplicate(replicated)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(back))
