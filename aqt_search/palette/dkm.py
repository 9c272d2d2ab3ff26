"""Differentiable k-means (DKM: Cho et al. 2022, arXiv 2108.12659): palettes that are learned.

    palettes = differentiable_palettes(sites, [("head", None), (".*", Palette(bits=2))])
    centroids = palettes.init(params)                                  # by k-means
    soft, centroids = palettes.apply(params, centroids, temperature)   # in every training step
    logits = apply(soft, x)                                            # differentiate in params
    paletted = palettize(params, sites, rules, centroids=centroids)    # what is stored

With u = w / rms(w) of a layer, c in the same units, and a temperature t (section 3.2):

    a_ij = softmax_j(-||u_i - c_j||^2 / t)         the share of centroid j in vector i
    c_j <- sum_i a_ij u_i / sum_i a_ij             a few times
    soft_i = sum_j a_ij c_j

The paper asks for a differentiable distance; the square of the Euclidean one has a
derivative where a weight meets its centroid, too, and makes the iterations those of EM. The rms,
which makes one temperature serve layers of all scales, is taken as a constant in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.palette.kmeans import kmeans
from aqt_search.palette.rules import (
    PaletteError,
    PaletteSpec,
    as_vectors,
    replace_weights,
    select_weights,
    weight_leaves,
)
from aqt_search.palette.soft_kmeans import soft_copies
from aqt_search.tracing.sites import Site

Centroids = dict[str, jax.Array]  # [copies, k, dimension], float32, by site


class DifferentiablePalettes(NamedTuple):
    """Soft clustering of a model's weights; params as `find_sites` was given them, or "params"."""

    init: Callable[[Any], Centroids]  # not traced
    # (params, centroids, temperature) -> (soft params, centroids to go on from)
    apply: Callable[[Any, Centroids, jax.typing.ArrayLike], tuple[Any, Centroids]]


def _root_mean_square(vectors: jax.Array) -> jax.Array:
    """Of each copy of [copies, n, d], float32; 1 for zeros. Squares neither overflow nor vanish."""
    largest = jnp.max(jnp.abs(vectors), (1, 2)).astype(jnp.float32)
    largest = jnp.where(largest > 0, largest, 1.0)
    square = jnp.mean(jnp.square(vectors / largest[:, None, None]), (1, 2))
    return largest * jnp.sqrt(jnp.where(square > 0, square, 1.0))


def differentiable_palettes(
    sites: Mapping[str, Site],
    rules: Iterable[tuple[str, PaletteSpec]],
    *,
    iterations: int = 3,
    seed: int = 0,
) -> DifferentiablePalettes:
    """Soft clustering of the weights that rules choose.

    Each step goes on from the centroids of the one before, taken as constants, so few iterations
    are enough (the paper has up to 5). A temperature of 0.01 to 0.1 leaves most weights near one
    centroid; lower it in the course of training for weights that lose nothing when they are stored.

    Args:
      sites: as `find_sites` returns them.
      rules: as for `select_weights`.
      iterations: of the centroids, at least 1.
      seed: of the first centroids, those of `kmeans`.

    Raises:
      RuleError: as `select_weights`.
      PaletteError: iterations below 1; `init` raises it as `palettize`.
    """
    if iterations < 1:
        raise PaletteError(f"DKM takes at least 1 iteration; got {iterations}.")
    chosen = select_weights(sites, rules)

    def init(params: Any) -> Centroids:
        leaves = weight_leaves(params, chosen)
        found = {}
        for name, weight in chosen.items():
            layers = np.asarray(as_vectors(leaves[name], weight), np.float32)
            start = [kmeans(v, weight.palette.clusters, seed=seed, name=name) for v in layers]
            found[name] = jnp.stack([c.centroids for c in start])
        return found

    def apply(params: Any, centroids: Centroids, temperature) -> tuple[Any, Centroids]:
        leaves, start = weight_leaves(params, chosen), jax.lax.stop_gradient(centroids)
        sharpness = 1 / jnp.asarray(temperature, jnp.float32)
        soft, moved = {}, {}
        for name, weight in chosen.items():
            vectors = as_vectors(leaves[name], weight)
            scale = jax.lax.stop_gradient(_root_mean_square(vectors))
            units = scale[:, None, None]
            found, new = soft_copies(vectors, scale, start[name] / units, sharpness, iterations)
            soft[name], moved[name] = found.reshape(leaves[name].shape), new * units
        return replace_weights(params, chosen, soft), jax.lax.stop_gradient(moved)

    return DifferentiablePalettes(init, apply)


def soft_apply(fun: Callable, palettes: DifferentiablePalettes) -> Callable:
    """`soft(variables, centroids, temperature, *args, **kwargs) -> (result, centroids)`.

    `fun(variables, *args, **kwargs)` on soft weights, for a training step; the model is not
    touched. Parallel replicas that have equal weights find equal centroids.
    """

    def soft(variables: Any, centroids: Centroids, temperature, *args: Any, **kwargs: Any):
        weights, centroids = palettes.apply(variables, centroids, temperature)
        return fun(weights, *args, **kwargs), centroids

    return soft
