"""Trees with leaves that are no arrays, and functions whose arguments are bound by name.

The model is as Equinox has them: a tree that holds its activation function and its name.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import aqt_search as aqs
from aqt_search import SiteFormats, ptq, search
from aqt_search.palette import storage
from aqt_search.tracing.freeze import Dropped


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


X = sample(6, 4)
MODEL = {
    "first": {"kernel": sample(4, 8, seed=1), "bias": jnp.zeros(8), "activation": jnp.tanh},
    "out": {"kernel": sample(8, 3, seed=2), "bias": jnp.zeros(3), "name": "head"},
    "gain": 2.0,
}


def apply(model, x):
    first, out = model["first"], model["out"]
    assert out["name"] == "head"
    return model["gain"] * (
        first["activation"](x @ first["kernel"] + first["bias"][None]) @ out["kernel"]
        + out["bias"][None]
    )


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


INT4 = aqs.assign(aqs.find_sites(apply, MODEL, X), [(".*", "int4")])


def test_a_model_with_functions_in_it_is_served():
    frozen = aqs.freeze(apply, INT4, MODEL, X)
    expected = aqs.quantize(apply)(INT4, MODEL, X)
    for serve in (aqs.serve(apply), jax.jit(aqs.serve(apply))):
        np.testing.assert_allclose(serve(frozen, X), expected, rtol=1e-6, atol=1e-6)


def test_after_training():
    static, state = ptq.calibrate(apply, INT4, MODEL, [X, 2 * X])
    logits = aqs.quantize_with_state(apply).evaluate(static, state, MODEL, X)
    frozen = aqs.freeze(apply, static, MODEL, X, state=state)
    np.testing.assert_allclose(jax.jit(aqs.serve(apply))(frozen, X), logits, rtol=1e-6, atol=1e-6)
    with_bias = ptq.correct_bias(apply, static, state, MODEL, [X, 2 * X])
    assert with_bias["first"]["activation"] is jnp.tanh
    means = [aqs.quantize_with_state(apply).evaluate(static, state, with_bias, x).mean(0)
             for x in (X, 2 * X)]  # fmt: skip
    wanted = [apply(MODEL, x).mean(0) for x in (X, 2 * X)]
    np.testing.assert_allclose(np.mean(means, 0), np.mean(wanted, 0), atol=1e-5)


def test_scores():
    """One decision, whose score has the closed form sum (g (Q(w) - w))^2 of its docstring."""
    sites = aqs.find_sites(apply, MODEL, X)
    space = search.make_space(
        sites, [(".*first.*", None), (".*", {"weight": ["int4", "int8"], "activation": None})]
    )
    values = search.score(apply, lambda y, x: jnp.mean(y**2), MODEL, [X], space)
    hidden = np.tanh(np.float64(X) @ np.float64(MODEL["first"]["kernel"]))
    kernel = np.float64(MODEL["out"]["kernel"])
    gradient = 2 * hidden.T @ (2 * 2 * (hidden @ kernel)) / (len(X) * 3)
    errors = [aqs.fake_quant(kernel, name, channel_axes=(1,)) - kernel for name in ("int4", "int8")]
    expected = [-len(X) / 2 * np.sum((gradient * error) ** 2) for error in errors]
    np.testing.assert_allclose(values, [expected], rtol=1e-3)


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.cell = nnx.LSTMCell(4, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, deterministic=True):
        carry = (jnp.tile(x[:, :1], 5), jnp.tile(x[:, 1:2], 5))
        carry, y = self.cell(carry, x)
        return self.out(self.dropout(y, deterministic=deterministic))


@pytest.mark.parametrize("deterministic", [True, False])
def test_random_keys_among_the_parameters(deterministic):
    graph, variables = nnx.split(Recurrent(nnx.Rngs(0)))

    def fun(variables, x):
        return nnx.merge(graph, variables, copy=True)(x, deterministic)

    assignment = aqs.assign(aqs.find_sites(fun, variables, X), [(".*", "int8")])
    frozen = aqs.freeze(fun, assignment, variables, X)
    kernels = [leaf for leaf in jax.tree.leaves(
        frozen.params, is_leaf=lambda x: isinstance(x, Dropped)) if isinstance(leaf, Dropped)
    ]  # fmt: skip
    assert (
        sum(len(leaf.shape) == 2 for leaf in kernels) == 9
    )  # four gates of two products each, and the last layer
    expected = aqs.quantize(fun)(assignment, variables, X)
    served = jax.jit(aqs.serve(fun, execution="emulated"))(frozen, X)
    np.testing.assert_allclose(served, expected, rtol=1e-6, atol=1e-6)


# --- Bound by name --------------------------------------------------------------------------------


def moded(params, x, train=False, *, scale=1.0):
    return scale * (x @ params if train else x)


def leading(fun):
    return list(inspect.signature(fun).parameters)


def test_names_of_arguments_are_those_they_are_called_with():
    assert leading(aqs.quantize(moded)) == ["assignment", "params", "x", "train", "scale"]
    assert leading(aqs.serve(moded)) == ["frozen", "x", "train", "scale"]
    assert leading(storage.serve(moded)) == ["params", "x", "train", "scale"]
    assert leading(aqs.quantize(lambda *args: args)) == ["assignment", "params", "args"]
    assert aqs.quantize(moded).__name__ == "moded"
    assert not hasattr(aqs.quantize(moded), "__wrapped__")


def test_static_argnames():
    w, int8 = sample(4, 3), aqs.numeric_format("int8")
    assignment = {"params": SiteFormats(None, int8)}
    quantized = jax.jit(aqs.quantize(moded), static_argnames="train")
    expected = X @ aqs.fake_quant(w, "int8", channel_axes=(1,))
    np.testing.assert_allclose(quantized(assignment, w, X, train=True), expected, rtol=1e-6)
    frozen = aqs.freeze(functools.partial(moded, train=True), assignment, w, X)
    served = jax.jit(aqs.serve(moded), static_argnames="train")
    np.testing.assert_allclose(served(frozen, X, train=True), expected, rtol=1e-6)
