"""Residual networks in plain Flax Linen, CIFAR and ImageNet forms.

Sources: He et al. 2015 (arXiv 1512.03385) for both forms; stride in the 3x3 convolution of a
bottleneck ("v1.5") and a zero last BatchNorm scale after Goyal et al. 2017 (arXiv 1706.02677).

Module names are part of the interface, as they become the names of quantization sites:
`stem`, `stage{i}_block{j}/conv{k}`, `stage{i}_block{j}/shortcut`, `head`; each convolution's
BatchNorm is `stem_bn`, `bn{k}` or `shortcut_bn`. Stages, blocks and convolutions count from 1.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.classifier import batch_norm, check_images, check_options, pixel_mean
from aqt_search.models.convolution import convolution

# depth -> residual blocks in each stage
CIFAR_STAGES = {8: (1, 1, 1), 20: (3, 3, 3), 32: (5, 5, 5), 56: (9, 9, 9)}
IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    29: (2, 2, 3, 2),  # of the Pareto-ResNet paper (arXiv 2105.03536), as 200
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
BOTTLENECK_DEPTHS = (29, 50, 101, 152, 200)
BOTTLENECK_EXPANSION = 4
CIFAR_FILTERS = 16
IMAGENET_FILTERS = 64


class ResidualBlock(nn.Module):
    """relu(residual(x) + shortcut(x)); the residual is zero at initialisation.

    Residual of a basic block: 3x3, 3x3. Of a bottleneck block: 1x1, 3x3, 1x1 with four times as
    many channels at the end. The shortcut is x, or a 1x1 convolution with BatchNorm where the
    shape changes. [batch, height, width, channels] to [batch, ceil(height / stride), ..., out].
    """

    features: int
    stride: int
    bottleneck: bool
    dtype: Any
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the block."""
        if self.bottleneck:
            out = self.features * BOTTLENECK_EXPANSION
            layers = ((self.features, 1, 1), (self.features, 3, self.stride), (out, 1, 1))
        else:
            out = self.features
            layers = ((self.features, 3, self.stride), (out, 3, 1))
        residual = inputs
        for k, (features, window, stride) in enumerate(layers, start=1):
            last = k == len(layers)
            scale_init = nn.initializers.zeros if last else nn.initializers.ones
            conv = convolution(features, window, stride, dtype=self.dtype, name=f"conv{k}")
            residual = self.norm(name=f"bn{k}", scale_init=scale_init)(conv(residual))
            residual = residual if last else nn.relu(residual)
        shortcut = inputs
        if inputs.shape != residual.shape:
            conv = convolution(out, 1, self.stride, dtype=self.dtype, name="shortcut")
            shortcut = self.norm(name="shortcut_bn")(conv(inputs))
        return nn.relu(residual + shortcut)


class ResNet(nn.Module):
    """Residual network; `resnet` builds the named depths.

    `model.apply(variables, images, train=True, mutable=["batch_stats"])` gives
    `(logits, updates)`; with train=False the logits alone.

    Attributes:
        stage_sizes: residual blocks in each stage; all stages but the first halve the image.
        stage_filters: channels of each stage, before the bottleneck's factor of four.
        stem_filters: channels of the first convolution.
        num_classes: number of logits.
        bottleneck: bottleneck blocks instead of basic ones.
        imagenet_stem: 7x7 stride 2 and max pool 3x3 stride 2 instead of 3x3 stride 1.
        dtype: type convolutions and activations are computed in. Parameters, BatchNorm
            statistics, the mean over pixels and the head are float32 always.
        axis_name: mapped axis over which batch statistics are averaged in training, so that all
            replicas normalise alike and hold the same running statistics.
        momentum: BatchNorm, r <- momentum * r + (1 - momentum) * batch statistic.
        epsilon: BatchNorm, added to the variance.
    """

    stage_sizes: tuple[int, ...]
    stage_filters: tuple[int, ...]
    stem_filters: int
    num_classes: int
    bottleneck: bool = False
    imagenet_stem: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images.

        Args:
            images: [batch, height, width, channels], any float dtype.
            train: normalise with batch statistics, and update the running ones.

        Returns:
            [batch, num_classes] float32.

        Raises:
            ValueError: images are not of rank 4.
        """
        check_images(images)
        norm = batch_norm(self, train)
        x = self._stem(images.astype(self.dtype), norm)
        for i, (blocks, filters) in enumerate(zip(self.stage_sizes, self.stage_filters), start=1):
            for j in range(1, blocks + 1):
                stride = 2 if i > 1 and j == 1 else 1
                name = f"stage{i}_block{j}"
                block = ResidualBlock(filters, stride, self.bottleneck, self.dtype, norm, name=name)
                x = block(x)
        features = pixel_mean(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(features)

    def _stem(self, images: jax.Array, norm: Callable[..., nn.Module]) -> jax.Array:
        """First convolution, its BatchNorm and relu, and the max pool of the ImageNet form."""
        window, stride = (7, 2) if self.imagenet_stem else (3, 1)
        conv = convolution(self.stem_filters, window, stride, dtype=self.dtype, name="stem")
        x = nn.relu(norm(name="stem_bn")(conv(images)))
        if self.imagenet_stem:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x


def resnet(
    depth: int,
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["cifar", "imagenet"] = "cifar",
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> ResNet:
    """ResNet of a published depth.

    CIFAR form: 3x3 stem, stages of 16, 32 and 64 channels, basic blocks, a 1x1 projection where
    the shape changes; `width` multiplies stem and stages. ImageNet form: 7x7 stride 2 stem of 64
    channels at every width, max pool, stages of 64, 128, 256 and 512 channels times `width`,
    basic (18, 34) or bottleneck blocks (the others). Channels are rounded to whole numbers.

    Args:
        depth: 8, 20, 32, 56 (CIFAR form) or 18, 29, 34, 50, 101, 152, 200 (ImageNet form).
        num_classes: number of logits.
        width: multiplier of the channels, above 0.
        form: "cifar" for small images, "imagenet" for large ones.
        dtype: type convolutions are computed in, e.g. bfloat16; see `ResNet`.
        axis_name: mapped axis BatchNorm statistics are averaged over in training, or None.
        momentum: BatchNorm momentum.
        epsilon: BatchNorm epsilon.

    Raises:
        ValueError: unknown depth or form, or a width or class count that is not above 0.
    """
    stages = {"cifar": CIFAR_STAGES, "imagenet": IMAGENET_STAGES}
    check_options("ResNet", form, stages, num_classes, width)
    if depth not in stages[form]:
        known = "; ".join(f"{f}: {', '.join(map(str, sizes))}" for f, sizes in stages.items())
        raise ValueError(f"no ResNet of depth {depth!r} in the {form} form; known depths: {known}")
    imagenet = form == "imagenet"
    sizes = stages[form][depth]
    first = IMAGENET_FILTERS if imagenet else CIFAR_FILTERS
    filters = tuple(max(1, round(first * width * 2**i)) for i in range(len(sizes)))
    return ResNet(
        stage_sizes=sizes,
        stage_filters=filters,
        stem_filters=IMAGENET_FILTERS if imagenet else filters[0],
        num_classes=num_classes,
        bottleneck=depth in BOTTLENECK_DEPTHS,
        imagenet_stem=imagenet,
        dtype=dtype,
        axis_name=axis_name,
        momentum=momentum,
        epsilon=epsilon,
    )
