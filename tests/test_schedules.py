import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aqt_search.models.resnet import resnet
from aqt_search.training.schedules import learning_rate, weight_decay_mask

TOTAL, WARMUP, PEAK = 250, 5, 0.4


def cosine(t, warmup):
    return (1 + math.cos(math.pi * (t - warmup) / (TOTAL - warmup))) / 2


# the formulas of the docstring, in plain Python
AFTER_WARMUP = {
    "constant": lambda t, w: 1.0,
    "cosine": cosine,
    "cosine_linear_cooldown": lambda t, w: cosine(t, w) * min(1.0, (TOTAL - t) / 50),
    "step": lambda t, w: 0.1 ** ((t >= 125) + (t >= 188)),  # round(0.75 * 250) = 188
}


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_rate_is_the_documented_formula_at_every_step(name, warmup):
    schedule = learning_rate(name, peak=PEAK, total_steps=TOTAL, warmup_steps=warmup)
    steps = jnp.arange(TOTAL)
    rates = np.asarray(jnp.broadcast_to(jax.jit(schedule)(steps), steps.shape))
    expected = [
        PEAK * (t / warmup if t < warmup else AFTER_WARMUP[name](t, warmup)) for t in range(TOTAL)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=PEAK * 1e-6)


def test_options():
    schedule = learning_rate(
        "step", peak=1.0, total_steps=100, warmup_steps=10, drops=(0.2, 0.9), factor=0.5
    )
    assert [float(schedule(t)) for t in (5, 10, 19, 20, 89, 90)] == [0.5, 1, 1, 0.5, 0.5, 0.25]
    schedule = learning_rate("cosine_linear_cooldown", peak=1.0, total_steps=8, cooldown_share=1.0)
    assert float(schedule(4)) == pytest.approx(0.5 * 0.5)


@pytest.mark.parametrize(
    "changes, kind, words",
    [
        ({"name": "cosin"}, ValueError, ["'cosin'", *AFTER_WARMUP]),
        ({"warmup_steps": 100}, ValueError, ["warmup_steps", "100"]),
        ({"warmup_steps": -1}, ValueError, ["warmup_steps", "-1"]),
        ({"total_steps": 0}, ValueError, ["total_steps", "0"]),
        ({"peak": float("nan")}, ValueError, ["peak", "nan"]),
        ({"peak": -0.1}, ValueError, ["peak", "-0.1"]),
        ({"drops": (0.5,)}, TypeError, ["drops"]),
        (
            {"name": "cosine_linear_cooldown", "cooldown_share": 1.5},
            ValueError,
            ["cooldown_share", "1.5"],
        ),
        (
            {"name": "cosine_linear_cooldown", "warmup_steps": 50, "cooldown_share": 0.6},
            ValueError,
            ["cooldown_share", "0.6", "50 steps after"],
        ),
        ({"name": "step", "drops": (0.9, 0.5)}, ValueError, ["drops", "(0.9, 0.5)"]),
        ({"name": "step", "drops": (1.0,)}, ValueError, ["drops", "100"]),
        ({"name": "step", "drops": (0.1,), "warmup_steps": 20}, ValueError, ["drops", "20"]),
        ({"name": "step", "factor": 0.0}, ValueError, ["factor", "0.0"]),
    ],
)
def test_bad_input_is_named(changes, kind, words):
    arguments = {"name": "cosine", "peak": 0.1, "total_steps": 100} | changes
    with pytest.raises(kind) as error:
        learning_rate(arguments.pop("name"), **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_weight_decay_is_for_kernels_only():
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(resnet(20, 10).init, jax.random.key(0), images)["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(weight_decay_mask(params))
    names = {path[-1].key for path, decayed in flat if decayed}
    assert names == {"kernel"}
    assert sum(decayed for _, decayed in flat) == 19 + 2 + 1  # 3x3, shortcuts, head


def test_stacked_biases_and_scales_are_not_decayed():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm(name="norm")(nn.Dense(3, name="dense")(x)), None

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
    params = stack.init(jax.random.key(0), jnp.ones((2, 3)), None)["params"]
    assert jax.tree.map(jnp.ndim, params)["norm"]["scale"] == 2
    assert weight_decay_mask(params) == {
        "dense": {"bias": False, "kernel": True},
        "norm": {"bias": False, "scale": False},
    }


def test_mask_fits_optax():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    decay = optax.add_decayed_weights(0.5, mask=weight_decay_mask)
    updates, _ = decay.update(jax.tree.map(jnp.zeros_like, params), decay.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], np.full((2, 2), 0.5))
    np.testing.assert_array_equal(updates["bias"], np.zeros(2))
