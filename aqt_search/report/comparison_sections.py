"""The report's sections that compare: fronts, seeds, retraining, targets, gap and sensitivity.

A section that has nothing to say is an empty text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqt_search.report.elements import figure, folded, items, note, table
from aqt_search.report.records import Record
from aqt_search.report.retraining import Pair, PairGroup, group_pairs, retrained_pairs
from aqt_search.report.seed_table import has_seeds, seed_rows
from aqt_search.report.sensitivity import rank_correlation
from aqt_search.report.series import Comparison, Series, all_series, compare_all

_HYPERVOLUME = (
    "Hypervolume: the area that the points of a series dominate in the plane of log10 GBOPs and "
    "accuracy (a fraction), up to twice the cost of the dearest run and the accuracy of the worst "
    "one, the same for all series. The interval is a bootstrap over the seeds: with three seeds, "
    "little more than their range."
)
_COMPARED = (
    "Between its points a front is a straight line in log cost, level from its last one on. The "
    "difference is the mean over the costs that both series cover, between the fronts of the same "
    "seed and then over the seeds, as at the head of this page; the ratio is the geometric mean "
    "over the accuracies that the fronts of the means cover; n/a where there are none."
)
_GAP = (
    "Accuracy of the final model on training images, not augmented, less that on test images. "
    "Marks are means over the seeds, bars go from the least to the greatest."
)
_CORRELATION = (
    "Rank correlation over the searched sites between the increase of the loss with the site alone "
    "in the narrowest format that all decisions have, and the mean bits of the formats found for "
    "its operands. Positive: sensitive sites got more bits. Per MAC: of the increase over the MACs "
    "of the site, the price of its bits. n/a: fewer than three sites, or all alike."
)


# ---- fronts ----


def fronts_section(records: Sequence[Record]) -> str:
    """Every series' hypervolume, and every pair of series in numbers and words."""
    series = all_series(records)
    if not series:
        return ""
    titles = ("series", "points", "seeds", "hypervolume", "95 % interval")
    parts = ["<h2>Fronts compared</h2>", table(titles, map(_series_row, series))]
    parts.append(note(_HYPERVOLUME))
    pairs = compare_all(series)
    if not pairs:
        return "".join([*parts, note("No two series have two points or more: none are compared.")])
    titles = ("A", "B", "points of B that A dominates", "points of A that B dominates",
              "A - B in % points at equal cost", "cost A / B at equal accuracy")  # fmt: skip
    parts += [items([pair.sentence for pair in pairs])]
    parts += [table(titles, map(_comparison_row, pairs), text_columns=2), note(_COMPARED)]
    return "".join(parts)


def _series_row(series: Series) -> list[str]:
    low, high = series.interval
    interval = f"{low:.4f} to {high:.4f}" if math.isfinite(low) else "n/a: one seed"
    counts = [str(len(series.groups)), str(series.seeds)]
    return [series.name, *counts, f"{series.hypervolume:.4f}", interval]


def _comparison_row(pair: Comparison) -> list[str]:
    won, lost = pair.dominated
    return [
        pair.first.name,
        pair.second.name,
        f"{won} of {len(pair.second.groups)}",
        f"{lost} of {len(pair.first.groups)}",
        _difference(pair.accuracy_gain),
        _shown(pair.cost_ratio, ".3g"),
    ]


# ---- seeds ----


def seeds_section(records: Sequence[Record]) -> str:
    """Means and ranges over seeds; nothing where every point has a single seed."""
    if not has_seeds(records):
        return ""
    titles = {
        "name": "point", "series": "series", "note": "note", "seeds": "seeds",
        "accuracy": "accuracy %", "accuracy_range": "over seeds", "gbops": "GBOPs",
        "gbops_range": "over seeds", "miss": "miss", "weights": "weights kB",
    }  # fmt: skip
    rows = [[getattr(row, field) for field in titles] for row in seed_rows(records)]
    told = note("Means over the seeds, and from the least to the greatest value.")
    return "<h2>Seeds</h2>" + table(list(titles.values()), rows, text_columns=3) + told


# ---- no retraining ----


def retraining_section(records: Sequence[Record]) -> str:
    """What training the formats found from scratch would have gained."""
    pairs = retrained_pairs(records)
    if not pairs:
        return ""
    groups = group_pairs(pairs)
    parts = ["<h2>No retraining</h2>"]
    numbers = ("not retrained %", "retrained %", "difference in % points")
    if groups:
        parts.append(items([_retraining_sentence(groups)]))
        titles = ("retrained", "pairs", *numbers, "over seeds")
        parts.append(table(titles, map(_pair_group_row, groups)))
    every = table(("retrained", "search", *numbers), map(_pair_row, pairs), text_columns=2)
    return "".join([*parts, folded("Every pair", every)])


