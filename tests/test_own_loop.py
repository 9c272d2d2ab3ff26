"""A search in a training loop of one's own: any model, loss, batch and compilation.

None of the models is of this project's zoo, and none of the loops knows its trainer.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import aqt_search as aqs
from aqt_search import search

OPTIONS = ("int3", "int4", "int8")
STEPS = 40


class Problem(NamedTuple):
    """What a user brings."""

    apply: Any  # apply(params, x)
    params: Any
    loss: Any  # loss(quantized apply, params, assignment, batch) -> []
    batches: Any  # an endless stream


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 16):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)


def linen_regression():
    """Mean squared error; batches are tuples."""
    rng = np.random.default_rng(0)
    model, direction = Mlp(), rng.normal(size=(5, 1))

    def batches():
        while True:
            x = rng.normal(size=(32, 5)).astype(np.float32)
            yield x, np.sin(x @ direction).astype(np.float32)

    def loss(qapply, params, assignment, batch):
        x, y = batch
        return jnp.mean(jnp.square(qapply(assignment, params, x) - y))

    return Problem(model.apply, model.init(jax.random.key(0), jnp.ones((1, 5))), loss, batches())


VOCABULARY, LENGTH = 11, 6


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x, mask=nnx.make_causal_mask(jnp.ones(x.shape[:2])))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, 8, rngs=rngs)
        self.block = Block(rngs)
        self.head = nnx.Linear(8, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.block(self.embed(tokens)))


def nnx_tokens():
    """Next tokens, logits [B, T, V]; batches are arrays of ints."""
    graph, params = nnx.split(Transformer(nnx.Rngs(0)), nnx.Param)
    rng = np.random.default_rng(0)

    def apply(params, tokens):
        return nnx.merge(graph, params)(tokens)

    def batches():
        while True:
            yield (rng.integers(VOCABULARY, size=(16, 1)) + np.arange(LENGTH + 1)) % VOCABULARY

    def loss(qapply, params, assignment, tokens):
        logits = qapply(assignment, params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return Problem(apply, params, loss, batches())


def plain_contrastive():
    """InfoNCE between two views: a batch is a dict of pairs, and the model runs twice."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=shape) / 3, jnp.float32) for shape in ((8, 16), (16, 4))]

    def apply(params, x):
        return jax.nn.relu(x @ params[0]) @ params[1]

    def batches():
        while True:
            x = rng.normal(size=(16, 8))
            views = [x + 0.1 * rng.normal(size=x.shape) for _ in range(2)]
            yield {"one": np.float32(views[0]), "other": np.float32(views[1])}

    def loss(qapply, params, assignment, pair):
        one, other = (qapply(assignment, params, pair[view]) for view in ("one", "other"))
        labels = jnp.arange(len(one))
        return optax.softmax_cross_entropy_with_integer_labels(one @ other.T, labels).mean()

    return Problem(apply, params, loss, batches())


PROBLEMS = {"linen": linen_regression, "nnx": nnx_tokens, "plain": plain_contrastive}


def example(batch):
    """What the model is called on, of a batch."""
    if isinstance(batch, tuple):
        return batch[0]
    return batch["one"] if isinstance(batch, dict) else batch[:, :-1]


class Searched(NamedTuple):
    space: Any
    costs: Any
    target: float
    one_shot: Any
    step: Any  # step(params, opt_state, state, key, batch, held_out)
    params: Any
    opt_state: Any


def prepared(problem, factory, axis_name=None):
    """The dozen lines that a user writes."""
    sites = aqs.find_sites(problem.apply, problem.params, example(next(problem.batches)))
    space = search.make_space(sites, [(".*", OPTIONS)])
    costs = {"gbops": space.cost_table(aqs.cost.gbops)}
    one_shot = factory(space, costs, total_steps=STEPS, axis_name=axis_name)
    loss = functools.partial(problem.loss, aqs.quantize(problem.apply))
    optimizer = optax.adam(1e-2)

    def step(params, opt_state, state, key, batch, held_out):
        choices = one_shot.sample(state, key)
        grads = jax.grad(loss)(params, space.assignment(choices[0]), batch)
        quality = -jnp.stack([loss(params, space.assignment(c), held_out) for c in choices])
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        updates, opt_state = optimizer.update(grads, opt_state)
        state, told = one_shot.update(state, choices, quality, key)
        return optax.apply_updates(params, updates), opt_state, state, told

    target = 1.5 * costs["gbops"].range[0]
    opt_state = optimizer.init(problem.params)
    return Searched(space, costs, target, one_shot, step, problem.params, opt_state)


def assert_on_target(table, choices, target):
    """Within the tolerance, or where there are few points as near as any."""
    points = np.indices((len(OPTIONS),) * min(len(choices), 3)).reshape(min(len(choices), 3), -1).T
    few = len(choices) <= 3
    nearest = np.abs(table.of_many(points) / target - 1).min() if few else 0.0
    off = abs(table.of_many(choices[None])[0] / target - 1)
    assert off <= max(nearest, 0.02) + 1e-6


