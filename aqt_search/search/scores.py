"""Values of every option from gradients: what formats a trained network can bear, without training.

    values = score(apply, loss, params, batches, space)      # nats, [decisions, max_options]
    choices = allocate(values, costs, targets)

One backward pass tells of all options of all decisions, where measuring one change after another
takes a pass for each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.fake_quant import fake_quantized
from aqt_search.search.space import Space, searched_operands
from aqt_search.tracing import static_leaves
from aqt_search.tracing.control_flow import Path
from aqt_search.tracing.interpreter import EMPTY, Held, Interpreter, run_flow
from aqt_search.tracing.layers import by_layer, layer_indices, layer_name
from aqt_search.tracing.planned_sites import PlannedSites
from aqt_search.tracing.plans import layer_number, make_plans, quantized_by
from aqt_search.tracing.sites import SIDES, Key, Site, SiteFormats
from aqt_search.tracing.trace import Trace, trace_function
from aqt_search.tracing.transform import check_assignment


def score(
    apply: Callable,
    loss: Callable,
    params: Any,
    batches: Iterable[Any],
    space: Space,
    reference: Mapping[str, SiteFormats] | None = None,
) -> np.ndarray:
    """Minus the expected increase of the loss in nats by each option: [decisions, max_options].

    To second order, with the Fisher information in place of the Hessian and the errors of elements
    taken to be independent,

        value[d, o] = -n/2 sum (g (Q_o(x) - x))^2

    where g is the gradient of a batch's mean loss with respect to an operand x of the decision's
    sites, n the examples of the batch, and the sum is over elements and operands (the score of
    NVIDIA's AutoQuantize; Dong et al. 2019, "HAWQ", arXiv 1905.03696, has the Hessian). It is a
    mean over batches. Options that do not exist have the value 0.

    Args:
      apply: (params, batch) -> outputs; its sites are those of the space.
      loss: (outputs, batch) -> [], the mean over the batch's examples.
      params: trained.
      batches: pytrees of arrays whose first axes are the examples, all of one shape; a few hundred
        examples are enough.
      space: the decisions.
      reference: the formats the network runs under meanwhile; None: as it was written.

    Raises:
      SiteError: as `quantize`.
      ValueError: there are no batches.
    """
    program = _program(apply, loss, space)
    found = [np.asarray(program(reference or {}, params, batch)) for batch in batches]
    if not found:
        raise ValueError("There is nothing to score by: there are no batches.")
    return np.stack(found).mean(axis=0, dtype=np.float64)


# Kept: equal functions and spaces share a program, whatever the weights and the reference.
@functools.lru_cache(maxsize=8)
def _program(apply: Callable, loss: Callable, space: Space) -> Callable:
    """`program(reference, params, batch) -> values`."""
    return static_leaves.jit(functools.partial(_scores, apply, loss, space))


def _scores(apply, loss, space: Space, reference, params, batch) -> jax.Array:
    """`score` by one batch."""
    trace = trace_function(apply, params, (batch,), {}, {})
    check_assignment(reference, trace.sites)
    sites = PlannedSites(
        trace, make_plans(trace, reference, None), execution="emulated", update=False
    )
    offered, decision_of = _offered(trace, space), searched_operands(space)
    rows, numbers = _rows(trace.sites, decision_of)

    def loss_of(squares: dict[Key, jax.Array]) -> jax.Array:
        def at_site(name, eqn, operands, held):
            def of_operand(side, x):
                key = name, side
                if key not in squares:
                    return x
                apart = len(squares[key]) > 1
                row = layer_number(trace.sites[name], held.numbers) if apart else 0
                return _marked(x, squares[key][row], *offered(key, x, held))

            marked = [of_operand(s, x) for s, x in zip(trace.sites[name].equation_sides, operands)]
            if name in sites.names:
                return sites.at_site(name, eqn, marked, held)
            return [eqn.primitive.bind(*marked, *operands[2:], **eqn.params)], {}

        names = {name for name, _ in squares} | sites.names
        held = sites.with_numbers(dataclasses.replace(EMPTY, numbers=numbers))
        outputs, _ = Interpreter(trace, names, at_site, run_flow).run(held)
        return loss(jax.tree_util.tree_unflatten(trace.out_tree, outputs), batch)

    zeros = {key: jnp.zeros((len(found), space.max_options)) for key, found in rows.items()}
    squares = jax.grad(loss_of)(zeros)
    values = jnp.zeros((len(space.decisions) + 1, space.max_options))
    for key, numbers_of_decisions in rows.items():
        values = values.at[np.array(numbers_of_decisions)].add(squares[key])
    values = values[:-1]
    examples = jax.tree.leaves(batch)[0].shape[0]
    return jnp.where(space.mask, -examples / 2 * values, 0.0)


def _rows(
    sites: Mapping[str, Site], decision_of: Mapping[Key, int]
) -> tuple[dict[Key, list[int]], dict[Path, jax.Array]]:
    """The decision about each layer of an operand (-1: none), and the iterations' numbers.

    One decision where it is about the whole stack.
    """
    by_side = {side: {n: d for (n, s), d in decision_of.items() if s == side} for side in SIDES}
    rows: dict[Key, list[int]] = {}
    loops = set()
    for side, decisions in by_side.items():
        for name, own in by_layer(decisions, sites).items():
            if set(own) == {""}:
                rows[name, side] = [own[""]]
                continue
            labels = [layer_name("", index) for index in layer_indices(sites[name])]
            rows[name, side] = [own.get(label, -1) for label in labels]
            loops |= set(sites[name].layers)
    return rows, {path: jnp.arange(length, dtype=np.int32) for path, length in sorted(loops)}


def _offered(trace: Trace, space: Space) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns `offered(key, x, held)`: how x is quantized, and its options' grids.

    These are [max_options, n, 7].
    """
    counts = np.array([len(decision.options) for decision in space.decisions])
    options = [
        quantized_by(
            trace, make_plans(trace, space.assignment(np.minimum(option, counts - 1)), None)
        )
        for option in range(space.max_options)
    ]

    def offered(key: Key, x: jax.Array, held: Held) -> tuple[Any, jax.Array]:
        found: list[Any] = [quantized(key, x, held.numbers) for quantized in options]
        how = found[0]
        # Without the tensor, which stands for itself, and with the grids of all options apart.
        how = dataclasses.replace(how, x=None, grids=None)
        return how, jnp.stack([quantized.grids for quantized in found])

    return offered


@jax.custom_vjp
def _marked(x: jax.Array, squares: jax.Array, how: Any, grids: jax.Array) -> jax.Array:
    """x; the derivative with respect to `squares` [options] is sum (g error)^2 of each option."""
    del squares, how, grids
    return x


def _marked_forward(x, squares, how, grids):
    del squares
    return x, (x, how, grids)


def _marked_backward(kept, gradient):
    x, how, grids = kept

    def square(grid):
        error = fake_quantized(dataclasses.replace(how, x=x, grids=grid)) - x
        return jnp.sum(jnp.square(gradient * error), dtype=jnp.float32)

    return gradient, jax.lax.map(square, grids), None, None


_marked.defvjp(_marked_forward, _marked_backward)