def _retraining_sentence(groups: Sequence[PairGroup]) -> str:
    differences = [100 * pair.difference for group in groups for pair in group.pairs]
    mean = np.mean(differences)
    return (
        f"Not retrained, the weights of a search are on average {abs(mean):.2f} percentage points "
        f"{'above' if mean >= 0 else 'below'} weights trained from scratch in the same formats "
        f"(pairs: {len(differences)}, from {min(differences):+.2f} to {max(differences):+.2f})."
    )


def _pair_group_row(group: PairGroup) -> list[str]:
    searched, retrained, difference = group.means
    spread = _spread([pair.difference for pair in group.pairs])
    accuracies = [_percent(searched), _percent(retrained)]
    return [group.name, str(len(group.pairs)), *accuracies, _difference(difference), spread]


def _pair_row(pair: Pair) -> list[str]:
    search = f"{pair.retrained.pair}{'' if pair.searched else ': no result'}"
    accuracies = [_percent(pair.not_retrained), _percent(pair.retrained.accuracy)]
    return [pair.retrained.name, search, *accuracies, _difference(pair.difference)]


# ---- targets ----


def targets_section(records: Sequence[Record]) -> str:
    """How far the points with targets for other costs than GBOPs are from each of their targets."""
    rows = []
    for record in records:
        if not set(record.targets) - {"gbops"}:
            continue
        gbops = {} if record.target_gbops is None else {"gbops": record.target_gbops}
        for name, target in (gbops | dict(record.targets)).items():
            cost = record.costs[name]
            miss = f"{100 * (cost / target - 1):+.1f}%"
            rows.append([record.name, name, f"{cost:.4g}", f"{target:.4g}", miss])
    if not rows:
        return ""
    titles = ("point", "cost", "reached", "target", "cost / target - 1")
    told = note("Searches with a target for other costs than GBOPs; positive: over the target.")
    return "<h2>Costs and targets</h2>" + table(titles, rows, text_columns=2) + told


# ---- generalization gap ----


def gap_section(records: Sequence[Record], gap_png: bytes | None) -> str:
    """Accuracy on training images less accuracy on test images."""
    known = [r for r in records if math.isfinite(r.gap)]
    if not known or gap_png is None:
        return ""
    series: dict[str, list[Record]] = {}
    for record in known:
        series.setdefault(record.series, []).append(record)
    numbers = ("training images %", "test %", "gap in % points")
    means = [
        [name, str(len(runs)), *_gap_cells(runs), _spread([r.gap for r in runs])]
        for name, runs in series.items()
    ]
    every = table(("point", *numbers), [[r.name, *_gap_cells([r])] for r in known])
    return (
        "<h2>Generalization gap</h2>"
        + figure(gap_png, "generalization gap against cost", _GAP)
        + table(("series", "runs", *numbers, "from least to greatest"), means)
        + folded("Every point", every)
    )


def _gap_cells(runs: Sequence[Record]) -> list[str]:
    """Means of the accuracy on training images, on test images, and of their difference."""
    values = [(r.train_split_accuracy, r.accuracy, r.gap) for r in runs]
    train, test, gap = np.mean(values, axis=0)
    return [_percent(train), _percent(test), _difference(gap)]


# ---- sensitivity ----


def sensitivity_section(
    searches: Sequence[Record], sensitivity: Mapping[str, Any] | None, png: bytes | None
) -> str:
    """The sensitivities of the sites, and whether the searches gave bits to the sensitive ones."""
    if sensitivity is None or png is None:
        return ""
    caption = "One site at a time in each format, all others as in the reference."
    parts = ["<h2>Sensitivity</h2>", figure(png, "sensitivity of the sites", caption)]
    found = [(record.name, rank_correlation(record, sensitivity)) for record in searches]
    rows = [
        [name, f.format or "none in common", str(f.sites)]
        + [_shown(rho, "+.2f") for rho in (f.rho, f.rho_by_cost)]
        for name, f in found
    ]
    if rows:
        titles = ("search", "narrowest common format", "sites", "Spearman's rho", "per MAC")
        parts += [table(titles, rows, text_columns=2), note(_CORRELATION)]
    return "".join(parts)


# ---- numbers as text ----


def _percent(fraction: float) -> str:
    return _shown(100 * fraction, ".2f")


def _difference(fraction: float) -> str:
    return _shown(100 * fraction, "+.2f")


def _spread(fractions: Sequence[float]) -> str:
    """Least to greatest; nothing for a single number."""
    if len(fractions) == 1:
        return ""
    return f"{_difference(min(fractions))} to {_difference(max(fractions))}"


def _shown(value: float, style: str) -> str:
    return format(value, style) if math.isfinite(value) else "n/a"
