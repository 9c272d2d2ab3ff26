"""A run of several processes, each with devices of its own: what they agree on, and who writes.

All processes run the same program on the same configuration, and call what is collective here in
the same order. The first one (process 0) alone reads and writes the folder of the run, and tells
the others, so that the folder needs to be seen by none of them. In a run of one process nothing is
sent anywhere.
"""

from __future__ import annotations

import contextvars
import functools
import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

_P = ParamSpec("_P")
_T = TypeVar("_T")
_HEAD_BYTES = 4096  # sent at once, with the length of the whole
_CHUNK_BYTES = 1 << 26
# Within `on_first` the first process is alone: what is collective otherwise is a plain call there.
_ALONE: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


class ProcessError(RuntimeError):
    """Processes that cannot find each other, do not fit together, or have lost one of them."""


def several() -> bool:
    """Whether this run has more than one process; touches no device where it has not."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files, and talks to the terminal."""
    return not several() or jax.process_index() == 0


def on_first(fun: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes `fun` collective: the first process calls it, all return its result or raise its error.

    Results are pickled, so they are of plain Python and numpy. Calls within `fun` of what is
    collective, too, are plain calls of the first process. In a run of one process it is `fun`.
    """

    @functools.wraps(fun)
    def collective(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not several() or _ALONE.get():
            return fun(*args, **kwargs)
        if jax.process_index():
            failed, result = pickle.loads(_broadcast(b""))
            if failed:
                raise result
            return result
        token = _ALONE.set(True)
        try:
            result, error = fun(*args, **kwargs), None
        except Exception as raised:  # every process raises it
            result, error = None, raised
        finally:
            _ALONE.reset(token)
        _broadcast(_pickled(result, error))
        if error is not None:
            raise error
        return result  # pyrefly: ignore[bad-return]

    return collective


def _pickled(result: Any, error: Exception | None) -> bytes:
    """(failed, result or error) as bytes; of what cannot be sent, its words."""
    try:
        content = pickle.dumps((error is not None, result if error is None else error))
        pickle.loads(content)  # an error with arguments of its own may fail here
    except Exception as problem:
        told = error if error is not None else problem
        return pickle.dumps((True, ProcessError(f"{type(told).__name__}: {told}")))
    return content


def _sent(block: np.ndarray) -> np.ndarray:
    """The first process's block, of one shape in all of them."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(block))


def _broadcast(content: bytes) -> bytes:
    """The first process's content, in all of them; what the others give does not count."""
    head = np.zeros(_HEAD_BYTES, np.uint8)
    size = np.frombuffer(len(content).to_bytes(8, "little"), np.uint8)
    start = np.frombuffer(content[: _HEAD_BYTES - 8], np.uint8)
    head[:8], head[8 : 8 + len(start)] = size, start
    head = _sent(head)
    total = int.from_bytes(head[:8].tobytes(), "little")
    parts = [head[8 : 8 + total].tobytes()]
    for begin in range(_HEAD_BYTES - 8, total, _CHUNK_BYTES):
        size = min(total - begin, _CHUNK_BYTES)
        block = _padded(content[begin : begin + size], size)
        parts.append(_sent(block)[:size].tobytes())
    return b"".join(parts)


def _padded(content: bytes, size: int) -> np.ndarray:
    """Bytes as uint8 of a length that is a power of two, at least `size`: a few programs do."""
    block = np.zeros(1 << max(size - 1, 1).bit_length(), np.uint8)
    block[: len(content)] = np.frombuffer(content, np.uint8)
    return block


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order; a collective call."""
    if not several() or _ALONE.get():
        return [value]
    from jax.experimental import multihost_utils

    content = pickle.dumps(value)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(content)], np.uint32)))
    blocks = multihost_utils.process_allgather(_padded(content, int(sizes.max())))
    return [pickle.loads(row[: int(size)].tobytes()) for row, size in zip(blocks, sizes.ravel())]


def check_agreed(facts: Mapping[str, Any], what: str) -> None:
    """Checks that facts, {name: JSON value}, are the same in all processes; a collective call.

    Raises:
      ProcessError: in all of them; names the first process that differs from process 0, and every
        fact in which it does.
    """
    first, *others = gathered(json.dumps(facts, sort_keys=True))
    for number, other in enumerate(others, start=1):
        if other == first:
            continue
        there, own = json.loads(first), json.loads(other)
        listing = "\n".join(
            f"  {name}: process 0 has {json.dumps(there.get(name))}, process {number} has"
            f" {json.dumps(own.get(name))}"
            for name in sorted(there.keys() | own.keys())
            if there.get(name) != own.get(name)
        )
        raise ProcessError(
            f"the processes of this run disagree on {what}:\n{listing}\nStart all of them by the"
            " same command."
        )
