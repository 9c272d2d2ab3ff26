"""Kernel matrices: a smaller window is a learned function of the middle of the next larger one.

    k5 = middle of k7, as 25 numbers, times M of 25 x 25;   k3 = middle of k5 times M of 9 x 9

for every channel alike, a matrix for each layer (Cai et al. 2020, arXiv 1908.09791, section 3.3).
With the identity, from which they start, a window is the middle of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from aqt_search.architecture.leaf_masks import LeafMask

Matrices = Mapping[str, Sequence[jax.Array]]  # by leaf, from the largest window down


def identity_matrices(masks: Mapping[str, LeafMask]) -> dict[str, tuple[jax.Array, ...]]:
    """The matrices of every leaf whose window is decided about: float32, [k * k, k * k]."""
    return {
        name: tuple(jnp.eye(size * size, dtype=jnp.float32) for size in _smaller(mask))
        for name, mask in masks.items()
        if mask.windows
    }


def chosen_kernel(
    leaf: jax.Array, mask: LeafMask, matrices: Sequence[jax.Array], choices: jax.Array
) -> jax.Array:
    """The kernel of a subnet, with zeros around its window; choices may be traced."""
    kernels = kernels_by_size(leaf, mask, matrices)
    ((_, (factor,)),) = mask.windows
    return jnp.stack([kernels[size] for size in factor.of_option.tolist()])[
        choices[factor.decision]
    ]


def kernels_by_size(
    leaf: jax.Array, mask: LeafMask, matrices: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """The kernels of all windows, in the shape of the leaf."""
    ((axes, _),) = mask.windows
    full = mask.shape[axes[0]]
    kernel = jnp.moveaxis(leaf, axes, (-2, -1))
    found, before = {full: leaf}, full
    for size, matrix in zip(_smaller(mask), matrices, strict=True):
        start = (before - size) // 2
        middle = kernel[..., start : start + size, start : start + size]
        flat = middle.reshape(*middle.shape[:-2], size * size)
        product = jnp.matmul(flat, matrix.astype(leaf.dtype), precision="highest")
        kernel, before = product.reshape(middle.shape), size
        border = (full - size) // 2
        padded = jnp.pad(kernel, [(0, 0)] * (leaf.ndim - 2) + [(border, border)] * 2)
        found[size] = jnp.moveaxis(padded, (-2, -1), axes)
    return found


def _smaller(mask: LeafMask) -> list[int]:
    """The windows below the largest, from the largest down."""
    ((axes, (factor,)),) = mask.windows
    return sorted({int(k) for k in factor.of_option if k < mask.shape[axes[0]]}, reverse=True)
