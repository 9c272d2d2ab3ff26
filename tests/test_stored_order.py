"""Stored weights lie as products read them: served programs neither transpose nor copy them."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs


def sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Layers(nn.Module):
    """Products with one and several axes that are summed over, or kept."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (1, 1))(x))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        x = nn.DenseGeneral((4, 30))(x)
        return nn.DenseGeneral(10, axis=(-2, -1))(x)


def experts(params, x):
    """[b, m] x [b, m, n]: a batch of weights."""
    return jnp.einsum("bxm,bmn->bxn", x, params["w"])


def linen():
    model, x = Layers(), sample(4, 8, 8, 32)
    return model.apply, model.init(jax.random.key(0), x), x


def batched():
    return experts, {"w": sample(3, 16, 24)}, sample(3, 5, 16, seed=1)


def frozen_with_static_scales(apply, params, x, fmt):
    sites = aqs.find_sites(apply, params, x)
    rules = [(".*", {"weight": fmt, "activation": "int8"})]
    assignment = aqs.with_static_activations(aqs.assign(sites, rules), sites)
    qfun = aqs.quantize_with_state(apply)
    _, state = qfun.apply(assignment, qfun.init(assignment, params, x), params, x)
    expected = qfun.evaluate(assignment, state, params, x)
    return aqs.freeze(apply, assignment, params, x, state=state), expected


def instructions(hlo, opcodes):
    """Dimensions of the results of these instructions."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{opcodes})\(", hlo)
    return [[int(n) for n in dims.split(",") if n] for dims in found]


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("execution", ["native", "bf16", "auto"])
@pytest.mark.parametrize("make", [linen, batched])
def test_served_programs_read_weights_as_they_lie(make, execution, fmt):
    apply, params, x = make()
    frozen, expected = frozen_with_static_scales(apply, params, x, fmt)
    served = jax.jit(aqs.serve(apply, execution=execution)).lower(frozen, x).compile()
    # Sums in another order may round an activation of a later layer to the next of its codes.
    error = (1e-5 if make is batched else 0.02) * np.abs(expected).max()
    np.testing.assert_allclose(served(frozen, x), expected, rtol=0, atol=error)
    sizes = {math.prod(w["rhs"].shape) for w in frozen.weights.values()}
    moved = instructions(served.as_text(), "transpose|copy")
    assert not [dims for dims in moved if math.prod(dims) in sizes]


def test_layers_of_a_scan_in_formats_of_their_own_are_read_as_they_lie():
    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    params, x = {"w": sample(3, 64, 64)}, sample(5, 64, seed=1)
    sites = aqs.find_sites(apply, params, x)
    rules = [(r"w\[1\]", {"weight": "int4", "activation": "int8"}), (".*", "int8")]
    assignment = aqs.assign(sites, rules)
    frozen = aqs.freeze(apply, assignment, params, x)
    assert len(frozen.weights["w"]["rhs"].groups) == 2  # int8 and int4
    served = jax.jit(aqs.serve(apply)).lower(frozen, x).compile()
    expected = jax.jit(aqs.quantize(apply))(assignment, params, x)
    np.testing.assert_allclose(served(frozen, x), expected, rtol=1e-4, atol=1e-4)
    moved = instructions(served.as_text(), "transpose")
    assert not [dims for dims in moved if math.prod(dims) == 64 * 64]


def test_an_activation_is_rounded_once():
    """Static scales: a rounding for each of the five, and none of weights."""
    apply, params, x = linen()
    frozen, _ = frozen_with_static_scales(apply, params, x, "int8")
    for execution in ("native", "emulated"):
        program = jax.jit(aqs.serve(apply, execution=execution)).lower(frozen, x).compile()
        assert len(instructions(program.as_text(), "round-nearest-even")) == 5


def test_the_last_axis_of_stored_weights_is_summed_over():
    apply, params, x = linen()
    sites = aqs.find_sites(apply, params, x)
    frozen = aqs.freeze(apply, aqs.assign(sites, [(".*", "int8")]), params, x)
    lying = {name: weight["rhs"].data.shape for name, weight in frozen.weights.items()}
    assert lying["Dense_0/kernel"] == (128, 4096)
    assert lying["DenseGeneral_0/kernel"] == (4, 30, 128)
    assert lying["DenseGeneral_1/kernel"] == (10, 4, 30)
    if jax.default_backend() == "cpu":  # whose fast kernels read [*spatial, I, O]
        assert lying["Conv_0/kernel"] == (3, 3, 32, 32)


@pytest.mark.parametrize("name", ["int8", "int3", "e4m3", "e2m1", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 2, 1), (0, 1, 2)])
def test_the_order_in_storage_changes_no_value(name, order):
    x = sample(6, 5, 32)
    plain = aqs.quantize_tensor(x, name, *(() if "fp" in name else ((2,),)))
    ordered = aqs.quantize_tensor(x, name, *(() if "fp" in name else ((2,),)), order=order)
    np.testing.assert_array_equal(ordered.dequantize(), plain.dequantize())
    np.testing.assert_array_equal(ordered.take(np.array([3, 1])), plain.take(np.array([3, 1])))
    assert (ordered.shape, ordered.nbytes) == (plain.shape, plain.nbytes)
    if name in ("int8", "e4m3"):
        np.testing.assert_array_equal(
            np.asarray(ordered.data, np.float32),
            np.asarray(plain.data, np.float32).transpose(order),
        )


@pytest.mark.parametrize("order", [(0,), (0, 0), (1, 2), (0, -1)])
def test_an_order_names_each_axis_once(order):
    with pytest.raises(ValueError, match=r"order is .*; expected the axes of x, 0 to 1, each once"):
        aqs.quantize_tensor(sample(3, 4), "int8", order=order)


@pytest.mark.parametrize("execution", ["emulated", "int8", "bf16", "fp8"])
@pytest.mark.parametrize("numbers", [(((2,), (1,)), ((0,), (0,))), (((2, 0), (1, 0)), ((), ()))])
def test_products_of_weights_in_any_order(numbers, execution):
    """As stored, and with axes in between that lie elsewhere: the same product."""
    x, w = sample(3, 5, 16), sample(3, 16, 24, seed=1)
    name = "e4m3" if execution == "fp8" else "int8"
    channels = (0, 2) if numbers[1][0] else (2,)
    product = {}
    for order in ((), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)):
        stored = aqs.quantize_tensor(w, name, channels, order=order)
        product[order] = jax.jit(
            lambda x, stored: aqs.dot_general(
                x, stored, numbers, lhs_format=name, execution=execution
            )
        )(x, stored)
    for found in product.values():
        error = 1e-6 * np.abs(product[()]).max()
        np.testing.assert_allclose(found, product[()], rtol=0, atol=error)


@pytest.mark.parametrize("execution", ["emulated", "int8"])
def test_convolutions_of_kernels_in_any_order(execution):
    x, w = sample(2, 8, 8, 32), sample(3, 3, 32, 16, seed=1)
    numbers = ("NHWC", "HWIO", "NHWC")
    found = []
    for order in ((), (3, 0, 1, 2), (3, 2, 1, 0)):
        stored = aqs.quantize_tensor(w, "int8", (3,), order=order)
        found.append(
            aqs.conv_general_dilated(
                x, stored, (1, 1), "SAME", dimension_numbers=numbers, lhs_format="int8",
                execution=execution,
            )
        )  # fmt: skip
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5 * np.abs(found[0]).max())
