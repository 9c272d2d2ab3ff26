"""MobileNetV3-Large and -Small in plain Flax Linen, ImageNet and CIFAR forms, and a tiny one.

Source: Howard et al. 2019 (arXiv 1905.02244), tables 1 and 2, section 6.1 for the BatchNorm
momentum and the dropout rate; BatchNorm's epsilon after the authors' published code.

Module names are part of the interface, as they become the names of quantization sites: `stem`,
`block{i}/expand`, `depthwise`, `squeeze`, `excite` and `project`, `last` (the 1x1 convolution after
the blocks), `hidden` (the dense layer after the mean over pixels), `head`. Blocks count from 1;
the first has no `expand`. `squeeze` and `excite` are Dense layers on the mean over pixels; they and
`hidden` have a bias. The BatchNorm of a convolution is named after it: `stem_bn`, `project_bn`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.blocks import per_block, per_stage
from aqt_search.models.channels import round_channels
from aqt_search.models.classifier import (
    batch_norm,
    check_images,
    check_options,
    head,
    pixel_mean,
)
from aqt_search.models.convolution import convolution


class Block(NamedTuple):
    """One inverted residual block."""

    window: int
    expanded: int  # channels of the depthwise convolution
    channels: int
    squeezed: bool | int  # channels of squeeze and excitation: True for a quarter of the expanded
    hard_swish: bool  # instead of relu
    stride: int
    # Whether a convolution makes the expanded channels, and whether the input is added to the
    # result; None: if they are not the input's, and if it has its shape.
    expands: bool | None = None
    adds: bool | None = None


class Variant(NamedTuple):
    """A network at width 1, with a stem of stride 2; in its CIFAR form it shrinks less."""

    blocks: tuple[Block, ...]
    last_channels: int
    hidden_channels: int
    forms: tuple[str, ...] = ("imagenet", "cifar")


def _stage(
    channels: int, inputs: int, squeezed: bool, hard_swish: bool, stride: int
) -> tuple[Block, ...]:
    """A stage of Once-for-all's largest subnet: four blocks of 7 x 7 windows and expansion 6."""
    first = Block(7, 6 * inputs, channels, squeezed, hard_swish, stride)
    return (first, *[first._replace(expanded=6 * channels, stride=1)] * 3)


VARIANTS = {
    "large": Variant((
        Block(3, 16, 16, False, False, 1),
        Block(3, 64, 24, False, False, 2),
        Block(3, 72, 24, False, False, 1),
        Block(5, 72, 40, True, False, 2),
        Block(5, 120, 40, True, False, 1),
        Block(5, 120, 40, True, False, 1),
        Block(3, 240, 80, False, True, 2),
        Block(3, 200, 80, False, True, 1),
        Block(3, 184, 80, False, True, 1),
        Block(3, 184, 80, False, True, 1),
        Block(3, 480, 112, True, True, 1),
        Block(3, 672, 112, True, True, 1),
        Block(5, 672, 160, True, True, 2),
        Block(5, 960, 160, True, True, 1),
        Block(5, 960, 160, True, True, 1),
    ), 960, 1280),
    "small": Variant((
        Block(3, 16, 16, True, False, 2),
        Block(3, 72, 24, False, False, 2),
        Block(3, 88, 24, False, False, 1),
        Block(5, 96, 40, True, True, 2),
        Block(5, 240, 40, True, True, 1),
        Block(5, 240, 40, True, True, 1),
        Block(5, 120, 48, True, True, 1),
        Block(5, 144, 48, True, True, 1),
        Block(5, 288, 96, True, True, 2),
        Block(5, 576, 96, True, True, 1),
        Block(5, 576, 96, True, True, 1),
    ), 576, 1024),
    "ofa": Variant((
        Block(3, 16, 16, False, False, 1),
        *_stage(24, 16, False, False, 2),
        *_stage(40, 24, True, False, 2),
        *_stage(80, 40, False, True, 2),
        *_stage(112, 80, True, True, 1),
        *_stage(160, 112, True, True, 2),
    ), 960, 1280),
    "tiny": Variant((
        Block(5, 16, 16, False, False, 1),
        Block(5, 96, 24, False, False, 1),
        Block(5, 144, 24, False, False, 1),
        Block(5, 144, 32, True, False, 2),
        Block(5, 192, 32, True, False, 1),
        Block(5, 192, 64, True, True, 1),
        Block(5, 384, 64, True, True, 1),
    ), 384, 256, forms=("tiny",)),
}  # fmt: skip
STEM_CHANNELS = 16
SQUEEZE_RATIO = 4


