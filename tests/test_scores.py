"""Scores against the gradients and errors of a plain reference, and against measured losses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.search import make_space, score

OPTIONS = ("int2", "int4", "int8", "e2m1")


def mlp(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["first"])
    return hidden @ params["last"]


def loss(outputs, batch):
    return jnp.mean(jnp.sum(jnp.square(outputs - batch["y"]), axis=-1))


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(6, 8)), "last": rng.normal(size=(8, 3))}
    batch = {"x": rng.normal(size=(16, 6)), "y": rng.normal(size=(16, 3))}
    return jax.tree.map(jnp.float32, (params, batch))


@pytest.mark.parametrize("reference", [None, "int4"])
def test_it_is_the_square_of_gradient_times_error(setting, reference):
    params, batch = setting
    sites = aqs.find_sites(mlp, params, batch)
    space = make_space(sites, [(".*", {"weight": OPTIONS, "activation": OPTIONS})])
    assignment = None if reference is None else aqs.assign(sites, [(".*", reference)])
    found = score(mlp, loss, params, [batch], space, assignment)

    def quantized(x, weight, name):
        if name is None:
            return x
        fmt = aqs.numeric_format(name)
        if not weight and name.startswith("int") and bool(jnp.all(x >= 0)):
            fmt = aqs.numeric_format("u" + name)  # what follows a relu is never negative
        axes = (0,) if weight else (0, 1)
        peak = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        scale = peak / float(fmt.max_value)
        return aqs.round_to_format(x / scale, fmt) * scale

    def tapped(w1, w2, x):
        """The loss of operands as they enter, straight through the reference's roundings."""

        def through(value, weight):
            return value + jax.lax.stop_gradient(quantized(value, weight, reference) - value)

        hidden = jax.nn.relu(through(x, False) @ through(w1, True))
        return hidden, through

    w1, w2, x = params["first"], params["last"], batch["x"]

    def of_operands(x, w1, hidden_shift, w2):
        hidden, through = tapped(w1, w2, x)
        out = through(hidden + hidden_shift, False) @ through(w2, True)
        return loss(out, batch)

    hidden = tapped(w1, w2, x)[0]
    operands = (x, w1, jnp.zeros_like(hidden), w2)
    gradients = jax.grad(of_operands, argnums=(0, 1, 2, 3))(*operands)
    values = {
        ("first", "activation"): (x, gradients[0], False),
        ("first", "weight"): (w1, gradients[1], True),
        ("last", "activation"): (hidden, gradients[2], False),
        ("last", "weight"): (w2, gradients[3], True),
    }
    for decision, row in zip(space.decisions, found):
        value, gradient, weight = values[decision.sites[0], decision.role]
        for option, name in enumerate(OPTIONS):
            error = quantized(value, weight, name) - value
            expected = -16 / 2 * jnp.sum(jnp.square(gradient * error))
            np.testing.assert_allclose(row[option], expected, rtol=1e-4)


class Scanned(nn.Module):
    """Two layers that share a program, and one of its own."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda cell, carry, _: (nn.tanh(cell(carry)), None),
            variable_axes={"params": 0}, split_rngs={"params": True}, length=2,
        )  # fmt: skip
        x, _ = body(nn.Dense(6, name="layers"), x, None)
        return nn.Dense(3, name="head")(x)


RULES = [(".*", {"weight": OPTIONS, "activation": "int8"})]


def test_layers_in_a_loop_are_told_together_or_one_by_one(setting):
    _, batch = setting
    model = Scanned()
    params = model.init(jax.random.key(0), batch["x"])

    def apply(params, batch):
        return model.apply(params, batch["x"])

    def unrolled(params, batch):
        layers, head = params["params"]["layers"], params["params"]["head"]
        x = batch["x"]
        for i in range(2):
            x = jnp.tanh(x @ layers["kernel"][i] + layers["bias"][i][None])
        return x @ head["kernel"] + head["bias"][None]

    found = []
    for function in (apply, unrolled):
        sites = aqs.find_sites(function, params, batch)
        space = make_space(sites, RULES, decide="stack")
        values = score(function, loss, params, [batch, batch], space)
        found.append({d.sites[0]: row for d, row in zip(space.decisions, values)})
    scanned, plain = found
    loop = sum(row for name, row in plain.items() if "layers" in name)
    (name,) = (name for name in scanned if "layers" in name)
    np.testing.assert_allclose(scanned[name], loop, rtol=1e-4)
    stacked = make_space(aqs.find_sites(apply, params, batch), RULES)
    values = score(apply, loss, params, [batch, batch], stacked)
    own = {d.sites[0]: row for d, row in zip(stacked.decisions, values)}
    layers = sorted(name for name in plain if "layers" in name)
    for i, name in enumerate(layers):
        np.testing.assert_allclose(own[f"layers/kernel[{i}]"], plain[name], rtol=1e-4)


def test_fewer_options_and_no_batches(setting):
    params, batch = setting
    sites = aqs.find_sites(mlp, params, batch)
    space = make_space(sites, [("first", ("int4", "int8")), ("last", OPTIONS)])
    found = score(mlp, loss, params, [batch], space)
    assert found.shape == (2, 4)
    assert (found[~space.mask] == 0).all()
    assert (found[space.mask] < 0).all()
    assert found[0, 1] > found[0, 0]
    with pytest.raises(ValueError, match="no batches"):
        score(mlp, loss, params, [], space)


def test_it_compiles_once_for_all_batches(setting):
    params, batch = setting
    traced = []

    def counting(params, batch):
        traced.append(1)
        return mlp(params, batch)

    sites = aqs.find_sites(mlp, params, batch)
    space = make_space(sites, [(".*", OPTIONS)])
    score(counting, loss, params, [batch] * 4, space)
    assert len(traced) == 1


def test_equal_spaces_share_one_program(setting):
    """It is traced once, however many weights, references and spaces made anew are scored by it."""
    params, batch = setting
    sites, traced = aqs.find_sites(mlp, params, batch), []

    def counted(params, batch):
        traced.append(None)
        return mlp(params, batch)

    found = [
        score(counted, loss, jax.tree.map(lambda x, k=scale: k * x, params), [batch, batch],
              make_space(sites, [(".*", ("int2", "int4"))]))
        for scale in (1.0, 2.0)
    ]  # fmt: skip
    assert len(traced) == 1
    assert (found[0] != found[1]).any()
    score(counted, loss, params, [batch], make_space(sites, [(".*", ("int2", "int3"))]))
    assert len(traced) == 2
