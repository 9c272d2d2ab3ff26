"""Searched weights as the search left them, beside weights trained anew in the same formats."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from aqt_search.report.records import Record


@dataclasses.dataclass(frozen=True)
class Pair:
    """A retrained point and the search whose formats it has; None if that has no result."""

    retrained: Record
    searched: Record | None

    @property
    def not_retrained(self) -> float:
        """Test accuracy of the search's own weights; NaN if there is none."""
        return self.searched.accuracy if self.searched else math.nan

    @property
    def difference(self) -> float:
        """Accuracy not retrained less accuracy retrained: positive where retraining lost."""
        return self.not_retrained - self.retrained.accuracy


@dataclasses.dataclass(frozen=True)
class PairGroup:
    """The pairs that differ only in their seed and have both accuracies."""

    name: str
    pairs: tuple[Pair, ...]

    @property
    def means(self) -> tuple[float, float, float]:
        """Mean accuracy not retrained, retrained, and their mean difference."""
        values = [(p.not_retrained, p.retrained.accuracy, p.difference) for p in self.pairs]
        return tuple(np.mean(values, axis=0).tolist())


def retrained_pairs(records: Sequence[Record]) -> tuple[Pair, ...]:
    """Every finished retrained point that names its search."""
    finished = {r.name: r for r in records if r.error is None}
    return tuple(Pair(r, finished.get(r.pair)) for r in finished.values() if r.pair is not None)


def group_pairs(pairs: Sequence[Pair]) -> tuple[PairGroup, ...]:
    """The pairs grouped over seeds; those that lack an accuracy are left out."""
    members: dict[str, list[Pair]] = {}
    for pair in pairs:
        if math.isfinite(pair.difference):
            members.setdefault(pair.retrained.group, []).append(pair)
    return tuple(PairGroup(name, tuple(group)) for name, group in members.items())
