"""The search step on a small problem, and the guard that watches a search."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import aqt_search as aqs
from aqt_search.search import policy as policies
from aqt_search.search.answer import most_probable
from aqt_search.search.one_shot import (
    SearchOptions,
    SearchState,
    accuracy_and_agreement,
    check_targets,
    cost_terms,
    init_policy,
    make_search_step,
)
from aqt_search.search.options import SpaceError
from aqt_search.search.space import make_space
from aqt_search.training import parallel
from aqt_search.training.guard import CollapsedSearchError, QualityGuard
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.train_step import init_train_state, make_update

CLASSES, FEATURES = 4, 6
OPTIONS = ("int3", "int4", "int6", "int8")
CENTRES = np.random.default_rng(7).normal(size=(CLASSES, FEATURES)) * 2


class Net(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        for width in (12, 10, 8):
            x = nn.BatchNorm(not train, momentum=self.momentum)(nn.Dense(width)(x))
            x = nn.relu(x)
        return nn.Dense(CLASSES)(x)


def batches(seed, size=32):
    rng = np.random.default_rng(seed)
    while True:
        labels = rng.integers(0, CLASSES, size)
        images = CENTRES[labels] + rng.normal(size=(size, FEATURES))
        yield {"image": images.astype(np.float32), "label": labels.astype(np.int32)}


class Recorder:
    """The points both replicas train and judge, and how often the model was traced."""

    def __init__(self):
        # By place in the step: the weights' point first, then those that are judged.
        self.drawn: list[dict[int, list[np.ndarray]]] = []
        self.traces = 0

    def spying_space(self, space):
        def recording():
            drawn: dict[int, list] = {0: [], 1: []}
            self.drawn.append(drawn)
            return lambda replica, choices: drawn[int(replica)].append(np.asarray(choices))

        class Spying(type(space)):
            def assignment(self, choices):
                jax.debug.callback(recording(), jax.lax.axis_index(parallel.AXIS), choices)
                return super().assignment(choices)

        return Spying(space.sites, space.decisions, space.fixed)

    def counting(self, qapply):
        def apply(*args, **kwargs):
            self.traces += 1
            return qapply(*args, **kwargs)

        return apply

    def points(self, place):
        """[steps, replicas, decisions]"""
        jax.effects_barrier()
        return np.stack([self.drawn[place][0], self.drawn[place][1]], axis=1)

    @property
    def choices(self):
        """Those that weights were trained under."""
        return self.points(0)


class Problem(NamedTuple):
    step: Any  # not compiled
    state: SearchState  # the first, not replicated
    targets: dict
    space: Any
    costs: Any
    recorder: Recorder


# As FLIQS has it: one sample a step, judged by accuracy against a moving baseline.
CLASSIC = {
    "samples": 1, "advantage": "baseline", "cost_samples": 0, "penalty": "sampled",
    "searcher": "policy_gradient", "measure": "accuracy",
}  # fmt: skip


def problem(spy=True, rules=((".*", OPTIONS),), **options):
    model, recorder = Net(), Recorder()
    optimizer = make_optimizer("sgd", 0.05)
    train = init_train_state(model, optimizer, (FEATURES,), seed=0)
    variables = {"params": train.params, "batch_stats": train.batch_stats}
    sites = aqs.find_sites(model.apply, variables, jnp.zeros((1, FEATURES)))
    space = make_space(sites, rules)
    costs = space.cost_table(aqs.cost.gbops)
    options = SearchOptions(**options)
    qapply = recorder.counting(aqs.quantize(model.apply)) if spy else aqs.quantize(model.apply)
    used = recorder.spying_space(space) if spy else space
    update = make_update(qapply, optimizer)
    step = make_search_step(qapply, update, used, {"gbops": costs}, options)
    state = SearchState(train, init_policy(space, options))
    targets = {"gbops": np.float32(1.5 * costs.range[0])}
    return Problem(step, state, targets, space, costs, recorder)


class History(NamedTuple):
    problem: Problem
    policies: list  # before every step and after the last, of both replicas
    trains: list
    metrics: list
    traces: list  # so far, after every step
    batches: list  # those of every step


def search(steps, *, held_out=True, keep=True, **options):
    """Runs a search and keeps what went by."""
    setting = problem(total_steps=options.pop("total_steps", steps), **options)
    step = parallel.pmap_step(setting.step, donate_state=False)
    state, targets = parallel.replicate(setting.state), parallel.replicate(setting.targets)
    streams = [batches(1), batches(2)][: 1 + held_out]
    history = History(setting, [], [], [], [], [])
    for _ in range(steps):
        inputs = [parallel.shard(next(stream)) for stream in streams]
        if keep:
            history.policies.append(jax.tree.map(np.asarray, state.policy))
            history.trains.append(jax.tree.map(np.asarray, state.train))
            history.batches.append(inputs)
        state, metrics = step(state, targets, *inputs)
        history.metrics.append(jax.tree.map(np.asarray, metrics))
        history.traces.append(setting.recorder.traces)
    history.policies.append(jax.tree.map(np.asarray, state.policy))
    history.trains.append(jax.tree.map(np.asarray, state.train))
    return history


DELAY_STEPS, STEPS = 150, 200


@pytest.fixture(scope="module")
def short():
    """Three quarters of delay, then a policy that moves."""
    return search(STEPS, delay=DELAY_STEPS / STEPS, learning_rate=0.3, **CLASSIC)


@pytest.fixture(scope="module")
def several():
    """Two samples a step, centred, and 64 points whose cost alone is judged."""
    controls = {"searcher": "policy_gradient", "cost_samples": 64, "measure": "accuracy"}
    return search(30, delay=0.5, **controls)


def test_the_policy_rests_until_the_delay_is_over(short):
    first = short.policies[0]
    for policy in short.policies[1 : DELAY_STEPS + 1]:
        jax.tree.map(np.testing.assert_array_equal, policy, first)
    moved = [np.abs(p.logits - q.logits).max() for p, q in zip(short.policies, short.policies[1:])]
    assert min(moved[DELAY_STEPS:]) > 0
    assert short.policies[-1].updates.tolist() == [STEPS - DELAY_STEPS] * 2


def test_samples_are_uniform_before_the_delay_is_over(short):
    drawn = short.problem.recorder.choices[:DELAY_STEPS]  # [steps, replicas, decisions]
    assert drawn.shape == (DELAY_STEPS, 2, 4)
    expected = DELAY_STEPS * 2 / len(OPTIONS)
    counts = np.stack([np.bincount(drawn[..., d].ravel(), minlength=4) for d in range(4)])
    statistic = ((counts - expected) ** 2 / expected).sum()
    # 4 decisions of 3 degrees of freedom; a fair sampler passes for all but one in 10^6 seeds.
    assert statistic < chi2.ppf(1 - 1e-6, 12)


def test_unequal_numbers_of_options_are_sampled_alike():
    rules = (("Dense_0", ("int4", "int8")), ("Dense_1", ("int4", "int6", "int8")), (".*", OPTIONS))
    found = search(150, keep=False, rules=rules, delay=0.9, total_steps=1000)
    drawn = found.problem.recorder.choices
    for decision, options in enumerate((2, 3, 4, 4)):
        counts = np.bincount(drawn[..., decision].ravel(), minlength=options)
        assert len(counts) == options
        # Each count is binomial: five standard deviations.
        p = 1 / options
        assert (np.abs(counts - 300 * p) < 5 * math.sqrt(300 * p * (1 - p))).all()


def test_replicas_draw_their_own_samples_and_hold_one_state(short):
    drawn = short.problem.recorder.choices[:DELAY_STEPS]
    same = (drawn[:, 0] == drawn[:, 1]).all(axis=1).mean()
    # Two fair draws of 4 ** 4 points agree once in 256: 10 of 150 would be far outside.
    assert same < 10 / DELAY_STEPS
    steps = (drawn[1:] == drawn[:-1]).all(axis=(1, 2)).mean()
    assert steps < 10 / DELAY_STEPS
    for tree in (short.trains[-1], short.policies[-1], short.metrics[-1]):
        for leaf in jax.tree.leaves(tree):
            np.testing.assert_array_equal(leaf[0], leaf[1])


def test_no_sample_compiles_anything(short):
    points = {tuple(c) for c in short.problem.recorder.choices[:, 0]}
    assert len(points) >= 50
    assert short.traces[0] == short.traces[-1]


@pytest.mark.parametrize(
    "searcher, own",
    [("policy_gradient", {"advantage", "entropy_weight"}),
     ("critic", {"temperature", "quality_noise"})],
)  # fmt: skip
def test_metrics_alone_come_back_to_python(searcher, own):
    setting = problem(spy=False, total_steps=10, searcher=searcher)
    batch = parallel.shard(next(batches(1)))
    step = jax.pmap(setting.step, axis_name=parallel.AXIS)
    state, targets = parallel.replicate(setting.state), parallel.replicate(setting.targets)
    jaxpr = str(jax.make_jaxpr(step)(state, targets, batch, batch))
    assert "categorical" in jaxpr or "gumbel" in jaxpr or "random_bits" in jaxpr
    assert "callback" not in jaxpr
    new, metrics = jax.eval_shape(step, state, targets, batch, batch)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert set(metrics) == {
        "loss", "accuracy", "gradient_norm", "reward", "quality", "sample_accuracy",
        "prediction_agreement", "cost", "entropy", "expected_cost", *own,
    }  # fmt: skip
    assert {leaf.shape for leaf in metrics.values()} == {(2,)}


def judged_by_hand(history, at, place):
    """(accuracy, loss, cost) of each replica's point, of the weights before the step."""
    setting, train = history.problem, history.trains[at]
    held_out = history.batches[at][1]
    params = jax.tree.map(lambda leaf: leaf[0], train.params)
    qapply = aqs.quantize(Net().apply)
    found = []
    for replica, choices in enumerate(setting.recorder.points(place)[at]):
        assignment = setting.space.concrete_assignment(choices)
        variables = {"params": params, "batch_stats": setting.state.train.batch_stats}
        image, label = held_out["image"][replica], held_out["label"][replica]
        logits, _ = qapply(assignment, variables, image, train=True, mutable=["batch_stats"])
        correct = np.mean(np.argmax(logits, -1) == label)
        loss = -np.mean(jax.nn.log_softmax(logits)[np.arange(len(label)), label])
        found.append((correct, loss, aqs.cost.gbops(setting.space.sites, assignment)))
    return np.array(found).T


