"""Tracing: a function of parameters and data as a jaxpr, with its sites."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

from aqt_search.tracing.control_flow import Path
from aqt_search.tracing.liveness import used_equations
from aqt_search.tracing.sites import Site, SiteError, analyze, parameter_name


class Trace(NamedTuple):
    """A traced function."""

    closed: jex_core.ClosedJaxpr
    inputs: list[Any]  # the array leaves of params and data, in the jaxpr's order
    out_tree: jax.tree_util.PyTreeDef
    sites: dict[str, Site]
    site_paths: dict[Path, str]
    parameters: dict[str, bool]  # by name, whether the function reads them


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; others stay Python values."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def trace_function(
    fun: Callable, params: Any, args: tuple, kwargs: dict, axis_sizes: Mapping[Hashable, int]
) -> Trace:
    """Traces `fun(params, *args, **kwargs)`; leaves that are no arrays stay Python values."""
    paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path((params, args, kwargs))
    leaves = [leaf for _, leaf in paths_and_leaves]
    arrays = [index for index, leaf in enumerate(leaves) if is_array(leaf)]

    def flat_fun(*values):
        filled = list(leaves)
        for index, value in zip(arrays, values):
            filled[index] = value
        inner_params, inner_args, inner_kwargs = jax.tree_util.tree_unflatten(tree, filled)
        return fun(inner_params, *inner_args, **inner_kwargs)

    inputs = [leaves[index] for index in arrays]
    make = jax.make_jaxpr(flat_fun, axis_env=list(axis_sizes.items()), return_shape=True)
    try:
        closed, out_shape = make(*inputs)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise SiteError(
            f"The function uses a mapped axis that is not bound here ({error}). Call it under the"
            " pmap or vmap that names the axis, or, to find sites outside of it, pass"
            " axis_sizes={'name': 1} to find_sites."
        ) from error
    names = [
        parameter_name(path[1:]) if path[0].idx == 0 else None
        for path, leaf in paths_and_leaves
        if is_array(leaf)
    ]
    sites, site_paths = analyze(closed.jaxpr, names, closed.consts)
    _, read = used_equations(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    parameters = {name: used for name, used in zip(names, read) if name is not None}
    out_tree = jax.tree_util.tree_structure(out_shape)
    return Trace(closed, inputs, out_tree, sites, site_paths, parameters)
