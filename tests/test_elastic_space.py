"""Formats and architecture in one space: costs against those of extracted models, found anew."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search import search
from aqt_search.architecture.decisions import Times
from aqt_search.architecture.elastic import elastic
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.costs import cost
from aqt_search.models import build
from aqt_search.models.fitting import fitted
from aqt_search.search import elastic_costs
from aqt_search.search.critic import critic_over, groups_of
from aqt_search.search.options import SpaceError
from aqt_search.search.space import Point, make_space
from aqt_search.training.parallel import AXIS
from aqt_search.training.subnets import mean_gradients, moved_where_had, of_points

IMAGE = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


@functools.cache
def small_net():
    model = build("mobilenet_v2", 10, form="tiny", width=0.5, windows=5, dropout=0.0)
    variables = model.init(jax.random.key(0), jnp.zeros(IMAGE.shape))
    net = elastic(
        functools.partial(model.apply, train=False), variables, IMAGE,
        widths={
            "block2/project": (8, 16), "block4/project": (8, 16),
            "block5/expand": Times("block4/project", (1, 3, 6)),
            "block7/expand": Times("block6/project", (1, 6)),
        },
        kernels={"block(2|5)/depthwise": (1, 3, 5)},
        depths=[(("block3",), (0, 1)), (("block5",), (0, 1))],
    )  # fmt: skip
    return model, variables, net


RULES = {
    "tied": [("stem|head", "int8"), (".*", ("int3", "int4", "int8"))],
    "apart": [("stem|head", "int8"),
              (".*", {"weight": ("int3", "int4", "int8"), "activation": ("int4", "int8")})],
    "fixed": [(".*", "int4")],
}  # fmt: skip


@functools.cache
def space_of(rules):
    _, _, net = small_net()
    return make_space(net.sites, RULES[rules], net=net)


def random_points(space, count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, space.mask.sum(1), (count, len(space.mask)))


def found_anew(space, point):
    """The sites of the model that is built like a subnet, and its formats, by its own names."""
    model, variables, net = small_net()
    architecture = np.asarray(space.architecture(point))
    small, cut = fitted(model, net.extract(architecture, variables))
    sites = aqs.find_sites(functools.partial(small.apply, train=False), cut, IMAGE)
    mine = subnet_sites(net, architecture)
    assignment = space.concrete_assignment(point)
    assert [site.kind for site in sites.values()] == [site.kind for site in mine.values()]
    return sites, {new: assignment[old] for new, old in zip(sites, mine)}, mine


def test_sites_of_a_subnet_are_those_of_the_extracted_model():
    space = space_of("tied")
    for point in random_points(space, 8):
        sites, _, mine = found_anew(space, point)
        for site, other in zip(sites.values(), mine.values()):
            assert (site.macs, site.lhs_shape, site.rhs_shape, site.out_shape) == (
                other.macs, other.lhs_shape, other.rhs_shape, other.out_shape
            )  # fmt: skip


COSTS = {
    "gbops": cost.gbops,
    "bytes": cost.weight_bytes,
    "codes": functools.partial(cost.weight_bytes, scales=False),
    "macs": lambda sites, assignment: cost.total_macs(sites),
    "latency": functools.partial(aqs.roofline.latency_ms, chip="edge_int8"),
    "blocks": lambda sites, assignment: sum(-(-s.rhs_shape[-1] // 12) for s in sites.values()),
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", COSTS)
def test_tabulated_costs_are_those_of_the_extracted_models(rules, name):
    space = space_of(rules)
    table = space.cost_table(COSTS[name])
    for point in random_points(space, 4, seed=1):
        sites, assignment, _ = found_anew(space, point)
        expected = float(COSTS[name](sites, assignment))
        np.testing.assert_allclose(table.of_many(point[None])[0], expected, rtol=1e-12)
        np.testing.assert_allclose(table.of(point), expected, rtol=1e-5)


@pytest.mark.parametrize("rules", ["apart", "tied"])
def test_expected_cost_is_the_mean_over_all_points(rules):
    """Of four decisions that are open, the others certain: every point by name."""
    space, rng = space_of(rules), np.random.default_rng(0)
    table = space.cost_table(cost.gbops)
    p = np.where(space.mask, rng.uniform(0.1, 1, space.mask.shape), 0.0)
    kinds = [decision.kind if i < 10 else "format" for i, decision in enumerate(space.decisions)
             if i < len(small_net()[2].decisions) or i == len(space.decisions) - 4]  # fmt: skip
    open_ones = [0, 2, 7, len(space.decisions) - 4]
    assert len(kinds) > 4
    certain = random_points(space, 1)[0]
    for decision in range(len(p)):
        if decision not in open_ones:
            p[decision] = np.arange(p.shape[1]) == certain[decision]
    p /= p.sum(1, keepdims=True)
    total = 0.0
    for options in itertools.product(*(np.flatnonzero(space.mask[d]) for d in open_ones)):
        point = certain.copy()
        point[open_ones] = options
        probability = np.prod([p[d, o] for d, o in zip(open_ones, options)])
        sites = subnet_sites(space.net, point[: len(space.net.decisions)])
        total += probability * float(cost.gbops(sites, space.concrete_assignment(point)))
    np.testing.assert_allclose(table.known_expected(p), total, rtol=1e-12)
    np.testing.assert_allclose(table.expected(jnp.asarray(p, jnp.float32)), total, rtol=1e-5)


def test_gradient_of_the_expected_cost_is_what_an_option_changes():
    space = space_of("tied")
    table = space.cost_table(cost.gbops)
    point = random_points(space, 1)[0]
    one_hot = jnp.eye(space.max_options)[point]
    gradient = jax.grad(table.expected)(one_hot)
    for decision, exists in enumerate(space.mask):
        other = point.copy()
        other[decision] = (point[decision] + 1) % exists.sum()
        expected = np.diff(table.of_many(np.stack([point, other])))[0]
        found = gradient[decision, other[decision]] - gradient[decision, point[decision]]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_range_and_dearest_are_those_of_the_smallest_and_largest():
    space = space_of("apart")
    table = space.cost_table(cost.gbops)
    low, high = table.range
    smallest = [*space.net.smallest, *[0] * (len(space.decisions) - len(space.net.decisions))]
    dearest = [*space.net.largest, *(np.array([len(d.options) for d in space.decisions]) - 1)]
    dearest = np.array([*space.net.largest, *dearest[2 * len(space.net.decisions) :]])
    np.testing.assert_allclose(low, table.of_many(np.array(smallest)[None])[0])
    np.testing.assert_allclose(high, table.of_many(dearest[None])[0])
    np.testing.assert_array_equal(table.dearest, dearest)
    with pytest.raises(SpaceError, match="outside of the space"):
        table.check_target(high * 1.01)


def test_what_a_skipped_block_has_is_not_decided():
    space = space_of("apart")
    names = [decision.name for decision in space.decisions]
    point = random_points(space, 1)[0]
    point[names.index("block5:depth")] = 0
    active = dict(zip(names, np.asarray(space.active(point))))
    assert not active["block5/depthwise/kernel:window"]
    assert not active["block5/expand/kernel:expansion"]
    assert not active["block5/project/kernel:weight"]
    off = {name for name, on in active.items() if not on}
    assert all(name.startswith("block5/") or name.startswith("block3/") for name in off)
    point[names.index("block5:depth")] = point[names.index("block3:depth")] = 1
    assert np.all(space.active(point))


def test_one_program_for_all_points():
    model, variables, _ = small_net()
    space = space_of("apart")
    qapply = aqs.quantize(functools.partial(model.apply, train=False))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    @jax.jit
    def logits(choices, variables):
        point = space.point(choices)
        return qapply(point.assignment, space.net.variables(point.architecture, variables), images)

    found = [logits(point, variables) for point in random_points(space, 50)]
    assert logits._cache_size() == 1
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize(
    "calibration",
    [aqs.centred(aqs.absmax()), aqs.centred(aqs.percentile(99)),
     aqs.moving_average(aqs.centred(aqs.absmax()))],
)  # fmt: skip
def test_grids_without_a_zero_are_refused_in_subnets(calibration, side):
    """Beside activations under BatchQuant, too, whose zeros are saved by the weights' alone."""

    def calibrated(site, formats):
        formats = formats._replace(lhs=aqs.Quantizer("int8", None, aqs.batch_quant()))
        return formats._replace(**{side: aqs.Quantizer("int4", None, calibration)})

    space = dataclasses.replace(space_of("fixed"), adapt=calibrated)
    with pytest.raises(SpaceError, match=rf"'stem/kernel'.*\({side}: centred\)"):
        space.point(np.zeros(len(space.decisions), int))


