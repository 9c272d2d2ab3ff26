"""The training step: one update of the weights under an assignment of formats, on every replica."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aqt_search.training.parallel import AXIS, replica_index

Batch = Mapping[str, jax.Array]  # "image": [B, H, W, C] float32, "label": [B] int32


class TrainState(NamedTuple):
    """Everything a training step reads and writes."""

    step: jax.Array  # [], int32: updates done
    params: Any  # pytree of float32
    batch_stats: Any  # pytree of float32: running BatchNorm statistics, {} without BatchNorm
    opt_state: Any  # optax state
    rng: jax.Array  # [2], uint32: key data of the run; steps and replicas fold their numbers in
    auxiliary: Any = ()  # what is learned beside the parameters: a range loss's margins


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_variables(model: Any, image_shape: tuple[int, ...], key: jax.Array) -> Any:
    images = jnp.zeros((1, *image_shape), jnp.float32)
    return model.init({"params": key, "dropout": key}, images, train=False)


def init_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    init_auxiliary: Callable[[Any], Any] = lambda params: (),
) -> TrainState:
    """Initialises a Flax Linen model that maps images [B, *image_shape] to logits.

    `init_auxiliary(params)` makes what is learned beside the parameters, by the same optimizer.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = _initial_variables(model, tuple(image_shape), init_key)
    params = variables["params"]
    auxiliary = init_auxiliary(params)
    return TrainState(
        jnp.int32(0), params, variables.get("batch_stats", {}), optimizer.init((params, auxiliary)),
        jax.random.key_data(run_key), auxiliary,
    )  # fmt: skip


def step_key(state: TrainState) -> jax.Array:
    """The random key of this step on this replica."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.random.fold_in(key, replica_index())


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Softmax cross-entropy [B] in nats against one-hot labels mixed with uniform ones.

    target = (1 - label_smoothing) * one_hot + label_smoothing / classes
    (Szegedy et al. 2015, arXiv 1512.00567, section 7)
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def make_update(
    qapply: Callable,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    auxiliary_loss: Callable[[Any, Any], jax.Array] | None = None,
) -> Callable:
    """Returns `update(state, assignment, batch) -> (state, metrics, logits)`, inside `AXIS`.

    Gradients and new running statistics are averaged over the replicas; the metrics "loss",
    "accuracy" and "gradient_norm" (with `auxiliary_loss` that too), and the replica's own logits
    [B, classes], are of the weights before the update; "loss" is the cross-entropy alone.

    Args:
      qapply: `quantize(model.apply)`.
      optimizer: applied to the averaged gradients.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      auxiliary_loss: of `state.params` and `state.auxiliary`, added to the loss.
    """

    def update(state: TrainState, assignment: Any, batch: Batch):
        def loss_of(trained):
            params, auxiliary = trained
            logits, updates = qapply(
                assignment,
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": step_key(state)},
            )
            loss = cross_entropy(logits, batch["label"], label_smoothing).mean()
            accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
            told = {"loss": loss, "accuracy": accuracy}
            if auxiliary_loss is not None:
                told["auxiliary_loss"] = auxiliary_loss(params, auxiliary)
                loss += told["auxiliary_loss"]
            return loss, (logits, updates.get("batch_stats", {}), told)

        trained = (state.params, state.auxiliary)
        grads, (logits, own_stats, told) = jax.grad(loss_of, has_aux=True)(trained)
        grads, batch_stats, means = jax.lax.pmean((grads, own_stats, told), AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params, auxiliary = optax.apply_updates(trained, updates)
        metrics = means | {"gradient_norm": optax.tree.norm(grads)}
        new = TrainState(state.step + 1, params, batch_stats, opt_state, state.rng, auxiliary)
        return new, metrics, logits

    return update
