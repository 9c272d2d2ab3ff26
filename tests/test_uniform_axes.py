"""Axes that are called uniform are so: every equation is run, and its result looked at.

What is found is written out by hand, so that a rule that finds nothing is noticed, too.
"""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_search.tracing.uniform_axes import uniform_results


def sample(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


Q, W = sample(1, 3, 4), sample(4, 4, seed=1)
TILED = jnp.tile

# A function of a query [1, 3, 4] and a matrix [4, 4], and the uniform axes of its result.
CASES = {
    "tile": (lambda q, w: TILED(q, (5, 1, 1)), {0}),
    "tile of more than one": (lambda q, w: TILED(q, (5, 2, 1)), {0}),
    "broadcast": (lambda q, w: jnp.broadcast_to(q[0], (5, 3, 4)), {0}),
    "repeat": (lambda q, w: jnp.repeat(q, 5, axis=0), {0}),
    "repeat in a row": (lambda q, w: jnp.repeat(q[0], 2, axis=0), set()),
    "new axes": (lambda q, w: jnp.broadcast_to(q[:, None], (5, 2, 3, 4)), {0, 1}),
    "merged": (lambda q, w: jnp.broadcast_to(q[:, None], (5, 2, 3, 4)).reshape(10, 3, 4), {0}),
    "merged with another": (lambda q, w: TILED(q, (5, 1, 1)).reshape(15, 4), set()),
    "split": (lambda q, w: TILED(q, (6, 1, 1)).reshape(2, 3, 3, 4), set()),
    "split of a whole": (lambda q, w: jnp.zeros((6,)).reshape(2, 3), {0, 1}),
    "ones between": (lambda q, w: TILED(q, (5, 1, 1)).reshape(1, 5, 1, 3, 4), {0, 1, 2}),
    "transpose": (lambda q, w: TILED(q, (5, 1, 1)).transpose(1, 2, 0), {2}),
    "of both": (lambda q, w: TILED(q, (5, 1, 1)) + jnp.exp(TILED(q, (5, 1, 1))), {0}),
    "of one": (lambda q, w: TILED(q, (4, 1, 1)) * jnp.broadcast_to(w[:, None], (4, 3, 4)), set()),
    "of lengths of 1": (
        lambda q, w: jax.lax.mul(TILED(q, (5, 1, 1)), jnp.ones((1, 3, 1))), {0},
    ),
    "sum": (lambda q, w: TILED(q, (5, 1, 1)).sum(1), {0}),
    "running sum": (lambda q, w: jnp.cumsum(TILED(q, (5, 1, 1)), axis=0), set()),
    "product": (lambda q, w: TILED(q, (5, 1, 1)) @ w, {0}),
    "product in a batch": (
        lambda q, w: jnp.einsum("bqd,bkd->bqk", TILED(q, (5, 1, 1)), TILED(q, (5, 1, 1))), {0},
    ),
    "summed over": (lambda q, w: jnp.einsum("bqd,bk->qdk", TILED(q, (4, 1, 1)), w), set()),
    "normalized": (lambda q, w: jax.nn.standardize(TILED(q, (5, 1, 1)), axis=-1), {0}),
    "concatenated": (lambda q, w: jnp.concatenate([TILED(q, (5, 1, 1))] * 2, axis=1), set()),
}  # fmt: skip


def run(jaxpr, consts, args):
    """Values and uniform axes of results, from those of arguments; what is found is checked."""
    known = [*((value, frozenset()) for value in consts), *args]
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), known, strict=True))

    def read(atom):
        return (atom.val, frozenset()) if isinstance(atom, jex_core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values, axes = zip(*map(read, eqn.invars)) if eqn.invars else ((), ())
        if eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            env.update(zip(eqn.outvars, run(inner.jaxpr, inner.consts, list(zip(values, axes)))))
            continue
        variables = [v for v in eqn.invars if not isinstance(v, jex_core.Literal)]
        part = jex_core.ClosedJaxpr(
            jaxpr.replace(constvars=(), invars=variables, outvars=eqn.outvars, eqns=[eqn]), ()
        )
        results = jex_core.jaxpr_as_fun(part)(*(env[v][0] for v in variables))
        found = uniform_results(eqn, axes)
        for value in results:
            for axis in found:
                first = np.take(value, [0], axis)
                np.testing.assert_array_equal(value, np.broadcast_to(first, value.shape))
        env.update(zip(eqn.outvars, ((value, found) for value in results)))
    return [read(v) for v in jaxpr.outvars]


@pytest.mark.parametrize("case", CASES)
def test_uniform_axes(case):
    fun, expected = CASES[case]
    closed = jax.make_jaxpr(fun)(Q, W)
    ((_, found),) = run(closed.jaxpr, closed.consts, [(Q, frozenset()), (W, frozenset())])
    assert found == expected
