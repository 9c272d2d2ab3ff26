"""MobileNetV2 in plain Flax Linen: ImageNet and CIFAR forms, and a tiny one.

Source: Sandler et al. 2018 (arXiv 1801.04381), table 2; the dropout rate after the authors'
published code.

Module names are part of the interface, as they become the names of quantization sites: `stem`,
`block{i}/expand`, `block{i}/depthwise` and `block{i}/project`, `last` (the 1x1 convolution after
the blocks), `head`. Blocks count from 1 through all stages; those with an expansion of 1 have no
`expand`. The BatchNorm of a convolution is named after it: `stem_bn`, `expand_bn`, `last_bn`.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.blocks import per_block, per_stage
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


class Stage(NamedTuple):
    """Inverted residual blocks in a row; the first has the stride, the others stride 1."""

    expansion: int
    channels: int
    blocks: int
    stride: int


class Form(NamedTuple):
    """A network at width 1."""

    stem_channels: int
    stem_stride: int
    stages: tuple[Stage, ...]


IMAGENET = Form(32, 2, (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
))  # fmt: skip
CIFAR = Form(32, 1, (IMAGENET.stages[0], Stage(6, 24, 2, 1), *IMAGENET.stages[2:]))
TINY = Form(16, 2, (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 1),
    Stage(6, 32, 2, 2),
    Stage(6, 64, 2, 1),
))  # fmt: skip
FORMS = {"imagenet": IMAGENET, "cifar": CIFAR, "tiny": TINY}
LAST_CHANNELS = 1280
TINY_LAST_RATIO = 4  # channels of `last` to those of the last block


class Block(NamedTuple):
    """One inverted residual block."""

    window: int  # of the depthwise convolution
    expanded: int  # channels of the depthwise convolution
    channels: int
    stride: int
    expands: bool  # whether a convolution makes the expanded channels; else they are the input's
    adds: bool  # whether the input is added to the result: stride 1, and the same channels


class InvertedResidual(nn.Module):
    """project(relu6(depthwise(relu6(expand(x))))), each convolution with its BatchNorm.

    Expand is 1x1, depthwise has the window and the stride, project is 1x1 and linear; x is added
    where `block.adds`. [batch, height, width, channels] to
    [batch, ceil(height / stride), ..., block.channels].
    """

    block: Block
    dtype: Any
    norm: Callable[..., nn.Module]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the block."""
        window, hidden, features, stride, expands, adds = self.block
        conv = functools.partial(convolution, dtype=self.dtype)
        x = inputs
        if expands:
            x = self.activation(self.norm(name="expand_bn")(conv(hidden, 1, name="expand")(x)))
        depthwise = conv(hidden, window, stride, groups=hidden, name="depthwise")
        x = self.activation(self.norm(name="depthwise_bn")(depthwise(x)))
        x = self.norm(name="project_bn")(conv(features, 1, name="project")(x))
        return inputs + x if adds else x


class MobileNetV2(nn.Module):
    """MobileNetV2; `mobilenet_v2` builds the named forms.

    `model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})`
    gives `(logits, updates)`; with train=False the logits alone, and no rngs are needed.

    Attributes:
        blocks: the blocks, in order.
        stem_channels: channels of the first convolution.
        stem_stride: its stride.
        last_channels: channels of the 1x1 convolution after the blocks.
        num_classes: number of logits.
        dropout: rate before the head.
        activation: "relu6", or "relu", whose scale post-training equalization can move.
        dtype: type convolutions and activations are computed in. Parameters, BatchNorm
            statistics, the mean over pixels and the head are float32 always.
        axis_name: mapped axis over which batch statistics are averaged in training.
        momentum: BatchNorm, r <- momentum * r + (1 - momentum) * batch statistic.
        epsilon: BatchNorm, added to the variance.
    """

    blocks: tuple[Block, ...]
    stem_channels: int
    stem_stride: int
    last_channels: int
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
        conv = functools.partial(convolution, dtype=self.dtype)
        x = conv(self.stem_channels, 3, self.stem_stride, name="stem")(images.astype(self.dtype))
        x = activation(norm(name="stem_bn")(x))
        for i, block in enumerate(self.blocks, start=1):
            x = InvertedResidual(block, self.dtype, norm, activation, name=f"block{i}")(x)
        x = activation(norm(name="last_bn")(conv(self.last_channels, 1, name="last")(x)))
        return head(pixel_mean(x), self.num_classes, dropout=self.dropout, train=train)


