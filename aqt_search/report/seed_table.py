"""The table of means and ranges over seeds, as rows of text."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from aqt_search.report.against_uniform import uniform_points
from aqt_search.report.front import Group, group_points
from aqt_search.report.records import Record
from aqt_search.report.table import dearest_cost


@dataclasses.dataclass(frozen=True)
class SeedRow:
    """The runs that differ only in their seed; ranges are "least to greatest", "" with one run."""

    name: str
    kind: str
    series: str
    seeds: str
    accuracy: str  # %
    accuracy_range: str  # %
    gbops: str
    gbops_range: str
    cost_to_uniform: str  # ratio
    weights: str  # kB = 1000 bytes
    miss: str  # mean miss in % of the target; positive: over it
    note: str


def has_seeds(records: Sequence[Record]) -> bool:
    """Whether some finished point was run with more than one seed."""
    return any(len(group.members) > 1 for group in group_points(records))


def seed_rows(records: Sequence[Record]) -> tuple[SeedRow, ...]:
    """One row per group of finished runs, cheapest first.

    Costs are relative to the dearest uniform point.
    """
    uniform_cost = dearest_cost(uniform_points(records))
    failed = [record.group for record in records if record.error is not None]
    return tuple(_row(g, uniform_cost, failed.count(g.name)) for g in group_points(records))


def _row(group: Group, uniform_cost: float | None, failed: int) -> SeedRow:
    members = group.members
    misses = [m.gbops / m.target_gbops - 1 for m in members if m.target_gbops]
    notes = ["front"] * group.on_front
    notes += ["not retrained"] * all(m.without_retraining for m in members)
    notes += [f"{failed} failed"] * bool(failed)
    return SeedRow(
        name=group.name,
        kind=group.kind,
        series=group.series,
        seeds=str(len(members)),
        accuracy=f"{100 * group.accuracy:.2f}",
        accuracy_range=_range(group, [100 * a for a in group.accuracy_range], ".2f"),
        gbops=f"{group.gbops:.4g}",
        gbops_range=_range(group, group.gbops_range, ".4g"),
        cost_to_uniform=f"{group.gbops / uniform_cost:.3f}" if uniform_cost else "",
        weights=f"{np.mean([m.weight_bytes for m in members]) / 1000:.1f}",
        miss=f"{100 * np.mean(misses):+.1f}%" if misses else "",
        note=", ".join(notes),
    )


def _range(group: Group, bounds: Sequence[float], style: str) -> str:
    """Text: "low to high", or one number where all seeds agree; "" with a single run."""
    low, high = (format(bound, style) for bound in bounds)
    return "" if len(group.members) == 1 else low if low == high else f"{low} to {high}"