class InvertedResidual(nn.Module):
    """Inverted residual block, with squeeze and excitation where `block.squeezed`.

        h = act(depthwise(act(expand(x)))),  each convolution with its BatchNorm
        y = project(h * hard_sigmoid(excite(relu(squeeze(mean over pixels of h)))))

    act is hard-swish or relu; project is linear. Where `block.expanded` is the number of channels
    of x there is no expanding convolution. The result is x + y where the block has stride 1 and
    keeps the number of channels; else y. A block of its own may say otherwise.
    [batch, height, width, channels] to [batch, ceil(height / stride), ..., block.channels].
    """

    block: Block
    dtype: Any
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the block."""
        window, hidden, features, squeezed, hard_swish, stride, expands, adds = self.block
        conv = functools.partial(convolution, dtype=self.dtype)
        activation = nn.hard_swish if hard_swish else nn.relu
        x = inputs
        if hidden != x.shape[-1] if expands is None else expands:
            x = activation(self.norm(name="expand_bn")(conv(hidden, 1, name="expand")(x)))
        depthwise = conv(hidden, window, stride, groups=hidden, name="depthwise")
        x = activation(self.norm(name="depthwise_bn")(depthwise(x)))
        x = x * self._gate(x) if squeezed else x
        x = self.norm(name="project_bn")(conv(features, 1, name="project")(x))
        same = stride == 1 and inputs.shape[-1] == features
        return inputs + x if (same if adds is None else adds) else x

    def _gate(self, x: jax.Array) -> jax.Array:
        """The factor of each example and channel, [batch, 1, 1, channels], in [0, 1]."""
        channels, squeezed = x.shape[-1], self.block.squeezed
        if squeezed is True:
            squeezed = round_channels(channels // SQUEEZE_RATIO)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        gate = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
        gate = nn.relu(dense(squeezed, name="squeeze")(gate))
        return nn.hard_sigmoid(dense(channels, name="excite")(gate))


class MobileNetV3(nn.Module):
    """MobileNetV3; `mobilenet_v3` builds the named variants.

    `model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})`
    gives `(logits, updates)`; with train=False the logits alone, and no rngs are needed.

    Attributes:
        blocks: the blocks, in order.
        stem_channels: channels of the first convolution.
        stem_stride: its stride.
        last_channels: channels of the 1x1 convolution after the blocks.
        hidden_channels: features of the dense layer after the mean over pixels.
        num_classes: number of logits.
        dropout: rate before the head.
        dtype: type convolutions, dense layers but the head, and activations are computed in.
            Parameters, BatchNorm statistics, means over pixels and the head are float32 always.
        axis_name: mapped axis over which batch statistics are averaged in training.
        momentum: BatchNorm, r <- momentum * r + (1 - momentum) * batch statistic.
        epsilon: BatchNorm, added to the variance.
    """

    blocks: tuple[Block, ...]
    stem_channels: int
    stem_stride: int
    last_channels: int
    hidden_channels: int
    num_classes: int
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
            train: normalise with batch statistics and update the running ones; apply dropout.

        Returns:
            [batch, num_classes] float32.

        Raises:
            ValueError: images are not of rank 4.
        """
        check_images(images)
        norm = batch_norm(self, train)
        conv = functools.partial(convolution, dtype=self.dtype)
        x = conv(self.stem_channels, 3, self.stem_stride, name="stem")(images.astype(self.dtype))
        x = nn.hard_swish(norm(name="stem_bn")(x))
        for i, block in enumerate(self.blocks, start=1):
            x = InvertedResidual(block, self.dtype, norm, name=f"block{i}")(x)
        x = nn.hard_swish(norm(name="last_bn")(conv(self.last_channels, 1, name="last")(x)))
        features = pixel_mean(x)
        hidden = nn.Dense(self.hidden_channels, dtype=self.dtype, name="hidden")
        features = nn.hard_swish(hidden(features))
        return head(features, self.num_classes, dropout=self.dropout, train=train)


def _stages(blocks: tuple[Block, ...]) -> list[list[Block]]:
    """Blocks by stage: in a row, with the same number of channels."""
    return [list(stage) for _, stage in itertools.groupby(blocks, lambda b: b.channels)]


