"""The learned and remembered scales of a subnet, cut out of those of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.architecture.elastic import Elastic
from aqt_search.architecture.subnet_sites import subnet_sites


def cut_scales(net: Elastic, choices: np.ndarray, scales: Mapping[str, Any]) -> dict[str, Any]:
    """States of calibrations, {site: {"lhs" or "rhs" or "out": state}}, of the sites of a subnet.

    A state with a number for every channel has those of the channels that are left. Scales of
    blocks are refused by a `Space` with an elastic network.

    Args:
      net: the elastic network.
      choices: int [decisions], known numbers.
      scales: of the whole model, by its names; may be traced.
    """
    with jax.ensure_compile_time_eval():
        masks = jax.tree.map(np.asarray, net.active_elements(np.asarray(choices)))

    def cut(name: str, side: str, state: Any) -> Any:
        mask = masks[name][side]
        if mask is None:
            return state
        site = net.sites[name]
        shape = site.out_shape if side == "out" else getattr(site, side).shape
        return jax.tree.map(lambda leaf: _cut_leaf(leaf, shape, mask), state)

    return {
        name: {side: cut(name, side, state) for side, state in scales[name].items()}
        for name in subnet_sites(net, choices)
        if name in scales
    }


def _cut_leaf(leaf: jax.Array, shape: tuple[int, ...], mask: np.ndarray) -> jax.Array:
    """A leaf [..., *sizes of the axes, or 1]: what comes before, such as formats, is whole."""
    before = leaf.ndim - len(shape)
    for axis in range(len(shape) if before >= 0 else 0):
        if mask.shape[axis] > 1 and leaf.shape[before + axis] > 1:
            others = tuple(a for a in range(mask.ndim) if a != axis)
            leaf = jnp.take(leaf, np.flatnonzero(mask.any(axis=others)), axis=before + axis)
    return leaf
