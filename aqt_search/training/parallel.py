"""Runs on devices: one run with a replica per device, or a run per device, side by side.

The devices of one run may be those of several processes (`processes`).

The only file that knows about `jax.pmap`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.training.processes import gathered, several

if TYPE_CHECKING:
    import grain

AXIS = "batch"  # the mapped axis that shards a batch over the replicas
MOST_STEPS_AHEAD = 4  # how far Python may run ahead of the devices, each step with its batches
_RUNS = "runs"  # the mapped axis over runs side by side


class BatchShapeError(ValueError):
    """A batch that cannot be divided over the devices."""


def replica_count() -> int:
    """Devices of all processes of this run, each of which holds one replica."""
    return jax.device_count()


def local_replica_count() -> int:
    """Replicas of this process: what it gives to a step, and holds of one, has so many slices."""
    return jax.local_device_count()


def _devices() -> list[jax.Device] | None:
    """All devices, those of process 0 first, so that every process has rows in a row of a batch.

    None, which is jax.pmap's own choice, in a run of one process.
    """
    if not several():
        return None
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def data_shard() -> grain.sharding.ShardOptions | None:
    """The part of every batch that this process reads; None for all of it."""
    if not several():
        return None
    import grain

    return grain.sharding.ShardByJaxProcess()


def pmap_step(step: Callable, *, donate_state: bool = True) -> Callable:
    """Compiles `step(state, ...)` for all replicas, with `AXIS` bound and every argument mapped."""
    donated = (0,) if donate_state else ()
    return jax.pmap(step, axis_name=AXIS, donate_argnums=donated, devices=_devices())


def release_programs() -> None:
    """Lets go of all programs that were compiled; what is called again is compiled again.

    jax.pmap keeps every function it has mapped, with its program and what it closes over, until
    then (jax 0.10): a sweep would grow by each of its points.
    """
    _compiled_alone.cache_clear()
    _largest.cache_clear()
    jax.clear_caches()


def replicate(tree: Any) -> Any:
    """Copies every leaf [...] to every replica, as [local replicas, ...] in each process."""
    count = local_replica_count()
    if not jax.tree.leaves(tree):  # which pmap refuses
        return tree

    def copy(leaf):
        leaf = np.asarray(leaf)
        return np.broadcast_to(leaf[None], (count, *leaf.shape))

    return _placed(count, AXIS)(jax.tree.map(copy, tree))


@functools.lru_cache(maxsize=4)
def _placed(count: int, axis_name: str) -> Callable:
    """Puts slice i of every leaf on device i of `count`, in buffers that a step may donate.

    Under the axis name of the step, which would be compiled again for what came from another.
    """
    devices = _devices() if axis_name == AXIS else None
    devices = jax.local_devices()[:count] if devices is None else devices
    return jax.pmap(lambda leaves: jax.tree.map(jnp.array, leaves), axis_name, devices=devices)


def unreplicate(tree: Any) -> Any:
    """The copy of every leaf of this process's first replica, as numpy arrays."""
    return jax.tree.map(lambda leaf: np.array(leaf.addressable_data(0))[0], tree)


def from_replicas(tree: Any) -> Any:
    """What all replicas hold, leaves [replicas, ...] as numpy arrays; a collective call."""
    if not several():
        return jax.device_get(tree)

    def own(leaf: jax.Array) -> np.ndarray:
        shards = [leaf.addressable_data(i) for i in range(local_replica_count())]
        return np.concatenate([np.asarray(shard) for shard in shards])

    parts = gathered(jax.tree.map(own, tree))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def own_rows(rows: np.ndarray) -> np.ndarray:
    """This process's part of rows [n, B] for all replicas: [n, B / processes]."""
    size = rows.shape[1] // jax.process_count()
    return rows[:, jax.process_index() * size : (jax.process_index() + 1) * size]


def largest(value: int) -> jax.Array:
    """The largest of the numbers that the processes give, on the devices: read it by `value_of`.

    A collective call, which waits for nobody: what is read of it some steps later is there, and the
    same for all.
    """
    return _largest()(np.full(local_replica_count(), value, np.int32))


def value_of(value: jax.Array) -> int:
    """The number of `largest`, when it is there."""
    return int(np.asarray(value.addressable_data(0))[0])


@functools.lru_cache(maxsize=1)
def _largest() -> Callable:
    return jax.pmap(lambda value: jax.lax.pmax(value, AXIS), AXIS, devices=_devices())


def replica_index() -> jax.Array | int:
    """The number of this replica of its run, inside `AXIS`; 0, known, where there is but one."""
    return 0 if jax.lax.axis_size(AXIS) == 1 else jax.lax.axis_index(AXIS)


def shard(batch: Any) -> Any:
    """Splits the leading axis of every leaf: [B, ...] to [replicas, B / replicas, ...].

    In a run of several processes B is this one's part of a batch, for its own replicas.

    Raises:
      BatchShapeError: the batch size is no multiple of the number of replicas.
    """
    count = local_replica_count()

    def split(leaf):
        if leaf.shape[0] % count:
            raise BatchShapeError(
                f"A batch of {leaf.shape[0]} examples cannot be divided over {count} devices:"
                " choose a batch size that is a multiple of their number."
            )
        return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])

    return jax.tree.map(split, batch)


class Placement(NamedTuple):
    """How one or several runs of one program lie on the devices.

    Runs are in lists, one element each; what is on the devices is one tree of all of them.
    """

    compile: Callable[[Callable], Callable]  # of step(state, ...), which gives its state away
    put: Callable[[Sequence[Any]], Any]  # trees, not replicated, onto the devices
    shard: Callable[[Sequence[Any]], Any]  # batches [B, ...], a step's argument
    view: Callable[[Any, int], Any]  # a run's own part, leaves [1, ...] still on its device
    replicas: int  # of each run


def _view(tree: Any, run: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.addressable_data(run), tree)


def data_parallel() -> Placement:
    """One run, whose batches are divided over all devices."""
    return Placement(
        compile=pmap_step,
        put=lambda trees: replicate(trees[0]),
        shard=lambda batches: shard(batches[0]),
        view=_view,
        replicas=replica_count(),
    )


def side_by_side(count: int) -> Placement:
    """`count` runs, each on a device of its own, in one program.

    To its step a run looks as on a machine with that one device: `AXIS` has size 1.

    Raises:
      ValueError: there are fewer devices, or this is a run of several processes.
    """
    if several():
        raise ValueError("Runs side by side are those of one process; this one has several.")
    if not 1 <= count <= replica_count():
        raise ValueError(f"{count} runs side by side need as many devices; got {replica_count()}.")

    def stack(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees)

    def put(trees: Sequence[Any]) -> Any:
        stacked = stack(trees)
        if not jax.tree.leaves(stacked):  # which pmap refuses
            return stacked
        return _placed(count, _RUNS)(stacked)

    return Placement(lambda step: _compiled_alone(step, count), put, stack, _view, replicas=1)


@functools.lru_cache(maxsize=4)  # the next runs of the same step find it compiled
def _compiled_alone(step: Callable, count: int) -> Callable:
    alone = jax.vmap(step, in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1)
    devices = jax.local_devices()[:count]
    return jax.pmap(alone, _RUNS, devices=devices, donate_argnums=(0,))
