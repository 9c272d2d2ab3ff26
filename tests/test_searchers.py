"""The searchers against brute force, on closed forms and on a trained net of four sites."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import aqt_search as aqs
from aqt_search.search.cost_table import CostTable
from aqt_search.search.searchers import (
    best_within,
    brute_force,
    critic_search,
    evolution,
    gradient_search,
    greedy,
    in_batches,
    random_search,
    regret,
    scored,
)
from aqt_search.search.searchers.points import (
    sample_points,
    tilted_log_probabilities,
)
from aqt_search.search.space import SpaceError, make_space

SEARCHERS = {
    "random": functools.partial(random_search, spread=0.3),
    "greedy": greedy,
    "evolution": evolution,
    "critic": critic_search,
    "policy_gradient": gradient_search,
}
ALL = SEARCHERS | {"brute_force": brute_force}
EVALUATIONS = 64
every_searcher = pytest.mark.parametrize("search", SEARCHERS.values(), ids=SEARCHERS)


def budget(search, costs):
    """All points for brute force; fewer than there are for the others."""
    return math.prod(costs.mask.sum(axis=1)) if search is brute_force else 40


all_and_brute_force = pytest.mark.parametrize("search", ALL.values(), ids=ALL)


# ---- problems with a closed form ----


def additive_costs(options, fixed=0.0):
    """Cost = fixed + sum of options[d][choice]; decisions may have differing numbers of options."""
    table = np.zeros((len(options), *2 * [max(map(len, options))]))
    mask = np.zeros(table.shape[:2], bool)
    for d, column in enumerate(options):
        table[d, range(len(column)), range(len(column))] = column
        mask[d, : len(column)] = True
    decisions = np.arange(len(options))
    return CostTable(table, decisions, decisions, fixed, mask)


def paired_costs(seed=0):
    """Decisions 0 and 2 are weights, 1 and 3 activations; 4 stands alone with two options."""
    rng = np.random.default_rng(seed)
    bits = np.array([2.0, 4.0, 8.0])
    table = rng.uniform(1, 3, (3, 1, 1)) * np.outer(bits, bits)
    mask = np.ones((5, 3), bool)
    mask[4, 2] = False
    return CostTable(table, np.array([0, 2, 4]), np.array([1, 3, 4]), 5.0, mask)


def every_point(costs):
    return np.array(list(itertools.product(*(np.flatnonzero(row) for row in costs.mask))))


BITS = ((2, 3, 4, 8), (2, 4, 8), (2, 3, 4, 8), (3, 8))
MACS = (5.0, 2.0, 1.0, 3.0)


def bit_operations():
    return additive_costs([[m * b * b for b in bits] for m, bits in zip(MACS, BITS)], fixed=10.0)


def interacting_quality(choices):
    """Accuracy-like: noise of each decision falls with its bits, neighbours amplify each other."""
    bits = np.array([[column[o] for column, o in zip(BITS, row)] for row in choices])
    noise = np.array([1.0, 0.5, 0.7, 0.2]) * 2.0 ** (2.0 - bits)
    total = (noise**2).sum(axis=1) + 0.8 * (noise[:, 1:] * noise[:, :-1]).sum(axis=1)
    return 1 / (1 + total)


def reference(costs, quality, limit):
    """Best (quality, -cost) by a plain loop over all points that fit, and all their qualities."""
    points = every_point(costs)
    found = costs.of_many(points)
    fitting = [(quality(p[None])[0], -c, tuple(p)) for p, c in zip(points, found) if c <= limit]
    return max(fitting), np.array([q for q, _, _ in fitting])


def allowed_regret(qualities, draws=EVALUATIONS // 2, chance=1e-3):
    """The regret that uniform draws of points that fit exceed with a probability of `chance`.

    All draws miss the best share s of the points with probability (1 - s)^draws. Half as many
    draws as the searchers have: about so many would fit if they were drawn from all points.
    """
    share = 1 - chance ** (1 / draws)
    return qualities.max() - np.quantile(qualities, 1 - share, method="lower")


@pytest.mark.parametrize("ratio", [1.0, 1.7, 2.5, 5.0])
def test_brute_force_is_the_plain_loop(ratio):
    costs = bit_operations()
    target = ratio * costs.range[0]
    best = brute_force(interacting_quality, costs, target, batch_size=7)
    (quality, cost, choices), _ = reference(costs, interacting_quality, 1.02 * target)
    assert (best.quality, best.cost, tuple(best.choices)) == (quality, -cost, choices)
    np.testing.assert_array_equal(best.evaluated.choices, every_point(costs))


@every_searcher
@pytest.mark.parametrize("ratio", [1.7, 2.5, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_regret_with_interactions(search, ratio, seed):
    costs = bit_operations()
    target = ratio * costs.range[0]
    best = brute_force(interacting_quality, costs, target)
    _, qualities = reference(costs, interacting_quality, 1.02 * target)
    found = search(interacting_quality, costs, target, EVALUATIONS, seed)
    assert 0 <= regret(found, best) <= allowed_regret(qualities)


@pytest.mark.parametrize("ratio", [1.7, 2.5, 5.0])
def test_of_additive_values_the_scored_point_is_the_best(ratio):
    """Brute force judges by the same values; another quality is what is told, not what decides."""
    costs, values = bit_operations(), np.random.default_rng(0).normal(size=(4, 4))

    def total(choices):
        return values[np.arange(4), choices].sum(axis=1)

    target = ratio * costs.range[0]
    best = brute_force(total, costs, target)
    found = scored(interacting_quality, costs, target, 1, 0, values=values)
    np.testing.assert_array_equal(found.choices, best.choices)
    assert found.quality == interacting_quality(found.choices[None])[0]
    assert len(found.evaluated.costs) == 1


@every_searcher
def test_what_counts_most_is_kept(search):
    """Equal costs, additive quality: the optimum of three dear decisions is the top three."""
    worth = np.array([0.05, 0.3, 0.1, 0.25, 0.02, 0.2])
    costs = additive_costs([[1.0, 2.0]] * 6)
    found = search(lambda choices: choices @ worth, costs, 9.0, 42, 0)  # as many points as fit
    np.testing.assert_array_equal(found.choices, [0, 1, 0, 1, 0, 1])
    assert found.quality == pytest.approx(0.75)


def test_greedy_by_hand():
    """Two decisions (cost 1, 2, 4) from (4, 4): losses per cost saved decide every step."""
    costs = additive_costs([[1.0, 2.0, 4.0]] * 2)
    table = np.array([[0.2, 0.6, 0.7], [0.5, 0.69, 0.7]])
    calls = []

    def quality(choices):
        calls.append(choices.tolist())
        return table[[0, 1], choices].sum(axis=1) / 2

    # Saved per loss: (4, 2) 0.01 / 2 first; then (2, 2) 0.1 / 2 beats (4, 1) 0.19 / 1. Cost 4.
    found = greedy(quality, costs, 4.0, 6, 0, tolerance=0.0)
    assert found.choices.tolist() == [1, 1]
    assert calls[1:] == [[[1, 1]]]
    assert sorted(calls[0]) == [[0, 2], [1, 2], [2, 0], [2, 1], [2, 2]]
    # Cost 5: (2, 2) leaves a slack of 1, in which no move up fits; (4, 1) was not on the way.
    assert greedy(quality, costs, 5.0, 6, 0, tolerance=0.0).choices.tolist() == [1, 1]


def test_greedy_spends_the_slack():
    """Decision 0 goes first (0.01 per cost saved), but 1 must too (0.2 / 9): then 0 fits again."""
    costs = additive_costs([[1.0, 2.0], [1.0, 10.0]])
    worth = np.array([0.01, 0.2])
    found = greedy(lambda choices: choices @ worth, costs, 10.0, 4, 0)
    assert found.choices.tolist() == [1, 0]
    # What gains in the table by a cheaper option takes it, and does not climb back.
    table = np.array([[0.0, 0.5], [0.5, 0.4]])
    found = greedy(lambda c: table[[0, 1], c].sum(axis=1), costs, 10.0, 4, 0)
    assert found.choices.tolist() == [1, 0]


# ---- a real net of four sites ----

WIDTHS, OPTIONS = (64, 32, 24, 16, 10), ("int2", "int3", "int4", "int8")


def mlp(params, images):
    *hidden, (kernel, bias) = params
    for weights, offsets in hidden:
        images = jax.nn.relu(images @ weights + offsets)
    return images @ kernel + bias


@jax.jit
def trained(params, images, labels):
    adam = optax.adam(1e-2)

    def loss(params, batch):
        logits = mlp(params, images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (128,), 0, len(images))
        updates, state = adam.update(jax.grad(loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 300)
    return jax.lax.scan(step, (params, adam.init(params)), keys)[0][0]


@pytest.fixture(scope="module")
def net():
    """(evaluate, costs, held-out images): accuracy on held-out digits, 64 points at a time."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = np.float32(digits.data[order] / 16)
    labels = digits.target[order]
    rng = np.random.default_rng(1)
    params = [
        (np.float32(rng.normal(size=(m, n)) * np.sqrt(2 / m)), np.zeros((1, n), np.float32))
        for m, n in itertools.pairwise(WIDTHS)
    ]
    params = trained(params, images[:1000], labels[:1000])
    space = make_space(aqs.find_sites(mlp, params, images[:1]), [(".*", OPTIONS)])
    apply = aqs.quantize(mlp)

    @jax.jit
    def accuracies(choices, params, images, labels):
        def accuracy(point):
            predictions = jnp.argmax(apply(space.assignment(point), params, images), axis=-1)
            return jnp.mean(predictions == labels)

        return jax.vmap(accuracy)(choices)

    def evaluate(choices):
        return accuracies(choices, params, images[1000:], labels[1000:])

    return in_batches(evaluate, EVALUATIONS), space.cost_table(aqs.cost.gbops), len(images) - 1000


