"""Weights as packed indices and a palette, and serving from them.

paletted = palettize(params, sites, [("head", None), (".*", Palette(bits=2))])
logits = serve(apply)(paletted, x)                  # through the same function
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.numerics.qtensor import pack_codes, unpack_codes
from aqt_search.palette.huffman import huffman_bits
from aqt_search.palette.kmeans import check_finite, kmeans, nearest
from aqt_search.palette.rules import (
    ClusteredWeight,
    PaletteError,
    PaletteSpec,
    as_vectors,
    replace_weights,
    select_weights,
    weight_leaves,
)
from aqt_search.tracing.signature import named_after
from aqt_search.tracing.sites import Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PalettedTensor:
    """A tensor whose vectors of `dimension` neighbours are rows of a table: x = palette[index].

    Stacked layers, `copies` of them, have a palette each.
    """

    # uint8 [copies, ceil(n * bits / 8)]: the n indices of each layer, packed as in a `QTensor`.
    data: jax.Array | np.ndarray
    palette: jax.Array | np.ndarray  # [copies, k, dimension], of `dtype`
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})  # of an index

    @property
    def dtype(self) -> np.dtype:
        """Of the tensor that it stands for."""
        return self.palette.dtype

    @property
    def dimension(self) -> int:
        """Weights that share an index."""
        return self.palette.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed indices and the palette."""
        return self.data.nbytes + self.palette.nbytes

    def indices(self) -> jax.Array:
        """The indices [copies, n], uint8."""
        count = math.prod(self.shape) // (self.data.shape[0] * self.dimension)
        return unpack_codes(jnp.asarray(self.data), self.bits, count)

    def dequantize(self) -> jax.Array:
        """The tensor, of the original shape and dtype."""
        rows = jax.vmap(lambda palette, index: palette[index.astype(jnp.int32)])
        return rows(self.palette, self.indices()).reshape(self.shape)

    def huffman_nbytes(self) -> int:
        """Bytes if the indices were Huffman-coded: words, table of lengths (`huffman`), palette."""
        counts = np.bincount(np.asarray(self.indices()).ravel(), minlength=self.palette.shape[1])
        return math.ceil(huffman_bits(counts) / 8) + self.palette.nbytes


def _is_paletted(node: Any) -> bool:
    return isinstance(node, PalettedTensor)


def dequantized(params: Any) -> Any:
    """The tree with every `PalettedTensor` in it as an array."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if _is_paletted(leaf) else leaf,
        params, is_leaf=_is_paletted,
    )  # fmt: skip


def serve(fun: Callable) -> Callable:
    """Returns `served(params, *args, **kwargs)`: `fun` on weights that are stored with palettes.

    It computes `fun(dequantized(params), *args)`, the same bits. Under jit the indices and palettes
    are what is passed in and kept; a weight exists for as long as the product that reads it.
    """

    @named_after(fun, "params")
    def served(params: Any, *args: Any, **kwargs: Any) -> Any:
        return fun(dequantized(params), *args, **kwargs)

    return served


def tree_nbytes(params: Any) -> int:
    """Bytes of all arrays of a tree, as they are stored."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def palettize(
    params: Any,
    sites: Mapping[str, Site],
    rules: Iterable[tuple[str, PaletteSpec]],
    *,
    centroids: Mapping[str, jax.Array] | None = None,
    seed: int = 0,
    restarts: int = 3,
    iterations: int = 100,
) -> Any:
    """Stores the weights that rules choose as indices of their nearest centroids.

    Clustering runs on the host and the default device, layer by layer, and cannot be traced.

    Args:
      params: as `find_sites` was given them, or their "params".
      sites: as `find_sites` returns them.
      rules: as for `select_weights`.
      centroids: [copies, k, dimension] by site, as `differentiable_palettes` learns them; None:
        those of `kmeans`.
      seed, restarts, iterations: as for `kmeans`.

    Returns:
      A tree like `params` with a `PalettedTensor` in place of every chosen weight.

    Raises:
      RuleError: as `select_weights`.
      PaletteError: a site has more clusters than distinct weights (as where they are constant), a
        NaN or infinite weight, or a dimension that does not divide them; centroids that are not of
        these rules.
    """
    chosen = select_weights(sites, rules)
    leaves = weight_leaves(params, chosen)
    if centroids is not None:
        _check_centroids(centroids, chosen)
    stored = {}
    for name, weight in chosen.items():
        layers = np.asarray(as_vectors(leaves[name], weight), np.float32)
        check_finite(layers, name)
        if centroids is None:
            options = {"seed": seed, "restarts": restarts, "iterations": iterations, "name": name}
            found = [kmeans(v, weight.palette.clusters, **options).centroids for v in layers]
            palette = np.stack(found)
        else:
            palette = np.asarray(centroids[name])
        # Rounded to the weight's dtype first: the nearest are those of what is stored.
        palette = np.asarray(jnp.asarray(palette, leaves[name].dtype))
        indices = [nearest(v, c) for v, c in zip(layers, palette.astype(np.float32))]
        stored[name] = PalettedTensor(
            pack_codes(jnp.stack(indices), weight.palette.bits),
            jnp.asarray(palette),
            leaves[name].shape,
            weight.palette.bits,
        )
    return replace_weights(params, chosen, stored)


def _check_centroids(
    centroids: Mapping[str, jax.Array], chosen: Mapping[str, ClusteredWeight]
) -> None:
    for name in sorted(set(centroids) ^ set(chosen)):
        where = "the rules, not the centroids" if name in chosen else "the centroids, not the rules"
        raise PaletteError(f"Site {name!r} is only in {where}: give those of the same rules.")
    for name, (_, copies, palette) in chosen.items():
        expected = (copies, palette.clusters, palette.dimension)
        if jnp.shape(centroids[name]) != expected:
            raise PaletteError(
                f"Site {name!r}: centroids of shape {jnp.shape(centroids[name])}; expected"
                f" {expected} by its rule."
            )
        if not np.isfinite(np.asarray(centroids[name], np.float32)).all():
            raise PaletteError(f"Site {name!r}: a centroid is NaN or infinite; train it again.")
