"""Calibrations that count elements, told which a subnet has, against tensors and models cut out."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.architecture.elastic import elastic
from aqt_search.architecture.subnet_scales import cut_scales
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.models import build
from aqt_search.models.fitting import fitted
from aqt_search.numerics.calibration import Over
from aqt_search.numerics.fake_quant import fake_quant, fake_quant_with_state, init_state
from aqt_search.numerics.formats import NumericFormat, as_grid, numeric_format
from aqt_search.search.space import make_space
from aqt_search.tracing.sites import SiteError

CALIBRATIONS = {
    "percentile": aqs.percentile(90),
    "mean_deviation": aqs.mean_deviation(1.0, 2.0),
    "without zeros": aqs.mean_deviation(1.0, 2.0, exclude_zeros=True),
    "lsq": aqs.lsq("int4", "int8"),
    "batch_quant": aqs.batch_quant(1),
    "moving": aqs.moving_average(aqs.percentile(90)),
    "frozen": aqs.frozen_after(aqs.mean_deviation(), 2),
    "delayed": aqs.delayed(aqs.percentile(90)),
    "running": aqs.running_max(aqs.mean_deviation()),
}
SHAPE = (6, 8, 5)
# Which indices of each axis a subnet has: channels are a prefix, taps the middle.
PARTS = {
    "first axis": (range(4), range(8), range(5)),
    "middle axis": (range(6), range(3), range(5)),
    "last axis": (range(6), range(8), range(1, 4)),
    "all axes": (range(2), range(5), range(1, 4)),
    "whole": (range(6), range(8), range(5)),
}


def mask_of(part, shape=SHAPE):
    """A mask with the axes that are cut, and an axis of 1 for each of the others."""
    mask = np.ones((1,) * len(shape), bool)
    for axis, kept in enumerate(part):
        if len(kept) < shape[axis]:
            along = np.isin(np.arange(shape[axis]), kept)
            mask = mask & along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return jnp.asarray(mask)


def tensors(part, dtype=np.float32, seed=0):
    """One with 0 in what a subnet has not, the same with numbers there, and what is cut out."""
    x = np.random.default_rng(seed).normal(size=SHAPE).astype(dtype) + dtype(0.3)
    cut = x[np.ix_(*part)]
    inside = np.broadcast_to(mask_of(part), SHAPE)
    return np.where(inside, x, 0), np.where(inside, x, 77.0), cut


def bounds_of(calibration, x, active, axes, steps=2):
    """What the calibration says of a tensor that it sees again, and its state."""
    grid = as_grid(numeric_format("int4"), np.dtype(x.dtype))
    shape = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
    state = calibration.init(shape)
    for _ in range(steps):
        bounds, state = calibration.apply(
            state, jnp.asarray(x), Over(axes, None, active), grid, lambda bounds: bounds.high
        )
    return bounds, state


def assert_cut(whole, cut, part, rtol=1e-6):
    """Leaves with a scale for each index have those of the whole model."""
    for found, expected in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        lead = np.ndim(expected) - len(part)  # formats, tensors
        index = [range(n) for n in np.shape(expected)[: max(0, lead)]]
        for n, size, kept in zip(np.shape(found)[max(0, lead) :], SHAPE, part):
            index.append(kept if n == size else range(n))
        found = np.asarray(found)[np.ix_(*index)] if np.ndim(expected) else found
        np.testing.assert_allclose(found, expected, rtol=rtol)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", CALIBRATIONS)
def test_bounds_and_states_are_those_of_the_cut_tensor(name, part, axes):
    if name == "batch_quant" and len(axes) < 3:
        pytest.skip("one scale for a tensor")
    zeros, numbers, cut = tensors(part)
    expected = bounds_of(CALIBRATIONS[name], cut, None, axes)
    for x in (zeros, numbers):
        found = bounds_of(CALIBRATIONS[name], x, mask_of(part), axes)
        assert_cut(found, expected, part)


@pytest.mark.parametrize("share", [0.5, 37.0, 50.0, 99.9, 100.0])
def test_percentile_is_that_of_numpy(share):
    for seed, part in enumerate(PARTS.values()):
        _, numbers, cut = tensors(part, seed=seed)
        found, _ = bounds_of(aqs.percentile(share), numbers, mask_of(part), (0, 1, 2))
        expected = np.percentile(np.abs(cut.astype(np.float64)), share)
        np.testing.assert_allclose(np.ravel(found.high), expected, rtol=2e-6)


def test_float64_counts_in_float64():
    with jax.enable_x64():
        _, numbers, cut = tensors(PARTS["all axes"], np.float64)
        mask = mask_of(PARTS["all axes"])
        found, _ = bounds_of(aqs.mean_deviation(1.0, 2.0), numbers, mask, (0, 1, 2))
        expected = np.abs(cut).mean() + 2 * np.sqrt(np.square(cut).mean())
        np.testing.assert_allclose(np.ravel(found.high), expected, rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["percentile", "mean_deviation"])
def test_what_is_not_finite_shows_where_it_counts(name, bad):
    part = PARTS["middle axis"]
    zeros, _, _ = tensors(part)
    q = aqs.Quantizer("int4", aqs.PER_TENSOR, CALIBRATIONS[name], active=mask_of(part))
    for place, counts in (((0, 0, 0), True), ((0, 7, 0), False)):
        x = zeros.copy()
        x[place] = bad
        bounds, _ = bounds_of(CALIBRATIONS[name], x, mask_of(part), (0, 1, 2))
        if not counts:
            assert np.all(np.isfinite(bounds.high))
        assert np.isnan(fake_quant(x, q)[place])


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_nothing_active_gives_finite_bounds_and_tells_nothing(name):
    calibration, x = CALIBRATIONS[name], tensors(PARTS["whole"])[1]
    q = aqs.Quantizer("int4", aqs.PER_TENSOR, calibration, active=jnp.zeros((1, 1, 1), bool))

    def loss(x, state):
        if calibration.read is None:
            return jnp.sum(fake_quant(x, q) ** 2), ()
        values, state = fake_quant_with_state(x, q, state)
        return jnp.sum(0 * values), state  # nothing reads a block that is skipped

    state = init_state(q, SHAPE)
    (value, after), found = jax.value_and_grad(loss, argnums=1, has_aux=True, allow_int=True)(
        jnp.asarray(x), state
    )
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)
    jax.tree.map(np.testing.assert_array_equal, after, state)


BY_CHANNEL = aqs.per_channel(1)


def lsq_gradient(x, active, step, granularity=BY_CHANNEL):
    q = aqs.Quantizer("int4", granularity, aqs.lsq(), active=active)
    learned, rest = aqs.split_learned(init_state(q, x.shape))
    learned = jax.tree.map(lambda leaf: jnp.broadcast_to(step, leaf.shape), learned)

    def loss(learned, x):
        state = aqs.merge_learned(learned, rest)
        values, _ = fake_quant_with_state(x, q, state)
        return jnp.sum(jnp.sin(values))  # cos(0) is not 0: what is cut has a gradient coming in

    of_step, of_x = jax.grad(loss, argnums=(0, 1))(learned, jnp.asarray(x))
    return jax.tree.leaves(of_step)[0], of_x


@pytest.mark.parametrize("step", [0.0, 0.2])
@pytest.mark.parametrize("granularity", [BY_CHANNEL, aqs.PER_TENSOR], ids=["channels", "tensor"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_gradient_of_lsq_is_that_of_the_cut_tensor_and_0_for_what_is_cut(part, granularity, step):
    zeros, _, cut = tensors(part)
    found, _ = lsq_gradient(zeros, mask_of(part), step, granularity)
    expected, _ = lsq_gradient(cut, None, step, granularity)
    assert_cut([found], [expected], part, rtol=2e-5)
    assert np.all(np.isfinite(found))
    if granularity == BY_CHANNEL:
        rest = np.setdiff1d(np.arange(SHAPE[1]), part[1])
        np.testing.assert_array_equal(np.asarray(found)[0, 0, rest, 0], 0)


def test_cut_channels_neither_start_nor_move():
    """A step size of a channel starts with the first subnet that has it."""
    q = aqs.Quantizer("int4", BY_CHANNEL, aqs.lsq("int4"))
    state = init_state(q, SHAPE)
    for part in (PARTS["middle axis"], PARTS["whole"]):
        x, _, cut = tensors(part)
        _, state = fake_quant_with_state(x, dataclasses.replace(q, active=mask_of(part)), state)
        first = 2 * np.abs(cut).mean((0, 2)) / np.sqrt(7)
        step = np.ravel(state["step"].value)
        np.testing.assert_allclose(step[list(part[1])], first, rtol=1e-6)
        assert not np.any(step[len(part[1]) :])


@pytest.mark.parametrize("name", ["percentile", "mean_deviation"])
def test_blocks(name):
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    x[:, 8:] = 0
    q = aqs.Quantizer("int4", aqs.per_block(4, 1), CALIBRATIONS[name])
    found = fake_quant(x, dataclasses.replace(q, active=jnp.arange(16)[None] < 8))
    np.testing.assert_allclose(found[:, :8], fake_quant(x[:, :8], q), rtol=1e-6)
    np.testing.assert_array_equal(found[:, 8:], 0)


@pytest.mark.parametrize("name", ["percentile", "mean_deviation", "lsq", "batch_quant"])
def test_replicas_with_subnets_of_their_own_share_bounds_of_what_both_have(name):
    """`axis_name`: as of one tensor whose mask is not the same in all rows."""
    rng, axes = np.random.default_rng(0), (0, 1)
    sizes = np.array([[3], [5]])
    active = np.arange(8)[None] < sizes
    x = np.where(active[:, None], rng.normal(size=(2, 4, 8)), 0).astype(np.float32)
    grid = as_grid(numeric_format("int4"), np.dtype(np.float32))
    calibration = CALIBRATIONS[name]

    def of_replica(x, active):
        over = Over(axes, "replicas", active)
        return calibration.apply(calibration.init((1, 1)), x, over, grid, None)[0].high

    found = jax.vmap(of_replica, axis_name="replicas")(jnp.asarray(x), jnp.asarray(active)[:, None])
    np.testing.assert_array_equal(found[0], found[1])
    over = Over((0, 1), None, jnp.asarray(np.repeat(active, 4, 0)))
    whole = calibration.apply(calibration.init((1, 1)), x.reshape(8, 8), over, grid, None)[0].high
    np.testing.assert_allclose(found[0], whole, rtol=1e-6)


# --- Without subnets ------------------------------------------------------------------------------


def test_programs_without_masks_are_those_of_plain_formulas():
    over = Over((0, 1), None)
    x, grid = jnp.ones((4, 6)), as_grid(numeric_format("int4"), np.dtype(np.float32))

    def quantile(x):
        values = jnp.abs(x).transpose(0, 1).reshape(24)
        return jnp.quantile(jax.lax.expand_dims(values, (0, 1)), np.float32(0.9), axis=-1)

    def found(x):
        return aqs.percentile(90).apply((), x, over, grid, None)[0].high

    assert str(jax.make_jaxpr(found)(x)) == str(jax.make_jaxpr(quantile)(x))
    assert len(jax.tree.leaves(aqs.Quantizer("int4"))) == 5  # the numbers of the format

    def lsq(x):
        state = aqs.lsq().init((1, 1))
        return aqs.lsq().apply(state, x, over, grid, None)[0].high

    jaxpr = str(jax.make_jaxpr(lsq)(x))
    assert "reduce_or" in jaxpr  # whether some step has not begun
    assert "i32[1,1]" not in jaxpr  # no number of elements is computed


# --- Subnets of models ----------------------------------------------------------------------------

IMAGE = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


@functools.cache
def small_net():
    model = build("mobilenet_v2", 10, form="tiny", width=0.5, windows=5, dropout=0.0)
    variables = model.init(jax.random.key(0), jnp.zeros(IMAGE.shape))
    net = elastic(
        functools.partial(model.apply, train=False), variables, IMAGE,
        widths={
            "block2/project": (8, 16), "block4/project": (8, 16),
            "block5/expand": aqs.Times("block4/project", (1, 3, 6)),
            "block7/expand": aqs.Times("block6/project", (1, 6)),
        },
        kernels={"block(2|5)/depthwise": (1, 3, 5)},
        depths=[(("block3",), (0, 1)), (("block5",), (0, 1))],
    )  # fmt: skip
    return model, variables, net


def space_with(quantized, fmt, net):
    """A space without decisions about formats: calibrations of lhs and of rhs, and rhs's scales.

    Sites take turns where several are given.
    """
    turns = dict(zip(net.sites, itertools.cycle(quantized)))

    def calibrated(site, formats):
        lhs, rhs, granularity = turns[site.name]
        # BatchQuant's zero point is that of an integer; elsewhere fp32 leaves values as they are.
        of_data = WIDE if fmt == "fp32" and lhs == aqs.batch_quant() else fmt
        return formats._replace(
            lhs=aqs.Quantizer(of_data, aqs.PER_TENSOR, lhs),
            rhs=aqs.Quantizer(fmt, granularity, rhs),
        )

    return dataclasses.replace(make_space(net.sites, [(".*", "int8")], net=net), adapt=calibrated)


def random_points(space, count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, space.mask.sum(1), (count, len(space.mask)))


TURNS = [  # calibrations of activations and of weights, and what the latter have scales for
    (aqs.moving_average(aqs.percentile(99)), aqs.frozen_after(aqs.percentile(90), 1),
     aqs.PER_CHANNEL),
    (aqs.batch_quant(), aqs.lsq(), aqs.PER_CHANNEL),
    (aqs.delayed(aqs.mean_deviation()), aqs.running_max(aqs.mean_deviation()), aqs.PER_TENSOR),
    (aqs.lsq(), aqs.lsq(), aqs.PER_TENSOR),
]  # fmt: skip
WIDE = NumericFormat(13, 13, -(2.0**14) + 1, 2.0**14 - 1, 15)  # an integer of 15 bits


@functools.cache
def masked(shift, fmt, execution):
    """A compiled `apply` of all subnets: choices, images -> outputs and states."""
    model, variables, net = small_net()
    space = space_with(TURNS[shift:] + TURNS[:shift], fmt, net)
    apply = functools.partial(model.apply, train=False)
    qfun = aqs.quantize_with_state(apply, execution=execution)

    @jax.jit
    def run(choices, images):
        point = space.point(choices)
        own = net.variables(point.architecture, variables)
        state = qfun.init(point.assignment, own, images)
        return qfun.apply(point.assignment, state, own, images)

    return space, run


def extracted(execution, space, point, images):
    """The same of the model that is cut out, with the sites' names in the whole one."""
    model, variables, net = small_net()
    architecture = np.asarray(space.architecture(point))
    small, cut = fitted(model, net.extract(architecture, variables))
    apply = functools.partial(small.apply, train=False)
    names = list(aqs.find_sites(apply, cut, IMAGE))
    whole = space.concrete_assignment(point)
    old = dict(zip(names, subnet_sites(net, architecture), strict=True))
    assignment = {name: whole[old[name]] for name in names}
    qfun = aqs.quantize_with_state(apply, execution=execution)
    state = qfun.init(assignment, cut, images)
    outputs, state = jax.jit(qfun.apply)(assignment, state, cut, images)
    return outputs, {old[name]: of_site for name, of_site in state.items()}