@pytest.mark.parametrize("at", [0, DELAY_STEPS + 20])
def test_quality_is_the_held_out_accuracy_of_the_weights_before_the_step(short, at):
    accuracies, _, costs = judged_by_hand(short, at, place=1)
    # 16 examples a replica: one may lie on the border of two classes.
    assert short.metrics[at]["quality"][0] == pytest.approx(np.mean(accuracies), abs=1.01 / 32)
    assert short.metrics[at]["cost"][0] == pytest.approx(np.mean(costs), rel=1e-6)
    np.testing.assert_array_equal(
        short.problem.recorder.points(0)[at], short.problem.recorder.points(1)[at]
    )


def test_quality_may_be_the_loss():
    found = search(4, delay=0.5, **CLASSIC | {"measure": "loss"})
    for at, metrics in enumerate(found.metrics):
        _, losses, _ = judged_by_hand(found, at, place=1)
        assert float(metrics["quality"][0]) == pytest.approx(-np.mean(losses), rel=1e-4)


def test_the_samples_of_a_step_are_judged_on_one_batch_and_the_first_is_trained(several):
    recorder = several.problem.recorder
    assert len(recorder.drawn) == 3
    np.testing.assert_array_equal(recorder.points(0), recorder.points(1))
    assert (recorder.points(1) != recorder.points(2)).any(axis=(1, 2)).mean() > 0.9
    for at in (0, 20):
        accuracies = [judged_by_hand(several, at, place)[0].mean() for place in (1, 2)]
        assert several.metrics[at]["quality"][0] == pytest.approx(
            np.mean(accuracies), abs=1.01 / 64
        )


