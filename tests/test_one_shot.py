"""The search step on a small problem, and the guard that watches a search."""

import functools
import importlib
import itertools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import chi2

import aqt_search as aqs
from aqt_search import search as searches
from aqt_search.search import SpaceError, make_space
from aqt_search.search import policy as policies
from aqt_search.search.answer import most_probable_on_target
from aqt_search.training import parallel
from aqt_search.training.guard import CollapsedSearchError, QualityGuard
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.search_step import (
    ClassifierSearchState,
    accuracy_and_agreement,
    make_search_step,
)
from aqt_search.training.train_step import cross_entropy, init_train_state, make_update

critics = importlib.import_module("aqt_search.search.critic")  # not the function called so

CLASSES, FEATURES = 4, 6
OPTIONS = ("int3", "int4", "int6", "int8")
CENTRES = np.random.default_rng(7).normal(size=(CLASSES, FEATURES)) * 2


LEARNING = ("critic", "policy_gradient")


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
    state: ClassifierSearchState  # the first, not replicated
    space: Any
    costs: Any
    recorder: Recorder


# As FLIQS has it: one sample a step, judged by accuracy against a moving baseline.
CLASSIC = {
    "searcher": "policy_gradient", "measure": "accuracy",
    "samples": 1, "baseline_momentum": 0.95, "cost_samples": 0, "annealed": False,
}  # fmt: skip


def problem(
    spy=True, rules=((".*", OPTIONS),), searcher="critic", measure="loss", total_steps=10, **options
):
    model, recorder = Net(), Recorder()
    optimizer = make_optimizer("sgd", 0.05)
    train = init_train_state(model, optimizer, (FEATURES,), seed=0)
    variables = {"params": train.params, "batch_stats": train.batch_stats}
    sites = aqs.find_sites(model.apply, variables, jnp.zeros((1, FEATURES)))
    space = make_space(sites, rules)
    costs = space.cost_table(aqs.cost.gbops)
    one_shot = getattr(searches, searcher)(
        space, {"gbops": costs}, total_steps=total_steps, axis_name=parallel.AXIS, **options
    )
    qapply = recorder.counting(aqs.quantize(model.apply)) if spy else aqs.quantize(model.apply)
    used = recorder.spying_space(space) if spy else space
    update = make_update(qapply, optimizer)
    step = make_search_step(qapply, update, used, one_shot, measure=measure)
    state = ClassifierSearchState(train, one_shot.init({"gbops": 1.5 * costs.range[0]}))
    return Problem(step, state, space, costs, recorder)


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
    state = parallel.replicate(setting.state)
    streams = [batches(1), batches(2)][: 1 + held_out]
    history = History(setting, [], [], [], [], [])
    for _ in range(steps):
        inputs = [parallel.shard(next(stream)) for stream in streams]
        if keep:
            history.policies.append(jax.tree.map(np.asarray, state.search.policy))
            history.trains.append(jax.tree.map(np.asarray, state.train))
            history.batches.append(inputs)
        state, metrics = step(state, (), *inputs)
        history.metrics.append(jax.tree.map(np.asarray, metrics))
        history.traces.append(setting.recorder.traces)
    history.policies.append(jax.tree.map(np.asarray, state.search.policy))
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