@pytest.mark.parametrize("shift", [0, 2])
def test_bounds_in_subnets_are_those_of_extracted_models(shift):
    """In wide formats: a value that is rounded otherwise hardly changes what comes after it."""
    space, run = masked(shift, "fp32", "emulated")
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    for point in random_points(space, 2, seed=shift):
        _, states = run(point, images)
        _, expected = extracted("emulated", space, point, images)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states))
        cut = cut_scales(space.net, np.asarray(space.architecture(point)), states)
        assert set(cut) == set(expected)
        for site, of_site in expected.items():
            leaves = zip(jax.tree.leaves(cut[site]), jax.tree.leaves(of_site), strict=True)
            for found, own in leaves:
                assert np.shape(found) == np.shape(own)
                np.testing.assert_allclose(found, own, rtol=5e-5, atol=1e-6, err_msg=site)


def test_outputs_in_int8_are_those_of_extracted_models_by_one_program():
    space, run = masked(0, "int8", "int8")
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    points = random_points(space, 20)
    found = [run(point, images)[0] for point in points]
    assert run._cache_size() == 1
    assert np.all(np.isfinite(found))
    for outputs, point in zip(found[:2], points):
        expected, _ = extracted("int8", space, point, images)
        # Bounds differ in their last bit, by which some codes do; without masks by half and more.
        np.testing.assert_allclose(outputs, expected, atol=0.06 * np.abs(expected).max())


