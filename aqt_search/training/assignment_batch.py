"""The quality of many assignments of formats, by one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.search.space import Point
from aqt_search.training import parallel
from aqt_search.training.scales import batch_arguments
from aqt_search.training.train_step import cross_entropy

BATCH_STATS = ("batch", "running")


class AssignmentQuality(NamedTuple):
    """Means over the examples of a data set, for n assignments."""

    accuracy: np.ndarray  # [n], float64: share of correct predictions, in [0, 1]
    loss: np.ndarray  # [n], float64: cross-entropy in nats; not finite where the logits are not
    examples: int


def forward_arguments(variables: Mapping[str, Any], batch_stats: str) -> dict[str, Any]:
    """Keyword arguments of a Linen model's forward pass that normalises as `batch_stats` says.

    "running" takes the running statistics of `variables`; "batch" those of the batch itself, as
    the search's reward does: dropout is then on, with one key for all. A model without BatchNorm
    is evaluated alike under both. With "mutable" among the arguments the model returns its logits
    in a pair.

    Raises:
      ValueError: `batch_stats` is something else.
    """
    if batch_stats not in BATCH_STATS:
        raise ValueError(f"batch_stats is {batch_stats!r}; expected {' or '.join(BATCH_STATS)}.")
    if batch_stats == "running":
        return {"train": False}
    return batch_arguments(variables, jax.random.key(0))


def on_one_replica(fun: Callable[[], Any]) -> Any:
    """`fun()` with `AXIS` bound to a single replica: what is shared over it is this device's own.

    A function made for data parallelism then sees its whole batch here, inside of a pmap or not.
    """
    found = jax.vmap(fun, axis_name=parallel.AXIS, axis_size=1)()
    return jax.tree.map(lambda leaf: leaf[0], found)


# Programs are kept by the function they run, so that calls for other assignments share them.
@functools.lru_cache(maxsize=8)
def _program(qapply: Callable, batch_stats: str, vectorized: bool) -> Callable:
    def sums(variables, batch, assignment):
        arguments = forward_arguments(variables, batch_stats)
        logits = qapply(assignment, variables, batch["image"], **arguments)
        logits = logits[0] if "mutable" in arguments else logits
        correct = (jnp.argmax(logits, -1) == batch["label"]) * batch["mask"]
        losses = cross_entropy(logits, batch["label"], 0.0) * batch["mask"]
        return correct.sum(), losses.sum()

    def step(assignments, variables, batch):
        def of_one(assignment):
            return on_one_replica(functools.partial(sums, variables, batch, assignment))

        # XLA:CPU runs the convolutions that vmap makes as grouped ones, 1.2 to 4.8 times slower
        # (benchmarks/vmapped_evaluation.py).
        return jax.vmap(of_one)(assignments) if vectorized else jax.lax.map(of_one, assignments)

    return parallel.pmap_step(step, donate_state=False)


def evaluate_assignments(
    qapply: Callable,
    assignments: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    chunk: int = 16,
    batch_stats: str = "batch",
    vectorized: bool | None = None,
) -> AssignmentQuality:
    """Accuracy and loss of one set of weights under n assignments.

    `chunk` assignments go to the devices at once, divided over them, with the whole batch on each:
    the result does not depend on the number of devices. The last chunk is filled up; one program
    serves all chunks, batches and later calls of equal shapes. A batch goes to the devices once,
    and the sums of all assignments come back once for each; they are added up in float64.

    Args:
      qapply: `quantize(model.apply)`; scales and statistics it shares over `parallel.AXIS` are
        those of the whole batch.
      assignments: an assignment whose format fields have a leading axis [n], such as
        `jax.vmap(space.assignment)(choices)` of choices [n, decisions]; `Point`s alike, where
        `qapply` is of `subnets.of_points`.
      variables: {"params": ..., "batch_stats": ...}, not replicated.
      batches: with "image", "label" and "mask" (0 on padding), as `data.eval_batches` yields them;
        in a run of several processes whole in each.
      chunk: assignments evaluated at once; memory grows with it where they are vectorized.
      batch_stats: what BatchNorm normalises by. "batch", the batch's own statistics, fit every
        assignment; padding counts in them, so batches should have little of it. "running" takes
        those of `variables`, which fit the assignment that they were gathered under.
      vectorized: whether a device evaluates its part of a chunk under vmap, or one after another
        in a loop; None: vectorized, but not on CPU, where it is slower.

    Raises:
      ValueError: no assignment or no example; format fields of unequal length; `chunk` is below 1;
        unknown `batch_stats`.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected a number of assignments, at least 1.")
    forward_arguments(variables, batch_stats)  # refuses what it does not know
    count, replicas = _count(assignments), parallel.replica_count()
    size = math.ceil(min(chunk, count) / replicas) * replicas
    rows = np.minimum(np.arange(math.ceil(count / size) * size), count - 1).reshape(-1, size)
    own_rows = parallel.own_rows(rows)
    host = jax.tree.map(np.asarray, assignments)
    chunks = [parallel.shard(jax.tree.map(lambda leaf, r=r: leaf[r], host)) for r in own_rows]
    if vectorized is None:
        vectorized = jax.default_backend() != "cpu"
    step = _program(qapply, batch_stats, vectorized)
    held = parallel.replicate(variables)
    sums, examples = np.zeros((2, count)), 0.0
    for batch in batches:
        on_devices = parallel.replicate(batch)
        found = parallel.from_replicas([step(part, held, on_devices) for part in chunks])
        sums += np.asarray(found, float).swapaxes(0, 1).reshape(2, -1)[:, :count]
        examples += float(np.sum(batch["mask"], dtype=float))
    if not examples:
        raise ValueError("There is nothing to evaluate: the batches hold no examples.")
    first, second = sums / examples
    return AssignmentQuality(first, second, round(examples))


def _count(assignments: Any) -> int:
    """The length n of the leading axis."""
    if isinstance(assignments, Point):
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(assignments)}
        if len(lengths) == 1 and lengths != {()} and lengths != {(0,)}:
            return lengths.pop()[0]
        raise ValueError(
            f"Points to evaluate have formats and architectures with leading axes {lengths};"
            " expected one, [n]. Make them with jax.vmap(space.point)(choices) of choices"
            " [n, decisions]."
        )
    shapes = sorted({np.shape(leaf) for leaf in jax.tree.leaves(assignments)})
    if len(shapes) == 1 and len(shapes[0]) == 1 and shapes[0][0]:
        return shapes[0][0]
    raise ValueError(
        f"Assignments to evaluate have format fields of one shape [n], n > 0; got shapes {shapes}."
        " Make them with jax.vmap(space.assignment)(choices) of choices [n, decisions]."
    )
