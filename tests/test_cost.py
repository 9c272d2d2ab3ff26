"""Costs against published numbers and sums written out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import SiteError, SiteFormats
from aqt_search.costs import cost
from aqt_search.models.resnet import resnet


@functools.cache
def resnet50_sites():
    model = resnet(50, 1000, form="imagenet")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return aqs.find_sites(model.apply, variables, images)


def resnet50_under(*rules):
    return resnet50_sites(), aqs.assign(resnet50_sites(), rules)


# --- Published numbers ----------------------------------------------------------------------------


def test_resnet50_is_counted_exactly():
    sites = resnet50_sites()
    assert cost.total_macs(sites) == 4_089_184_256
    assert sum(site.weight.size for site in sites.values()) == 25_502_912
    kinds = [site.kind for site in sites.values()]
    assert (kinds.count("conv_general_dilated"), kinds.count("dot_general")) == (53, 1)


# GBOPs, and bits of weights without scales: the design page's numbers.
@pytest.mark.parametrize(
    "name, gbops, bits",
    [
        ("bf16", 1046.831169536, 408_046_592),
        ("int8", 261.707792384, 204_023_296),
        ("e4m3", 261.707792384, 204_023_296),
        ("int4", 65.426948096, 102_011_648),
    ],
)
def test_resnet50_under_uniform_formats(name, gbops, bits):
    sites, assignment = resnet50_under((".*", name))
    assert cost.gbops(sites, assignment) == gbops
    assert 8 * cost.weight_bytes(sites, assignment, scales=False) == bits


# Pareto-Optimal Quantized ResNet Is Mostly 4-bit (arXiv 2105.03536): 4-bit body, relative to bf16.
@pytest.mark.parametrize(
    "ends, gbops, memory", [("int8", 0.068005, 0.270168), ("bf16", 0.090026, 0.310505)]
)
def test_resnet50_with_wide_ends(ends, gbops, memory):
    sites, wide = resnet50_under((".*", "bf16"))
    _, mixed = resnet50_under(("stem|head", ends), (".*", "int4"))
    assert round(cost.gbops(sites, mixed) / cost.gbops(sites, wide), 6) == gbops
    bytes_mixed = cost.weight_bytes(sites, mixed, scales=False)
    assert round(bytes_mixed / cost.weight_bytes(sites, wide, scales=False), 6) == memory


# --- Sums by hand ---------------------------------------------------------------------------------


def small_sites():
    """Two products of 5 x 4 by 4 x 3 and 3 x 2."""

    def fun(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2), jnp.bfloat16)}
    return aqs.find_sites(fun, params, jnp.ones((5, 4)))


def test_sums():
    sites = small_sites()
    assignment = aqs.assign(sites, [("a", {"lhs": "int8", "rhs": "int3"})])
    # Without formats the second product has a float32 and a bfloat16 operand.
    expected = (5 * 4 * 3 * 8 * 3 + 5 * 3 * 2 * 32 * 16) / 1e9
    assert cost.gbops(sites, assignment) == pytest.approx(expected, rel=1e-12)
    assert cost.weight_bytes(sites, assignment) == (12 * 3 + 3 * 32 + 6 * 16) / 8
    assert cost.weight_bytes(sites, assignment, scales=False) == (12 * 3 + 6 * 16) / 8
    assert cost.gbops(sites, {}) == pytest.approx((60 * 32 * 32 + 30 * 32 * 16) / 1e9)
    assert cost.gbops({}, {}) == cost.weight_bytes({}, {}) == 0


@pytest.mark.parametrize("name", ["int3", "int8", "e4m3", "e2m1", "bf16", "fp32"])
def test_bytes_are_those_of_the_stored_tensor(name):
    weight = jnp.ones((5, 8, 16))
    sites = aqs.find_sites(lambda w, x: jnp.einsum("bi,ijk->bjk", x, w), weight, jnp.ones((2, 5)))
    ((_, site),) = sites.items()
    stored = aqs.quantize_tensor(weight, name, site.rhs.channel_axes)
    assert cost.weight_bytes(sites, aqs.assign(sites, [(".*", name)])) == stored.nbytes


@pytest.mark.parametrize("name, bits", [("nvfp4", 4.5), ("mxfp4", 4.25), ("mxint8", 8.25)])
def test_scales_of_blocks_are_counted(name, bits):
    weight = jnp.ones((64, 32))
    sites = aqs.find_sites(lambda w, x: x @ w, weight, jnp.ones((2, 64)))
    assignment = aqs.assign(sites, [(".*", name)])
    tensor_scale = 4 if name == "nvfp4" else 0
    assert cost.weight_bytes(sites, assignment) == 64 * 32 * bits / 8 + tensor_scale
    frozen = aqs.freeze(lambda w, x: x @ w, assignment, weight, jnp.ones((2, 64)))
    assert frozen.weights["params"]["rhs"].nbytes == cost.weight_bytes(sites, assignment)
    elements = cost.weight_bytes(sites, assignment, scales=False)
    assert elements == 64 * 32 * int(bits) / 8


def test_zero_points_are_counted():
    weight = jnp.ones((64, 32))
    sites = aqs.find_sites(lambda w, x: x @ w, weight, jnp.ones((2, 64)))
    spec = {"weight": aqs.Quantizer("int4", calibration=aqs.min_max()), "activation": None}
    assert cost.weight_bytes(sites, aqs.assign(sites, [(".*", spec)])) == 64 * 32 / 2 + 8 * 32


def test_a_lookup_costs_bytes_and_no_operations():
    table, indices = jnp.ones((10, 4)), jnp.array([1, 2])
    sites = aqs.find_sites(lambda t, i: t[i], table, indices)
    assignment = aqs.assign(sites, [(".*", "int8")])
    assert cost.gbops(sites, assignment) == 0
    assert cost.weight_bytes(sites, assignment) == 10 * 4 + 10 * 4


def test_jit_and_vmap_in_the_assignment():
    sites = resnet50_sites()
    rng, names = np.random.default_rng(0), ["int2", "int4", "e4m3", "bf16"]
    table = jax.tree.map(jnp.asarray, aqs.stack_formats(names))
    draws = rng.integers(len(names), size=(20, len(sites), 2))

    def format_of(index):
        return jax.tree.map(lambda column: column[index], table)

    def costs(indices):
        assignment = {
            name: SiteFormats(format_of(indices[row, 0]), format_of(indices[row, 1]))
            for row, name in enumerate(sites)
        }
        return cost.gbops(sites, assignment), cost.weight_bytes(sites, assignment)

    expected = []
    for draw in draws:
        formats = [[aqs.numeric_format(names[i]) for i in row] for row in draw]
        assignment = {name: SiteFormats(*pair) for name, pair in zip(sites, formats)}
        expected.append((cost.gbops(sites, assignment), cost.weight_bytes(sites, assignment)))
    batched = jax.jit(jax.vmap(costs))(jnp.asarray(draws))
    # Sums of 54 and 108 terms in float32.
    np.testing.assert_allclose(np.stack(batched, 1), expected, rtol=1e-5)
    gradient = jax.grad(lambda b: cost.gbops(sites, aqs.assign(sites, [("head", _bits(b))])))(8.0)
    assert gradient == pytest.approx(2 * 8.0 * sites["head/kernel"].macs / 1e9, rel=1e-5)


def _bits(bits):
    return aqs.numeric_format("int8")._replace(bits=bits)


# --- Weights used twice, scanned, or looped over --------------------------------------------------


@pytest.mark.parametrize(
    "first, second, bits",
    [
        ("int4", "int4", 16 * 4 + 4 * 32),
        ("int4", "int8", 16 * 4 + 4 * 32 + 16 * 8 + 4 * 32),
        (None, None, 16 * 32),
        ("int8", None, 16 * 8 + 4 * 32 + 16 * 32),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_a_shared_parameter_is_stored_once_per_width(first, second, bits, traced):
    sites = aqs.find_sites(lambda w, x: x @ w @ w, jnp.ones((4, 4)), jnp.ones((5, 4)))
    assignment = aqs.assign(sites, [("#1", first), ("#2", second)])
    compute = functools.partial(cost.weight_bytes, sites)
    assert 8 * (jax.jit(compute) if traced else compute)(assignment) == bits


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_scanned_weights_count_every_slice():
    sites = aqs.find_sites(scanned, jnp.ones((6, 4, 4)), jnp.ones((5, 4)))
    assignment = aqs.assign(sites, [(".*", "int4")])
    assert cost.total_macs(sites) == 6 * 5 * 4 * 4
    assert cost.gbops(sites, assignment) == 6 * 5 * 4 * 4 * 16 / 1e9
    assert 8 * cost.weight_bytes(sites, assignment) == 6 * (16 * 4 + 4 * 32)


def test_a_weight_used_in_every_iteration_is_stored_once():
    sites = aqs.find_sites(
        lambda w, x: jax.lax.fori_loop(0, 6, lambda _, x: jnp.tanh(x @ w), x),
        jnp.ones((4, 4)), jnp.ones((5, 4)),
    )  # fmt: skip
    assignment = aqs.assign(sites, [(".*", "int4")])
    assert cost.total_macs(sites) == 6 * 5 * 4 * 4
    assert 8 * cost.weight_bytes(sites, assignment) == 16 * 4 + 4 * 32


def test_a_while_loop_has_no_cost_until_its_length_is_given():
    def fun(w, x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

    sites = aqs.find_sites(fun, jnp.ones((4, 4)), jnp.ones((5, 4)))
    ((name, site),) = sites.items()
    with pytest.raises(SiteError, match=f"Site {name!r} is inside a while loop.*`repeats`"):
        cost.gbops(sites, {})
    with pytest.raises(SiteError, match="while loop"):
        cost.total_macs(sites)
    known = {name: dataclasses.replace(site, repeats=3)}
    assert cost.total_macs(known) == 3 * 5 * 4 * 4


def test_products_of_activations_cost_work_but_no_bytes():
    sites = aqs.find_sites(lambda p, x: x @ x.T, {}, jnp.ones((5, 4)))
    assignment = aqs.assign(sites, [(".*", {"lhs": "int8", "rhs": "int4"})])
    assert cost.gbops(sites, assignment) == 5 * 5 * 4 * 8 * 4 / 1e9
    assert cost.weight_bytes(sites, assignment) == 0


def test_products_in_groups_of_rows():
    """A mixture of experts: each row meets the matrix of its expert, each matrix is stored."""
    sizes = jnp.array([5, 0, 7, 4], jnp.int32)
    params = {"experts": jnp.ones((4, 8, 32)), "router": jnp.ones((8, 8))}
    sites = aqs.find_sites(
        lambda p, x: jax.lax.ragged_dot(x @ p["router"], p["experts"], sizes),
        params,
        jnp.ones((16, 8)),
    )
    assert list(sites) == ["router", "experts"]
    assert cost.total_macs(sites) == 16 * 8 * 8 + 16 * 8 * 32
    assert cost.weight_bytes(sites, {}) == 4 * (8 * 8 + 4 * 8 * 32)
    int8 = aqs.assign(sites, [(".*", "int8")])
    assert cost.weight_bytes(sites, int8) == 8 * 8 + 4 * 8 * 32 + 4 * (8 + 4 * 32)
    assert sites["experts"].rhs.channel_axes == (0, 2)


# A transposed convolution multiplies no inserted zeros; a grouped one only within its groups.
@pytest.mark.parametrize(
    "x_shape, kernel_shape, arguments, macs",
    [
        ((1, 8, 8, 6), (3, 3, 2, 9), {"feature_group_count": 3}, 6 * 6 * 9 * 3 * 3 * 2),
        ((1, 8, 8, 6), (3, 3, 1, 6), {"feature_group_count": 6}, 6 * 6 * 6 * 3 * 3),
        ((1, 8, 8, 6), (3, 3, 6, 4), {"window_strides": (2, 2)}, 3 * 3 * 4 * 3 * 3 * 6),
        (
            (1, 4, 4, 6), (2, 2, 6, 4), {"lhs_dilation": (2, 2), "padding": [(1, 1)] * 2},
            4 * 4 * 6 * 4 * 4,
        ),
        # One as Flax writes it, padded by the kernel: each input place meets each tap.
        (
            (1, 1, 1, 4), (4, 4, 4, 8), {"padding": [(3, 3)] * 2}, 4 * 4 * 4 * 8,
        ),
        (
            (1, 4, 4, 4), (4, 4, 4, 8), {"lhs_dilation": (2, 2), "padding": [(3, 3)] * 2},
            4 * 4 * 4 * 4 * 4 * 8,
        ),
        (  # one axis more outputs than products, the other fewer
            (1, 1, 8, 4), (4, 4, 4, 8), {"window_strides": (1, 2), "padding": [(3, 3), (0, 0)]},
            4 * (3 * 4) * 4 * 8,
        ),
    ],
)  # fmt: skip
def test_convolutions(x_shape, kernel_shape, arguments, macs):
    arguments = {"window_strides": (1, 1), "padding": "VALID", **arguments}
    sites = aqs.find_sites(
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **arguments
        ),
        jax.ShapeDtypeStruct(kernel_shape, jnp.float32),
        jax.ShapeDtypeStruct(x_shape, jnp.float32),
    )
    assert cost.total_macs(sites) == macs
