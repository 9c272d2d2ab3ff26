"""Optimizers by name, with the conventions of image classification."""

from __future__ import annotations

import math

import optax

from aqt_search.training.schedules import weight_decay_mask

_NAMES = ("sgd", "adamw")


def make_optimizer(
    name: str,
    learning_rate: optax.Schedule | float,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum and L2 decay, or AdamW; no decay on BatchNorm and biases.

    Args:
      name: "sgd" (decay is added to the gradient, as in He et al. 2015) or "adamw".
      learning_rate: a number, finite and at least 0, or an optax schedule of the step.
      momentum: of SGD, or Adam's first moment, in [0, 1).
      nesterov: whether SGD looks ahead.
      weight_decay: coefficient of the L2 term, finite and at least 0.
      gradient_clip: largest global norm of the gradient, finite; 0 for no clipping.

    Raises:
      ValueError: unknown name, or a number out of its range.
    """
    # Below 0 each of them is the sign of another: a clip of -1 goes uphill.
    given = {"weight_decay": weight_decay, "gradient_clip": gradient_clip}
    if not callable(learning_rate):
        given["learning_rate"] = learning_rate
    for what, value in given.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{what} is {value}; expected a finite number, at least 0.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; expected at least 0 and below 1.")
    clip = [optax.clip_by_global_norm(gradient_clip)] if gradient_clip else []
    if name == "sgd":
        decay = optax.add_decayed_weights(weight_decay, mask=weight_decay_mask)
        return optax.chain(*clip, decay, optax.sgd(learning_rate, momentum, nesterov))
    if name == "adamw":
        adamw = optax.adamw(
            learning_rate, b1=momentum, weight_decay=weight_decay, mask=weight_decay_mask
        )
        return optax.chain(*clip, adamw)
    raise ValueError(f"Unknown optimizer {name!r}: expected one of {', '.join(_NAMES)}.")
