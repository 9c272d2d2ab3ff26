"""Timing of several programs side by side: built one after another, then run in turns.

A machine's speed drifts, so programs are compared within a round and ratios are medians of the
rounds' own ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

UNCOUNTED_ROUNDS = 2


class Build(NamedTuple):
    """What building a program took, and the program."""

    seconds: float  # to trace, lower and compile
    compiled: jax.stages.Compiled

    @property
    def temporary_bytes(self) -> int:
        """Bytes of intermediate results."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def peak_bytes(self) -> int:
        """Bytes of arguments, results and intermediate results together, by XLA's own plan."""
        memory = self.compiled.memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return total + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def build(jitted: Any, *args: Any) -> Build:
    """Traces, lowers and compiles `jitted` (a result of jit or pmap) from nothing."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return Build(time.perf_counter() - start, compiled)


def build_in_turns(
    builds: Mapping[str, Callable[[], Build]], rounds: int
) -> dict[str, list[Build]]:
    """Builds every program `rounds` times, the programs taking turns."""
    results: dict[str, list[Build]] = {name: [] for name in builds}
    for number in range(rounds):
        for name in _order(list(builds), number):
            results[name].append(builds[name]())
    return results


def time_in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, the programs taking turns; the first two rounds are not counted.

    Args:
      runs: by name, what runs a program once and returns its results, all of which are waited for.
      rounds: counted rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + UNCOUNTED_ROUNDS):
        for name in _order(list(runs), number):
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            if number >= UNCOUNTED_ROUNDS:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rounds_within(runs: Mapping[str, Callable[[], Any]], seconds: float) -> int:
    """Rounds that take about `seconds`, between 5 and 400."""
    once = sum(statistics.median(values) for values in time_in_turns(runs, 1).values())
    return min(max(round(seconds / once), 5), 400)


def median_ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(v / r for v, r in zip(values, references, strict=True))


def _order(names: list[str], number: int) -> list[str]:
    # Every other round runs backwards, so that no program always follows the same one.
    return names if number % 2 else names[::-1]