def blocks_of(
    stages: Iterable[Stage],
    stem_channels: int,
    windows: Sequence[int] | int = 3,
    expansions: Sequence[int] | int | None = None,
) -> tuple[Block, ...]:
    """The blocks of stages, on the channels of the stem.

    A block adds its input where it has stride 1 and as many channels; at an expansion of 1 it has
    no expanding convolution.
    """
    stages = tuple(stages)
    count = sum(stage.blocks for stage in stages)
    windows = per_block("windows", windows, count)
    published = [stage.expansion for stage in stages for _ in range(stage.blocks)]
    own = published if expansions is None else per_block("expansions", expansions, count)
    blocks, inputs = [], stem_channels
    for stage in stages:
        for number in range(stage.blocks):
            window, expansion = windows[len(blocks)], own[len(blocks)]
            stride = stage.stride if number == 0 else 1
            adds = stride == 1 and inputs == stage.channels
            expands = expansion > 1
            blocks.append(Block(window, expansion * inputs, stage.channels, stride, expands, adds))
            inputs = stage.channels
    return tuple(blocks)


def mobilenet_v2(
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["imagenet", "cifar", "tiny"] = "imagenet",
    windows: Sequence[int] | int = 3,
    expansions: Sequence[int] | int | None = None,
    depths: Sequence[int] | None = None,
    dropout: float = 0.2,
    activation: Literal["relu6", "relu"] = "relu6",
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> MobileNetV2:
    """MobileNetV2 of a form and width.

    Channels of stem and stages are multiplied by `width` and rounded with `round_channels`. As
    published, `last` keeps its 1280 channels at widths below 1.

    - "imagenet": as published; shrinks the image 32 times.
    - "cifar": the published stages, with stride 1 in the stem and in the second stage, as is common
      for 32 x 32 pixels; shrinks the image 8 times.
    - "tiny": ours, for 16 x 16 to 32 x 32 pixels on a CPU. A stem of 16 channels and seven blocks,
      the first four published stages with two blocks at most; shrinks the image 4 times. `last` has
      four times the channels of the last block, 256 at width 1, and follows the width.

    Args:
        num_classes: number of logits.
        width: multiplier of the channels, above 0.
        form: "imagenet", "cifar" or "tiny".
        windows: of the depthwise convolutions, odd: of every block, or one for all.
        expansions: of every block, or one for all; None: as published.
        depths: blocks of every stage; None: as published.
        dropout: rate before the head, in [0, 1).
        activation: "relu6" as published, or "relu"; see the module.
        dtype: type convolutions are computed in, e.g. bfloat16; see `MobileNetV2`.
        axis_name: mapped axis BatchNorm statistics are averaged over in training, or None.
        momentum: BatchNorm momentum.
        epsilon: BatchNorm epsilon.

    Raises:
        ValueError: unknown form or activation, or a width, rate or class count out of range;
            windows, expansions or depths of another number of blocks or stages.
    """
    check_options("MobileNetV2", form, FORMS, num_classes, width, dropout)
    check_activation("MobileNetV2", activation)
    stem_channels, stem_stride, published = FORMS[form]
    counts = per_stage("depths", depths, [stage.blocks for stage in published])
    stages = tuple(
        stage._replace(channels=round_channels(stage.channels * width), blocks=count)
        for stage, count in zip(published, counts)
    )
    last = round_channels(LAST_CHANNELS * max(1.0, width))
    stem_channels = round_channels(stem_channels * width)
    return MobileNetV2(
        blocks=blocks_of(stages, stem_channels, windows, expansions),
        stem_channels=stem_channels,
        stem_stride=stem_stride,
        last_channels=TINY_LAST_RATIO * stages[-1].channels if form == "tiny" else last,
        num_classes=num_classes,
        dropout=dropout,
        activation=activation,
        dtype=dtype,
        axis_name=axis_name,
        momentum=momentum,
        epsilon=epsilon,
    )
