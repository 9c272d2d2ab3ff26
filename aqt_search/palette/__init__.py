"""Palettization: weights stored as indices into a small table of values or vectors.

    rules = [("head", Palette(bits=4)), (".*", Palette(bits=2))]
    paletted = palettize(params, sites, rules)          # k-means; or DKM's, centroids=...
    logits = serve(apply)(paletted, x)                  # through the same function
    save(path, paletted); paletted = load(path)

What is stored is a pytree as the parameters are, with a `PalettedTensor` in place of each weight
that has a palette.
"""

from aqt_search.palette.dkm import (
    DifferentiablePalettes,
    differentiable_palettes,
    soft_apply,
)
from aqt_search.palette.file import encoded, load, save
from aqt_search.palette.huffman import huffman_bits, huffman_lengths
from aqt_search.palette.kmeans import Clusters, kmeans
from aqt_search.palette.rules import Palette, PaletteError
from aqt_search.palette.soft_kmeans import soft_clusters
from aqt_search.palette.storage import (
    PalettedTensor,
    dequantized,
    palettize,
    serve,
    tree_nbytes,
)

__all__ = [
    "Clusters",
    "DifferentiablePalettes",
    "Palette",
    "PaletteError",
    "PalettedTensor",
    "dequantized",
    "differentiable_palettes",
    "encoded",
    "huffman_bits",
    "huffman_lengths",
    "kmeans",
    "load",
    "palettize",
    "save",
    "serve",
    "soft_apply",
    "soft_clusters",
    "tree_nbytes",
]
