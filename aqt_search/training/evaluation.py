"""Evaluation of weights under an assignment, and BatchNorm statistics that belong to it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.training import parallel
from aqt_search.training.batch_norm import batch_statistics, running_momentum
from aqt_search.training.train_step import cross_entropy
from aqt_search.transform import quantize_with_state, with_static_activations


class Evaluation(NamedTuple):
    """Means over the examples of a data set."""

    accuracy: float  # share of correct predictions, in [0, 1]
    loss: float  # cross-entropy, nats
    examples: int


def evaluate(
    qapply: Callable, assignment: Any, variables: Mapping[str, Any], batches: Iterable[Mapping]
) -> Evaluation:
    """Accuracy and loss with running BatchNorm statistics.

    Args:
      qapply: `quantize(model.apply)`.
      assignment: formats by site.
      variables: {"params": ..., "batch_stats": ...}, not replicated.
      batches: with "image", "label" and "mask" (0 on padding), as `data.eval_batches` yields them.

    Raises:
      ValueError: there is no example.
    """

    def step(variables, batch):
        logits = qapply(assignment, variables, batch["image"], train=False)
        mask = batch["mask"]
        correct = (jnp.argmax(logits, -1) == batch["label"]) * mask
        losses = cross_entropy(logits, batch["label"], 0.0) * mask
        return jax.lax.psum((correct.sum(), losses.sum(), mask.sum()), parallel.AXIS)

    compiled = parallel.pmap_step(step, donate_state=False)
    variables = parallel.replicate(variables)
    sums = [compiled(variables, parallel.shard(batch)) for batch in batches]
    if not sums:
        raise ValueError("There is nothing to evaluate: the data set has no examples.")
    correct, loss, examples = np.sum([parallel.unreplicate(s) for s in sums], axis=0, dtype=float)
    return Evaluation(float(correct / examples), float(loss / examples), round(examples))


def reestimate_batch_stats(
    qapply: Callable, assignment: Any, variables: Mapping[str, Any], batches: Iterable[Mapping]
) -> Any:
    """BatchNorm statistics of frozen weights under `assignment`: plain means over `batches`.

    Statistics gathered while formats were being sampled fit none of them.

    Args:
      qapply, assignment, variables: as for `evaluate`.
      batches: training batches, of which each counts the same.

    Returns:
      A pytree like `variables["batch_stats"]`, not replicated.

    Raises:
      ValueError: there is no batch.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]
    if not jax.tree_util.tree_leaves(batch_stats):
        return batch_stats
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)

    def updated(params, old, batch):
        _, updates = qapply(
            assignment, {"params": params, "batch_stats": old}, batch["image"],
            train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        return updates["batch_stats"]

    def statistics(params, batch):
        momentum = running_momentum(functools.partial(updated, params), batch_stats, batch)
        own = batch_statistics(updated(params, zeros, batch), momentum)
        return jax.lax.pmean(own, parallel.AXIS)

    compiled = parallel.pmap_step(statistics, donate_state=False)
    params = parallel.replicate(params)
    total, count = None, 0
    for batch in batches:
        found = parallel.unreplicate(compiled(params, parallel.shard(batch)))
        total = found if total is None else jax.tree.map(np.add, total, found)
        count += 1
    if not count:
        raise ValueError("BatchNorm statistics need at least one batch; got none.")
    return jax.tree.map(lambda s: (s / count).astype(np.float32), total)


def static_evaluation(
    fun: Callable, assignment: Any, sites: Mapping, variables: Mapping[str, Any], batches: Iterable
) -> Callable:
    """A function like `quantize(fun)` in evaluation, with activation scales that never change.

    Bounds are averaged over `batches`, under `assignment` and the running BatchNorm statistics.

    Args:
      fun: `model.apply`.
      assignment: formats by site.
      sites: of fun.
      variables: {"params": ..., "batch_stats": ...}, not replicated.
      batches: training batches.

    Returns:
      `apply(assignment, variables, images, train=False)`, for the same assignment.

    Raises:
      ValueError: there is no batch.
    """
    static = with_static_activations(assignment, sites)
    stateful = quantize_with_state(fun, axis_name=parallel.AXIS)

    def step(state, variables, batch):
        return stateful.apply(static, state, variables, batch["image"], train=False)[1]

    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("Activation scales need at least one batch; got none.")
    one = jax.ShapeDtypeStruct((1, *first["image"].shape[1:]), jnp.float32)
    state = quantize_with_state(functools.partial(fun, train=False)).init(static, variables, one)
    if jax.tree_util.tree_leaves(state):  # none where no activation is quantized
        compiled = parallel.pmap_step(step, donate_state=False)
        replicated, held = parallel.replicate(variables), parallel.replicate(state)
        for batch in itertools.chain([first], batches):
            held = compiled(held, replicated, parallel.shard(batch))
        state = parallel.unreplicate(held)

    def apply(_, variables, images, train=False):
        return stateful.evaluate(static, state, variables, images, train=train)

    return apply
