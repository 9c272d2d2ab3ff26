"""Data parallelism: one replica per device. The only file that knows about `jax.pmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "batch"  # the mapped axis that shards a batch over the replicas


class BatchShapeError(ValueError):
    """A batch that cannot be divided over the devices."""


def replica_count() -> int:
    """Devices of this process, each of which holds one replica."""
    return jax.local_device_count()


def pmap_step(step: Callable, *, donate_state: bool = True) -> Callable:
    """Compiles `step(state, ...)` for all replicas, with `AXIS` bound and every argument mapped."""
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate_state else ())


def replicate(tree: Any) -> Any:
    """Copies every leaf [...] to every replica, as [replicas, ...]."""
    count = replica_count()

    def copy(leaf):
        leaf = np.asarray(leaf)
        return np.broadcast_to(leaf[None], (count, *leaf.shape))

    # The identity under pmap places each slice on its device, in buffers that a step may donate.
    return jax.pmap(lambda leaves: jax.tree.map(jnp.array, leaves), axis_name=AXIS)(
        jax.tree.map(copy, tree)
    )


def unreplicate(tree: Any) -> Any:
    """The first replica's copy of every leaf, as numpy arrays."""
    return jax.tree.map(lambda leaf: np.array(leaf.addressable_data(0))[0], tree)


def shard(batch: Any) -> Any:
    """Splits the leading axis of every leaf: [B, ...] to [replicas, B / replicas, ...].

    Raises:
      BatchShapeError: the batch size is no multiple of the number of replicas.
    """
    count = replica_count()

    def split(leaf):
        if leaf.shape[0] % count:
            raise BatchShapeError(
                f"A batch of {leaf.shape[0]} examples cannot be divided over {count} devices:"
                " choose a batch size that is a multiple of their number."
            )
        return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])

    return jax.tree.map(split, batch)
