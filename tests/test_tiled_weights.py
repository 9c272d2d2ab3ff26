"""Values of stored weights, tile by tile: the same products, without all values at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.products import tiled_weights

NUMBERS = (((1,), (0,)), ((), ()))


def blocks(name):
    """A block format, its blocks along the axis that is summed over."""
    q = aqs.quantizer(name)
    return dataclasses.replace(q, granularity=q.granularity._replace(block_axis=0))


WEIGHTS = {
    "int8": "int8", "int4": "int4", "int6": "int6", "e4m3": "e4m3", "e2m1": "e2m1", "bf16": "bf16",
    "mxfp4": blocks("mxfp4"), "nvfp4": blocks("nvfp4"),
    "per tensor": aqs.Quantizer("int8", aqs.PER_TENSOR),
    "zero points": aqs.Quantizer("int4", calibration=aqs.min_max()),
    "centred": aqs.Quantizer("int2", calibration=aqs.centred(aqs.absmax())),
}  # fmt: skip

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="tiles are for CPUs")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_weights, "TILE", 1024)
    monkeypatch.setattr(tiled_weights, "_LEAST", 2048)


def sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stored(w, quantizer):
    named = quantizer if isinstance(quantizer, aqs.Quantizer) else aqs.quantizer(quantizer)
    channels = () if named.granularity is not None else (1,)
    return aqs.quantize_tensor(w, quantizer, channels, order=(1, 0))


def multiplied(x, w, numbers=NUMBERS, execution="auto"):
    return aqs.dot_general(x, w, numbers, execution=execution)


def loops(fun, *args):
    return str(jax.make_jaxpr(fun)(*args)).count("scan[")


@pytest.mark.parametrize("n", [64, 72])  # 32 rows of 32 a tile: two of them, and eight more rows
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_are_those_of_the_values(small_tiles, name, rows, n):
    x, w = sample(rows, 32), stored(sample(32, n, seed=1), WEIGHTS[name])
    values = np.asarray(w.dequantize(), np.float64)
    expected = x.astype(np.float64) @ values
    assert loops(multiplied, x, w) == 1
    bound = 34 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(values))  # 32 products, 31 sums
    assert np.all(np.abs(jax.jit(multiplied)(x, w) - expected) <= bound)


@pytest.mark.parametrize("activations", [None, "e4m3", aqs.Quantizer("e4m3", aqs.PER_TOKEN)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_activations_are_what_they_are_otherwise(small_tiles, activations, dtype):
    x = jnp.asarray(sample(2, 3, 32), dtype)
    w = aqs.quantize_tensor(jnp.asarray(sample(32, 64, seed=1), dtype), "int8", (1,), order=(1, 0))
    numbers = (((2,), (0,)), ((), ()))

    def product(x, w, execution):
        return aqs.dot_general(x, w, numbers, lhs_format=activations, execution=execution)

    tiled, whole = (jax.jit(product, static_argnums=2)(x, w, e) for e in ("auto", "emulated"))
    assert tiled.dtype == whole.dtype == dtype
    # Sums in another order, each rounded once to the result's dtype.
    error = 1e-5 if dtype == np.float32 else 2.0**-7
    np.testing.assert_allclose(
        np.asarray(tiled, np.float32), np.asarray(whole, np.float32), rtol=error, atol=error
    )


def test_gradients_are_those_of_the_values(small_tiles):
    x, w, cotangent = sample(4, 32), stored(sample(32, 64, seed=1), "int8"), sample(4, 64, seed=2)
    gradient = jax.grad(lambda x: jnp.sum(multiplied(x, w) * cotangent))(x)
    np.testing.assert_allclose(gradient, cotangent @ w.dequantize().T, rtol=1e-5, atol=1e-5)
    tangent = sample(4, 32, seed=3)
    _, slope = jax.jvp(lambda x: multiplied(x, w), (x,), (tangent,))
    np.testing.assert_allclose(slope, tangent @ w.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [(), (0,), (3, 0), (2, 3)])
def test_a_batch_of_any_shape(small_tiles, rows):
    x, w = sample(*rows, 32), stored(sample(32, 64, seed=1), "int8")
    found = jax.jit(lambda x, w: multiplied(x, w, numbers=(((x.ndim - 1,), (0,)), ((), ()))))(x, w)
    np.testing.assert_allclose(found, x @ w.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape, contracting, order",
    [((32, 10, 8), (0,), (1, 2, 0)), ((4, 8, 72), (0, 1), (2, 0, 1)), ((72, 32), (1,), ())],
)
def test_weights_of_several_axes(small_tiles, shape, contracting, order):
    """Heads that are kept, heads that are summed over, and what lies so by itself."""
    x, w = sample(5, *(shape[a] for a in contracting)), sample(*shape, seed=1)
    kept = tuple(a for a in range(len(shape)) if a not in contracting)
    stored = aqs.quantize_tensor(w, "int4", kept, order=order)
    numbers = ((tuple(range(1, x.ndim)), contracting), ((), ()))
    assert loops(lambda x, w: multiplied(x, w, numbers=numbers), x, stored) == 1
    expected = np.tensordot(x.astype(np.float64), stored.dequantize(), numbers[0])
    found = multiplied(x, stored, numbers=numbers)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_under_vmap_every_product_is_its_own(small_tiles):
    x, w = sample(3, 2, 32), stored(sample(32, 64, seed=1), "int4")
    found = jax.jit(jax.vmap(multiplied, (0, None)))(x, w)
    np.testing.assert_allclose(found, x @ w.dequantize(), rtol=1e-5, atol=1e-5)


def test_what_is_emulated_adds_up_as_the_product_of_values_does(small_tiles):
    x, w = sample(4, 32), stored(sample(32, 64, seed=1), "int8")
    emulated = jax.jit(lambda x, w: multiplied(x, w, execution="emulated"))
    assert loops(emulated, x, w) == 0
    np.testing.assert_array_equal(emulated(x, w), jax.jit(jnp.matmul)(x, w.dequantize()))


def test_a_large_weight_is_served_without_its_values():
    """A dense layer of 2048 x 2048 in int8: a tile of 4 MB is planned, not all 16 MB."""
    x, params = sample(1, 2048), {"w": sample(2048, 2048, seed=1)}

    def apply(params, x):
        return jnp.tanh(x @ params["w"])

    rules = [(".*", {"weight": "int8", "activation": None})]
    frozen = aqs.freeze(apply, aqs.assign(aqs.find_sites(apply, params, x), rules), params, x)
    program = jax.jit(aqs.serve(apply)).lower(frozen, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * 4 * tiled_weights.TILE
    values = frozen.weights["w"]["rhs"].dequantize()
    np.testing.assert_allclose(program(frozen, x), np.tanh(x @ values), rtol=0, atol=1e-4)
