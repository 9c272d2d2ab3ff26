"""EfficientNet B0 to B4 in plain Flax Linen, ImageNet and CIFAR forms.

Source: Tan and Le 2019 (arXiv 1905.11946): table 1 for B0, compound scaling for the others.

Module names are part of the interface, as they become the names of quantization sites: `stem`,
`block{i}/expand`, `depthwise`, `squeeze`, `excite` and `project`, `last` (the 1x1 convolution after
the blocks), `head`. Blocks count from 1 through all stages; those of the first stage have no
`expand`. `squeeze` and `excite` are Dense layers on the mean over pixels. BatchNorms are `stem_bn`,
`last_bn` and `expand_bn`, `depthwise_bn`, `project_bn`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.channels import round_channels
from aqt_search.models.classifier import (
    batch_norm,
    check_images,
    check_options,
    head,
    pixel_mean,
)
from aqt_search.models.convolution import convolution
from aqt_search.models.stochastic_depth import StochasticDepth, check_rate


class Stage(NamedTuple):
    """Inverted residual blocks in a row; the first has the stride, the others stride 1."""

    blocks: int
    expansion: int
    window: int
    stride: int
    channels: int


class Variant(NamedTuple):
    """Compound scaling of B0, and the dropout rate published with it."""

    width: float
    depth: float
    dropout: float


# Resolutions of training: B0 224, B1 240, B2 260, B3 300, B4 380.
VARIANTS = {
    "b0": Variant(1.0, 1.0, 0.2),
    "b1": Variant(1.0, 1.1, 0.2),
    "b2": Variant(1.1, 1.2, 0.3),
    "b3": Variant(1.2, 1.4, 0.3),
    "b4": Variant(1.4, 1.8, 0.4),
}
B0_STAGES = (
    Stage(1, 1, 3, 1, 16),
    Stage(2, 6, 3, 2, 24),
    Stage(2, 6, 5, 2, 40),
    Stage(3, 6, 3, 2, 80),
    Stage(3, 6, 5, 1, 112),
    Stage(4, 6, 5, 2, 192),
    Stage(1, 6, 3, 1, 320),
)
# Strides of the stem and of the seven stages.
FORM_STRIDES = {"imagenet": (2, 1, 2, 2, 2, 1, 2, 1), "cifar": (1, 1, 1, 2, 2, 1, 2, 1)}
STEM_CHANNELS = 32
LAST_CHANNELS = 1280
SQUEEZE_RATIO = 0.25


class InvertedResidual(nn.Module):
    """Inverted residual block with squeeze and excitation, "MBConv".

        h = swish(depthwise(swish(expand(x)))),  each convolution with its BatchNorm
        y = project(h * sigmoid(excite(swish(squeeze(mean over pixels of h)))))

    The result is x + y where the shapes agree, with y left out per example at the rate
    `stochastic_depth` in training; else y. An expansion of 1 has no expanding convolution.
    [batch, height, width, channels] to [batch, ceil(height / stride), ..., stage.channels].
    """

    stage: Stage
    stochastic_depth: float
    dtype: Any
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Apply the block."""
        conv = functools.partial(convolution, dtype=self.dtype)
        x, channels = inputs, inputs.shape[-1]
        hidden = channels * self.stage.expansion
        if self.stage.expansion > 1:
            x = nn.swish(self.norm(name="expand_bn")(conv(hidden, 1, name="expand")(x)))
        window, stride = self.stage.window, self.stage.stride
        depthwise = conv(hidden, window, stride, groups=hidden, name="depthwise")
        x = nn.swish(self.norm(name="depthwise_bn")(depthwise(x)))
        x = x * self._gate(x, max(1, int(channels * SQUEEZE_RATIO)))
        x = self.norm(name="project_bn")(conv(self.stage.channels, 1, name="project")(x))
        if x.shape != inputs.shape:
            return x
        return inputs + StochasticDepth(self.stochastic_depth)(x, train)

    def _gate(self, x: jax.Array, squeezed: int) -> jax.Array:
        """The factor of each example and channel, [batch, 1, 1, channels], in (0, 1)."""
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        gate = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
        gate = nn.swish(dense(squeezed, name="squeeze")(gate))
        return nn.sigmoid(dense(x.shape[-1], name="excite")(gate))