@pytest.fixture(scope="module")
def judged_net(net):
    evaluate, costs, _ = net
    return brute_force(evaluate, costs, costs.range[1], batch_size=EVALUATIONS).evaluated


@every_searcher
def test_regret_on_a_net_of_four_sites(net, judged_net, search):
    evaluate, costs, images = net
    assert costs.mask.shape == (4, 4)
    assert judged_net.qualities.max() > 0.9  # the net has learned, and the formats matter:
    assert judged_net.qualities.min() < 0.5
    target = 3 * costs.range[0]
    best = best_within(judged_net, 1.02 * target)
    found = search(evaluate, costs, target, EVALUATIONS, 0)
    fitting = judged_net.qualities[judged_net.costs <= 1.02 * target]
    standard_error = math.sqrt(best.quality * (1 - best.quality) / images)
    # Two points within a standard error or two are one as far as these images can tell.
    bound = max(allowed_regret(fitting), 2 * standard_error)
    # An image on the edge may be judged otherwise in another place of a batch.
    assert -1.5 / images <= regret(found, best) <= bound
    assert regret(found, best) < best.quality - np.median(fitting)
    assert found.cost <= 1.02 * target
    assert len(found.evaluated.qualities) <= EVALUATIONS


# ---- what holds of every searcher ----


