"""What programs for GPUs are made of, told without one: StableHLO lowered for CUDA."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.products import measured_facts
from aqt_search.products.measured_facts import Fact


@pytest.fixture(autouse=True, scope="module")
def on_gpu():
    """A GPU on which int8 products were measured to be fast, as far as tracing asks."""
    fast = Fact("gpu", "", "0.1.0", "dot_general", "int8", "lax", 0.5, 1, 1, 1)
    jax.clear_caches()  # of what was outlined for another backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_facts, "FACTS", (fast,))
        patch.setattr(measured_facts, "chip", lambda: "H100")
        patch.setattr(jax, "default_backend", lambda: "gpu")
        yield
    jax.clear_caches()


def sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (1, 1))(x))
        x = nn.relu(nn.Dense(48)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


@functools.cache
def linen():
    model, x = Layers(), sample(4, 4, 4, 8)
    return model.apply, model.init(jax.random.key(0), x), x


def lowered(fun, *args):
    """The StableHLO of a program for CUDA."""
    return jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@functools.cache
def frozen_with_static_scales(fmt):
    apply, params, x = linen()
    sites = aqs.find_sites(apply, params, x)
    rules = [(".*", {"weight": fmt, "activation": "int8"})]
    assignment = aqs.with_static_activations(aqs.assign(sites, rules), sites)
    qfun = aqs.quantize_with_state(apply)

    def calibrated(params, x):
        return qfun.apply(assignment, qfun.init(assignment, params, x), params, x)[1]

    state = jax.jit(calibrated)(params, x)
    return aqs.freeze(apply, assignment, params, x, state=state)


LYING = {  # [O, *spatial, I] for cuDNN, [n, k] for cuBLAS
    "Conv_0/kernel": (16, 3, 3, 8), "Conv_1/kernel": (32, 1, 1, 16),
    "Dense_0/kernel": (48, 512), "Dense_1/kernel": (10, 48),
}  # fmt: skip


@pytest.mark.parametrize("fmt", ["int8", "int4", "e4m3"])
def test_the_last_axis_of_every_stored_weight_is_summed_over(fmt):
    _, params, _ = linen()
    frozen = frozen_with_static_scales(fmt)
    for name, shape in LYING.items():
        weight = frozen.weights[name]["rhs"]
        kernel = params["params"][name.split("/")[0]]["kernel"]
        lying = np.zeros(kernel.shape).transpose(np.argsort(weight.order))
        assert lying.shape == shape
        assert weight.data.shape == shape or fmt == "int4"  # which is packed
        values = aqs.fake_quant(kernel, fmt, (kernel.ndim - 1,))
        np.testing.assert_array_equal(weight.dequantize(), values)


def test_served_products_read_both_operands_along_their_last_axis():
    apply, _, x = linen()
    frozen = frozen_with_static_scales("int8")
    text = lowered(aqs.serve(apply), frozen, x)
    dots = re.findall(r"dot_general .*contracting_dims = (.*), precision.* : \((.*)\)", text)
    assert {axes for axes, _ in dots} == {"[1] x [1]"}
    products = [types for _, types in dots if types.startswith("tensor<4x")]
    # The others are what zero points are multiplied by: activations behind a relu are uint8.
    assert products == [
        "tensor<4x512xi8>, tensor<48x512xi8>", "tensor<4x48xi8>, tensor<10x48xi8>"
    ]  # fmt: skip
    kernels = re.findall(r"convolution\(.*dim_numbers = \[.*\]x\[(.*)\]->", text)
    assert kernels == ["o, 0, 1, i"] * 2


@pytest.mark.parametrize("execution", ["auto", "native"])
@pytest.mark.parametrize("fmt", ["int8", "int4", "e4m3"])
def test_serving_neither_transposes_a_weight_nor_rounds_twice(fmt, execution):
    apply, _, x = linen()
    frozen = frozen_with_static_scales(fmt)
    text = lowered(aqs.serve(apply, execution=execution), frozen, x)
    moved = re.findall(r"stablehlo.transpose .*-> tensor<([\dx]*)x\w+>", text)
    sizes = [np.prod([int(n) for n in dims.split("x")]) for dims in moved]
    least = min(np.prod(shape) for shape in LYING.values())
    assert all(size < least for size in sizes)  # scales alone
    assert len(re.findall(r"func.func private @(?:quantize|encode)", text)) == 4  # a site each
    assert text.count("round_nearest_even") == 4


def trained(residuals):
    """A step on int8 products, lowered."""
    apply, params, x = linen()
    assignment = aqs.assign(aqs.find_sites(apply, params, x), [(".*", "int8")])
    qapply = aqs.quantize(apply, residuals=residuals)
    return lowered(
        jax.value_and_grad(lambda p, x: jnp.sum(qapply(assignment, p, x) ** 2)), params, x
    )


def test_codes_alone_are_kept_for_the_backward_pass():
    """A barrier holds back their values until there is a gradient of what they were used for."""
    barriers = re.findall(r"optimization_barrier .* : (.*)", trained("codes"))
    waiting = {}
    for types in barriers:
        (codes,) = re.findall(r"tensor<([\dx]+)xi8>", types)
        floats = re.findall(r"tensor<([\dx]+)xf32>", types)
        waiting[codes] = [dims for dims in floats if set(dims) - set("1x")]  # without scales
    assert waiting == {
        "4x4x4x8": ["4x4x4x16"], "4x4x4x16": ["4x4x4x32"], "4x512": ["4x48"], "4x48": ["4x10"]
    }  # fmt: skip
    assert "optimization_barrier" not in trained("values")