def one_function(setting, searcher, start, total):
    """The step as it was before a search was a value of its own: one function of everything.

    As published tables were made by it; formulas of the critic and of REINFORCE stand here in a
    line each, in the order of the steps. Its targets are an argument, as they were: by a constant
    the compiler divides otherwise.
    """
    space, costs = setting.space, {"gbops": setting.costs}
    mask, axis = space.mask, parallel.AXIS
    qapply, adam = aqs.quantize(Net().apply), optax.adam(0.05)
    update = make_update(qapply, make_optimizer("sgd", 0.05))
    groups = critics.groups_of([(d.role, d.labels) for d in space.decisions])

    def judge(train, choices, batch, key):
        keywords = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": key}}
        assignment = space.assignment(choices)
        logits, _ = qapply(assignment, train.variables, batch["image"], **keywords)
        return -jnp.mean(cross_entropy(logits, batch["label"], 0.0))

    def ratio(points, target):
        return jax.vmap(costs["gbops"].of)(points) / target["gbops"]

    def by_critic(memory, log_p, samples, quality, step, key, target):
        memory = critics.observe(memory, samples, quality, 1 - 1 / (0.5 * total), axis)
        values = critics.pooled_values(memory, groups, mask)
        share = jnp.clip((step - start) / (total - start), 0.0, 1.0)
        tau = critics.temperature(values, mask, share)
        log_p = policies.log_probabilities(memory.logits, mask)
        settles = start + math.ceil(0.9 * (total - start))
        found = critics.logits_on_target(values / tau, log_p, costs, target, mask)
        point = most_probable_on_target(log_p, costs, target, 0.02, points=2**10, further=False)
        logits = jnp.where(step == settles, 50.0 * jax.nn.one_hot(point, 4), memory.logits)
        moves = (step >= start) & (step < settles)
        return memory._replace(logits=jnp.where(moves, jnp.where(mask, found, 0.0), logits))

    def by_gradient(memory, log_p, samples, quality, step, key, target):
        share = jnp.clip((step - start) / (total - start), 0.0, 1.0)
        points = policies.sample_many(key, log_p, 64)
        weight = jnp.where(step < start, 0.0, 0.1 * (1 - jnp.cos(jnp.pi * share)) / 2)

        def loss(logits):
            of_policy = functools.partial(
                policies.reinforce_loss, logits, mask=mask, temperature=1.0, reduce=jnp.sum
            )
            judged = jax.vmap(lambda c, a: of_policy(c, a, weight))
            cheap = jax.vmap(lambda c, a: of_policy(c, a, 0.0))
            p = jnp.exp(policies.log_probabilities(logits, mask))
            expected = jnp.abs(costs["gbops"].expected(p) / target["gbops"] - 1)
            penalties = -share * jnp.abs(ratio(points, target) - 1)
            total = (1 - share) * expected
            total += jnp.mean(judged(samples, policies.centred(quality)))
            return total + jnp.mean(cheap(points, policies.centred(penalties)))

        gradient = jax.lax.pmean(jax.grad(loss)(memory.logits), axis)
        moved, opt_state = adam.update(gradient, memory.opt_state)
        new = memory._replace(logits=memory.logits + moved, opt_state=opt_state)
        return jax.tree.map(lambda a, b: jnp.where(step >= start, a, b), new, memory)

    move = {"critic": by_critic, "policy_gradient": by_gradient}[searcher]

    def step(train, memory, target, batch, held_out):
        own = jax.random.fold_in(jax.random.wrap_key_data(train.rng), train.step)
        own = jax.random.fold_in(own, jax.lax.axis_index(axis))
        sampling, costing, dropping = jax.random.split(jax.random.fold_in(own, 1), 3)
        logits = jnp.where(train.step >= start, memory.logits, 0.0)
        log_p = policies.log_probabilities(logits, mask)
        samples = policies.sample_many(sampling, log_p, 2)
        new, _, _ = update(train, space.assignment(samples[0]), batch)
        quality = jnp.stack([judge(train, c, held_out, dropping) for c in samples])
        return new, move(memory, log_p, samples, quality, train.step, costing, target)

    return step


