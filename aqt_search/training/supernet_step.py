"""The training step of a supernet: the sandwich rule, with distillation from the largest subnet.

One set of weights is trained so that every subnet, in every assignment of formats, works without
training of its own (BatchQuant: arXiv 2105.08952; Once-for-all: arXiv 1908.09791; the sandwich
rule: Yu and Huang 2019, arXiv 1903.05134).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aqt_search.architecture.subnet_scales import cut_scales
from aqt_search.numerics.learned_scales import merge_learned, split_learned
from aqt_search.search import replicas
from aqt_search.search.space import Point, Space
from aqt_search.training.parallel import AXIS
from aqt_search.training.scales import SCALES, synchronized
from aqt_search.training.train_step import Batch, TrainState, cross_entropy, step_key


class SupernetState(NamedTuple):
    """Everything a step reads and writes."""

    train: TrainState
    # [decisions, max_options], bool: what random subnets and formats are drawn from. It is data, so
    # that one program trains all phases.
    allowed: jax.Array


class SmallestSubnet(NamedTuple):
    """The smallest subnet as a model of its own, so that it costs what it is worth.

    Attributes:
      qapply: of the model that `fitted` gives for its variables.
      cut: (parameters, kernel matrices) of the whole model -> its parameters; traced.
      names: of its sites, those of the whole model.
      choices: of the architecture.
    """

    qapply: Callable
    cut: Callable[[Any, Any], Any]
    names: dict[str, str]
    choices: np.ndarray


def make_supernet_step(
    qapply: Callable,
    space: Space,
    optimizer: optax.GradientTransformation,
    smallest: SmallestSubnet,
    *,
    subnets: int = 2,
    distillation: float = 1.0,
    label_smoothing: float = 0.0,
) -> Callable:
    """Returns `step(state, inputs, batch) -> (state, metrics)`, to run inside `AXIS`.

    In a step the largest subnet learns from the labels; the smallest, and `subnets` random ones,
    from them and from the largest one's detached logits t:

        loss = (CE(labels) + distillation * CE(softmax(t))) / (1 + distillation)

    The largest and the smallest have one random place among the options of every format decision,
    all alike; random ones are uniform in all decisions. Gradients are averaged over the subnets,
    one after another: the activations of one subnet are in memory at a time. BatchNorm normalises
    by the batch, and keeps no statistics: they would fit no subnet.

    The step's `inputs` are empty. `state.train.auxiliary` holds the kernel matrices
    (`Elastic.matrices`; () for plain middles).

    Args:
      qapply: `scales.with_scales(quantize_with_state(model.apply))`.
      space: with an elastic network.
      optimizer: applied to the averaged gradients.
      smallest: the smallest subnet.
      subnets: random ones in a step, at least 0.
      distillation: weight of the largest subnet's logits, at least 0.
      label_smoothing: in [0, 1).

    Raises:
      ValueError: a number out of its range, or a space without an elastic network.
    """
    if space.net is None:
        raise ValueError("The space has no elastic network: a supernet has subnets.")
    if subnets < 0 or distillation < 0 or not 0 <= label_smoothing < 1:
        raise ValueError(
            f"subnets is {subnets}, distillation {distillation} and label_smoothing"
            f" {label_smoothing}; expected at least 0, at least 0, and a share below 1."
        )
    logits_of = _logits_of(qapply, space, smallest)

    def loss_of(trained, remembered, subnet, teacher, batch, key):
        params, matrices, learned = trained
        scales = merge_learned(learned, remembered)
        logits, own = logits_of(subnet, params, matrices, scales, batch["image"], key)
        loss = cross_entropy(logits, batch["label"], label_smoothing).mean()
        if teacher is not None:
            soft = optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher)).mean()
            loss = (loss + distillation * soft) / (1 + distillation)
        return loss, (logits, own)

    def step(whole: SupernetState, inputs: Any, batch: Batch):
        state, allowed = whole
        learned, remembered = split_learned(state.scales)
        trained = (state.params, state.auxiliary, learned)
        key = step_key(state)
        points = _sandwich(space, smallest, allowed, jax.random.fold_in(key, 0), subnets)
        total, teacher, set_now, told = None, None, state.scales, {}
        for number, subnet in enumerate(points):
            # The next subnet waits for the gradients of the one before.
            trained_now, total = jax.lax.optimization_barrier((trained, total))
            (loss, (logits, own)), grads = jax.value_and_grad(loss_of, has_aux=True)(
                trained_now, remembered, subnet, teacher, batch, jax.random.fold_in(key, 1 + number)
            )
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            if subnet.kind == "largest":
                teacher, set_now = jax.lax.stop_gradient(logits), own
            told |= _told(subnet.kind, number, loss, logits, batch["label"])
        grads = jax.tree.map(lambda g: g / len(points), total)
        grads, means = replicas.mean((grads, told), AXIS)
        means["gradient_norm"] = optax.tree.norm(grads)
        return SupernetState(_moved(state, optimizer, grads, set_now), allowed), means

    return step


class _Subnet(NamedTuple):
    """One of those that a step trains."""

    kind: str  # "largest", "smallest" or "random"
    choices: jax.Array  # [decisions]


def _logits_of(qapply: Callable, space: Space, smallest: SmallestSubnet) -> Callable:
    """(subnet, params, matrices, scales, images, key) -> logits, and the scales after it.

    The largest subnet is the model as it is, the smallest the one cut out: nothing is masked.
    """
    net = space.net
    assert net is not None

    def logits_of(subnet: _Subnet, params, matrices, scales, images, key):
        kind, choices = subnet
        if kind == "smallest":
            variables = {"params": smallest.cut(params, matrices)}
            kept = cut_scales(net, smallest.choices, scales)
            own = {new: kept[old] for new, old in smallest.names.items() if old in kept}
            whole = space.assignment(choices)
            assignment = {new: whole[old] for new, old in smallest.names.items()}
            return _trained(smallest.qapply, assignment, variables, own, images, key)
        if kind == "largest":
            return _trained(qapply, space.assignment(choices), {"params": params}, scales, images,
                            key)  # fmt: skip
        masked = net.variables(choices[: len(net.decisions)], {"params": params}, matrices or None)
        return _trained(qapply, of_subnet(space, choices), masked, scales, images, key)

    return logits_of


def of_subnet(space: Space, choices: jax.Array) -> Any:
    """The assignment of a masked subnet, whose calibrations see no zeros."""
    point = space.point(choices)
    assert isinstance(point, Point)
    return point.assignment


def _trained(qapply, assignment, variables, scales, images, key) -> tuple[jax.Array, Any]:
    """Logits normalised by the batch, and the scales after it."""
    mutable = ["batch_stats"]
    if jax.tree.leaves(scales):
        variables, mutable = {**variables, SCALES: scales}, [*mutable, SCALES]
    logits, updates = qapply(
        assignment, variables, images, train=True, mutable=mutable, rngs={"dropout": key}
    )
    return logits, updates.get(SCALES, scales)


def _sandwich(
    space: Space, smallest: SmallestSubnet, allowed: jax.Array, key: jax.Array, subnets: int
) -> list[_Subnet]:
    """The subnets of a step; the largest comes first."""
    assert space.net is not None
    keys = jax.random.split(key, 2 + subnets)
    ends = [
        _Subnet(kind, jnp.concatenate([jnp.asarray(own), _alike(k, allowed[len(own) :])]))
        for kind, own, k in (("largest", space.net.largest, keys[0]),
                             ("smallest", smallest.choices, keys[1]))
    ]  # fmt: skip
    noise = [jax.random.gumbel(k, allowed.shape) for k in keys[2:]]
    drawn = [jnp.argmax(jnp.where(allowed, n, -jnp.inf), axis=-1) for n in noise]
    return [*ends, *(_Subnet("random", choices) for choices in drawn)]


def _alike(key: jax.Array, allowed: jax.Array) -> jax.Array:
    """One random place among the options of every decision, the same for all: [decisions]."""
    place = jax.random.uniform(key)
    count = jnp.sum(allowed, axis=-1)
    rank = jnp.minimum(jnp.floor(place * count), count - 1)
    before = jnp.cumsum(allowed, axis=-1) - 1
    return jnp.argmax(allowed & (before == rank[:, None]), axis=-1)


def _told(kind: str, number: int, loss, logits, labels) -> dict[str, jax.Array]:
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    if kind == "largest":
        return {"loss": loss, "accuracy": accuracy}
    name = kind if kind == "smallest" else f"random{number - 1}"
    return {f"loss/{name}": loss, f"accuracy/{name}": accuracy}


def _moved(state: TrainState, optimizer, grads, set_now) -> TrainState:
    """The state after a step; scales that were not yet set start as the largest subnet has them."""
    learned, _ = split_learned(state.scales)
    started, remembered = split_learned(synchronized(state.scales, set_now))
    trained = (state.params, state.auxiliary, learned)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    applied: Any = optax.apply_updates((state.params, state.auxiliary, started), updates)
    params, auxiliary, learned = applied
    return state._replace(
        step=state.step + 1, params=params, opt_state=opt_state, auxiliary=auxiliary,
        scales=merge_learned(learned, remembered),
    )  # fmt: skip