def two_layers():
    """relu(x w) v with 2, 5 or 8 channels inside, and its sites' names."""
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    }

    def apply(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["v"]

    x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    return apply, params, x, elastic(apply, params, x, widths={"w": (2, 5, 8)})


@pytest.mark.parametrize("name", [name for name in CALIBRATIONS if name != "batch_quant"])
@pytest.mark.parametrize(
    "granularity", [aqs.PER_CHANNEL, aqs.PER_TENSOR], ids=["channel", "tensor"]
)
def test_a_function_of_two_layers_in_int8(name, granularity):
    """Every calibration on both sides; BatchQuant's zero point on data alone."""
    apply, params, x, net = two_layers()
    c = CALIBRATIONS[name]
    lhs = aqs.batch_quant() if name == "lsq" else c
    space = space_with([(lhs, c, granularity)], "int8", net)
    qfun = aqs.quantize_with_state(apply, execution="int8")

    def run(assignment, params):
        return qfun.apply(assignment, qfun.init(assignment, params, x), params, x)[0]

    for option in range(3):
        point = space.point(np.array([option]))
        found = run(point.assignment, net.variables(point.architecture, params))
        cut = net.extract(np.array([option]), params)
        expected = run(space.concrete_assignment([option]), cut)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_quantized_as_those_of_the_extracted_function():
    apply, params, x, net = two_layers()
    spec = aqs.Quantizer("int8", None, aqs.mean_deviation())
    rule = {"lhs": "int8", "rhs": "int8", "lhs_gradient": spec, "rhs_gradient": spec}
    space = make_space(net.sites, [(".*", aqs.SiteFormats(**rule))], net=net)
    qapply = aqs.quantize(apply)
    for option, width in enumerate((2, 5, 8)):
        point = space.point(np.array([option]))

        def loss(params, assignment):
            return jnp.sum(jnp.sin(qapply(assignment, params, x)))

        found = jax.grad(loss)(net.variables(point.architecture, params), point.assignment)
        cut = net.extract(np.array([option]), params)
        expected = jax.grad(loss)(cut, space.concrete_assignment([option]))
        np.testing.assert_allclose(found["w"][:, :width], expected["w"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["v"][:width], expected["v"], rtol=1e-4, atol=1e-5)
        assert not np.any(found["w"][:, width:])


def test_many_subnets_at_once():
    apply, params, x, net = two_layers()
    space = space_with([(aqs.percentile(90), aqs.mean_deviation(), aqs.PER_CHANNEL)], "int4", net)
    qapply = aqs.quantize(apply)

    def outputs(choices):
        point = space.point(choices)
        return qapply(point.assignment, net.variables(point.architecture, params), x)

    together = jax.vmap(outputs)(jnp.arange(3)[:, None])
    for option in range(3):
        cut = net.extract(np.array([option]), params)
        expected = qapply(space.concrete_assignment([option]), cut, x)
        np.testing.assert_allclose(together[option], expected, rtol=1e-5, atol=1e-5)


def test_only_calibrations_that_count_get_masks():
    _, _, _, net = two_layers()
    space = space_with([(aqs.percentile(90), aqs.absmax(), aqs.PER_CHANNEL)], "int4", net)
    formats = space.point(np.array([1])).assignment
    assert formats["w"].lhs.active is None  # data are whole
    assert formats["v"].lhs.active.shape == (1, 8)
    assert formats["v"].rhs.active is None
    masks = net.active_elements(np.array([1]))
    np.testing.assert_array_equal(np.ravel(masks["w"]["rhs"]), np.arange(8) < 5)
    np.testing.assert_array_equal(np.ravel(masks["w"]["out"]), np.arange(8) < 5)
    np.testing.assert_array_equal(masks["v"]["rhs"][:, 0], np.arange(8) < 5)


def test_windows_and_skipped_blocks():
    _, _, net = small_net()
    labels = {d.name: list(d.options) for d in net.decisions}
    names = list(labels)
    choices = net.largest.copy()
    choices[names.index("block2/depthwise/kernel:window")] = 1
    choices[names.index("block5:depth")] = 0
    masks = net.active_elements(choices)
    taps = np.asarray(masks["block2/depthwise/kernel"]["rhs"])[:, :, 0, 0]
    np.testing.assert_array_equal(taps, np.pad(np.ones((3, 3), bool), 1))
    assert not np.any(masks["block5/depthwise/kernel"]["rhs"])
    assert not np.any(masks["block5/expand/kernel"]["lhs"])
    assert masks["stem/kernel"] == {"lhs": None, "rhs": None, "out": None}


def test_a_subnet_is_frozen_as_a_model_of_its_own():
    apply, params, x, net = two_layers()
    space = space_with([(aqs.percentile(90), aqs.absmax(), aqs.PER_CHANNEL)], "int4", net)
    point = space.point(np.array([0]))
    with pytest.raises(SiteError, match=r"net\.extract"):
        aqs.freeze(apply, point.assignment, net.variables(point.architecture, params), x)
