"""Roofline latencies against numbers written out by hand and exhaustive searches over formats."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import SiteError, SiteFormats
from aqt_search.costs.roofline import CHIPS, Chip, Rates, latency_ms
from aqt_search.models.resnet import resnet
from aqt_search.numerics.formats import code_values

INTEGERS = [f"{u}int{b}" for u in ("", "u") for b in range(2, 9)]
NARROW_FLOATS = [f"e{x}m{y}" for x in range(2, 8) for y in range(8 - x)]  # 8 bits or fewer
WIDE = ["e4m4", "e5m3", "e8m3", "e5m10", "bf16", "fp16", "e6m8", "e5m11", "fp32"]
FORMATS = [None, *INTEGERS, *NARROW_FLOATS, *WIDE]
# A chip with a different rate for every unit, so that a latency tells which one was taken.
EVERY_UNIT = Chip(
    "every", 1e12,
    Rates(fp32=1e12, fp16=2e12, bf16=3e12, fp8=5e12, fp4=11e12, int8=7e12, int4=13e12),
)  # fmt: skip


def product_sites(rows, terms, columns, dtype=jnp.bfloat16):
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((terms, columns), (rows, terms))]
    return aqs.find_sites(lambda w, x: x @ w, *shapes)


def under(sites, lhs, rhs):
    return aqs.assign(sites, [(".*", {"lhs": lhs, "rhs": rhs})]) if lhs or rhs else {}


@functools.cache
def resnet50_sites(batch=1):
    model = resnet(50, 1000, form="imagenet", dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return aqs.find_sites(model.apply, variables, images)


# --- Numbers by hand ------------------------------------------------------------------------------

CUBE = 4096**3  # multiply-accumulates of a compute-bound product
GIGA = 1e-9 * 1e3  # milliseconds that 1 byte or operation takes at 1e9 a second


@pytest.mark.parametrize(
    "chip, lhs, rhs, operations_per_second",
    [
        ("h100", "bf16", "bf16", 989.4e12),
        ("h100", "int8", "int8", 1978.9e12),
        ("h100", "int4", "int4", 1978.9e12),  # no int4 unit
        ("h100", "uint4", "int8", 1978.9e12),
        ("h100", "e4m3", "e5m2", 1978.9e12),
        ("h100", "int8", "e4m3", 989.4e12),  # a mixture
        ("h100", None, "int4", 989.4e12),  # weights alone: bfloat16 activations
        ("h100", "fp16", "fp16", 989.4e12),
        ("h100", "fp16", "bf16", 66.9e12),  # neither holds the other
        ("h100", "fp32", "fp32", 66.9e12),
        ("h200", "int8", "int8", 1978.9e12),
        ("tpu_v5e", "e4m3", "e4m3", 197e12),  # no fp8 unit
        ("tpu_v5e", "int8", "int8", 393e12),
        ("tpu_v5p", "bf16", "bf16", 459e12),
        ("tpu_v5p", "int8", "int8", 918e12),
        ("edge_int8", "int8", "int8", 4e12),
        ("edge_int8", "bf16", "bf16", 48e9),
    ],
)
def test_a_compute_bound_product(chip, lhs, rhs, operations_per_second):
    sites = product_sites(4096, 4096, 4096)
    found = latency_ms(sites, under(sites, lhs, rhs), chip)
    assert isinstance(found, float)
    assert found == pytest.approx(1e3 * 2 * CUBE / operations_per_second, rel=1e-12)


# One row against a 4096 x 4096 weight: the weight's bytes decide, whatever unit computes.
@pytest.mark.parametrize(
    "lhs, rhs, lhs_bits, rhs_bits",
    [
        (None, None, 16, 16), ("bf16", "bf16", 16, 16), ("int8", "int8", 8, 8),
        (None, "int8", 16, 8), (None, "int4", 16, 4), (None, "nvfp4", 16, 4),
        ("e4m3", "int3", 8, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chip, bandwidth", [("h100", 3.35e12), ("tpu_v5p", 2.765e12)])
def test_a_bandwidth_bound_product(chip, bandwidth, lhs, rhs, lhs_bits, rhs_bits):
    sites = product_sites(1, 4096, 4096)
    moved = (4096 * lhs_bits + 4096**2 * rhs_bits + 4096 * 16) / 8
    found = latency_ms(sites, under(sites, lhs, rhs), CHIPS[chip])
    assert found == pytest.approx(1e3 * moved / bandwidth, rel=1e-12)


def test_weights_alone_move_fewer_bytes_and_compute_no_faster():
    def share(rows, name):
        sites = product_sites(rows, 4096, 4096)
        return latency_ms(sites, under(sites, None, name), "h100") / latency_ms(sites, {}, "h100")

    assert share(1, "int8") == pytest.approx(1 / 2, rel=1e-3)
    assert share(1, "int4") == pytest.approx(1 / 4, rel=2e-3)  # the row itself is 1/4096
    assert share(4096, "int8") == share(4096, "int4") == 1


def test_sites_add_up_and_each_takes_its_slower_side():
    def fun(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 200), jnp.bfloat16)}
    sites = aqs.find_sites(fun, params, jnp.ones((5, 4)))
    chip = Chip("c", bandwidth=1e9, rates=Rates(fp32=1e9, int8=2e6))
    assignment = aqs.assign(sites, [("a", {"lhs": "int8", "rhs": "int3"})])
    first = 2 * 5 * 4 * 3  # operations; (20 * 8 + 12 * 3) / 8 + 15 * 4 = 84.5 bytes are fewer
    second = 15 * 4 + 600 * 2 + 1000 * 4  # bytes, the result in float32; 6000 operations are more
    assert latency_ms(sites, assignment, chip) == pytest.approx(GIGA * (first + 6000), rel=1e-12)
    faster = dataclasses.replace(chip, rates=Rates(fp32=1e12))
    expected = GIGA * (84.5 + second)
    assert latency_ms(sites, assignment, faster) == pytest.approx(expected, rel=1e-12)
    assert latency_ms({}, {}, chip) == 0.0


# (kernel [h, w, in / groups, out], whether arithmetic decides): grouped convolutions do little for
# the elements they move.
@pytest.mark.parametrize(
    "kernel, compute_bound",
    [((3, 3, 768, 768), True), ((3, 3, 8, 768), False), ((3, 3, 1, 768), False)],
)
def test_convolutions(kernel, compute_bound):
    sites = aqs.find_sites(
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=768 // kernel[2],
        ),
        jax.ShapeDtypeStruct(kernel, jnp.bfloat16),
        jax.ShapeDtypeStruct((64, 14, 14, 768), jnp.bfloat16),
    )  # fmt: skip
    elements = 64 * 14 * 14 * 768
    compute = 2 * elements * 9 * kernel[2] / 1978.9e12
    memory = (elements * 8 + np.prod(kernel) * 8 + elements * 16) / 8 / 3.35e12
    assert (compute > memory) == compute_bound
    found = latency_ms(sites, under(sites, "int8", "int8"), "h100")
    assert found == pytest.approx(1e3 * max(compute, memory), rel=1e-12)


# 6 indices of 32 bits, 6 rows of 8 elements read in the table's bits and written in float32.
@pytest.mark.parametrize("fmt, bits", [(None, 32), ("int8", 8), ("int4", 4)])
@pytest.mark.parametrize(
    "lookup", [lambda t, i: t[i], lambda t, i: jax.vmap(jax.vmap(lambda j: t[j]))(i)]
)
def test_a_lookup_moves_its_rows(lookup, fmt, bits):
    sites = aqs.find_sites(lookup, jnp.ones((1000, 8)), jnp.zeros((2, 3), jnp.int32))
    ((_, site),) = sites.items()
    indices = 4 * site.lhs.size  # vmap writes a start for every axis
    assert site.kind == "gather"
    assert site.lhs.size in (6, 12)
    moved = indices + 6 * 8 * bits / 8 + 6 * 8 * 4
    found = latency_ms(sites, aqs.assign(sites, [(".*", fmt)]), "h100")
    assert found == pytest.approx(1e3 * moved / 3.35e12, rel=1e-12)


@pytest.mark.parametrize("dtype, bytes_per_element", [("bfloat16", 2), ("float8_e4m3fn", 1)])
def test_operands_without_a_format_count_as_their_dtype(dtype, bytes_per_element):
    sites = product_sites(1, 512, 512, jnp.dtype(dtype))
    moved = (512 + 512**2) * bytes_per_element + 512 * 2  # the result is 16 bits wide at least
    assert latency_ms(sites, {}, "h100") == pytest.approx(1e3 * moved / 3.35e12, rel=1e-12)


def test_every_iteration_of_a_scan_counts():
    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def looped(w, x):
        return jax.lax.fori_loop(0, 6, lambda _, x: jnp.tanh(x @ w), x)

    once = latency_ms(product_sites(5, 4, 4, jnp.float32), {}, "h100")
    for fun, shape in ((scanned, (6, 4, 4)), (looped, (4, 4))):
        sites = aqs.find_sites(fun, jnp.ones(shape), jnp.ones((5, 4)))
        assert latency_ms(sites, {}, "h100") == pytest.approx(6 * once, rel=1e-12)


# --- Which unit -----------------------------------------------------------------------------------


def rate_of(lhs, rhs, chip=EVERY_UNIT):
    """Operations per second that a product is counted with, its bytes being free."""
    sites = product_sites(64, 64, 64, jnp.float32)
    seconds = latency_ms(sites, under(sites, lhs, rhs), dataclasses.replace(chip, bandwidth=1e99))
    return 2 * 64**3 / (seconds / 1e3)


def contains(wide, narrow):
    """Whether some power of two takes all codes of a narrow format to codes of a wider one."""
    codes = code_values(narrow).astype(np.float64)
    codes = codes[np.isfinite(codes)]
    held = code_values(wide).astype(np.float64)
    return any(np.isin(codes * 2.0**shift, held).all() for shift in range(-40, 41))


@pytest.mark.parametrize("name", NARROW_FLOATS)
def test_fp8_is_taken_exactly_where_it_holds_every_code(name):
    held = [contains(wide, name) for wide in ("e4m3", "e5m2")]
    rate = 5e12 if any(held) else 3e12
    rate = 11e12 if contains("e2m1", name) else rate
    assert rate_of(name, name) == pytest.approx(rate, rel=1e-12)
    codes = code_values(name)
    np.testing.assert_array_equal(codes.astype(jnp.bfloat16).astype(np.float32), codes)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_take_the_narrowest_integer_unit(name):
    bits = int(name[-1])
    assert rate_of(name, name) == pytest.approx(13e12 if bits <= 4 else 7e12, rel=1e-12)
    assert rate_of(name, "int8") == pytest.approx(7e12, rel=1e-12)
    assert rate_of(name, "e2m1") == rate_of("e4m3", name) == pytest.approx(3e12, rel=1e-12)
    assert rate_of(name, "fp16") == pytest.approx(2e12, rel=1e-12)
    assert rate_of(name, None) == pytest.approx(1e12, rel=1e-12)


@pytest.mark.parametrize("missing, takes", [("fp4", 5e12), ("int4", 7e12), ("fp8", 3e12)])
def test_a_chip_without_a_unit_takes_the_next_wider(missing, takes):
    chip = dataclasses.replace(EVERY_UNIT, rates=EVERY_UNIT.rates._replace(**{missing: None}))
    narrow = {"fp4": "e2m1", "int4": "int4", "fp8": "e4m3"}[missing]
    assert rate_of(narrow, narrow, chip) == pytest.approx(takes, rel=1e-12)


FAMILIES = {
    "int": INTEGERS[:7],
    "uint": INTEGERS[7:],
    **{f"e{x}": [f"e{x}m{y}" for y in range(x == 8, 24)] for x in range(2, 9)},
    **{f"m{y}": [f"e{x}m{y}" for x in range(2, 9)] for y in range(1, 24)},
}


@pytest.mark.parametrize("chip", [*CHIPS.values(), EVERY_UNIT], ids=lambda chip: chip.name)
def test_more_bits_are_never_faster(chip):
    shapes = [(1, 256, 256), (4096, 4096, 4096)]  # bandwidth and compute bound
    for sites, other in itertools.product(
        [product_sites(*shape) for shape in shapes], ["int4", "e5m2"]
    ):
        for family, names in FAMILIES.items():
            both = [latency_ms(sites, under(sites, name, name), chip) for name in names]
            one = [latency_ms(sites, under(sites, other, name), chip) for name in names]
            for found in (both, one):
                assert found == sorted(found), (family, other)


# --- Traced formats -------------------------------------------------------------------------------


def picked(table, index):
    return jax.tree.map(lambda column: jnp.asarray(column)[index], table)


@pytest.mark.parametrize(
    "chip", [CHIPS["h100"], CHIPS["edge_int8"], EVERY_UNIT], ids=lambda chip: chip.name
)
def test_traced_equals_concrete_for_every_pair(chip):
    names = FORMATS[1:]
    table = aqs.stack_formats(names)
    pairs = np.array(list(itertools.product(range(len(names)), repeat=2)))
    for shape in ((1, 512, 512), (2048, 2048, 2048)):
        sites = product_sites(*shape)
        ((name, _),) = sites.items()

        def latency(i, j, sites=sites, name=name):
            formats = SiteFormats(picked(table, i), aqs.quantizer(picked(table, j)))
            return latency_ms(sites, {name: formats}, chip)

        traced = jax.jit(jax.vmap(latency))(*pairs.T)
        assert traced.dtype == jnp.float32
        concrete = [latency_ms(sites, under(sites, names[i], names[j]), chip) for i, j in pairs]
        # A handful of float32 operations, each rounded by at most 6e-8 of its value.
        np.testing.assert_allclose(traced, concrete, rtol=5e-7)


def test_jit_and_vmap_over_assignments_of_resnet50():
    sites = resnet50_sites()
    rng, names = np.random.default_rng(0), ["int4", "int8", "e4m3", "bf16"]
    draws = rng.choice(names, size=(10, len(sites), 2))
    batched = {
        name: SiteFormats(*(aqs.stack_formats(list(column)) for column in draws[:, row].T))
        for row, name in enumerate(sites)
    }
    expected = []
    for draw in draws:
        formats = [SiteFormats(*map(aqs.numeric_format, map(str, pair))) for pair in draw]
        expected.append(latency_ms(sites, dict(zip(sites, formats)), "tpu_v5e"))
    found = jax.jit(jax.vmap(lambda a: latency_ms(sites, a, "tpu_v5e")))(batched)
    # Sums of 54 positive terms in float32.
    np.testing.assert_allclose(found, expected, rtol=5e-6)


def test_some_formats_may_be_traced_and_others_not():
    sites = resnet50_sites()
    assignment = aqs.assign(sites, [("head", None), (".*", "int8")])
    first = next(iter(sites))
    traced = jax.jit(lambda formats: latency_ms(sites, {**assignment, first: formats}, "h100"))
    expected = latency_ms(sites, assignment, "h100")
    assert traced(assignment[first]) == pytest.approx(expected, rel=5e-6)
    arrays = jax.tree.map(jnp.asarray, assignment)
    assert latency_ms(sites, arrays, "h100") == pytest.approx(expected, rel=1e-12)


# --- ResNet-50 ------------------------------------------------------------------------------------


def resnet50_layers():
    """(input side, channels, output side, channels, kernel side): He et al., table 1, v1.5."""
    layers, side, channels = [(224, 3, 112, 64, 7)], 56, 64
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for block in range(blocks):
            out = side // stride if block == 0 else side
            layers += [(side, channels, side, width, 1), (side, width, out, width, 3)]
            layers += [(out, width, out, 4 * width, 1)]
            layers += [(side, channels, out, 4 * width, 1)] if block == 0 else []
            side, channels = out, 4 * width
    return [*layers, (1, 2048, 1, 1000, 1)]


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("name, bits", [("bf16", 16), ("int8", 8)])
def test_resnet50_is_the_sum_over_its_published_layers(batch, chip, name, bits):
    rate = getattr(chip.rates, name) or chip.rates.fp32
    expected, macs, weights = 0.0, 0, 0
    for side, channels, out, filters, kernel in resnet50_layers():
        read = batch * side**2 * channels + kernel**2 * channels * filters
        written = batch * out**2 * filters
        moved = (read * bits + written * (32 if filters == 1000 else 16)) / 8  # logits in float32
        compute = 2 * written * kernel**2 * channels / rate
        expected += 1e3 * max(compute, moved / chip.bandwidth)
        macs += out**2 * filters * kernel**2 * channels
        weights += kernel**2 * channels * filters
    assert (macs, weights) == (4_089_184_256, 25_502_912)  # published: arXiv 2105.03536
    sites = resnet50_sites(batch)
    found = latency_ms(sites, aqs.assign(sites, [(".*", name)]), chip)
    assert found == pytest.approx(expected, rel=1e-12)


def test_resnet50_orders():
    one, many = resnet50_sites(1), resnet50_sites(256)
    for chip in CHIPS:
        for sites in (one, many):
            assignments = [aqs.assign(sites, [(".*", n)]) for n in ("int4", "int8", "bf16")]
            int4, int8, bf16 = (latency_ms(sites, a, chip) for a in assignments)
            assert int4 < int8 < bf16
        # Weights are read once a batch, so an image costs less in a batch.
        assert latency_ms(many, {}, chip) < 256 * latency_ms(one, {}, chip)
    assert latency_ms(one, {}, "h200") < latency_ms(one, {}, "h100")

    def weights_alone(sites):
        int4 = aqs.assign(sites, [(".*", {"weight": "int4"})])
        return latency_ms(sites, int4, "h100") / latency_ms(sites, {}, "h100")

    # Packed weights matter where weights are most of the traffic: 51 MB of 96 at batch 1.
    assert weights_alone(one) < 0.7
    assert 0.99 < weights_alone(many) <= 1


# --- Errors ---------------------------------------------------------------------------------------


def test_an_unknown_chip_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Unknown chip 'a100'.*h100, h200, tpu_v5e, tpu_v5p, edge"
    ):
        latency_ms({}, {}, "a100")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_a_chip_has_positive_rates(value):
    with pytest.raises(ValueError, match=r"Chip 'c' has bandwidth=.*positive"):
        Chip("c", value, Rates(1e12))
    with pytest.raises(ValueError, match=r"Chip 'c' has int8=.*positive"):
        Chip("c", 1e9, Rates(1e12, int8=value))


def test_a_while_loop_has_no_latency_until_its_length_is_given():
    def fun(w, x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ w, x)

    sites = aqs.find_sites(fun, jnp.ones((4, 4)), jnp.ones((5, 4)))
    ((name, site),) = sites.items()
    with pytest.raises(SiteError, match=f"Site {name!r} is inside a while loop.*`repeats`"):
        latency_ms(sites, {}, "h100")
    known = latency_ms({name: dataclasses.replace(site, repeats=3)}, {}, "h100")
    assert known == pytest.approx(3 * latency_ms(product_sites(5, 4, 4, jnp.float32), {}, "h100"))


def test_float64_has_no_rate():
    sites = product_sites(5, 4, 4, jnp.float32)
    ((name, site),) = sites.items()
    wide = dataclasses.replace(site.lhs, dtype=np.dtype(np.float64))
    sites = {name: dataclasses.replace(site, lhs=wide)}
    with pytest.raises(SiteError, match=r"operand of float64.*Trace the function in float32"):
        latency_ms(sites, {}, "h100")
    assert latency_ms(sites, under(sites, "int8", None), "h100") > 0


def test_chips_can_be_static_arguments():
    assert len({hash(chip) for chip in CHIPS.values()}) == len(CHIPS)
    assert all(chip.name == name for name, chip in CHIPS.items())
