"""What the zoo's classifiers have in common: checks of what they get, BatchNorm, and the head."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.stochastic_depth import check_rate


def check_options(
    network: str,
    form: str,
    forms: Iterable[str],
    num_classes: int,
    width: float,
    dropout: float = 0.0,
) -> None:
    """Raises ValueError for an unknown form, or a class count, width or rate out of range."""
    if form not in forms:
        raise ValueError(f"unknown {network} form {form!r}; known forms: {', '.join(forms)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes!r}; expected at least 1")
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width is {width!r}; expected a number above 0, such as 0.5 or 1.0")
    check_rate("dropout", dropout)


# Names of activations that a network may have instead of its own.
ACTIVATIONS = {"relu6": nn.relu6, "relu": nn.relu}


def check_activation(network: str, activation: str) -> None:
    """Raises ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{network} has activation {activation!r}; expected {' or '.join(ACTIVATIONS)}"
        )


def check_images(images: jax.Array) -> None:
    """Raises ValueError unless images are [batch, height, width, channels]."""
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; expected [batch, height, width, channels]. "
            "Add a batch axis for a single image."
        )


def batch_norm(model: Any, train: bool) -> Callable[..., nn.Module]:
    """BatchNorm with the options of `model`: axis_name, momentum, epsilon and dtype."""
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        axis_name=model.axis_name,
        momentum=model.momentum,
        epsilon=model.epsilon,
        dtype=model.dtype,
    )


def pixel_mean(x: jax.Array) -> jax.Array:
    """[batch, height, width, channels] to [batch, channels], in float32."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def head(features: jax.Array, num_classes: int, *, dropout: float, train: bool) -> jax.Array:
    """Dropout and the layer `head`, in float32: [batch, channels] to [batch, num_classes]."""
    features = nn.Dropout(dropout, deterministic=not train)(features)
    return nn.Dense(num_classes, dtype=jnp.float32, name="head")(features)
