"""Meshes with explicit axes, where an array's sharding is part of its type.

What quantizing takes (scales, blocks, codes as matrices) has types that say nothing to the caller:
inside, the axes are left to the compiler, and the result gets the sharding that the float function
gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def type_of(x: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of an array's type."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding)


def replicated(sharding: NamedSharding) -> NamedSharding:
    """The same mesh, and a whole array on every device."""
    return NamedSharding(sharding.mesh, PartitionSpec())


def sharded_as(fun: Callable, sharding: Any, *others: Any) -> Callable:
    """`fun` of arrays, its result sharded as said; `fun` itself off explicit axes.

    Args:
      fun: a function of pytrees of arrays.
      sharding: of its result, as a type tells it; None where it is not known.
      others: of the further parts, if the result is a tuple.
    """
    if sharding is None:
        return fun
    kinds = zip(sharding.mesh.axis_names, sharding.mesh.axis_types)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    out = (sharding, *others) if others else sharding
    return jax.sharding.auto_axes(fun, axes=axes, out_sharding=out) if axes else fun