class EfficientNet(nn.Module):
    """EfficientNet; `efficientnet` builds the named variants.

    `model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})`
    gives `(logits, updates)`; with train=False the logits alone, and no rngs are needed.

    Attributes:
        stages: the blocks, in order.
        stem_channels: channels of the first convolution.
        stem_stride: its stride.
        last_channels: channels of the 1x1 convolution after the blocks.
        num_classes: number of logits.
        stochastic_depth: the rate of block i of n is stochastic_depth * (i - 1) / n, from 0 at the
            first block.
        dropout: rate before the head.
        dtype: type convolutions and activations are computed in. Parameters, BatchNorm
            statistics, means over pixels and the head are float32 always.
        axis_name: mapped axis over which batch statistics are averaged in training.
        momentum: BatchNorm, r <- momentum * r + (1 - momentum) * batch statistic.
        epsilon: BatchNorm, added to the variance.
    """

    stages: tuple[Stage, ...]
    stem_channels: int
    stem_stride: int
    last_channels: int
    num_classes: int
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.99
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images.

        Args:
            images: [batch, height, width, channels], any float dtype.
            train: normalise with batch statistics and update the running ones; apply dropout and
                stochastic depth.

        Returns:
            [batch, num_classes] float32.

        Raises:
            ValueError: images are not of rank 4.
        """
        check_images(images)
        norm = batch_norm(self, train)
        conv = functools.partial(convolution, dtype=self.dtype)
        x = conv(self.stem_channels, 3, self.stem_stride, name="stem")(images.astype(self.dtype))
        x = nn.swish(norm(name="stem_bn")(x))
        blocks = [
            stage if j == 0 else stage._replace(stride=1)
            for stage in self.stages
            for j in range(stage.blocks)
        ]
        for i, stage in enumerate(blocks):
            rate = self.stochastic_depth * i / len(blocks)
            x = InvertedResidual(stage, rate, self.dtype, norm, name=f"block{i + 1}")(x, train)
        x = nn.swish(norm(name="last_bn")(conv(self.last_channels, 1, name="last")(x)))
        return head(pixel_mean(x), self.num_classes, dropout=self.dropout, train=train)


def efficientnet(
    variant: str,
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["imagenet", "cifar"] = "imagenet",
    stochastic_depth: float = 0.2,
    dropout: float | None = None,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
) -> EfficientNet:
    """EfficientNet of a published variant.

    All channels (stem, stages and `last`) are multiplied by the variant's width and by `width` and
    rounded with `round_channels`; squeezed ones are a quarter of the block's input channels. Blocks
    in a stage are multiplied by the variant's depth and rounded up. The ImageNet form shrinks the
    image 32 times. The CIFAR form shrinks it 8 times: its stem and its second stage have stride 1.

    Args:
        variant: "b0", "b1", "b2", "b3" or "b4".
        num_classes: number of logits.
        width: further multiplier of the channels, above 0.
        form: "imagenet" for large images, "cifar" for small ones.
        stochastic_depth: rate that the blocks' rates rise to, in [0, 1); see `EfficientNet`.
        dropout: rate before the head, in [0, 1); None is the published one, 0.2 for b0 to 0.4.
        dtype: type convolutions are computed in, e.g. bfloat16; see `EfficientNet`.
        axis_name: mapped axis BatchNorm statistics are averaged over in training, or None.
        momentum: BatchNorm momentum.
        epsilon: BatchNorm epsilon.

    Raises:
        ValueError: unknown variant or form, or a width, rate or class count out of range.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise ValueError(f"unknown EfficientNet variant {variant!r}; known variants: {known}")
    scale = VARIANTS[variant]
    dropout = scale.dropout if dropout is None else dropout
    check_options("EfficientNet", form, FORM_STRIDES, num_classes, width, dropout)
    check_rate("stochastic_depth", stochastic_depth)
    stem_stride, *strides = FORM_STRIDES[form]
    stages = tuple(
        stage._replace(
            blocks=math.ceil(stage.blocks * scale.depth),
            stride=stride,
            channels=round_channels(stage.channels * scale.width * width),
        )
        for stage, stride in zip(B0_STAGES, strides, strict=True)
    )
    return EfficientNet(
        stages=stages,
        stem_channels=round_channels(STEM_CHANNELS * scale.width * width),
        stem_stride=stem_stride,
        last_channels=round_channels(LAST_CHANNELS * scale.width * width),
        num_classes=num_classes,
        stochastic_depth=stochastic_depth,
        dropout=dropout,
        dtype=dtype,
        axis_name=axis_name,
        momentum=momentum,
        epsilon=epsilon,
    )
