"""The content of front.json: what a sweep found, for other programs."""

import math
from collections.abc import Sequence
from typing import Any

from aqt_search.report.front import Group, front_names, group_points
from aqt_search.report.records import Record
from aqt_search.report.series import Comparison, Series, all_series, compare_all, reference_point


def front_json(records: Sequence[Record]) -> dict[str, Any]:
    """Every point, every group over seeds, the names on the front, and the series compared.

    Accuracies are fractions, costs GBOPs; null stands for a number that is not defined.
    """
    front, groups, series = front_names(records), group_points(records), all_series(records)
    return {
        "front": list(front),
        "points": [_point_json(record, record.name in front) for record in records],
        "groups": [_group_json(group) for group in groups],
        "hypervolume_reference": _reference_json(series),
        "series": [_series_json(s) for s in series],
        "comparisons": [_comparison_json(c) for c in compare_all(series)],
    }


def _reference_json(series: Sequence[Series]) -> dict[str, float] | None:
    if not series:
        return None
    cost, accuracy = reference_point([group for s in series for group in s.groups])
    return {"log10_gbops": cost, "accuracy": accuracy}


def _series_json(series: Series) -> dict[str, Any]:
    return {
        "name": series.name,
        "groups": [group.name for group in series.groups],
        "seeds": series.seeds,
        "hypervolume": series.hypervolume,
        "hypervolume_interval": [_finite_or_none(bound) for bound in series.interval],
    }


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    first, second = comparison.first, comparison.second
    by_first, by_second = comparison.dominated
    return {
        "series": [first.name, second.name],
        "points": [len(first.groups), len(second.groups)],
        "points_dominated_by_the_other": [by_second, by_first],
        "accuracy_gain": _finite_or_none(comparison.accuracy_gain),
        "cost_ratio": _finite_or_none(comparison.cost_ratio),
    }


def _point_json(record: Record, on_front: bool) -> dict[str, Any]:
    entry = {"name": record.name, "kind": record.kind, "series": record.series}
    entry |= {"seed": record.seed, "on_front": on_front}
    if record.error is not None:
        return entry | {"error": record.error}
    return entry | {
        "accuracy": _finite_or_none(record.accuracy),
        "gbops": record.gbops,
        "weight_bytes": _finite_or_none(record.weight_bytes),
        "target_gbops": record.target_gbops,
        "costs": {name: _finite_or_none(cost) for name, cost in record.costs.items()},
        "targets": dict(record.targets),
        "train_split_accuracy": _finite_or_none(record.train_split_accuracy),
        "formats": record.policy_path,
        "without_retraining": record.without_retraining,
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "series": group.series,
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