def test_the_critic_decides_the_architecture_first():
    """At 0.4 of the steps after the delay its temperature is 0.06 of the values' spread, and would
    be 0.5 if it fell as that of formats: what differs by the spread is decided to e^-17 or to e^-2.
    """
    space = space_of("apart")
    costs = {"gbops": space.cost_table(cost.gbops)}
    values = jnp.asarray(np.random.default_rng(0).normal(size=space.mask.shape), jnp.float32)
    groups = groups_of([(d.role, d.labels) for d in space.decisions])
    settings = {"total_steps": 100, "delay": 0.2, "samples": 4, "tolerance": 0.02,
                "one_sided": False, "memory": 0.5, "axis_name": None}  # fmt: skip

    def entropy(one_shot):
        """Of the decisions about the architecture, of those that are as open as can be."""

        @jax.jit
        def step(state, key):
            choices = one_shot.sample(state, key)
            quality = values[jnp.arange(len(values)), choices].sum(1)
            return one_shot.update(state, choices, quality, key)[0]

        state = one_shot.init({"gbops": sum(costs["gbops"].range) / 2})
        for key in jax.random.split(jax.random.key(0), 52):
            state = step(state, key)
        p = jax.nn.softmax(jnp.where(space.mask, state.policy.logits, -jnp.inf), axis=-1)
        of_each = -np.sum(np.where(space.mask, p * np.log(np.maximum(p, 1e-30)), 0.0), axis=1)
        return (of_each / np.log(space.mask.sum(1)))[: len(space.net.decisions)].mean()

    together = critic_over(space.mask, groups, costs, active=space.active, **settings)
    assert entropy(search.critic(space, costs, **settings)) < entropy(together) / 2


