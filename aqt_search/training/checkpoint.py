"""Checkpoints that survive a kill, a full disk and damaged files.

A checkpoint of step s is the folder `step_<s>` with the arrays (`arrays/`, orbax) and
`manifest.json`: name, shape, dtype and CRC-32 of every leaf, the identity of the run, and the
caller's `extra`. It is written under a temporary name and renamed when all is on the disk, so a
folder of the final name is whole. A second save of the same step becomes `step_<s>-1`, and so on:
no moment is without the former one. One process saves at a time; see `workdir.lock_workdir`. In a
run of several processes all call these functions, and the first reads and writes (`processes`).

In a bucket, which has no rename, the manifest is what makes a checkpoint whole: it is written last
and deleted first (`checkpoint_folders`). The arrays are written to, and read from, a temporary
folder of this machine, which needs room for one checkpoint. All else holds there, too, but for one
thing: a checkpoint whose manifest is lost counts as unfinished, and the next save deletes it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from aqt_search.training import checkpoint_folders
from aqt_search.training.checkpoint_folders import MANIFEST_FILE
from aqt_search.training.processes import on_first
from aqt_search.training.storage import BucketError, as_path
from aqt_search.training.workdir import WorkdirError, differences, read_json, write_json

_STEP_FOLDER = re.compile(r"step_(\d+)(?:-(\d+))?$")
_LEAF = "leaf_{:05d}"  # as orbax stores it


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or restored; the message says what is there and what to do."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint is whole but belongs to another model, optimizer or configuration."""


class SkippedCheckpoint(NamedTuple):
    """A damaged checkpoint that a restore passed over."""

    step: int
    reason: str
    moved_to: Path


class RestoredCheckpoint(NamedTuple):
    """What `restore_latest` found."""

    step: int
    state: Any  # structure of the template
    extra: dict[str, Any]
    skipped: tuple[SkippedCheckpoint, ...]  # newest first; empty when the newest was whole


class _Leaf(NamedTuple):
    """What the manifest knows of a leaf before its bits."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class _DamagedError(Exception):
    """A checkpoint that cannot be trusted; ends inside this module."""


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> _Leaf:
    """Name, shape and dtype of a leaf: array, typed key or Python number."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic) and leaf.dtype != object:
        return _Leaf(name, tuple(leaf.shape), str(leaf.dtype))
    if isinstance(leaf, bool | int | float):
        return _Leaf(name, (), type(leaf).__name__)
    raise TypeError(
        f"state leaf {name} is a {type(leaf).__name__}; expected an array or a number. Put "
        "strings and the like into `extra`."
    )


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with names such as "params/stem/kernel"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/") or "state", v) for p, v in flat]


def _to_numpy(leaf: Any) -> np.ndarray:
    """The bits of a leaf; those of a key are its uint32 data."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _from_numpy(array: np.ndarray, like: Any) -> Any:
    """A leaf of the kind of `like`: number, numpy array, or jax array placed as `like` is."""
    if isinstance(like, bool | int | float):
        return type(like)(array.item())
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, np.ndarray):
        return array
    value = jnp.array(array)  # a copy, so that the array may be donated
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    return jax.device_put(value, like.sharding) if like.committed else value


@contextlib.contextmanager
def _quiet_orbax() -> Generator[None]:
    """Keep orbax out of the log: what goes wrong it raises, too, and the error here names it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _checkpointer() -> ocp.Checkpointer:
    """Of the process that calls it alone: the others of its run are elsewhere."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _stored_leaves(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What orbax stores: it takes no array of size zero, which holds no bits anyway."""
    return {_LEAF.format(i): array for i, array in enumerate(arrays) if array.size}


def _write_arrays(folder: Path, arrays: list[np.ndarray]) -> None:
    with _quiet_orbax(), _checkpointer() as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(_stored_leaves(arrays)))


def _read_arrays(
    folder: Path, like: list[np.ndarray], places: list[int], part: bool
) -> list[np.ndarray]:
    """Arrays of the shapes and dtypes of `like`, the `places`-th stored; raises as orbax does."""
    stored = {_LEAF.format(i): array for i, array in zip(places, like) if array.size}
    kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
    with _quiet_orbax(), _checkpointer() as checkpointer:
        args = ocp.args.PyTreeRestore(item=stored, restore_args=kinds, partial_restore=part)
        found = checkpointer.restore(folder.absolute(), args=args)
    return [found.get(_LEAF.format(i), empty) for i, empty in zip(places, like)]


