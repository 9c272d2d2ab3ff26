"""MobileNetV1 in plain Flax Linen, ImageNet and CIFAR forms.

Source: Howard et al. 2017 (arXiv 1704.04861), table 1; relu6 and the dropout rate after the
authors' published code.

Module names are part of the interface, as they become the names of quantization sites: `stem`,
`block{i}/depthwise` and `block{i}/pointwise` with i from 1 to 13, `head`. The BatchNorm of a
convolution is named after it: `stem_bn`, `depthwise_bn`, `pointwise_bn`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.channels import round_channels
from aqt_search.models.classifier import (
    ACTIVATIONS,
    batch_norm,
    check_activation,
    check_images,
    check_options,
    head,
    pixel_mean,
)
from aqt_search.models.convolution import convolution

STEM_CHANNELS = 32
BLOCK_CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
# Strides of the stem and of the thirteen blocks.
FORM_STRIDES = {
    "imagenet": (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1),
    "cifar": (1, 1, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1),
}


class SeparableBlock(nn.Module):
    """relu6(pointwise(relu6(depthwise(x)))), each convolution with its BatchNorm.

    Depthwise is 3x3 with the stride and one filter a channel, pointwise is 1x1.
    [batch, height, width, channels] to [batch, ceil(height / stride), ..., features].
    """

    features: int
    stride: int
    dtype: Any
    norm: Callable[..., nn.Module]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the block."""
        conv = functools.partial(convolution, dtype=self.dtype)
        channels = x.shape[-1]
        depthwise = conv(channels, 3, self.stride, groups=channels, name="depthwise")
        x = self.activation(self.norm(name="depthwise_bn")(depthwise(x)))
        x = conv(self.features, 1, name="pointwise")(x)
        return self.activation(self.norm(name="pointwise_bn")(x))


class MobileNetV1(nn.Module):
    """MobileNetV1; `mobilenet_v1` builds the published widths.

    `model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})`
    gives `(logits, updates)`; with train=False the logits alone, and no rngs are needed.

    Attributes:
        block_channels: channels of each block.
        strides: of the stem, and of each block.
        stem_channels: channels of the first convolution.
        num_classes: number of logits.
        dropout: rate before the head.
        activation: "relu6", or "relu", whose scale post-training equalization can move.
        dtype: type convolutions and activations are computed in. Parameters, BatchNorm
            statistics, the mean over pixels and the head are float32 always.
        axis_name: mapped axis over which batch statistics are averaged in training.
        momentum: BatchNorm, r <- momentum * r + (1 - momentum) * batch statistic.
        epsilon: BatchNorm, added to the variance.
    """

    block_channels: tuple[int, ...]
    strides: tuple[int, ...]
    stem_channels: int
    num_classes: int
    dropout: float = 0.0
    activation: str = "relu6"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images.

        Args:
            images: [batch, height, width, channels], any float dtype.
            train: normalise with batch statistics and update the running ones; apply dropout.

        Returns:
            [batch, num_classes] float32.

        Raises:
            ValueError: images are not of rank 4.
        """
        check_images(images)
        norm, activation = batch_norm(self, train), ACTIVATIONS[self.activation]
        stem_stride, *strides = self.strides
        stem = convolution(self.stem_channels, 3, stem_stride, dtype=self.dtype, name="stem")
        x = activation(norm(name="stem_bn")(stem(images.astype(self.dtype))))
        for i, (features, stride) in enumerate(zip(self.block_channels, strides, strict=True)):
            block = SeparableBlock(
                features, stride, self.dtype, norm, activation, name=f"block{i + 1}"
            )
            x = block(x)
        return head(pixel_mean(x), self.num_classes, dropout=self.dropout, train=train)


def mobilenet_v1(
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["imagenet", "cifar"] = "imagenet",
    dropout: float = 0.001,
    activation: Literal["relu6", "relu"] = "relu6",
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> MobileNetV1:
    """MobileNetV1 of a width.

    Channels of the stem and of the blocks are multiplied by `width` and rounded with
    `round_channels`, which changes nothing at the published widths of 0.25, 0.5, 0.75 and 1. The
    ImageNet form shrinks the image 32 times. The CIFAR form, ours, shrinks it 8 times: its stem and
    its second block, the first that has stride 2 in the ImageNet form, have stride 1.

    Args:
        num_classes: number of logits.
        width: multiplier of the channels, above 0.
        form: "imagenet" for large images, "cifar" for small ones.
        dropout: rate before the head, in [0, 1).
        activation: "relu6" as published, or "relu"; see the module.
        dtype: type convolutions are computed in, e.g. bfloat16; see `MobileNetV1`.
        axis_name: mapped axis BatchNorm statistics are averaged over in training, or None.
        momentum: BatchNorm momentum.
        epsilon: BatchNorm epsilon.

    Raises:
        ValueError: unknown form or activation, or a width, rate or class count out of range.
    """
    check_options("MobileNetV1", form, FORM_STRIDES, num_classes, width, dropout)
    check_activation("MobileNetV1", activation)
    return MobileNetV1(
        block_channels=tuple(round_channels(channels * width) for channels in BLOCK_CHANNELS),
        strides=FORM_STRIDES[form],
        stem_channels=round_channels(STEM_CHANNELS * width),
        num_classes=num_classes,
        dropout=dropout,
        activation=activation,
        dtype=dtype,
        axis_name=axis_name,
        momentum=momentum,
        epsilon=epsilon,
    )
