"""What a search shares over a mapped axis, if there is one."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

import jax

Tree = TypeVar("Tree")


def total(tree: Tree, axis_name: Hashable | None) -> Tree:
    """The sum of every leaf over the replicas; the tree itself without an axis."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def mean(tree: Tree, axis_name: Hashable | None) -> Tree:
    """The mean of every leaf over the replicas; the tree itself without an axis."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def count(axis_name: Hashable | None) -> int:
    """The number of replicas."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)
