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


def in_mesh_of(like: Any, fun: Callable, held: Any) -> Any:
    """`fun(held)` where a traced value has its type: in a region of the function's own `auto_axes`.

    Such a region has the mesh of its surroundings with other types of axes, and what it computes is
    typed so.

    Args:
      like: the abstract value.
      fun: a function of a pytree of arrays from outside of the region.
      held: that pytree.
    """
    mesh = getattr(getattr(like, "sharding", None), "mesh", None)
    around = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or around.empty or mesh == around:
        return fun(held)
    with jax.sharding.use_abstract_mesh(mesh):
        return fun(entered(held))


def entered(held: Any) -> Any:
    """Arrays typed as in the region that is traced; as they are outside of any."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    if mesh.empty or AxisType.Manual in mesh.axis_types:  # in shard_map all has a type of its own
        return held

    def explicit(part: Any) -> Any:
        names = (part,) if isinstance(part, str) else tuple(part or ())
        return tuple(name for name in names if kinds[name] == AxisType.Explicit) or None

    def enter(x: Any) -> Any:
        sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else None
        if sharding is None or sharding.mesh.empty or sharding.mesh == mesh:
            return x
        spec = PartitionSpec(*map(explicit, sharding.spec))
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(enter, held)