@pytest.mark.parametrize("searcher", LEARNING)
def test_a_search_in_four_functions_has_the_bits_of_the_one_it_was(searcher):
    """60 steps on two replicas from the same keys: so the published tables stay valid."""
    controls = {"cost_samples": 64} if searcher == "policy_gradient" else {}
    setting = problem(spy=False, searcher=searcher, total_steps=60, delay=0.2, **controls)
    old = parallel.pmap_step(one_function(setting, searcher, 12, 60), donate_state=False)
    new = parallel.pmap_step(setting.step, donate_state=False)
    state = parallel.replicate(setting.state)
    train, memory, target = state.train, state.search.policy, state.search.targets
    first, second = batches(1), batches(2)
    for _ in range(60):
        inputs = parallel.shard(next(first)), parallel.shard(next(second))
        state, _ = new(state, (), *inputs)
        train, memory = old(train, memory, target, *inputs)
        # The critic's multipliers differ in their last bits, as other operations are fused.
        rtol = 1e-5 if searcher == "critic" else 0
        np.testing.assert_allclose(state.search.policy.logits, memory.logits, rtol, atol=rtol)
    assert np.abs(memory.logits).max() > 0
    jax.tree.map(np.testing.assert_array_equal, state.train, train)


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
    [("policy_gradient", {"reward", "advantage", "entropy_weight"}),
     ("critic", {"temperature", "quality_noise"}), ("uniform", set())],
)  # fmt: skip
def test_metrics_alone_come_back_to_python(searcher, own):
    moving = {"baseline_momentum": 0.9} if searcher == "policy_gradient" else {}
    setting = problem(spy=False, searcher=searcher, samples=2, **moving)
    batch = parallel.shard(next(batches(1)))
    step = jax.pmap(setting.step, axis_name=parallel.AXIS)
    state = parallel.replicate(setting.state)
    jaxpr = str(jax.make_jaxpr(step)(state, (), batch, batch))
    assert "categorical" in jaxpr or "gumbel" in jaxpr or "random_bits" in jaxpr
    assert "callback" not in jaxpr
    new, metrics = jax.eval_shape(step, state, (), batch, batch)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert set(metrics) == {
        "loss", "accuracy", "gradient_norm", "quality", "sample_accuracy",
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
    found = search(20, held_out=False, delay=0.5, **CLASSIC)
    for metrics in found.metrics:
        assert metrics["quality"][0] == metrics["accuracy"][0]
    assert np.abs(found.policies[-1].logits).max() > 0
    with pytest.raises(ValueError, match=r"2 samples a step.*Set samples to 1"):
        search(1, held_out=False)


@pytest.mark.parametrize("annealed, step, share", [(True, 25, 0.0), (True, 70, 0.6),
                                                   (True, 100, 1.0), (False, 30, 1.0)])  # fmt: skip
def test_the_penalty_moves_from_the_expected_cost_to_that_of_points(annealed, step, share):
    """Where all qualities are alike the gradient is that of the penalty, whose two parts are known.

    By Adam's first step, -learning_rate * sign(gradient), the sign of every logit's gradient is
    told; it is the sign of (1 - s) dP(E[C]) / dlogit + s dE[P(C)] / dlogit, worked out over all 256
    points.
    """
    setting = problem(spy=False)
    table, mask = setting.costs, setting.space.mask
    target = 1.5 * table.range[0]
    one_shot = searches.policy_gradient(
        setting.space, {"gbops": table}, total_steps=100, annealed=annealed, beta=2.0,
        cost_samples=20_000, entropy_weight=0.0, learning_rate=1.0,
    )  # fmt: skip
    logits = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape), jnp.float32)
    points = np.array(list(itertools.product(range(4), repeat=4)))

    def penalty(logits):
        p = jax.nn.softmax(logits)
        of_points = jnp.prod(p[np.arange(4), points], axis=-1)
        off = np.abs(table.of_many(points) / target - 1)
        return (1 - share) * jnp.abs(table.expected(p) / target - 1) + share * of_points @ off

    gradient = jax.grad(penalty)(logits)
    state = one_shot.init({"gbops": target})
    policy = state.policy._replace(logits=logits)
    state = state._replace(step=jnp.int32(step), policy=policy)
    choices = jnp.zeros((2, 4), int)
    new, _ = jax.jit(one_shot.update)(state, choices, jnp.zeros(2), jax.random.key(1))
    moved = new.policy.logits - logits
    # The mean over 20,000 points of terms below 2 is off by less than 0.05 = 3.5 standard errors.
    clear = jnp.abs(gradient) > 0.05
    assert clear.sum() > 4
    np.testing.assert_array_equal(jnp.sign(moved)[clear], -jnp.sign(gradient)[clear])