def judged(problem, found, choices, params):
    loss = jax.jit(functools.partial(problem.loss, aqs.quantize(problem.apply)))
    return float(loss(params, found.space.concrete_assignment(choices), next(problem.batches)))


@pytest.mark.parametrize(
    "name, searcher", [("linen", "critic"), ("nnx", "critic"), ("plain", "policy_gradient")]
)
def test_a_search_in_ones_own_jitted_loop(name, searcher):
    problem = PROBLEMS[name]()
    found = prepared(problem, getattr(search, searcher))
    step = jax.jit(found.step)
    params, opt_state, state = found.params, found.opt_state, found.one_shot.init(
        {"gbops": found.target}
    )  # fmt: skip
    for number in range(STEPS):
        key = jax.random.fold_in(jax.random.key(1), number)
        batch, held_out = next(problem.batches), next(problem.batches)
        params, opt_state, state, told = step(params, opt_state, state, key, batch, held_out)
    assert step._cache_size() == 1
    assert int(state.step) == STEPS
    assert all(np.isfinite(value) for value in told.values())
    choices = found.one_shot.answer(state)
    assert_on_target(found.costs["gbops"], np.asarray(choices), found.target)
    assert judged(problem, found, choices, params) < judged(problem, found, choices, found.params)
    # The answer is what a user freezes and serves.
    assignment = found.space.concrete_assignment(choices)
    x = example(next(problem.batches))
    frozen = aqs.freeze(problem.apply, assignment, params, x)
    expected = aqs.quantize(problem.apply)(assignment, params, x)
    served = aqs.serve(problem.apply)(frozen, x)
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-4)


def replicated(found):
    """What every replica starts from, the policy included."""
    state = found.one_shot.init({"gbops": found.target})
    return found.params, found.opt_state, state


def inputs(problem, count):
    """(keys, batches, held-out batches) of `count` replicas, stacked."""

    def stacked():
        batches = [next(problem.batches) for _ in range(count)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    return jax.random.split(jax.random.key(2), count), stacked(), stacked()


def under_pmap(step, carried, given, axis_name):
    """One step; results have a leading axis of replicas."""
    mapped = jax.pmap(step, axis_name=axis_name, in_axes=(None, None, None, 0, 0, 0))
    return mapped(*carried, *given)


def under_vmap(step, carried, given, axis_name):
    mapped = jax.vmap(step, axis_name=axis_name, in_axes=(None, None, None, 0, 0, 0))
    return jax.jit(mapped)(*carried, *given)


def under_shard_map(step, carried, given, axis_name):
    mesh = jax.make_mesh((2,), (axis_name,), axis_types=(jax.sharding.AxisType.Auto,))

    def local(params, opt_state, state, key, batch, held_out):
        own = jax.tree.map(lambda leaf: leaf[0], (key, batch, held_out))
        found = step(params, opt_state, state, *own)
        return jax.tree.map(lambda leaf: leaf[None], found)

    specs = (P(), P(), P(), P(axis_name), P(axis_name), P(axis_name))
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=P(axis_name), check_vma=False
    )
    return jax.jit(mapped)(*carried, *given)


@pytest.mark.parametrize("searcher", ["critic", "policy_gradient"])
def test_replicas_end_in_one_state_however_they_are_mapped(searcher):
    problem = plain_contrastive()
    found = prepared(problem, getattr(search, searcher), "replicas")
    given = inputs(problem, 2)
    ends = [  # on the host: an explicitly sharded array takes no plain index
        jax.device_get(mapped(found.step, replicated(found), given, "replicas"))
        for mapped in (under_pmap, under_vmap, under_shard_map)
    ]
    for end in ends:
        for leaf, like in zip(jax.tree.leaves(end), jax.tree.leaves(ends[0])):
            np.testing.assert_array_equal(leaf[0], leaf[1])
            # Sums are taken in another order, and a rounding of formats may flip by it.
            np.testing.assert_allclose(leaf, like, rtol=1e-3, atol=1e-5)


def test_a_vmapped_search_meets_its_own_targets():
    """Targets are part of the state: one program searches for several at once."""
    problem = plain_contrastive()
    found = prepared(problem, search.critic)
    low, high = found.costs["gbops"].range
    targets = jnp.linspace(1.2 * low, 0.8 * high, 3)
    states = jax.vmap(lambda target: found.one_shot.init({"gbops": target}))(targets)
    keys = jax.random.split(jax.random.key(0), 3)
    worth = jnp.asarray(np.random.default_rng(0).normal(size=found.space.mask.shape))

    @jax.jit
    @jax.vmap
    def step(state, key):
        choices = found.one_shot.sample(state, key)
        quality = worth[np.arange(len(worth)), choices].sum(-1)
        return found.one_shot.update(state, choices, quality, key)[0]

    for number in range(STEPS):
        states = step(states, jax.vmap(jax.random.fold_in, (0, None))(keys, number))
    choices = np.asarray(jax.vmap(found.one_shot.answer)(states))
    assert len({tuple(point) for point in choices}) == 3
    for point, target in zip(choices, np.asarray(targets)):
        assert_on_target(found.costs["gbops"], point, target)
