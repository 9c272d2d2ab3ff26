"""Evaluation of weights under an assignment, and BatchNorm statistics that belong to it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search import replicas
from aqt_search.tracing.transform import quantize_with_state, with_static_activations
from aqt_search.training import parallel
from aqt_search.training.batch_norm import batch_statistics, running_momentum
from aqt_search.training.scales import SCALES, batch_arguments, with_learned
from aqt_search.training.train_step import cross_entropy


class Evaluation(NamedTuple):
    """Means over the examples of a data set."""

    accuracy: float  # share of correct predictions, in [0, 1]
    loss: float  # cross-entropy, nats
    examples: int


def as_data(assignment: Any) -> Any:
    """An assignment whose formats are arrays: one compiled program takes all that look alike."""
    return jax.tree.map(jnp.asarray, assignment)


# Programs are kept by the function they run, so that points of a sweep that differ in their formats
# alone share them.
@functools.lru_cache(maxsize=8)
def _evaluation_step(qapply: Callable) -> Callable:
    def step(variables, assignment, batch):
        logits = qapply(assignment, variables, batch["image"], train=False)
        mask = batch["mask"]
        correct = (jnp.argmax(logits, -1) == batch["label"]) * mask
        losses = cross_entropy(logits, batch["label"], 0.0) * mask
        return replicas.total((correct.sum(), losses.sum(), mask.sum()), parallel.AXIS)

    return parallel.pmap_step(step, donate_state=False)


def evaluate(
    qapply: Callable, assignment: Any, variables: Mapping[str, Any], batches: Iterable[Mapping]
) -> Evaluation:
    """Accuracy and loss with running BatchNorm statistics.

    Args:
      qapply: `quantize(model.apply)`; compiled once for all assignments that look alike.
      assignment: formats by site.
      variables: {"params": ..., "batch_stats": ...}, not replicated.
      batches: with "image", "label" and "mask" (0 on padding), as `data.eval_batches` yields them;
        in a run of several processes each has its own shard of every batch.

    Raises:
      ValueError: there is no example.
    """
    step = _evaluation_step(qapply)
    held = parallel.replicate((variables, as_data(assignment)))
    sums: list[Any] = []
    for batch in batches:
        sums.append(step(*held, parallel.shard(batch)))
        if len(sums) > parallel.MOST_STEPS_AHEAD:
            jax.block_until_ready(sums[-parallel.MOST_STEPS_AHEAD])
    if not sums:
        raise ValueError("There is nothing to evaluate: the data set has no examples.")
    correct, loss, examples = np.sum([parallel.unreplicate(s) for s in sums], axis=0, dtype=float)
    return Evaluation(float(correct / examples), float(loss / examples), round(examples))


@functools.lru_cache(maxsize=8)
def _statistics_step(qapply: Callable) -> Callable:
    def updated(variables, assignment, old, batch):
        _, updates = qapply(
            assignment, {**variables, "batch_stats": old}, batch["image"],
            **batch_arguments(variables, jax.random.key(0)),
        )  # fmt: skip
        return updates["batch_stats"]

    def statistics(variables, assignment, batch):
        old = variables["batch_stats"]
        of_batch = functools.partial(updated, variables, assignment)
        momentum = running_momentum(of_batch, old, batch)
        own = batch_statistics(of_batch(jax.tree.map(jnp.zeros_like, old), batch), momentum)
        return replicas.mean(own, parallel.AXIS)

    return parallel.pmap_step(statistics, donate_state=False)


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
    if not jax.tree_util.tree_leaves(variables["batch_stats"]):
        return variables["batch_stats"]
    step = _statistics_step(qapply)
    held = parallel.replicate((variables, as_data(assignment)))
    total, count = None, 0
    for batch in batches:
        found = parallel.unreplicate(step(*held, parallel.shard(batch)))
        total = found if total is None else jax.tree.map(np.add, total, found)
        count += 1
    if not count:
        raise ValueError("BatchNorm statistics need at least one batch; got none.")
    return jax.tree.map(lambda s: (s / count).astype(np.float32), total)


class StaticEvaluation(NamedTuple):
    """What `evaluate` takes to judge weights with activation scales that never change."""

    apply: Callable  # apply(assignment, variables, images, train=False)
    assignment: Any
    variables: Mapping[str, Any]  # with the scales


@functools.lru_cache(maxsize=8)
def _static_programs(fun: Callable) -> tuple[Callable, Callable]:
    """(a step that moves the scales, the function that uses them)."""
    stateful = quantize_with_state(fun, axis_name=parallel.AXIS)

    def step(scales, variables, assignment, batch):
        return stateful.apply(assignment, scales, variables, batch["image"], train=False)[1]

    def apply(assignment, variables, images, train=False):
        scales, own = variables["scales"], variables["own"]
        return stateful.evaluate(assignment, scales, own, images, train=train)

    return parallel.pmap_step(step, donate_state=False), apply


def static_evaluation(
    fun: Callable, assignment: Any, sites: Mapping, variables: Mapping[str, Any], batches: Iterable
) -> StaticEvaluation:
    """Makes `quantize(fun)` ready for evaluation with static activation scales.

    Bounds are averaged over `batches`, under `assignment` and the running BatchNorm statistics;
    scales that were learned stay as they are.

    Args:
      fun: `model.apply`.
      assignment: formats by site.
      sites: of fun.
      variables: {"params": ..., "batch_stats": ...}, with "scales" if any, not replicated.
      batches: training batches.

    Raises:
      ValueError: there is no batch.
    """
    static = as_data(with_static_activations(assignment, sites))
    step, apply = _static_programs(fun)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("Activation scales need at least one batch; got none.")
    one = jax.ShapeDtypeStruct((1, *first["image"].shape[1:]), jnp.float32)
    trained = variables.get(SCALES, {})
    variables = {name: value for name, value in variables.items() if name != SCALES}
    scales = quantize_with_state(functools.partial(fun, train=False)).init(static, variables, one)
    scales = with_learned(scales, trained)
    if jax.tree_util.tree_leaves(scales):  # none where no activation is quantized
        fixed = parallel.replicate((variables, static))
        held = parallel.replicate(scales)
        for batch in itertools.chain([first], batches):
            held = step(held, *fixed, parallel.shard(batch))
        scales = parallel.unreplicate(held)
    return StaticEvaluation(apply, static, {"own": variables, "scales": scales})