@pytest.mark.parametrize("searcher", ["critic", "policy_gradient", "uniform"])
def test_the_first_of_several_costs_is_the_one_told(searcher):
    """Their targets come in a dict, whose order JAX does not keep."""
    setting = problem(spy=False)
    costs = {"weight_bytes": setting.space.cost_table(aqs.cost.weight_bytes)}
    costs["gbops"] = setting.costs
    one_shot = getattr(searches, searcher)(setting.space, costs, total_steps=4)
    state = one_shot.init({name: 1.5 * table.range[0] for name, table in costs.items()})
    choices = one_shot.sample(state, jax.random.key(0))
    quality = jnp.zeros(len(choices))
    _, metrics = jax.jit(one_shot.update)(state, choices, quality, jax.random.key(1))
    low, high = costs["weight_bytes"].range
    assert low <= float(metrics["cost"]) <= high
    uniform = np.full(setting.space.mask.shape, 1 / len(OPTIONS))
    for name, metric in (("weight_bytes", "expected_cost"), ("gbops", "expected_cost/gbops")):
        expected = float(costs[name].expected(uniform))
        assert float(metrics[metric]) == pytest.approx(expected, rel=1e-5)


def test_random_search_leaves_the_policy_alone():
    found = search(20, searcher="uniform")
    np.testing.assert_array_equal(found.policies[-1].logits, 0)
    drawn = found.problem.recorder.points(0)
    assert len({tuple(c) for c in drawn.reshape(-1, 4)}) > 30  # of 40 draws from 256 points


HEAVY = {"beta": 10.0, "entropy_weight": 1.0, "learning_rate": 0.15, "delay": 0.1}


@pytest.mark.parametrize(
    "controls",
    [CLASSIC | HEAVY, {"searcher": "policy_gradient", "cost_samples": 64} | HEAVY, {"delay": 0.1}],
    ids=["classic", "policy_gradient", "critic"],
)
def test_a_search_ends_at_its_target_decided(controls):
    """With a heavy cost term the search must find one of the many points near the target.

    The 256 points cost 1 to 7.1 times the cheapest, target 1.5; the entropy term, at its end as
    large as the differences of rewards, leaves no decision open (ln 4 = 1.39 is undecided).
    """
    found = search(400, keep=False, **controls)
    setting, logits = found.problem, found.policies[-1].logits[0]
    log_p = policies.log_probabilities(logits, setting.space.mask)
    assert float(policies.entropy(log_p).mean()) < 0.1
    best = np.asarray(log_p).argmax(-1)
    cost = aqs.cost.gbops(setting.space.sites, setting.space.concrete_assignment(best))
    assert cost == pytest.approx(1.5 * setting.costs.range[0], rel=0.05)
    accuracy = np.mean([m["accuracy"][0] for m in found.metrics[-50:]])
    assert accuracy > 0.8  # the classes overlap little; chance is 0.25


def test_accuracy_and_agreement():
    logits = jnp.asarray(np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 3]])
    accuracy, agreement = accuracy_and_agreement(logits, jnp.array([0, 1, 2, 1, 0]))
    assert (float(accuracy), float(agreement)) == pytest.approx((3 / 5, 3 / 5))


