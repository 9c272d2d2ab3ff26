"""Inception v3 in plain Flax Linen, without the auxiliary classifier.

Source: Szegedy et al. 2015 (arXiv 1512.00567); sizes of the layers as in the published weights.

Module names are part of the interface, as they become the names of quantization sites: `stem` and
`conv2` to `conv5` before the blocks, `mixed{i}/branch{j}_conv{k}` in the eleven blocks, `head`.
Where a branch of the last two blocks forks, the convolutions of its fork are `conv{k}a` (1x3) and
`conv{k}b` (3x1). The BatchNorm of a convolution is named after it: `stem_bn`, `branch1_conv1_bn`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.channels import round_channels
from aqt_search.models.classifier import batch_norm, check_images, check_options, pixel_mean

SMALLEST_IMAGE = 75  # pixels a side; of smaller ones the last blocks have no pixel left


class Layer(NamedTuple):
    """A convolution with its BatchNorm and relu."""

    features: int
    height: int
    width: int
    stride: int = 1
    padding: str = "SAME"


class Branch(NamedTuple):
    """Layers one after the other, perhaps after a pool; a fork's layers share their input."""

    layers: tuple[Layer, ...]
    fork: tuple[Layer, ...] = ()
    pool: Literal["average", "max"] | None = None  # 3x3; the max pool has stride 2


def _local_block(pooled: int) -> tuple[Branch, ...]:
    """5x5 and two 3x3 convolutions, at 35 x 35 pixels."""
    return (
        Branch((Layer(64, 1, 1),)),
        Branch((Layer(48, 1, 1), Layer(64, 5, 5))),
        Branch((Layer(64, 1, 1), Layer(96, 3, 3), Layer(96, 3, 3))),
        Branch((Layer(pooled, 1, 1),), pool="average"),
    )


def _factorized_block(hidden: int) -> tuple[Branch, ...]:
    """One and two 7x7 convolutions, each as 1x7 and 7x1, at 17 x 17 pixels."""
    first, row, column = Layer(hidden, 1, 1), Layer(hidden, 1, 7), Layer(hidden, 7, 1)
    return (
        Branch((Layer(192, 1, 1),)),
        Branch((first, row, Layer(192, 7, 1))),
        Branch((first, column, row, column, Layer(192, 1, 7))),
        Branch((Layer(192, 1, 1),), pool="average"),
    )


def _wide_block() -> tuple[Branch, ...]:
    """3x3 convolutions, each as 1x3 and 3x1 side by side, at 8 x 8 pixels."""
    fork = (Layer(384, 1, 3), Layer(384, 3, 1))
    return (
        Branch((Layer(320, 1, 1),)),
        Branch((Layer(384, 1, 1),), fork),
        Branch((Layer(448, 1, 1), Layer(384, 3, 3)), fork),
        Branch((Layer(192, 1, 1),), pool="average"),
    )


