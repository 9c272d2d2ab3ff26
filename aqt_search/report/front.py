"""Groups the points of a sweep over seeds and finds the Pareto front of the groups."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from aqt_search.report.records import Record
from aqt_search.search.pareto import pareto_front


@dataclasses.dataclass(frozen=True)
class Group:
    """The finished runs that differ only in their seed; `accuracy` and `gbops` are the means.

    The ranges are (least, greatest) over the seeds. If one seed has no accuracy (NaN), neither has
    the group.
    """

    name: str
    kind: str
    series: str
    members: tuple[Record, ...]
    on_front: bool

    @property
    def accuracy(self) -> float:
        """Mean test accuracy, a fraction."""
        return float(np.mean([member.accuracy for member in self.members]))

    @property
    def gbops(self) -> float:
        """Mean cost in GBOPs."""
        return float(np.mean([member.gbops for member in self.members]))

    @property
    def accuracy_range(self) -> tuple[float, float]:
        """Least and greatest accuracy over the seeds."""
        values = [member.accuracy for member in self.members]
        return (math.nan, math.nan) if any(map(math.isnan, values)) else (min(values), max(values))

    @property
    def gbops_range(self) -> tuple[float, float]:
        """Least and greatest cost over the seeds."""
        values = [member.gbops for member in self.members]
        return min(values), max(values)


def group_points(records: Sequence[Record]) -> tuple[Group, ...]:
    """The finished points grouped over seeds, cheapest first, with the front marked.

    A group is on the front if no other group's mean cost and mean accuracy dominate its own.
    """
    members: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record.error is None:
            members.setdefault((record.group, record.kind, record.series), []).append(record)
    groups = [Group(*key, tuple(m), False) for key, m in members.items()]
    groups.sort(key=lambda group: (group.gbops, group.name))
    front = set(pareto_front([g.gbops for g in groups], [g.accuracy for g in groups]).tolist())
    return tuple(dataclasses.replace(g, on_front=i in front) for i, g in enumerate(groups))


def front_names(records: Sequence[Record]) -> tuple[str, ...]:
    """Names of the points whose group is on the front, cheapest group first."""
    groups = group_points(records)
    return tuple(member.name for group in groups if group.on_front for member in group.members)