@pytest.mark.parametrize("calibration", [aqs.lsq(), aqs.moving_average(aqs.absmax())])
def test_scales_that_stay_are_not_of_blocks(calibration):
    q = aqs.Quantizer("int4", aqs.per_block(4), calibration)
    adapt = lambda site, formats: formats._replace(rhs=q)  # noqa: E731
    space = dataclasses.replace(space_of("fixed"), adapt=adapt)
    with pytest.raises(SpaceError, match=r"'stem/kernel' learns or remembers scales of blocks"):
        space.point(np.zeros(len(space.decisions), int))


def residual(params, x):
    h = x @ params["stem"]
    for name in ("block1", "block2"):
        h = h + jax.nn.relu(h @ params[name]["up"]) @ params[name]["down"]
    return h @ params["head"]


def test_latency_of_every_point():
    """A product's time is a largest of two: that of three corners of two widths tells no fourth."""
    block = {"up": jnp.ones((6, 10)), "down": jnp.ones((10, 6))}
    params = {"stem": jnp.ones((8, 6)), "block1": block, "block2": block, "head": jnp.ones((6, 3))}
    net = elastic(residual, params, jnp.ones((1, 8)), widths={"^stem": (3, 6), "up": (4, 10)},
                  depths=[(("block1", "block2"), (0, 1, 2))])  # fmt: skip
    space = make_space(net.sites, [("stem|head", "int8"), (".*", ("int4", "int8"))], net=net)
    points = np.array(list(itertools.product(*map(range, space.mask.sum(1)))))
    for chip in ("edge_int8", "h100"):
        latency = functools.partial(aqs.roofline.latency_ms, chip=chip)
        expected = [
            latency(
                subnet_sites(net, point[: len(net.decisions)]), space.concrete_assignment(point)
            )
            for point in points
        ]
        np.testing.assert_allclose(space.cost_table(latency).of_many(points), expected, rtol=1e-12)