def test_the_policy_gradient_of_several_samples_has_the_mean_of_many_single_ones():
    """Centred advantages, and costs judged by points of their own, leave the expectation alone.

    For a reward without quality, -beta |C / T - 1|, the exact gradient is a sum over all points.
    """
    mask = np.ones((2, 3), bool)
    logits = jnp.array([[0.3, -0.2, 0.1], [0.0, 0.5, -0.4]])
    reward_of = jnp.array([[0.1, -0.3, 0.7], [0.2, 0.0, -0.5], [0.9, 0.4, -0.1]])

    def expected(logits):
        p = jax.nn.softmax(logits)
        return -jnp.einsum("i,ij,j->", p[0], reward_of, p[1])

    def estimate(key, count):
        points = policies.sample_many(key, policies.log_probabilities(logits, mask), count)
        advantages = policies.centred(reward_of[points[:, 0], points[:, 1]])

        def loss(logits):
            one = functools.partial(
                policies.reinforce_loss, logits,
                entropy_weight=0.0, mask=mask, temperature=1.0, reduce=jnp.sum,
            )  # fmt: skip
            return jnp.mean(jax.vmap(one)(points, advantages))

        return jax.grad(loss)(logits)

    exact = jax.grad(expected)(logits)
    for count in (2, 16):
        keys = jax.random.split(jax.random.key(count), 20_000)
        found = jax.jit(jax.vmap(lambda key, n=count: estimate(key, n)))(keys)
        error = found.std(axis=0) / math.sqrt(len(keys))
        # Six numbers twice, five standard errors each.
        assert (jnp.abs(found.mean(axis=0) - exact) < 5 * error).all()


