"""Groups the points of a sweep over seeds and finds the Pareto front of the groups."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

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
    members: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.error is None:
            members.setdefault((record.kind, record.group), []).append(record)
    groups = [Group(name, kind, tuple(m), False) for (kind, name), m in members.items()]
    groups.sort(key=lambda group: (group.gbops, group.name))
    front = set(pareto_front([g.gbops for g in groups], [g.accuracy for g in groups]).tolist())
    return tuple(dataclasses.replace(g, on_front=i in front) for i, g in enumerate(groups))


def front_names(records: Sequence[Record]) -> tuple[str, ...]:
    """Names of the points whose group is on the front, cheapest group first."""
    groups = group_points(records)
    return tuple(member.name for group in groups if group.on_front for member in group.members)


def front_json(records: Sequence[Record]) -> dict[str, Any]:
    """The content of front.json: every point, every group over seeds, and the front's names."""
    front = front_names(records)
    return {
        "front": list(front),
        "points": [_point_json(record, record.name in front) for record in records],
        "groups": [_group_json(group) for group in group_points(records)],
    }


def _point_json(record: Record, on_front: bool) -> dict[str, Any]:
    entry = {"name": record.name, "kind": record.kind, "seed": record.seed, "on_front": on_front}
    if record.error is not None:
        return entry | {"error": record.error}
    return entry | {
        "accuracy": _finite_or_none(record.accuracy),
        "gbops": record.gbops,
        "weight_bytes": _finite_or_none(record.weight_bytes),
        "target_gbops": record.target_gbops,
        "formats": record.policy_path,
        "without_retraining": record.without_retraining,
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "points": [member.name for member in group.members],
        "on_front": group.on_front,
        "accuracy_mean": _finite_or_none(group.accuracy),
        "accuracy_range": [_finite_or_none(value) for value in group.accuracy_range],
        "gbops_mean": group.gbops,
        "gbops_range": list(group.gbops_range),
    }


def _finite_or_none(value: float) -> float | None:
    """JSON has no NaN; null stands for it."""
    return value if math.isfinite(value) else None
