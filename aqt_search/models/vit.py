"""Vision transformers in plain Flax Linen: ViT, and DeiT without its distillation token.

Sources: Dosovitskiy et al. 2020 (arXiv 2010.11929) for the architecture; Touvron et al. 2020
(arXiv 2012.12877) for the sizes Ti, S and B and for stochastic depth.

Module names are part of the interface, as they become the names of quantization sites: `stem` (the
patch embedding, a convolution), `block{i}/query`, `key`, `value` and `out` (attention, four Dense
layers), `block{i}/up` and `down` (MLP), `head`. Blocks count from 1. The two products of attention
have no weights and are named by their place: `ViT/block{i}/scores/dot_general` (queries by keys)
and `ViT/block{i}/mix/dot_general` (attention weights, which are never negative, by values). Costs
without attention products, as FLIQS gives them, are those of the sites that have a weight.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_search.models.classifier import check_images, check_options
from aqt_search.models.stochastic_depth import StochasticDepth, check_rate


class Size(NamedTuple):
    """Dimensions of a named transformer; it has heads * head_channels channels."""

    heads: int
    head_channels: int
    blocks: int


# "ti", "s" and "b" are DeiT's; "tiny" is ours, for small images, and is not DeiT-Ti.
SIZES = {
    "ti": Size(3, 64, 12),
    "s": Size(6, 64, 12),
    "b": Size(12, 64, 12),
    "tiny": Size(3, 32, 6),
}
FORM_SIZES = {"imagenet": ("ti", "s", "b"), "cifar": ("ti", "s", "b", "tiny")}
FORM_PATCHES = {"imagenet": 16, "cifar": 4}
MLP_EXPANSION = 4
EPSILON = 1e-6
_EMBEDDING_INIT = nn.initializers.normal(0.02)


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    """Dense layer with bias."""
    kernel_init = nn.initializers.xavier_uniform()
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(query key^T / sqrt(channels)) value over all tokens, for every head.

    All of shape [batch, tokens, heads, channels], as is the result. The softmax is float32.
    """
    query = query / math.sqrt(query.shape[-1])
    # dot_general and not einsum, which adds its subscripts to the scope and swaps operands.
    with jax.named_scope("scores"):
        scores = jax.lax.dot_general(query, key, (((3,), (3,)), ((0, 2), (0, 2))))
    weights = nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
    with jax.named_scope("mix"):
        mixed = jax.lax.dot_general(weights, value, (((3,), (1,)), ((0, 1), (0, 2))))
    return mixed.transpose(0, 2, 1, 3)


