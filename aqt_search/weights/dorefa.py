"""DoReFa-Net's weights: companded by tanh before they are quantized (arXiv 1606.06160).

    model = companded_model(model, sites, ["conv/kernel"])
    weight = Quantizer("uint2", calibration=centred(fixed(1.0)), gradient=PASS_THROUGH)

The quantizer with 2^b levels between -1 and 1 and a gradient of 1 is the paper's quantize_k.
Companding is a function of the parameters, so `quantize`, `freeze` and `serve` fold it as they fold
any other on the way to a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from aqt_search.tracing.layers import check_whole
from aqt_search.tracing.sites import Site, SiteError, parameter_name


def companded(weight: jax.Array) -> jax.Array:
    """tanh(w) / max|tanh(w)|, in [-1, 1]; zeros stay zeros (section 2.3, equation 9)."""
    squashed = jnp.tanh(weight)
    largest = jnp.max(jnp.abs(squashed))
    return squashed / jnp.where(largest > 0, largest, 1)


@dataclasses.dataclass(frozen=True)
class CompandedModel:
    """A Flax model some of whose weights are companded on their way in."""

    model: Any
    parameters: frozenset[str]  # names of leaves

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model.init(*args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's, on companded weights."""

        def changed(path: tuple, leaf: Any) -> Any:
            return companded(leaf) if parameter_name(path) in self.parameters else leaf

        variables = jax.tree_util.tree_map_with_path(changed, variables)
        return self.model.apply(variables, *args, **kwargs)


def companded_model(model: Any, sites: Mapping[str, Site], names: Iterable[str]) -> CompandedModel:
    """The model with the weights of some of its sites companded.

    Raises:
      SiteError: a name that is no site, or one of a site without a weight.
    """
    check_whole(sites, "Companding")
    parameters = set()
    for name in names:
        weight = sites[name].weight if name in sites else None
        if weight is None or weight.parameter is None:
            raise SiteError(f"{name!r} is no site with a weight to compand.")
        parameters.add(weight.parameter)
    return CompandedModel(model, frozenset(parameters))