STEM = {
    "stem": Layer(32, 3, 3, 2, "VALID"),
    "conv2": Layer(32, 3, 3, 1, "VALID"),
    "conv3": Layer(64, 3, 3),
    "conv4": Layer(80, 1, 1),
    "conv5": Layer(192, 3, 3, 1, "VALID"),
}
POOL_AFTER = ("conv3", "conv5")
MIXED = (
    _local_block(32),
    _local_block(64),
    _local_block(64),
    (
        Branch((Layer(384, 3, 3, 2, "VALID"),)),
        Branch((Layer(64, 1, 1), Layer(96, 3, 3), Layer(96, 3, 3, 2, "VALID"))),
        Branch((), pool="max"),
    ),
    _factorized_block(128),
    _factorized_block(160),
    _factorized_block(160),
    _factorized_block(192),
    (
        Branch((Layer(192, 1, 1), Layer(320, 3, 3, 2, "VALID"))),
        Branch((
            *(Layer(192, 1, 1), Layer(192, 1, 7), Layer(192, 7, 1)),
            Layer(192, 3, 3, 2, "VALID"),
        )),
        Branch((), pool="max"),
    ),
    _wide_block(),
    _wide_block(),
)  # fmt: skip


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _average_pool(x: jax.Array) -> jax.Array:
    """Means of the pixels in 3x3 windows; of fewer at the border."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _apply_layer(
    x: jax.Array, layer: Layer, width: float, dtype: Any, norm: Callable[..., nn.Module], name: str
) -> jax.Array:
    """relu(norm(convolution(x))), with modules `name` and `{name}_bn` of the calling module."""
    conv = nn.Conv(
        round_channels(layer.features * width),
        (layer.height, layer.width),
        strides=(layer.stride, layer.stride),
        padding=layer.padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )
    return nn.relu(norm(name=f"{name}_bn")(conv(x)))


class Mixed(nn.Module):
    """The results of all branches, concatenated. [batch, height, width, channels]."""

    branches: tuple[Branch, ...]
    width: float
    dtype: Any
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the block."""
        layer_of = functools.partial(
            _apply_layer, width=self.width, dtype=self.dtype, norm=self.norm
        )
        pools = {"average": _average_pool, "max": _max_pool}
        results = []
        for j, branch in enumerate(self.branches, start=1):
            x = pools[branch.pool](inputs) if branch.pool else inputs
            for k, layer in enumerate(branch.layers, start=1):
                x = layer_of(x, layer, name=f"branch{j}_conv{k}")
            fork = f"branch{j}_conv{len(branch.layers) + 1}"
            ends = [layer_of(x, layer, name=fork + end) for end, layer in zip("ab", branch.fork)]
            results += ends or [x]
        return jnp.concatenate(results, axis=-1)


class InceptionV3(nn.Module):
    """Inception v3; `inception_v3` checks the arguments.

    `model.apply(variables, images, train=True, mutable=["batch_stats"])` gives
    `(logits, updates)`; with train=False the logits alone.

    Attributes:
        num_classes: number of logits.
        width: multiplier of all channels, rounded with `round_channels`.
        dtype: type convolutions and activations are computed in. Parameters, BatchNorm
            statistics, the mean over pixels and the head are float32 always.
        axis_name: mapped axis over which batch statistics are averaged in training.
        momentum: BatchNorm, r <- momentum * r + (1 - momentum) * batch statistic.
        epsilon: BatchNorm, added to the variance.
    """

    num_classes: int
    width: float = 1.0
    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images.

        Args:
            images: [batch, height, width, channels], any float dtype, of at least 75 x 75 pixels
                (published: 299 x 299).
            train: normalise with batch statistics, and update the running ones.

        Returns:
            [batch, num_classes] float32.

        Raises:
            ValueError: images are not of rank 4 or too small.
        """
        check_images(images)
        if min(images.shape[1:3]) < SMALLEST_IMAGE:
            raise ValueError(
                f"images have shape {images.shape}; Inception v3 needs at least {SMALLEST_IMAGE} "
                "pixels a side. Enlarge them, or use a model with a CIFAR form."
            )
        norm = batch_norm(self, train)
        x = images.astype(self.dtype)
        for name, layer in STEM.items():
            x = _apply_layer(x, layer, self.width, self.dtype, norm, name)
            x = _max_pool(x) if name in POOL_AFTER else x
        for i, branches in enumerate(MIXED, start=1):
            x = Mixed(branches, self.width, self.dtype, norm, name=f"mixed{i}")(x)
        features = pixel_mean(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(features)


def inception_v3(
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["imagenet"] = "imagenet",
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-3,
) -> InceptionV3:
    """Inception v3: 23.83 million parameters with 1000 classes, 5.71 billion MACs at 299 x 299.

    Args:
        num_classes: number of logits.
        width: multiplier of all channels, above 0; results are rounded with `round_channels`.
        form: "imagenet"; there is no form for small images.
        dtype: type convolutions are computed in, e.g. bfloat16; see `InceptionV3`.
        axis_name: mapped axis BatchNorm statistics are averaged over in training, or None.
        momentum: BatchNorm momentum.
        epsilon: BatchNorm epsilon.

    Raises:
        ValueError: another form, or a width or class count that is not above 0.
    """
    if form != "imagenet":
        raise ValueError(
            f"unknown Inception v3 form {form!r}; known forms: imagenet. For small images use"
            " resnet, efficientnet or vit in the cifar form."
        )
    check_options("Inception v3", form, ("imagenet",), num_classes, width)
    return InceptionV3(num_classes, width, dtype, axis_name, momentum, epsilon)