def _step_folders(directory: Path) -> list[tuple[int, int, Path]]:
    """(step, how often it was saved again, folder) of all whole checkpoints, oldest first."""
    names = checkpoint_folders.whole_folders(directory)
    matches = [(_STEP_FOLDER.match(name), directory / name) for name in names]
    return sorted((int(m[1]), int(m[2] or 0), path) for m, path in matches if m)


@on_first
def latest_step(directory: str | os.PathLike) -> int | None:
    """Step of the newest checkpoint in the folder, damaged or not; None if there is none."""
    folders = _step_folders(as_path(directory))
    return folders[-1][0] if folders else None


@on_first
def save_checkpoint(
    directory: str | os.PathLike,
    step: int,
    state: Any,
    extra: Mapping[str, Any] | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Save a state, whole or not at all, and delete all but the last `keep` steps.

    Args:
        directory: folder of the checkpoints; made if needed.
        step: not below the newest step there; the same step again takes its place.
        state: pytree of jax or numpy arrays of any dtype and size, typed PRNG keys and Python
            numbers; of several processes that of the first is saved.
        extra: JSON values, such as the position in the data.
        identity: of the run, by key (`workdir.identity_of`): what a restore may ask for.
        keep: how many steps to keep, at least 1. With 2 or more, a damaged newest checkpoint
            still leaves one to go back to.

    Returns:
        The folder written.

    Raises:
        CheckpointError: the disk is full or another error of the system; the former checkpoints
            are untouched. Or a later step is there already.
        TypeError: a leaf is neither array nor number, or `extra` or `identity` is no JSON.
        ValueError: `keep` or `step` out of range, or a NaN or infinity in one of these.
    """
    directory = as_path(directory)
    if keep < 1 or step < 0:
        raise ValueError(f"keep is {keep!r} and step {step!r}; expected at least 1 and 0")
    more = {"extra": dict(extra or {}), "identity": None if identity is None else dict(identity)}
    manifest, arrays = _manifest(int(step), state, more)
    there = _step_folders(directory)
    if there and step < there[-1][0]:
        raise CheckpointError(
            f"{directory} holds a checkpoint of step {there[-1][0]}, after step {step} that is to "
            "be saved. Restore that one and go on from it, or delete it."
        )
    again = there[-1][1] + 1 if there and there[-1][0] == step else 0
    folder = directory / (f"step_{step:09d}" + (f"-{again}" if again else ""))
    try:
        _write_folder(folder, manifest, arrays)
        _delete_old(directory, keep)
    # orbax and tensorstore report a full disk by several kinds of exception, OSError not always
    # among them; all end the save, and the cause is in the message
    except Exception as error:
        raise _save_error(directory, step, error) from error
    return folder


def _manifest(step: int, state: Any, more: dict) -> tuple[dict, list[np.ndarray]]:
    """The JSON side of a checkpoint, sealed with its own CRC, and the arrays."""
    named = _named_leaves(state)
    described = [_describe(name, leaf) for name, leaf in named]
    arrays = [_to_numpy(leaf) for _, leaf in named]
    leaves = [
        leaf._asdict() | {"crc32": _crc(array)}
        for leaf, array in zip(described, arrays, strict=True)
    ]
    content = {"step": step, "leaves": leaves, **more}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return {"crc32": zlib.crc32(text.encode()), "content": json.loads(text)}, arrays


def _write_folder(folder: Path, manifest: dict, arrays: list[np.ndarray]) -> None:
    """Write a checkpoint, whole or not at all."""
    with checkpoint_folders.written_whole(folder) as temporary:
        _write_arrays(temporary / "arrays", arrays)
        write_json(temporary / MANIFEST_FILE, manifest)


@on_first
def delete_unfinished(directory: str | os.PathLike) -> None:
    """Delete what a killed save, or a killed deletion, left behind."""
    checkpoint_folders.delete_unfinished(as_path(directory))


@on_first
def delete_after(directory: str | os.PathLike, step: int) -> None:
    """Delete the checkpoints of later steps, for a run that goes back."""
    for found, _, path in reversed(_step_folders(as_path(directory))):
        if found > step:
            checkpoint_folders.delete_whole(path)


def _delete_old(directory: Path, keep: int) -> None:
    """Delete all but the newest save of each of the last `keep` steps."""
    newest = {step: path for step, _, path in _step_folders(directory)}
    kept = {newest[step] for step in sorted(newest)[-keep:]}
    for _, _, path in _step_folders(directory):
        if path not in kept:
            checkpoint_folders.delete_whole(path)


def _save_error(directory: Path, step: int, error: Exception) -> CheckpointError:
    """Error of a failed save; frees what the attempt took."""
    with contextlib.suppress(OSError, BucketError):  # the save's own error is the one to report
        delete_unfinished(directory)
    try:
        last = latest_step(directory)
    except BucketError:
        return CheckpointError(
            f"could not save the checkpoint of step {step} in {directory}: {_reason(error)}. Those "
            "before it are whole. Run the same command again when the bucket can be reached."
        )
    there = "there is no checkpoint yet" if last is None else f"the one of step {last} is whole"
    return CheckpointError(
        f"could not save the checkpoint of step {step} in {directory}: {_reason(error)}; {there}. "
        "Free space or make the folder writable, then run the same command again."
    )


def _reason(error: BaseException) -> str:
    """First line of an error, with its kind, in at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def restore_latest(
    directory: str | os.PathLike,
    template: Any,
    *,
    identity: Mapping[str, Any] | None = None,
    part: bool = False,
) -> RestoredCheckpoint | None:
    """Restore the newest whole checkpoint, bit for bit.

    A checkpoint that cannot be read, or whose bits differ from their CRC-32, is passed over with a
    warning in the log and in `skipped`, and moved to `damaged_<its name>` once an older one has
    been restored.

    Args:
        directory: folder of the checkpoints.
        template: a state of the wanted structure, shapes, dtypes and placement on devices, such
            as a freshly initialised one; its values do not matter.
        identity: what the checkpoint must have been saved with, if it was saved with any.
        part: whether the checkpoint may hold more than the template, which is then left there.

    Returns:
        Step, state, extra and skipped checkpoints; None if the folder holds no checkpoint.

    Raises:
        CheckpointError: there are checkpoints and all are damaged; nothing is moved.
        CheckpointMismatchError: structure, shape or dtype differs from the template (names the
            first leaf that does), or another identity (names every key).
        TypeError: a leaf of the template is neither array nor number.
        WorkdirError: a bucket cannot be reached.
    """
    found = _read_latest(as_path(directory), template, identity, part)
    if found is None:
        return None
    leaves, structure = jax.tree.flatten(template)
    state = [_from_numpy(array, like) for array, like in zip(found.state, leaves, strict=True)]
    return found._replace(state=jax.tree.unflatten(structure, state))


@on_first
def _read_latest(
    directory: Path, template: Any, identity: Mapping[str, Any] | None, part: bool
) -> RestoredCheckpoint | None:
    """`restore_latest`, its state a list of arrays."""
    damaged: list[tuple[int, Path, str]] = []
    for step, _, folder in reversed(_step_folders(directory)):
        try:
            content = _read_manifest(folder / MANIFEST_FILE, step)
            _check_identity(folder, content.get("identity"), identity)
            state = _restore(folder, content, template, part)
        except _DamagedError as error:
            logging.warning("checkpoint %s is damaged (%s)", folder, error)
            damaged.append((step, folder, str(error)))
            continue
        skipped = tuple(SkippedCheckpoint(s, why, _set_aside(path)) for s, path, why in damaged)
        if skipped:
            logging.warning("going on from the checkpoint of step %d instead", step)
        return RestoredCheckpoint(step, state, content["extra"], skipped)
    if not damaged:
        return None
    found = "\n".join(f"  {path.name}: {why}" for _, path, why in damaged)
    raise CheckpointError(
        f"all checkpoints in {directory} are damaged:\n{found}\n"
        f"Delete {directory} to start anew, or put a copy of a whole checkpoint there."
    )


def _set_aside(folder: Path) -> Path:
    """Move a damaged checkpoint out of the way of later saves of its step."""
    try:
        return checkpoint_folders.set_aside(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot move the damaged checkpoint {folder} to damaged_{folder.name}: "
            f"{error.strerror}. Delete it by hand, then run the same command again."
        ) from error


def _restore(folder: Path, content: dict, template: Any, part: bool) -> list[np.ndarray]:
    """The arrays of one checkpoint; _DamagedError if it is not whole."""
    named = _named_leaves(template)
    wanted = [_describe(name, leaf) for name, leaf in named]
    entries, names = list(enumerate(content["leaves"])), {leaf.name for leaf in wanted}
    if part:
        entries = [(place, entry) for place, entry in entries if entry["name"] in names]
    saved = [_Leaf(e["name"], tuple(e["shape"]), e["dtype"]) for _, e in entries]
    _check_match(folder, saved, wanted)
    shaped = [_to_numpy(leaf) for _, leaf in named]
    places = [place for place, _ in entries]
    try:
        with checkpoint_folders.read_locally(folder) as local:
            arrays = _read_arrays(local / "arrays", shaped, places, part)
    except (MemoryError, BucketError):  # which do not tell of the checkpoint
        raise
    # damaged files make orbax raise nearly any kind of exception; the reason is passed on
    except Exception as error:
        raise _DamagedError(_reason(error)) from error
    for leaf, (_, entry), array, like in zip(saved, entries, arrays, shaped, strict=True):
        same_form = array.shape == like.shape and array.dtype == like.dtype
        if not same_form or _crc(array) != entry["crc32"]:
            raise _DamagedError(f"the bits of leaf {leaf.name} are not those that were saved")
    return arrays


def _read_manifest(path: Path, step: int) -> dict[str, Any]:
    """The content of a manifest whose CRC and step are right."""
    try:
        sealed = read_json(path)
        content = sealed["content"]
        text = json.dumps(content, sort_keys=True)
    except BucketError:
        raise
    except (OSError, WorkdirError, KeyError, TypeError) as error:
        raise _DamagedError(_reason(error)) from error
    if zlib.crc32(text.encode()) != sealed.get("crc32") or content["step"] != step:
        raise _DamagedError(f"{path.name} is not the one that was saved")
    return content


def _check_identity(folder: Path, there: Mapping | None, wanted: Mapping | None) -> None:
    """Raise CheckpointMismatchError if both are known and differ."""
    listing = "" if there is None or wanted is None else differences(there, wanted)
    if listing:
        raise CheckpointMismatchError(
            f"checkpoint {folder} is of another run:\n{listing}\nGive another --workdir, or delete "
            f"{folder.parent} to start anew."
        )


@on_first
def checkpoint_fingerprint(directory: str | os.PathLike) -> str | None:
    """Hash of the leaves (names, shapes, dtypes, bits) of the newest checkpoint; None without one.

    It is read from the manifest alone; what is damaged there is passed over.
    """
    for step, _, folder in reversed(_step_folders(as_path(directory))):
        with contextlib.suppress(_DamagedError):
            leaves = _read_manifest(folder / MANIFEST_FILE, step)["leaves"]
            return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]
    return None


def _check_match(folder: Path, saved: list[_Leaf], wanted: list[_Leaf]) -> None:
    """Raise CheckpointMismatchError for the first leaf that differs."""
    names = {leaf.name for leaf in saved}, {leaf.name for leaf in wanted}
    for there, here in itertools.zip_longest(saved, wanted):
        if there == here:
            continue
        if here is not None and here.name not in names[0]:
            what = f"leaf {here.name} is missing there, and wanted here as {here}"
        elif there is not None and there.name not in names[1]:
            what = f"leaf {there.name} is {there} there, and not wanted here"
        elif here is not None and there is not None and here.name == there.name:
            what = f"leaf {here.name} is {there} there, and wanted here as {here}"
        else:
            what = f"leaf {(here or there).name} is in another place"
        raise CheckpointMismatchError(
            f"checkpoint {folder} does not fit: {what}. Model, optimizer or formats have changed: "
            f"give another --workdir, or delete {folder.parent} to start anew."
        )
