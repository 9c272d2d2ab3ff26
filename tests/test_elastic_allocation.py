"""The best subnet of additive values, against all points of a small space."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.models import build
from aqt_search.search.allocation import allocate
from aqt_search.search.elastic_allocation import allocate_subnet
from aqt_search.search.options import SpaceError
from aqt_search.search.space import make_space
from experiments.option_values import rising

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


@functools.cache
def small_space():
    """7 decisions about the architecture and 2 about formats: 1,728 points."""
    model = build("mobilenet_v2", 4, form="tiny", width=0.25, depths=(1, 2, 1, 1), windows=3)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGE.shape))
    net = aqs.elastic(
        functools.partial(model.apply, train=False), variables, IMAGE,
        widths={"block4/expand": (8, 16, 48), "block4/project": (4, 8), "block5/expand": (16, 48)},
        kernels={"block(2|3|4)/depthwise": (1, 3)}, depths=[(("block3",), (0, 1))],
    )  # fmt: skip
    rules = [("block3/expand|block4/project", ("int3", "int4", "int8")), (".*", "int8")]
    return make_space(net.sites, rules, net=net)


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_best_of_all_points(seed):
    space = small_space()
    table = space.cost_table(aqs.cost.gbops)
    points = np.array(list(itertools.product(*(range(n) for n in space.mask.sum(1)))))
    assert len(points) == 1728
    rng = np.random.default_rng(seed)
    values = np.where(space.mask, -rng.exponential(size=space.mask.shape), 0.0)
    low, high = table.range
    target = low + rng.uniform(0.1, 0.9) * (high - low)
    names = [d.name for d in space.decisions]
    skipped = np.zeros(points.shape, bool)
    for name in ("block3/depthwise/kernel:window", "block3/expand/kernel"):
        skipped[:, names.index(name)] = points[:, names.index("block3:depth")] == 0
    sums = np.where(skipped, 0.0, values[np.arange(len(values)), points]).sum(1)
    best = sums[table.of_many(points) <= target].max()
    found = allocate_subnet(values, space, table, target)
    (place,) = np.flatnonzero((points == found).all(1))
    assert table.of_many(found[None])[0] <= target
    assert sums[place] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(2))
def test_no_subnet_with_its_best_formats_is_better(seed):
    """Where cutting a width pays only once many formats are raised: 20 subnets, each allocated."""
    model = build("mobilenet_v2", 4, form="tiny", width=0.25, windows=3)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGE.shape))
    net = aqs.elastic(
        functools.partial(model.apply, train=False), variables, IMAGE,
        widths={f"block{n}/expand": (16, 32, 48) for n in range(4, 8)}, kernels={"depth": (1, 3)},
    )  # fmt: skip
    formats = ("int3", "int4", "int8")
    rules = [(".*", {"weight": formats, "activation": formats})]
    space = make_space(net.sites, rules, net=net)
    table, count = space.cost_table(aqs.cost.gbops), len(net.decisions)
    rng = np.random.default_rng(seed)
    values = -rng.exponential(size=space.mask.shape) * [1.0, 0.3, 0.0] * space.mask
    target = 0.2 * table.range[1]

    def worth(choices):
        return values[np.arange(len(values)), choices].sum()

    found = allocate_subnet(values, space, table, target)
    assert table.of_many(found[None])[0] <= target
    for number in range(20):
        choices = rng.integers(0, space.mask[:count].sum(1)) if number else net.largest
        own = make_space(subnet_sites(net, choices), rules)
        assert own.decisions == space.decisions[count:]
        costs = {"gbops": own.cost_table(aqs.cost.gbops)}
        best = allocate(values[count:, : own.max_options], costs, {"gbops": target})
        assert worth(found) >= worth(np.concatenate([choices, best])) - 1e-4


def test_of_points_of_equal_worth_it_takes_the_dearest():
    space = small_space()
    table = space.cost_table(aqs.cost.gbops)
    points = np.array(list(itertools.product(*(range(n) for n in space.mask.sum(1)))))
    target = 0.7 * table.range[1]
    costs = table.of_many(points)
    found = allocate_subnet(np.zeros(space.mask.shape), space, table, target)
    assert table.of_many(found[None])[0] == pytest.approx(costs[costs <= target].max(), rel=1e-2)


def test_values_that_fall_with_the_cost_are_pooled():
    space = small_space()
    table = space.cost_table(aqs.cost.gbops)
    names = [d.name for d in space.decisions]
    rows = [names.index(name) for name in ("block4/expand/kernel:width", "block4/project/kernel")]
    values = np.zeros(space.mask.shape)
    values[rows] = [-1.0, 0.5, 0.0]
    found = rising(values, table, np.arange(len(values)) == rows[0])
    expected = values.copy()
    expected[rows[0]] = [-1.25, 0.0, 0.0]  # the mean of the last two, and less it
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_targets_outside_of_the_space_are_refused():
    space = small_space()
    table = space.cost_table(aqs.cost.gbops)
    with pytest.raises(SpaceError, match="target"):
        allocate_subnet(np.zeros(space.mask.shape), space, table, 0.5 * table.range[0])