class TransformerBlock(nn.Module):
    """x = x + attention(norm(x)); x = x + MLP(norm(x)), on tokens [batch, tokens, channels].

    In training each of the two branches is left out per example at the rate `stochastic_depth`.
    """

    heads: int
    stochastic_depth: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Apply the block."""
        channels = tokens.shape[-1]
        norm = functools.partial(nn.LayerNorm, epsilon=EPSILON, dtype=self.dtype)
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)

        x = norm(name="norm1")(tokens)
        heads = (*tokens.shape[:2], self.heads, channels // self.heads)
        names = ("query", "key", "value")
        x = _attention(*(_dense(channels, self.dtype, n)(x).reshape(heads) for n in names))
        x = dropout()(_dense(channels, self.dtype, "out")(x.reshape(tokens.shape)))
        tokens = tokens + StochasticDepth(self.stochastic_depth)(x, train)

        x = norm(name="norm2")(tokens)
        x = nn.gelu(_dense(channels * MLP_EXPANSION, self.dtype, "up")(x), approximate=False)
        x = dropout()(_dense(channels, self.dtype, "down")(dropout()(x)))
        return tokens + StochasticDepth(self.stochastic_depth)(x, train)


class ViT(nn.Module):
    """Vision transformer that classifies by a class token; `vit` and `deit` build the named sizes.

    In training, `dropout` or `stochastic_depth` above 0 need `rngs={"dropout": key}`.

    Attributes:
        channels: channels of a token, a multiple of heads.
        heads: attention heads.
        blocks: transformer blocks.
        patch: height and width in pixels of the patches that become tokens.
        num_classes: number of logits.
        stochastic_depth: rate at which the last block's branches are left out; the rates of the
            blocks before rise linearly from 0 at the first.
        dropout: rate after the position embedding, the GELU, and each branch.
        dtype: type products and activations are computed in. Parameters, the softmax, LayerNorm's
            statistics and the head are float32 always.
    """

    channels: int
    heads: int
    blocks: int
    patch: int
    num_classes: int
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images.

        Args:
            images: [batch, height, width, channels], any float dtype, of the size that the model
                was initialised with.
            train: apply dropout and stochastic depth.

        Returns:
            [batch, num_classes] float32.

        Raises:
            ValueError: images are not of rank 4, do not divide into patches, or have another size
                than at initialisation.
        """
        tokens = self._embed(images)
        tokens = nn.Dropout(self.dropout, deterministic=not train)(tokens)
        for i in range(self.blocks):
            rate = self.stochastic_depth * i / max(1, self.blocks - 1)
            block = TransformerBlock(
                self.heads, rate, self.dropout, self.dtype, name=f"block{i + 1}"
            )
            tokens = block(tokens, train)
        features = tokens[:, 0].astype(jnp.float32)
        features = nn.LayerNorm(epsilon=EPSILON, name="norm")(features)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(features)

    def _embed(self, images: jax.Array) -> jax.Array:
        """Class token and patches [batch, 1 + patches, channels], with their positions added."""
        self._check_images(images)
        size = (self.patch, self.patch)
        embed = nn.Conv(
            self.channels, size, strides=size, padding="VALID", dtype=self.dtype, name="stem"
        )
        patches = embed(images.astype(self.dtype))
        patches = patches.reshape(patches.shape[0], -1, self.channels)
        start = self.param("class_token", nn.initializers.zeros, (1, 1, self.channels))
        start = jnp.broadcast_to(start, (patches.shape[0], 1, self.channels))
        tokens = jnp.concatenate([start.astype(self.dtype), patches], axis=1)
        position = self.param("position", _EMBEDDING_INIT, (1, *tokens.shape[1:]))
        return tokens + position.astype(self.dtype)

    def _check_images(self, images: jax.Array) -> None:
        check_images(images)
        height, width = images.shape[1:3]
        if not (height and width) or height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height} x {width} pixels do not divide into patches of "
                f"{self.patch} x {self.patch}; resize them or choose another patch"
            )
        tokens = 1 + (height // self.patch) * (width // self.patch)
        position = self.get_variable("params", "position")
        if position is not None and position.shape[1] != tokens:
            raise ValueError(
                f"images of {height} x {width} pixels make {tokens} tokens, but the position "
                f"embedding has {position.shape[1]}; resize the images to the size that the model "
                "was initialised with, or initialise it with this one"
            )


def vit(
    size: str,
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["imagenet", "cifar"] = "imagenet",
    patch: int | None = None,
    stochastic_depth: float = 0.0,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> ViT:
    """ViT of a named size; the image's size is the one the model is initialised with.

    | size | heads x channels each | blocks | million parameters (224, patch 16, 1000 classes) |
    |---|---|---|---|
    | "ti" | 3 x 64 | 12 | 5.72 |
    | "s" | 6 x 64 | 12 | 22.05 |
    | "b" | 12 x 64 | 12 | 86.57 |
    | "tiny" (ours, CIFAR form only) | 3 x 32 | 6 | |

    Args:
        size: a name in the table. DeiT-Ti, which others call tiny, is "ti".
        num_classes: number of logits.
        width: multiplier of the heads, which is rounded to a whole number of at least 1 (half to
            even); channels follow, as a head keeps its own.
        form: "imagenet", patches of 16 pixels; or "cifar", patches of 4 for small images.
        patch: height and width of a patch in pixels, instead of the form's.
        stochastic_depth: rate at the last block, in [0, 1); see `ViT`.
        dropout: dropout rate, in [0, 1).
        dtype: type products are computed in, e.g. bfloat16; see `ViT`.

    Raises:
        ValueError: unknown size or form, or a width, patch, rate or class count out of range.
    """
    check_options("ViT", form, FORM_SIZES, num_classes, width, dropout)
    if size not in FORM_SIZES[form]:
        known = "; ".join(f"{f}: {', '.join(sizes)}" for f, sizes in FORM_SIZES.items())
        raise ValueError(
            f"no ViT of size {size!r} in the {form} form; known sizes: {known} (DeiT-Ti is ti)"
        )
    patch = FORM_PATCHES[form] if patch is None else patch
    if patch < 1:
        raise ValueError(f"patch is {patch!r}; expected at least 1 pixel, such as 4 or 16")
    check_rate("stochastic_depth", stochastic_depth)
    heads = max(1, round(SIZES[size].heads * width))
    return ViT(
        channels=heads * SIZES[size].head_channels,
        heads=heads,
        blocks=SIZES[size].blocks,
        patch=patch,
        num_classes=num_classes,
        stochastic_depth=stochastic_depth,
        dropout=dropout,
        dtype=dtype,
    )


def deit(
    size: str,
    num_classes: int,
    *,
    width: float = 1.0,
    form: Literal["imagenet", "cifar"] = "imagenet",
    patch: int | None = None,
    stochastic_depth: float = 0.1,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> ViT:
    """`vit` with DeiT's regularisation: stochastic depth 0.1 at the last block, no dropout.

    The architecture is DeiT's without the distillation token. Arguments and errors are `vit`'s.
    """
    return vit(
        size,
        num_classes,
        width=width,
        form=form,
        patch=patch,
        stochastic_depth=stochastic_depth,
        dropout=dropout,
        dtype=dtype,
    )