def test_costs_that_are_no_sums_are_refused(monkeypatch):
    space = space_of("tied")
    with pytest.raises(SpaceError, match=r"of a subnet is .*, the sum over its sites"):
        space.cost_table(lambda sites, _: sum(site.macs for site in sites.values()) ** 0.5)
    monkeypatch.setattr(elastic_costs, "_MOST_SHAPES", 3)
    with pytest.raises(SpaceError, match=r"'block5/.*6 shapes it can have .*at most 3 are: offer"):
        space.cost_table(lambda sites, _: sum(site.macs**0.5 for site in sites.values()))
    with pytest.raises(SpaceError, match="'stem/kernel' is not finite"):
        space.cost_table(lambda sites, _: float("nan"))
    with pytest.raises(SpaceError, match="cost is 'gbops'; expected a function"):
        space.cost_table("gbops")
    table = space.cost_table(cost.gbops)
    with pytest.raises(SpaceError, match="architecture"):
        search.allocate(np.zeros(space.mask.shape), {"gbops": table}, {"gbops": 1.0})
    _, _, net = small_net()
    other = {name: site for name, site in net.sites.items() if name != "head/kernel"}
    with pytest.raises(SpaceError, match="another model"):
        make_space(other, RULES["tied"], net=net)


def test_gradients_are_averaged_over_the_replicas_that_have_a_channel():
    """Four replicas, of which one has channels 8 to 15 of a width, and none a block."""
    _, variables, net = small_net()
    names = [decision.name for decision in net.decisions]
    width, depth = names.index("block2/project/kernel:width"), names.index("block3:depth")
    choices = np.tile(net.largest, (4, 1))
    choices[1:, width], choices[:, depth] = 0, 0
    params = variables["params"]

    def of_replica(choices, number):  # numbers 1 to 4, where the subnet has something
        masks = net.masks(choices, {"params": params})["params"]
        return jax.tree.map(lambda x, m: number * (jnp.ones_like(x) * m), params, masks)

    gradients = jax.vmap(of_replica)(jnp.asarray(choices), jnp.arange(1.0, 5.0))

    def averaged(choices, gradients):
        found, had = mean_gradients(net, Point({}, choices), gradients)
        old = jax.tree.map(jnp.zeros_like, params)
        return found, moved_where_had(had, jax.tree.map(jnp.ones_like, params), old)

    found, moved = jax.vmap(averaged, axis_name=AXIS)(jnp.asarray(choices), gradients)
    kernel = found["block2"]["project"]["kernel"]
    np.testing.assert_allclose(kernel[..., :8], 2.5)  # the mean of 1 to 4
    np.testing.assert_allclose(kernel[..., 8:], 1.0)  # of the first alone
    assert not np.any(found["block3"]["project"]["kernel"])
    assert not np.any(moved["block3"]["project"]["kernel"])
    assert np.all(moved["block2"]["project"]["kernel"] == 1)


def test_subnets_give_back_what_they_have_not():
    """Running statistics of channels that a subnet lacks stay; its own move."""
    model, variables, net = small_net()
    space = space_of("fixed")
    qapply = of_points(aqs.quantize(model.apply), net)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    choices = np.array([*net.smallest], int)
    _, updates = qapply(space.point(choices), variables, images, train=True,
                        mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})  # fmt: skip
    before, after = variables["batch_stats"], updates["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, before["block3"], after["block3"])
    mean = (before["block2"]["project_bn"]["mean"], after["block2"]["project_bn"]["mean"])
    np.testing.assert_array_equal(mean[0][8:], mean[1][8:])
    assert np.all(mean[0][:8] != mean[1][:8])
