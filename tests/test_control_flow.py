"""Bodies evaluated on the operands that `control_flow` names give what JAX itself computes."""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_search.tracing.control_flow import (
    Body,
    Call,
    Cond,
    Custom,
    Opaque,
    Remat,
    Scan,
    While,
    control_flow,
    equations_along,
)

W, V = jnp.array([0.5, -2.0, 3.0]), jnp.array([1.0, 0.25, -1.0])
X = jnp.array([0.1, 0.7, -0.3])
XS = jnp.arange(12.0).reshape(4, 3) / 7


# --- An evaluator that knows bodies and operands by `control_flow` alone --------------------------


def evaluate(body, args):
    env = dict(zip((*body.jaxpr.constvars, *body.jaxpr.invars), (*body.consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    for eqn in body.jaxpr.eqns:
        results = step(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in body.jaxpr.outvars]


def step(eqn, operands):
    match control_flow(eqn):
        case None | Opaque():
            results = eqn.primitive.bind(*operands, **eqn.params)
            return results if eqn.primitive.multiple_results else [results]
        case Scan() as scan:
            consts, carry, xs = scan.split(operands)
            stacked = [None] * scan.length
            for i in reversed(range(scan.length)) if scan.reverse else range(scan.length):
                results = evaluate(scan.body, [*consts, *carry, *(x[i] for x in xs)])
                carry, stacked[i] = results[: scan.carries], results[scan.carries :]
            return [*carry, *map(jnp.stack, zip(*stacked))]
        case While() as loop:
            test_consts, body_consts, carry = loop.split(operands)
            while evaluate(loop.test, test_consts + carry)[0]:
                carry = evaluate(loop.body, body_consts + carry)
            return carry
        case Cond() as cond:
            index, _ = cond.split(operands)
            return evaluate(*cond.calls(operands)[min(max(int(index), 0), len(cond.bodies) - 1)])
        case flow:
            ((body, called_on),) = flow.calls(operands)
            return evaluate(body, called_on)


# --- Programs -------------------------------------------------------------------------------------


def scan(x):
    def layer(carry, row):
        total, count = carry
        return (total * W + row, count + 1), (total @ row, row * V)

    return jax.lax.scan(layer, (x, 0), XS)


def reverse_scan(x):
    return jax.lax.scan(lambda c, row: (c * V + row, c), x, XS, reverse=True, unroll=2)


def scan_of_nothing(x):
    return jax.lax.scan(lambda c, _: (c * W, None), x, None, length=3)


def while_loop(x):
    """The test and the body have constants of their own, of different numbers."""

    def test(carry):
        return (carry[1] < 5) & ((carry[0] @ W) < 1e3)

    def body(carry):
        return carry[0] * V + XS[0] - W, carry[1] + 1

    return jax.lax.while_loop(test, body, (x, 0))


def cond(x):
    return jax.lax.cond(x[0] > 0, lambda x: x * W, lambda x: x - V, x)


def switch(index):
    def program(x):
        branches = [lambda x, y: x * W + y, lambda x, y: y - V, lambda x, y: x + 0 * y]
        return jax.lax.switch(index, branches, x, x * x)

    return program


@jax.custom_jvp
def doubled(x, w):
    return 2 * x + w


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 7 * tangents[0]))


@jax.custom_vjp
def tripled(x, w):
    return 3 * x * w


tripled.defvjp(lambda x, w: (tripled(x, w), None), lambda _, g: (g, g))


def nested(x):
    """jit in checkpoint in scan in cond in jit."""
    inner = jax.jit(lambda x, row: jnp.tanh(doubled(x, row) * W))
    layer = jax.checkpoint(lambda x, row: (inner(x, row), x[0]))
    loop = jax.jit(lambda x: jax.lax.scan(layer, x, XS))
    return jax.lax.cond(x[0] < 9, loop, lambda x: (x, XS[:, 0]), x)


PROGRAMS = {
    "scan": (scan, Scan),
    "reverse scan": (reverse_scan, Scan),
    "scan of nothing": (scan_of_nothing, Scan),
    "while": (while_loop, While),
    "fori": (lambda x: jax.lax.fori_loop(0, XS.sum().astype(int), lambda i, x: x * V, x), While),
    "cond": (cond, Cond),
    "other branch": (lambda x: cond(-x), Cond),
    **{f"switch {i}": (switch(jnp.int32(i)), Cond) for i in (-1, 0, 1, 2, 7)},
    "jit": (jax.jit(lambda x: x * W - V), Call),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(x * W)), Remat),
    "custom_jvp": (lambda x: doubled(x, W), Custom),
    "custom_vjp": (lambda x: tripled(x, W), Custom),
    "nested": (nested, Cond),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_bodies_on_their_operands_give_what_the_program_gives(name):
    program, kind = PROGRAMS[name]
    closed = jax.make_jaxpr(program)(X)
    assert any(isinstance(control_flow(eqn), kind) for eqn in closed.jaxpr.eqns)
    found = evaluate(Body(closed.jaxpr, closed.consts), [X])
    expected = jax.tree.leaves(program(X))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def only_flow(program, *args):
    closed = jax.make_jaxpr(program)(*args)
    (flow,) = (f for f in map(control_flow, closed.jaxpr.eqns) if f is not None)
    return flow