def test_the_baseline_is_a_moving_average_that_starts_at_the_first_reward(short):
    rewards = [float(m["reward"][0]) for m in short.metrics]
    baseline = rewards[DELAY_STEPS]
    # Three roundings a step of numbers of the rewards' size, forgotten in 1 / (1 - 0.95) steps; the
    # average itself may be near 0.
    rounding = 20 * 3 * float(np.finfo(np.float32).eps) / 2 * max(map(abs, rewards))
    for number in range(DELAY_STEPS, STEPS):
        expected = rewards[number] - baseline
        assert float(short.metrics[number]["advantage"][0]) == pytest.approx(expected, abs=1e-5)
        baseline = 0.95 * baseline + 0.05 * rewards[number]
        found = short.policies[number + 1].baseline[0]
        assert float(found) == pytest.approx(baseline, abs=rounding)


def test_quality_on_the_training_batch():
    found = search(20, held_out=False, quality="train", delay=0.5, **CLASSIC)
    for metrics in found.metrics:
        assert metrics["quality"][0] == metrics["accuracy"][0]
    assert np.abs(found.policies[-1].logits).max() > 0


@pytest.mark.parametrize(
    "penalty, step, share",
    [("annealed", 25, 0.0), ("annealed", 70, 0.6), ("annealed", 100, 1.0), ("sampled", 30, 1.0)],
)
def test_the_penalty_moves_from_the_expected_cost_to_that_of_points(penalty, step, share):
    setting = problem(spy=False, total_steps=100)
    options = SearchOptions(total_steps=100, penalty=penalty, beta=2.0, cost_samples=50)
    costs, mask = {"gbops": setting.costs}, setting.space.mask
    logits = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape), jnp.float32)
    log_p = policies.log_probabilities(logits, mask)
    (points, rewards), of_expected = cost_terms(
        costs, setting.targets, log_p, jax.random.key(0), jnp.int32(step), mask, options
    )
    target = float(setting.targets["gbops"])
    off = np.abs(setting.costs.of_many(np.asarray(points)) / target - 1)
    np.testing.assert_allclose(rewards, -share * 2 * off, rtol=1e-4, atol=1e-6)
    expected = abs(float(setting.costs.expected(jnp.exp(log_p))) / target - 1)
    assert float(of_expected(logits)) == pytest.approx((1 - share) * 2 * expected, rel=1e-5)
    assert len({tuple(p) for p in np.asarray(points)}) > 10


