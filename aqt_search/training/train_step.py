"""The training step: one update of the weights under an assignment of formats, on every replica."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aqt_search.architecture.elastic import Elastic
from aqt_search.numerics.learned_scales import merge_learned, split_learned
from aqt_search.search import replicas
from aqt_search.training.parallel import AXIS, replica_index
from aqt_search.training.scales import SCALES, synchronized
from aqt_search.training.subnets import mean_gradients, moved_where_had

Batch = Mapping[str, jax.Array]  # "image": [B, H, W, C] float32, "label": [B] int32


class TrainState(NamedTuple):
    """Everything a training step reads and writes."""

    step: jax.Array  # [], int32: updates done
    params: Any  # pytree of float32
    batch_stats: Any  # pytree of float32: running BatchNorm statistics, {} without BatchNorm
    opt_state: Any  # optax state, of (params, auxiliary, learned part of scales)
    rng: jax.Array  # [2], uint32: key data of the run; steps and replicas fold their numbers in
    auxiliary: Any = ()  # what is learned beside the parameters: a range loss's margins
    scales: Any = ()  # states of calibrations, of which a part may be learned

    @property
    def variables(self) -> dict[str, Any]:
        """What the quantized model is called with."""
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        return variables | ({SCALES: self.scales} if jax.tree.leaves(self.scales) else {})


def _init(model: Any, image_shape: tuple[int, ...], key: jax.Array) -> Any:
    images = jnp.zeros((1, *image_shape), jnp.float32)
    return model.init({"params": key, "dropout": key}, images, train=False)


@functools.cache
def _jitted_init(backend: str) -> Callable:
    # At XLA's default level LLVM takes 2.5 seconds for the random bits of every layer, 24 for a
    # ResNet-8. At level 1 they are 4, and the program runs once.
    options = {"xla_backend_optimization_level": 1} if backend == "cpu" else None
    return jax.jit(_init, static_argnums=(0, 1), compiler_options=options)


def _initial_variables(model: Any, image_shape: tuple[int, ...], key: jax.Array) -> Any:
    traced = isinstance(key, jax.core.Tracer)  # options are for the outermost program alone
    init = _init if traced else _jitted_init(jax.default_backend())
    return init(model, image_shape, key)


def init_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    init_auxiliary: Callable[[Any], Any] = lambda params: (),
    init_scales: Callable[[Any], Any] = lambda variables: (),
) -> TrainState:
    """Initialises a Flax Linen model that maps images [B, *image_shape] to logits.

    `init_auxiliary(params)` makes what is learned beside the parameters, by the same optimizer;
    `init_scales(variables)` the states of calibrations, whose learned part it moves, too.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = _initial_variables(model, tuple(image_shape), init_key)
    params = variables["params"]
    auxiliary, scales = init_auxiliary(params), init_scales(variables)
    return TrainState(
        jnp.int32(0), params, variables.get("batch_stats", {}),
        optimizer.init((params, auxiliary, split_learned(scales)[0])),
        jax.random.key_data(run_key), auxiliary, scales,
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
    net: Elastic | None = None,
) -> Callable:
    """Returns `update(state, assignment, batch) -> (state, metrics, logits)`, inside `AXIS`.

    Gradients and new running statistics are averaged over the replicas; the metrics "loss",
    "accuracy" and "gradient_norm" (with `auxiliary_loss` that too), and the replica's own logits
    [B, classes], are of the weights before the update; "loss" is the cross-entropy alone.

    Args:
      qapply: `quantize(model.apply)`; where calibrations have state, `scales.with_scales`.
      optimizer: applied to the averaged gradients.
      label_smoothing: share of the target spread over all classes, in [0, 1).
      auxiliary_loss: of `state.params` and `state.auxiliary`, added to the loss.
      net: the subnets, where each replica trains one of its own: the assignment is a `Point` then,
        and `qapply` of `subnets.of_points`. Parameters that no replica's subnet has stay.

    Raises:
      ValueError: a label smoothing out of its range.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected at least 0 and below 1.")

    def update(state: TrainState, assignment: Any, batch: Batch):
        learned, remembered = split_learned(state.scales)

        def loss_of(trained):
            params, auxiliary, learned = trained
            scales = merge_learned(learned, remembered)
            variables = state._replace(params=params, scales=scales).variables
            mutable = ["batch_stats", *(name for name in variables if name == SCALES)]
            logits, updates = qapply(
                assignment, variables, batch["image"],
                train=True, mutable=mutable, rngs={"dropout": step_key(state)},
            )  # fmt: skip
            loss = cross_entropy(logits, batch["label"], label_smoothing).mean()
            accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
            told = {"loss": loss, "accuracy": accuracy}
            if auxiliary_loss is not None:
                told["auxiliary_loss"] = auxiliary_loss(params, auxiliary)
                loss += told["auxiliary_loss"]
            return loss, (logits, updates, told)

        trained = (state.params, state.auxiliary, learned)
        grads, (logits, own, told) = jax.grad(loss_of, has_aux=True)(trained)
        own_stats = own.get("batch_stats", {})
        had = None
        if net is not None:
            own_grads, had = mean_gradients(net, assignment, grads[0])
            grads = (own_grads, *replicas.mean(grads[1:], AXIS))
            batch_stats, means = replicas.mean((own_stats, told), AXIS)
        else:
            grads, batch_stats, means = replicas.mean((grads, own_stats, told), AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        set_now, remembered = split_learned(
            synchronized(state.scales, own.get(SCALES, state.scales))
        )
        applied: Any = optax.apply_updates((*trained[:2], set_now), updates)
        params, auxiliary, learned = applied
        if had is not None:
            params = moved_where_had(had, params, state.params)
        metrics = means | {"gradient_norm": optax.tree.norm(grads)}
        new = TrainState(
            state.step + 1, params, batch_stats, opt_state, state.rng, auxiliary,
            merge_learned(learned, remembered),
        )  # fmt: skip
        return new, metrics, logits

    return update