# --- How often, and in which order ----------------------------------------------------------------


def test_counts():
    flow = only_flow(scan, X)
    assert (flow.length, flow.carries, flow.reverse) == (4, 2, False)
    flow = only_flow(reverse_scan, X)
    assert (flow.length, flow.carries, flow.reverse, flow.unroll) == (4, 1, True, 2)
    flow = only_flow(while_loop, X)
    assert [len(part) for part in flow.split(range(flow.test_consts + flow.body_consts + 2))] == [
        flow.test_consts, flow.body_consts, 2,
    ]  # fmt: skip


def test_a_scan_whose_carry_looks_like_what_it_scans_over():
    """Nothing but the axis that is scanned over tells them apart."""
    square = jnp.ones((3, 3))
    flow = only_flow(lambda c, w, xs: jax.lax.scan(lambda c, x: (c @ w + x, c), c, xs),
                     square, 2 * square, jnp.ones((3, 3, 3)))  # fmt: skip
    assert (flow.consts, flow.carries) == (1, 1)
    assert flow.split("wcx") == [["w"], ["c"], ["x"]]


def test_paths_count_the_test_of_a_loop_first_and_branches_in_their_order():
    closed = jax.make_jaxpr(
        lambda x: jax.lax.while_loop(
            lambda x: jnp.sin(x).sum() < 0,
            lambda x: jax.lax.cond(x[0] > 0, jnp.exp, jnp.log, x),
            x,
        )
    )(X)
    (loop,) = (n for n, e in enumerate(closed.jaxpr.eqns) if isinstance(control_flow(e), While))
    flow = control_flow(closed.jaxpr.eqns[loop])
    assert [body.number for body in flow.bodies] == [0, 1]
    assert flow.test.jaxpr.eqns[0].primitive.name == "sin"
    (inner,) = (n for n, e in enumerate(flow.body.jaxpr.eqns) if isinstance(control_flow(e), Cond))
    # False, the second function, is branch 0.
    for number, name in enumerate(("log", "exp")):
        *around, (_, eqn) = equations_along(closed.jaxpr, (loop, 1, inner, number, 0))
        assert eqn.primitive.name == name
        assert [e.primitive.name for _, e in around] == ["while", "cond"]
    branch = control_flow(flow.body.jaxpr.eqns[inner]).bodies[1]
    assert branch.under((loop, 1, inner)) == (loop, 1, inner, 1)


def test_remat_and_scan_are_run_again_as_they_were():
    policy = jax.checkpoint_policies.dots_saveable
    fun = jax.checkpoint(jnp.sin, prevent_cse=False, policy=policy)
    (eqn,) = jax.make_jaxpr(control_flow(jax.make_jaxpr(fun)(1.0).eqns[0]).again(jnp.cos))(1.0).eqns
    flow = control_flow(eqn)
    assert isinstance(flow, Remat)
    assert (flow.prevent_cse, flow.policy) == (False, policy)
    before = only_flow(reverse_scan, X)
    after = only_flow(lambda x: before.again(lambda c, row: (c + row, None), x, XS), X)
    for field in ("length", "reverse", "unroll"):
        assert getattr(after, field) == getattr(before, field)


def summed(x):
    return jnp.zeros(3).at[jnp.array([0, 0, 1])].add(x)


def solved(x):
    def solve(matvec, y):
        return y / matvec(jnp.ones_like(y))

    return jax.lax.custom_linear_solve(lambda y: y * W, x, solve, solve)


@pytest.mark.parametrize("program, count", [(jnp.sin, 0), (summed, 1), (solved, 4)])
def test_what_else_holds_jaxprs_is_opaque(program, count):
    *_, eqn = jax.make_jaxpr(program)(X).jaxpr.eqns
    flow = control_flow(eqn)
    if not count:
        assert flow is None
        return
    assert isinstance(flow, Opaque)
    assert [body.number for body in flow.bodies] == list(range(count))