def test_the_first_of_several_costs_is_the_one_told():
    """Their targets come in a dict, whose order JAX does not keep."""
    setting = problem(spy=False, total_steps=4)
    costs = {"weight_bytes": setting.space.cost_table(aqs.cost.weight_bytes)}
    costs["gbops"] = setting.costs
    targets = {name: np.float32(2 * table.range[0]) for name, table in costs.items()}
    options = SearchOptions(total_steps=4, delay=0.0)
    qapply = aqs.quantize(Net().apply)
    update = make_update(qapply, make_optimizer("sgd", 0.05))
    step = parallel.pmap_step(make_search_step(qapply, update, setting.space, costs, options))
    state, held = parallel.replicate(setting.state), parallel.replicate(targets)
    batch = parallel.shard(next(batches(1)))
    _, metrics = step(state, held, batch, batch)
    low, high = costs["weight_bytes"].range
    assert low <= float(metrics["cost"][0]) <= high
    uniform = np.full(setting.space.mask.shape, 1 / len(OPTIONS))
    for name, metric in (("weight_bytes", "expected_cost"), ("gbops", "expected_cost/gbops")):
        expected = float(costs[name].expected(uniform))
        assert float(metrics[metric][0]) == pytest.approx(expected, rel=1e-5)


def test_random_search_leaves_the_policy_alone():
    found = search(20, searcher="random", delay=0.0, learning_rate=1.0)
    np.testing.assert_array_equal(found.policies[-1].logits, 0)
    drawn = found.problem.recorder.points(0)
    assert len({tuple(c) for c in drawn.reshape(-1, 4)}) > 30  # of 40 draws from 256 points


@pytest.mark.parametrize(
    "controls", [CLASSIC, {"searcher": "policy_gradient", "cost_samples": 64}, {}]
)
def test_a_search_ends_at_its_target_decided(controls):
    """With a heavy cost term the search must find one of the many points near the target.

    The 256 points cost 1 to 7.1 times the cheapest, target 1.5; the entropy term, at its end as
    large as the differences of rewards, leaves no decision open (ln 4 = 1.39 is undecided).
    """
    options = {"beta": 10.0, "entropy_weight": 1.0, "learning_rate": 0.15, "delay": 0.1}
    found = search(400, keep=False, **options, **controls)
    setting, logits = found.problem, found.policies[-1].logits[0]
    log_p = policies.log_probabilities(logits, setting.space.mask)
    assert float(policies.entropy(log_p).mean()) < 0.1
    best = most_probable(np.asarray(log_p))
    cost = aqs.cost.gbops(setting.space.sites, setting.space.concrete_assignment(best))
    assert cost == pytest.approx(1.5 * setting.costs.range[0], rel=0.05)
    accuracy = np.mean([m["accuracy"][0] for m in found.metrics[-50:]])
    assert accuracy > 0.8  # the classes overlap little; chance is 0.25


def test_accuracy_and_agreement():
    logits = jnp.asarray(np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 3]])
    accuracy, agreement = accuracy_and_agreement(logits, jnp.array([0, 1, 2, 1, 0]))
    assert (float(accuracy), float(agreement)) == pytest.approx((3 / 5, 3 / 5))


