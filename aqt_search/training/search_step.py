"""One-shot search of an image classifier: weights and policy learn together in one step.

Every replica samples formats for all decisions, takes a weight step under them, and judges them on
held-out examples. Nothing but metrics leaves the device, and no sample compiles anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aqt_search.search import replicas
from aqt_search.search.one_shot import Search, SearchState
from aqt_search.search.space import Space
from aqt_search.training.parallel import AXIS
from aqt_search.training.scales import batch_arguments
from aqt_search.training.train_step import Batch, TrainState, cross_entropy, step_key

QUALITIES = ("held_out", "train")
MEASURES = ("accuracy", "loss")


class ClassifierSearchState(NamedTuple):
    """Everything a search step reads and writes."""

    train: TrainState
    search: SearchState


def make_search_step(
    qapply: Callable, update: Callable, space: Space, search: Search, *, measure: str = "loss"
) -> Callable:
    """Returns `step(state, inputs, batch[, held_out]) -> (state, metrics)`, to run inside `AXIS`.

    With s the state before the step: points are sampled from the policy, and the weights take one
    step under the first. The quality of each is measured with the weights of s on one held-out
    batch, normalised by that batch's own statistics, as the running ones fit none of the samples.
    Without a held-out batch it is that of the training batch, and the search may have one sample.
    The search's update then moves the policy by the qualities.

    Each replica has its own samples; gradients of weights and policy are averaged over replicas.

    Args:
      qapply: `quantize(model.apply)`; of a space with an architecture `subnets.of_points` of it.
      update: of `train_step.make_update` on the same qapply (and the space's `net`).
      space: the decisions.
      search: over the space, with `axis_name=AXIS`.
      measure: the quality: minus the cross-entropy in nats ("loss"), or the "accuracy" (the
        papers'), which needs many more images.

    The step's `inputs` are empty: what may differ between runs of one program, the targets, is in
    the state.

    Raises:
      ValueError: unknown measure; when it is traced, several samples without a held-out batch.
    """
    if measure not in MEASURES:
        raise ValueError(f"Unknown measure {measure!r}: expected one of {', '.join(MEASURES)}.")

    def step(state: ClassifierSearchState, inputs, batch: Batch, held_out: Batch | None = None):
        train = state.train
        sample_key, update_key, dropout_key = jax.random.split(
            jax.random.fold_in(step_key(train), 1), 3
        )
        choices = search.sample(state.search, sample_key)
        new_train, metrics, logits = update(train, space.point(choices[0]), batch)
        if held_out is None:
            _check_one_sample(choices)
            judged = [_judge(logits, batch["label"], measure)]
        else:
            found = [_logits(qapply, space, train, c, held_out, dropout_key) for c in choices]
            judged = [_judge(logits, held_out["label"], measure) for logits in found]
        judged = jax.tree.map(lambda *values: jnp.stack(values), *judged)
        quality = judged.pop("quality")
        new_search, told = search.update(state.search, choices, quality, update_key)
        metrics |= replicas.mean(jax.tree.map(jnp.mean, judged), AXIS) | told
        return ClassifierSearchState(new_train, new_search), metrics

    return step


def _check_one_sample(choices: jax.Array) -> None:
    if len(choices) > 1:
        raise ValueError(
            f"The search has {len(choices)} samples a step, but without a held-out batch only the"
            " one point that the weights are trained under can be judged. Set samples to 1, or"
            " quality to 'held_out'."
        )


def _logits(qapply, space: Space, train: TrainState, choices, batch: Batch, key) -> jax.Array:
    """Logits of a batch under `choices`, normalised by the batch's own statistics."""
    # One key for all samples of a step: what is dropped does not tell them apart.
    arguments = batch_arguments(train.variables, key)
    logits = qapply(space.point(choices), train.variables, batch["image"], **arguments)
    return logits[0] if "mutable" in arguments else logits


def _judge(logits: jax.Array, labels: jax.Array, measure: str) -> dict[str, jax.Array]:
    accuracy, agreement = accuracy_and_agreement(logits, labels)
    by_loss = measure == "loss"
    quality = -jnp.mean(cross_entropy(logits, labels, 0.0)) if by_loss else accuracy
    return {"quality": quality, "sample_accuracy": accuracy, "prediction_agreement": agreement}


def accuracy_and_agreement(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of correct predictions, and share of the most frequent prediction."""
    predictions = jnp.argmax(logits, -1)
    counts = jnp.zeros(logits.shape[-1], jnp.float32).at[predictions].add(1.0)
    return jnp.mean(predictions == labels), jnp.max(counts) / len(predictions)