def _chosen_blocks(
    blocks: tuple[Block, ...],
    windows: Sequence[int] | int | None,
    expansions: Sequence[int] | int | None,
    depths: Sequence[int] | None,
) -> tuple[Block, ...]:
    """The first blocks of every stage, with windows and expansions of their own."""
    stages = _stages(blocks)
    counts = per_stage("depths", depths, [len(stage) for stage in stages])
    longer = [
        [*stage, *[stage[-1]._replace(stride=1)] * count] for stage, count in zip(stages, counts)
    ]
    kept = [block for stage, count in zip(longer, counts) for block in stage[:count]]
    if windows is not None:
        sizes = per_block("windows", windows, len(kept))
        kept = [block._replace(window=size) for block, size in zip(kept, sizes)]
    if expansions is not None:
        ratios = per_block("expansions", expansions, len(kept))
        inputs = [STEM_CHANNELS, *(block.channels for block in kept)]
        kept = [b._replace(expanded=r * n) for b, r, n in zip(kept, ratios, inputs)]
    return tuple(kept)


def _scaled_blocks(blocks: tuple[Block, ...], width: float, form: str) -> tuple[Block, ...]:
    """Blocks at a width; in the CIFAR form the first that has a stride above 1 loses it.

    The factor by which a block expands its input is that of width 1.
    """
    first_strided = next(i for i, block in enumerate(blocks) if block.stride > 1)
    inputs, scaled_inputs = STEM_CHANNELS, round_channels(STEM_CHANNELS * width)
    scaled = []
    for i, block in enumerate(blocks):
        channels = round_channels(block.channels * width)
        expanded = round_channels(block.expanded * scaled_inputs / inputs)
        stride = 1 if form == "cifar" and i == first_strided else block.stride
        scaled.append(block._replace(expanded=expanded, channels=channels, stride=stride))
        inputs, scaled_inputs = block.channels, channels
    return tuple(scaled)


def mobilenet_v3(
    variant: str,
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["imagenet", "cifar", "tiny"] = "imagenet",
    windows: Sequence[int] | int | None = None,
    expansions: Sequence[int] | int | None = None,
    depths: Sequence[int] | None = None,
    dropout: float = 0.2,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
) -> MobileNetV3:
    """MobileNetV3 of a variant and width.

    Channels of stem, blocks and `last` are multiplied by `width` and rounded with `round_channels`.
    A block expands the rounded channels of its input by the published factor, and squeezes to a
    quarter of that, both rounded too. As published, `hidden` keeps its features (1280 of the large,
    1024 of the small variant) at widths below 1.

    The ImageNet form shrinks the image 32 times. The CIFAR form, ours, shrinks it 8 times: its stem
    and the first block that has stride 2 in the ImageNet form have stride 1. That is block 2 of the
    large variant, and block 1 of the small one. The tiny variant has the form "tiny" alone, which
    shrinks the image 4 times.

    Args:
        variant: "large" or "small"; "ofa" is the largest subnet of Once-for-all (Cai et al. 2020,
            arXiv 1908.09791): 7 x 7 windows, expansions of 6 and four blocks in each stage. "tiny"
            is ours, for 16 x 16 to 32 x 32 pixels on a CPU: the stages of MobileNetV2's form of
            that name, 5 x 5 windows.
        num_classes: number of logits.
        width: multiplier of the channels, above 0.
        form: "imagenet" for large images, "cifar" for small ones; "tiny" of the tiny variant.
        windows: of the depthwise convolutions, odd: of every block, or one for all; None: as
            published.
        expansions: of every block, or one for all: channels of the depthwise convolution to those
            of the block's input at width 1. None: as published.
        depths: blocks of every stage (blocks in a row with the same channels); None: as published.
        dropout: rate before the head, in [0, 1).
        dtype: type convolutions are computed in, e.g. bfloat16; see `MobileNetV3`.
        axis_name: mapped axis BatchNorm statistics are averaged over in training, or None.
        momentum: BatchNorm momentum; 0.99 takes some hundred steps to forget its start.
        epsilon: BatchNorm epsilon.

    Raises:
        ValueError: unknown variant or form, or a width, rate or class count out of range;
            windows, expansions or depths of another number of blocks or stages.
    """
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise ValueError(f"unknown MobileNetV3 variant {variant!r}; known variants: {known}")
    published, last_channels, hidden_channels, forms = VARIANTS[variant]
    check_options(f"MobileNetV3-{variant}", form, forms, num_classes, width, dropout)
    blocks = _chosen_blocks(published, windows, expansions, depths)
    return MobileNetV3(
        blocks=_scaled_blocks(blocks, width, form),
        stem_channels=round_channels(STEM_CHANNELS * width),
        stem_stride=1 if form == "cifar" else 2,
        last_channels=round_channels(last_channels * width),
        hidden_channels=round_channels(hidden_channels * max(1.0, width)),
        num_classes=num_classes,
        dropout=dropout,
        dtype=dtype,
        axis_name=axis_name,
        momentum=momentum,
        epsilon=epsilon,
    )
