"""Who makes batches, threads or processes, and the iterator over what they make."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aqt_search.data.errors import DataError
from aqt_search.data.sources import ImageSource

if TYPE_CHECKING:
    import grain


class Readers(NamedTuple):
    """Who makes batches; their bits do not depend on it.

    Attributes:
        workers: processes, each of which makes its rows of every batch; 0: threads of this process
            alone. Images in memory are batched by those in any case.
        threads: background threads that make batches, of each worker if there are any; None is what
            suits the source (of a worker 0). With 0 batches are made as they are asked for.
        prefetch: batches made ahead, at least one a thread; 0: two a thread, and two with workers.
    """

    workers: int = 0
    threads: int | None = None
    prefetch: int = 0


IN_THREADS = Readers()


class Batches:
    """An iterator over batches, whose state is the number of the next one.

    Workers are started with the first batch and end with the last one, with `close`, with this
    object, or with this process, however that ends.
    """

    def __init__(
        self,
        source: ImageSource,
        part: Callable[[range], grain.MapDataset],
        rows: range,
        readers: Readers,
        next_index: int = 0,
    ):
        """
        Args:
            source: that batches are read from.
            part: makes the data set of these rows of every batch.
            rows: of every batch that this process reads.
            readers: who makes them.
            next_index: number of the first batch.
        """
        workers = 0 if source.in_memory else min(readers.workers, len(rows))
        self._in_workers, self._readers, self._source = workers > 0, readers, source
        self._parts = [part(own) for own in _divided(rows, max(workers, 1))]
        self._next_index = next_index
        self._iterators: list[grain.DatasetIterator] = []

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterators:
            self._start()
        parts = self._next_parts()
        if parts is None:
            self.close()
            raise StopIteration
        self._next_index += 1
        if len(parts) == 1:
            return parts[0]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _next_parts(self) -> list[dict[str, np.ndarray]] | None:
        """What each part has of the next batch; None at the end."""
        try:
            return [next(iterator) for iterator in self._iterators]
        except StopIteration:
            return None
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):
                raise DataError(_worker_lost(error)) from error
            raise

    def get_state(self) -> dict[str, int]:
        """The number of the next batch, as JSON."""
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on with the batch that a state tells, whoever made those before it."""
        self.close()
        self._next_index = state["next_index"]

    def close(self) -> None:
        """Ends the workers; the next batch starts them anew."""
        if not self._iterators:
            return
        while self._iterators:
            self._iterators.pop().close()
        if self._in_workers:
            gc.collect()  # cycles of grain's errors hold the last batch, in shared memory

    def _start(self) -> None:
        for part in self._parts:
            ahead = part[self._next_index :] if self._next_index else part
            self._iterators.append(iter(self._read_ahead(ahead)))
        if not self._in_workers:
            return
        _parse_flags()
        for iterator in self._iterators:
            # Makes what is started, and Python's own process beside workers, which lets signals
            # through again.
            iterator.get_state()
        with _signals_blocked():
            for iterator in self._iterators:  # all, before the first is waited for
                iterator.start_prefetch()

    def _read_ahead(self, part: grain.MapDataset) -> grain.IterDataset:
        import grain

        threads, prefetch = self._readers.threads, self._readers.prefetch
        if self._in_workers:
            batches = part.to_iter_dataset(_read_options(threads or 0, 0))
            # Grain holds so many in the worker, and as many again in this process.
            held = max(1, (prefetch or 2) // 2)
            return batches.mp_prefetch(grain.MultiprocessingOptions(1, held), _begin_worker)
        threads = self._source.read_threads if threads is None else threads
        return part.to_iter_dataset(_read_options(threads, prefetch))


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
    import grain

    # Two batches a thread keep it busy; grain's own default holds 500 batches in memory.
    return grain.ReadOptions(threads, max(threads, prefetch or 2 * threads))


def _divided(rows: range, parts: int) -> Iterator[range]:
    """Consecutive parts of rows, their lengths as equal as can be."""
    bounds = [rows.start + len(rows) * part // parts for part in range(parts + 1)]
    return (range(*pair) for pair in itertools.pairwise(bounds))


def _parse_flags() -> None:
    """Lets grain read its flags in a program that parses none."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def _signals_blocked() -> Generator[None]:
    """Processes started in here never see SIGINT and SIGTERM, which this one then gets later.

    A terminal, or a cluster, sends them to all processes of a run, which still needs batches then.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _begin_worker(index: int, count: int) -> None:
    """Makes a worker end with the process that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # of one that was killed, too
        os._exit(1)


def _worker_lost(error: RuntimeError) -> str:
    return (
        f"a worker process (data.workers) ended: {error} It may have run out of memory, or of"
        " shared memory: a batch lies in /dev/shm on its way. Give fewer workers or a smaller"
        " prefetch, or make /dev/shm larger; then run the same command again."
    )