@pytest.mark.parametrize(
    "searcher, changes, words",
    [
        ("policy_gradient", {"reward": "sharp"}, ["reward", "'sharp'", "absolute"]),
        ("policy_gradient", {"entropy_schedule": "sine"}, ["schedule", "'sine'", "cosine"]),
        ("policy_gradient", {"log_probability": "max"}, ["log_probability", "'max'", "sum, mean"]),
        ("policy_gradient", {"baseline_momentum": 1.0}, ["baseline_momentum", "1.0"]),
        ("policy_gradient", {"temperature": 0.0}, ["temperature", "0.0"]),
        *(
            ("policy_gradient", {name: value}, [name, str(value), "at least 0"])
            for name in ("beta", "learning_rate", "entropy_weight")
            for value in (-1.0, math.nan, math.inf)
        ),
        ("policy_gradient", {"cost_samples": 1}, ["cost_samples is 1"]),
        ("policy_gradient", {"cost_samples": 0}, ["annealed", "cost_samples to 2"]),
        ("policy_gradient", {"reward": "soft"}, ["multiplies", "cost_samples to 0"]),
        ("policy_gradient", {"samples": 1}, ["samples is 1", "baseline_momentum"]),
        ("policy_gradient", {"samples": 0, "baseline_momentum": 0.9}, ["samples is 0"]),
        ("critic", {"samples": 1}, ["samples is 1", "critic compares"]),
        ("critic", {"memory": 0.0}, ["memory is 0.0"]),
        *((s, {"tolerance": -0.1}, ["tolerance is -0.1"]) for s in (*LEARNING, "uniform")),
        ("uniform", {"samples": 0}, ["samples is 0"]),
        *((searcher, {"delay": 1.0}, ["delay", "[0, 1)", "1.0"]) for searcher in LEARNING),
        *((searcher, {"delay": 0.96}, ["0.96", "10 steps", "Shorten"]) for searcher in LEARNING),
        *((searcher, {"total_steps": 0}, ["0 steps"]) for searcher in (*LEARNING, "uniform")),
    ],
)
def test_controls_are_checked(searcher, changes, words):
    setting = problem(spy=False)
    controls = {"total_steps": 10} | changes
    with pytest.raises(ValueError) as caught:
        getattr(searches, searcher)(setting.space, {"gbops": setting.costs}, **controls)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("searcher", ["critic", "policy_gradient", "uniform"])
def test_targets_are_checked(searcher):
    setting = problem(spy=False)
    one_shot = getattr(searches, searcher)(setting.space, {"gbops": setting.costs}, total_steps=4)
    with pytest.raises(SpaceError, match=r"gbops.*outside of the space"):
        one_shot.init({"gbops": 2 * setting.costs.range[1]})
    with pytest.raises(SpaceError, match=r"costs gbops, but targets of latency"):
        one_shot.init({"latency": 1.0})
    for odd in ("abc", np.ones(1), None, float("nan")):
        with pytest.raises(SpaceError, match=r"^gbops: "):
            one_shot.init({"gbops": odd})
    with pytest.raises(SpaceError, match=r"0\.5; expected a mapping"):
        one_shot.init(0.5)
    with pytest.raises(SpaceError, match="at least one"):
        getattr(searches, searcher)(setting.space, {}, total_steps=4).init({})


@pytest.mark.parametrize("searcher", ["critic", "policy_gradient", "uniform"])
def test_a_state_may_be_donated(searcher):
    """Its arrays are its own: none is there twice, none the user's."""
    setting = problem(spy=False)
    factory = functools.partial(getattr(searches, searcher), samples=2, total_steps=4)
    one_shot = factory(setting.space, {"gbops": setting.costs})
    target = jnp.float32(1.5 * setting.costs.range[0])
    step = jax.jit(one_shot.update, donate_argnums=0)
    state = one_shot.init({"gbops": target})
    for key in jax.random.split(jax.random.key(0), 2):
        choices = one_shot.sample(state, key)
        state, _ = step(state, choices, jnp.zeros(2), key)
    assert float(target) > 0
    assert int(state.step) == 2


