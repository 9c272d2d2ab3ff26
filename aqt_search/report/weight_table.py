"""The report's numbers of weights: runs side by side, and the sites of a run, as rows of text."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from aqt_search.report.front import Group, group_points
from aqt_search.report.records import Record
from aqt_search.report.weight_file import WeightRow

FALLS_BY = 0.2  # of max|w| / std(w), that is told as a fall

SITE_TITLES = (
    "site", "format", "note", "weights", "max / std", "kurtosis", "outliers %", "SQNR dB",
    "clipped %", "codes used", "entropy bits",
)  # fmt: skip
RUN_TITLES = (
    "point", "sites", "median max / std", "of the reference", "sites at least 20 % lower",
    "median SQNR dB", "least SQNR dB",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RangeGroup:
    """Runs that differ only in their seed: max|w| / std(w) of every site, a number per seed."""

    name: str
    series: str
    members: tuple[Record, ...]
    ranges: Mapping[str, tuple[float, ...]]  # constant weights left out

    @property
    def means(self) -> dict[str, float]:
        """The mean over the seeds of every site."""
        return {label: float(np.mean(values)) for label, values in self.ranges.items()}

    @property
    def median(self) -> float:
        """The median over the sites of the means over the seeds; NaN without any."""
        return float(np.median(list(self.means.values()))) if self.ranges else math.nan


def range_groups(records: Sequence[Record]) -> tuple[RangeGroup, ...]:
    """The runs with statistics of weights, grouped over seeds, cheapest first."""
    return tuple(map(_range_group, group_points([r for r in records if r.weights])))


def _range_group(group: Group) -> RangeGroup:
    ranges: dict[str, list[float]] = {}
    for member in group.members:
        for label, row in member.weights.items():
            if math.isfinite(row.range_to_deviation):
                ranges.setdefault(label, []).append(row.range_to_deviation)
    found = {label: tuple(values) for label, values in ranges.items()}
    return RangeGroup(group.name, group.series, group.members, found)


def reference_group(groups: Sequence[RangeGroup]) -> RangeGroup:
    """What other runs are compared with: a float run if there is one, the widest of them.

    The widest has the largest median of max|w| / std(w) over the sites.
    """
    floats = [group for group in groups if group.members[0].kind == "float"]
    return max(floats or groups, key=lambda g: -math.inf if math.isnan(g.median) else g.median)


def ratios(group: RangeGroup, reference: RangeGroup) -> list[float]:
    """max|w| / std(w) over that of the reference, means over the seeds, at every common site."""
    own, other = group.means, reference.means
    return [own[label] / other[label] for label in own if label in other]


def run_rows(groups: Sequence[RangeGroup]) -> list[list[str]]:
    """A row of `RUN_TITLES` per group."""
    reference = reference_group(groups)
    return [_run_row(group, reference) for group in groups]


def _run_row(group: RangeGroup, reference: RangeGroup) -> list[str]:
    compared = ["", ""]
    if group is not reference and (found := ratios(group, reference)):
        lower = sum(ratio <= 1 - FALLS_BY for ratio in found)
        compared = [f"{np.median(found):.3f}", f"{lower} of {len(found)}"]
    elif group is reference:
        compared = ["reference", ""]
    sqnr = [row.sqnr_db for member in group.members for row in member.weights.values()]
    known = [value for value in sqnr if math.isfinite(value)]
    noise = [f"{np.median(known):.1f}", f"{min(known):.1f}"] if known else ["", ""]
    return [group.name, str(len(group.ranges)), _shown(group.median, ".2f"), *compared, *noise]


def site_rows(record: Record) -> list[list[str]]:
    """A row of `SITE_TITLES` per weight of a run, in network order."""
    return [_site_row(label, row, record) for label, row in record.weights.items()]


def format_of(row: WeightRow, record: Record) -> str:
    """The format's name, "float" for none."""
    return record.policy[row.site][row.operand == "rhs"] or "float"


def _site_row(label: str, row: WeightRow, record: Record) -> list[str]:
    codes = f"{row.codes_used} of {row.codes}" if row.codes is not None else ""
    return [
        label,
        format_of(row, record),
        row.note,
        str(row.weights),
        _shown(row.range_to_deviation, ".2f"),
        _shown(row.kurtosis, ".2f"),
        _shown(100 * row.outliers, ".2f"),
        _shown(row.sqnr_db, ".1f"),
        _shown(100 * row.clipped, ".2f"),
        codes,
        _shown(row.code_entropy, ".2f"),
    ]


def worst_weights(record: Record, most: int) -> list[str]:
    """Labels of the weights with a histogram and the least SQNR, worst first.

    Those without an SQNR come after the others, the largest max|w| / std(w) first.
    """

    def order(label: str) -> tuple[float, float]:
        row = record.weights[label]
        lost = row.sqnr_db if math.isfinite(row.sqnr_db) else math.inf
        spread = row.range_to_deviation if math.isfinite(row.range_to_deviation) else 0.0
        return lost, -spread

    drawn = [label for label, row in record.weights.items() if row.before]
    return sorted(drawn, key=order)[:most]


def _shown(value: float, style: str) -> str:
    return format(value, style) if math.isfinite(value) else ""