class Recorder:
    """An evaluate that notes what it was asked."""

    def __init__(self, quality):
        self.quality, self.asked = quality, []

    def __call__(self, choices):
        self.asked.append(choices)
        return self.quality(choices)


@all_and_brute_force
@pytest.mark.parametrize("ratio", [1.0, 1.6, 4.0])
def test_budget_tolerance_and_masks(search, ratio):
    costs = bit_operations()
    low, high = costs.range
    target = min(ratio * low, high)
    evaluations = budget(search, costs)
    recorder = Recorder(interacting_quality)
    found = search(recorder, costs, target, evaluations, 3, tolerance=0.05)
    asked = np.concatenate(recorder.asked)
    if search is not brute_force:  # which fills its last batch up
        np.testing.assert_array_equal(asked, found.evaluated.choices)
    assert len(found.evaluated.choices) <= evaluations
    assert costs.mask[np.arange(4), asked].all()
    assert found.cost <= 1.05 * target
    assert costs.of_many(found.choices[None])[0] == pytest.approx(found.cost)
    assert interacting_quality(found.choices[None])[0] == found.quality
    fits = found.evaluated.costs <= 1.05 * target
    assert found.quality == found.evaluated.qualities[fits].max()
    np.testing.assert_array_equal(
        found.evaluated.qualities, interacting_quality(found.evaluated.choices)
    )