def test_a_target_outside_of_the_space():
    setting = problem(spy=False, total_steps=10)
    with pytest.raises(SpaceError, match=r"gbops.*outside of the space"):
        check_targets({"gbops": setting.costs}, {"gbops": 2 * setting.costs.range[1]})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reward": "sharp"}, ["reward", "'sharp'", "absolute"]),
        ({"quality": "test"}, ["quality", "'test'", "held_out"]),
        ({"entropy_schedule": "sine"}, ["entropy schedule", "'sine'", "cosine"]),
        ({"log_probability": "max"}, ["log_probability", "'max'", "sum, mean"]),
        ({"delay": 1.0}, ["delay", "[0, 1)", "1.0"]),
        ({"delay": 0.96}, ["0.96", "10 steps", "Shorten the delay"]),
        ({"baseline_momentum": 1.0}, ["baseline_momentum", "1.0"]),
        ({"temperature": 0.0}, ["temperature", "0.0"]),
        ({"beta": -1.0}, ["beta", "-1.0"]),
        ({"searcher": "grid"}, ["searcher", "'grid'", "policy_gradient"]),
        ({"measure": "f1"}, ["measure", "'f1'", "accuracy"]),
        ({"advantage": "raw"}, ["advantage", "'raw'", "centred"]),
        ({"samples": 0}, ["samples is 0"]),
        ({"cost_samples": 1}, ["cost_samples is 1"]),
        ({"samples": 1}, ["centred", "samples to 2"]),
        ({"samples": 1, "advantage": "baseline"}, ["'critic'", "2 or more"]),
        ({"temperature": 2.0}, ["'critic'", "leave temperature", "2.0"]),
        ({"reward": "hard", "cost_samples": 0, "measure": "accuracy"}, ["'critic'", "'hard'"]),
        ({"quality": "train"}, ["samples is 2", "'held_out'"]),
        ({"penalty": "none"}, ["penalty", "'none'", "annealed"]),
        ({"cost_samples": 0}, ["'annealed'", "cost_samples to 2"]),
        ({"reward": "soft"}, ["'soft'", "cost_samples to 0"]),
        ({"reward": "hard", "cost_samples": 0, "measure": "loss"}, ["'hard'", "'loss'"]),
    ],
)
def test_options_are_checked(changes, words):
    with pytest.raises(ValueError) as caught:
        SearchOptions(**{"total_steps": 10} | changes)
    assert all(word in str(caught.value) for word in words)


# --- The guard ------------------------------------------------------------------------------------

GUARDED = SearchOptions(total_steps=100, delay=0.2)


def watch(qualities, agreements, *, first_step=21, window=10):
    """The step at which the guard stops a search of 10 classes and 32 examples, or None."""
    guard = QualityGuard(GUARDED, classes=10, examples=32, window=window)
    for step, (quality, agreement) in enumerate(zip(qualities, agreements), first_step):
        try:
            guard(step, {"sample_accuracy": np.float32(quality), "prediction_agreement": agreement})
        except CollapsedSearchError:
            return step
    return None


# Chance is 0.1; its three standard errors over 10 steps of 32 examples are 0.05.
@pytest.mark.parametrize(
    "quality, agreement, stops",
    [
        (0.9, 0.3, None),
        (0.16, 0.5, None),
        (0.14, 0.5, 30),
        (0.1, 0.5, 30),
        (0.3, 1.0, 30),  # one class makes up a third of the examples: constant all the same
    ],
)
def test_the_guard_stops_a_search_without_quality(quality, agreement, stops):
    assert watch([quality] * 40, [agreement] * 40) == stops


def test_the_guard_says_when_and_what_to_do():
    guard = QualityGuard(GUARDED, classes=10, examples=32, window=1)
    with pytest.raises(CollapsedSearchError, match=r"step 21 .*one and the same.*--workdir"):
        guard(21, {"sample_accuracy": 0.3, "prediction_agreement": 1.0})


def test_the_guard_waits_for_the_delay():
    assert watch([0.1] * 29, [1.0] * 29, first_step=1) is None
    assert watch([0.1] * 30, [1.0] * 30, first_step=1) == 30


def test_the_guard_looks_at_the_last_steps_only():
    assert watch([0.9] * 30 + [0.1] * 20, [0.3] * 50) == 20 + 30 + 10
    assert watch([0.9] * 40, [1.0, 0.9] * 20) is None  # not every batch alike


def test_defaults_of_the_guard_are_fit_for_a_search():
    """A fair coin of a network, at chance, passes in no window; one a little better always does."""
    rng = np.random.default_rng(0)
    options = dataclasses.replace(GUARDED, delay=0.0)
    for accuracy, stopped in ((0.1, True), (0.2, False)):
        guard = QualityGuard(options, classes=10, examples=32)
        draws = rng.binomial(32, accuracy, 50) / 32
        for step, quality in enumerate(draws[:-1], 1):
            guard(step, {"sample_accuracy": quality, "prediction_agreement": 0.5})
        try:
            guard(50, {"sample_accuracy": draws[-1], "prediction_agreement": 0.5})
            assert not stopped
        except CollapsedSearchError:
            assert stopped