@pytest.mark.parametrize("searcher", ["critic", "policy_gradient", "uniform"])
@pytest.mark.parametrize("shape, given", [((), 2), ((1,), 2), ((3,), 2), ((2, 1), 2), ((1,), 1)])
def test_a_quality_for_each_choice(searcher, shape, given):
    setting = problem(spy=False)
    factory = functools.partial(getattr(searches, searcher), samples=2, total_steps=4)
    one_shot = factory(setting.space, {"gbops": setting.costs})
    state = one_shot.init({"gbops": 1.5 * setting.costs.range[0]})
    choices = one_shot.sample(state, jax.random.key(0))[:given]
    with pytest.raises(ValueError, match=r"one number for each"):
        one_shot.update(state, choices, jnp.zeros(shape), jax.random.key(0))


@pytest.mark.parametrize("searcher", LEARNING)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_of_a_quality_that_is_not_finite_nothing_is_learned(searcher, odd):
    """By no replica, whichever of them it was seen by; the search goes on."""
    setting = problem(spy=False)
    one_shot = getattr(searches, searcher)(
        setting.space, {"gbops": setting.costs}, total_steps=20, delay=0.0, axis_name="replicas"
    )
    state = one_shot.init({"gbops": 1.5 * setting.costs.range[0]})
    update = jax.jit(jax.vmap(one_shot.update, (None, 0, 0, 0), axis_name="replicas"))
    for number, key in enumerate(jax.random.split(jax.random.key(0), 3)):
        keys = jax.random.split(key, 2)
        choices = jax.vmap(one_shot.sample, (None, 0))(state, keys)
        quality = jnp.float32(choices.sum(-1)).at[0, 1].set(odd if number == 1 else 0.5)
        both, told = update(state, choices, quality, keys)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[1]), both)
        new = jax.tree.map(lambda leaf: leaf[0], both)
        assert int(new.step) == number + 1
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
        learned = new.policy._replace(logits=0) if searcher == "critic" else new.policy
        before = state.policy._replace(logits=0) if searcher == "critic" else state.policy
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), learned, before)
        assert all(jax.tree.leaves(same)) == (number == 1)
        assert np.isfinite(told["quality"][0]) == (number != 1)
        state = new


@pytest.mark.parametrize("searcher", [*LEARNING, "uniform"])
def test_costs_are_those_of_the_space(searcher):
    setting, other = problem(spy=False), problem(spy=False, rules=((".*", OPTIONS[:3]),))
    factory = functools.partial(getattr(searches, searcher), setting.space, total_steps=4)
    with pytest.raises(SpaceError, match=r"gbops.*another space: .* 12 options, .* 16\."):
        factory({"gbops": other.costs})
    with pytest.raises(SpaceError, match=r"expected a table, as space\.cost_table"):
        factory({"gbops": aqs.cost.gbops})
    with pytest.raises(SpaceError, match=r"expected a mapping"):
        factory(setting.costs)


def test_a_measure_that_does_not_exist():
    with pytest.raises(ValueError, match=r"'f1'.*accuracy, loss"):
        problem(measure="f1")


# --- The guard ------------------------------------------------------------------------------------

DELAY = 20  # steps


def watch(qualities, agreements, *, first_step=21, window=10):
    """The step at which the guard stops a search of 10 classes and 32 examples, or None."""
    guard = QualityGuard(DELAY, classes=10, examples=32, window=window)
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
    guard = QualityGuard(DELAY, classes=10, examples=32, window=1)
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
    for accuracy, stopped in ((0.1, True), (0.2, False)):
        guard = QualityGuard(0, classes=10, examples=32)
        draws = rng.binomial(32, accuracy, 50) / 32
        for step, quality in enumerate(draws[:-1], 1):
            guard(step, {"sample_accuracy": quality, "prediction_agreement": 0.5})
        try:
            guard(50, {"sample_accuracy": draws[-1], "prediction_agreement": 0.5})
            assert not stopped
        except CollapsedSearchError:
            assert stopped