@all_and_brute_force
def test_front_is_what_no_judged_point_dominates(search):
    costs = bit_operations()
    found = search(interacting_quality, costs, 2 * costs.range[0], budget(search, costs), 1)
    points = {tuple(p): (c, -q) for p, q, c in zip(*found.evaluated)}
    front = {
        p
        for p, (c, q) in points.items()
        if not any(a <= c and b <= q and (a, b) != (c, q) for a, b in points.values())
    }
    assert front == {tuple(p) for p in found.front}
    assert len(front) == len(found.front)
    assert np.all(np.diff(costs.of_many(found.front)) >= 0)


@every_searcher
def test_seeds(search, capsys):
    costs = bit_operations()
    a, b, c = (
        search(interacting_quality, costs, 2 * costs.range[0], 40, seed) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(a.evaluated.choices, b.evaluated.choices)
    if search is not greedy:
        assert not np.array_equal(a.evaluated.choices, c.evaluated.choices)
    assert capsys.readouterr() == ("", "")


@all_and_brute_force
def test_weights_and_activations_decided_apart(search):
    costs = paired_costs()

    def quality(choices):
        return 1 - np.mean(2.0 ** -(choices + 1.0), axis=1)

    found = search(quality, costs, 2 * costs.range[0], budget(search, costs), 0)
    (best, _, _), qualities = reference(costs, quality, 2.04 * costs.range[0])
    assert 0 <= best - found.quality <= allowed_regret(qualities, draws=20)


@all_and_brute_force
def test_a_quality_that_is_not_finite_never_wins(search):
    costs = bit_operations()

    def quality(choices):
        values = interacting_quality(choices)
        return np.where(choices[:, 0] == 1, [np.nan, np.inf][len(choices) % 2], values)

    found = search(quality, costs, 2.5 * costs.range[0], budget(search, costs), 0)
    assert np.isfinite(found.quality)
    assert found.choices[0] != 1


@all_and_brute_force
def test_bad_evaluations_are_refused(search):
    costs = bit_operations()
    target = 2 * costs.range[0]
    with pytest.raises(ValueError, match="quality"):
        search(lambda choices: np.full(len(choices), np.nan), costs, target, 96, 0)
    if search is not brute_force:
        with pytest.raises(ValueError, match=r"returned shape \(\d+, 1\)"):
            search(lambda choices: np.zeros((len(choices), 1)), costs, target, 96, 0)


@all_and_brute_force
def test_bad_targets_and_budgets_are_refused(search):
    costs = bit_operations()
    low, high = costs.range
    for target in (0.9 * low, 1.1 * high):
        with pytest.raises(SpaceError, match="outside of the space"):
            search(interacting_quality, costs, target, 96, 0)
    with pytest.raises(ValueError, match=r"tolerance is -0\.1"):
        search(interacting_quality, costs, low, 96, 0, tolerance=-0.1)
    with pytest.raises(ValueError, match="evaluations"):
        search(interacting_quality, costs, low, 0, 0)


@pytest.mark.parametrize(
    "search, options, evaluations, message",
    [
        (brute_force, {}, 95, "96 points, more than the 95"),
        (brute_force, {"batch_size": 0}, 96, "size, the points of a batch, is 0"),
        (greedy, {}, 10, "at least 11"),  # 1 + 3 + 2 + 3 + 1 of the table, and the last
        (random_search, {"spread": 2.0}, 10, "spread is 2"),
        (evolution, {}, 3, "at least 4"),
        (evolution, {"population": 20}, 10, "population is 20"),
        (gradient_search, {}, 8, "at least 9"),
        (critic_search, {}, 8, "at least 9"),
        (critic_search, {"samples": 1}, 10, "samples is 1"),
        (gradient_search, {"samples": 1}, 10, "samples is 1"),
        (gradient_search, {"cost_samples": 0}, 10, "cost_samples is 0"),
    ],
)
def test_bad_controls_are_refused(search, options, evaluations, message):
    costs = bit_operations()
    with pytest.raises(ValueError, match=message):
        search(interacting_quality, costs, 2 * costs.range[0], evaluations, 0, **options)


def test_a_window_without_points_is_refused():
    costs = additive_costs([[1.0, 100.0]] * 2)
    with pytest.raises(ValueError, match=r"costs between 81 and 91\.8: raise spread"):
        random_search(lambda choices: choices.sum(axis=1), costs, 90.0, 5, 0)


def test_greedy_avoids_options_that_fail_alone():
    costs = additive_costs([[1.0, 2.0, 4.0]] * 2)

    def failing(options):
        return lambda choices: np.where(np.isin(choices, options).any(axis=1), np.nan, 1.0)

    assert greedy(failing([1]), costs, 3.0, 6, 0).choices.tolist() == [0, 0]
    with pytest.raises(ValueError, match="cost at least 4, above the 3"):
        greedy(failing([0]), costs, 3.0, 6, 0, tolerance=0.0)
    with pytest.raises(ValueError, match=r"dearest point \[2, 2\] has quality nan"):
        greedy(failing([2]), costs, 3.0, 6, 0)


def test_evolution_ends_when_the_space_is_exhausted():
    costs = additive_costs([[1.0, 2.0]] * 3)
    found = evolution(lambda choices: choices.sum(axis=1), costs, 6.0, 1000, 0, population=4)
    assert len(found.evaluated.choices) <= 8
    assert found.choices.tolist() == [1, 1, 1]


def test_batches_of_one_size():
    recorder = Recorder(interacting_quality)
    choices = every_point(bit_operations())
    found = in_batches(recorder, 36)(choices)
    np.testing.assert_array_equal(found, interacting_quality(choices))
    assert [len(asked) for asked in recorder.asked] == [36, 36, 36]


# ---- the points searchers start from ----


@pytest.mark.parametrize("costs", [bit_operations(), paired_costs()], ids=["additive", "paired"])
def test_the_dearest_point(costs):
    found = costs.of_many(costs.dearest[None])[0]
    assert found == pytest.approx(costs.of_many(every_point(costs)).max())


@pytest.mark.parametrize("costs", [bit_operations(), paired_costs()], ids=["additive", "paired"])
@pytest.mark.parametrize("ratio", [1.2, 2.0, 4.0, 7.0])
def test_tilted_mean_cost_is_the_target(costs, ratio):
    target = ratio * costs.range[0]
    p = np.exp(tilted_log_probabilities(costs, target))
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert not p[~costs.mask].any()
    points = every_point(costs)
    joint = np.prod(p[np.arange(p.shape[0]), points], axis=1)
    assert joint @ costs.of_many(points) == pytest.approx(target, rel=1e-4)


def test_sampled_points_follow_the_law():
    costs = bit_operations()
    log_p = tilted_log_probabilities(costs, 2 * costs.range[0])
    count = 20_000
    drawn = sample_points(np.random.default_rng(0), log_p, count)
    for d, p in enumerate(np.exp(log_p)):
        share = np.bincount(drawn[:, d], minlength=len(p)) / count
        # Five standard errors: of 13 shares one is off by more once in 10^5 runs.
        assert np.all(np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1e-12)
