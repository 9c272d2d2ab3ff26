"""Static leaves: what stands among arrays in a tree of parameters and is no array.

An Equinox module, or any tree of one's own, has functions and strings among its leaves. jax.jit
takes none, so they travel beside the arrays: as part of the tree (`Static`), or of the program
(`jit`).
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Hashable
from typing import Any

import jax

from aqt_search.tracing.trace import is_array


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("value",))
@dataclasses.dataclass(frozen=True)
class Static:
    """A leaf that is no array, as part of its tree: for jit it is known, and compared by ==."""

    value: Hashable


def is_static(leaf: Any) -> bool:
    """Whether jax.jit does not take a leaf."""
    return not is_array(leaf) and not isinstance(leaf, numbers.Number)


def wrapped(tree: Any) -> Any:
    """The tree with its static leaves in `Static`."""
    return jax.tree.map(lambda leaf: Static(leaf) if is_static(leaf) else leaf, tree)


def unwrapped(tree: Any) -> Any:
    """The tree with its static leaves as they were."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Static) else leaf, tree,
        is_leaf=lambda leaf: isinstance(leaf, Static),
    )  # fmt: skip


def jit(fun: Callable) -> Callable:
    """`jax.jit(fun)` for positional arguments whose trees may have static leaves."""
    run = jax.jit(lambda *arguments: fun(*unwrapped(arguments)))
    return lambda *arguments: run(*wrapped(arguments))
