"""The figures of weights: range over deviation of all runs, and histograms of one."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from aqt_search.report.canvas import (
    DPI,
    MAX_HEIGHT_INCHES,
    elided,
    legend_text,
    line_styles,
    log_cost_axis,
    merged,
    plain,
    png,
    style,
)
from aqt_search.report.records import Record
from aqt_search.report.weight_table import RangeGroup, format_of, range_groups, worst_weights

HISTOGRAMS = 12  # at most, in a figure
_MOST_MARKS = 10  # in a row of the figure of ranges
_MARKERS = "osD^v<>PX*"
_BAR, _LINE = "#8ab8d8", "#1a1a1a"


def by_series(groups: Sequence[RangeGroup]) -> bool:
    """Whether there are so many groups that those of a series have one mark together."""
    return len(groups) > _MOST_MARKS


def shown_records(records: Sequence[Record]) -> list[Record]:
    """The first seed of every point with statistics of weights."""
    return [group.members[0] for group in range_groups(records)]


def ranges_figure(records: Sequence[Record]) -> bytes:
    """max|w| / std(w) of every site (rows), a mark per point, or per series of many points."""
    groups = range_groups(records)
    marks = _marks(groups)
    everywhere = merged(member.weights for g in groups for member in g.members)
    known = {label for values in marks.values() for label in values}
    labels = [label for label in everywhere if label in known]
    rows = max(len(labels), 1)
    header, footer = 0.15 + 0.22 * math.ceil(len(marks) / 4), 0.6
    height = min(header + footer + 0.28 * rows, MAX_HEIGHT_INCHES)
    figure = Figure(figsize=(10.5, height), dpi=DPI, facecolor="white")
    bottom, panel = footer / height, 1 - (header + footer) / height
    axes = figure.add_axes((0.30, bottom, 0.68, panel))
    style(axes, "max|w| / std(w), log scale", "")
    _draw_ranges(axes, marks, labels)
    font = min(8.5, 0.85 * (height - header - footer) * 72 / rows)
    axes.set_yticks(range(len(labels)), [elided(label, 46) for label in labels], fontsize=font)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(rows - 0.5, -0.5)
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8.5, frameon=False)
    return png(figure)


def _marks(groups: Sequence[RangeGroup]) -> dict[str, dict[str, list[float]]]:
    """Name of a mark -> site -> the numbers of its runs."""
    marks: dict[str, dict[str, list[float]]] = {}
    for group in groups:
        own = marks.setdefault(group.series if by_series(groups) else group.name, {})
        for label, values in group.ranges.items():
            own.setdefault(label, []).extend(values)
    return dict(list(marks.items())[:_MOST_MARKS])


def _draw_ranges(
    axes: Axes, marks: Mapping[str, Mapping[str, Sequence[float]]], labels: Sequence[str]
) -> None:
    everything = [v for values in marks.values() for numbers in values.values() for v in numbers]
    log_cost_axis(axes, min(everything, default=1), max(everything, default=4))
    styles = line_styles(list(marks))
    for place, ((name, values), marker) in enumerate(zip(marks.items(), _MARKERS)):
        beside = 0.6 * ((place + 0.5) / len(marks) - 0.5)  # so that equal marks are all seen
        rows = [labels.index(label) + beside for label in values]
        colour = styles[name]["color"]
        means = [np.mean(numbers) for numbers in values.values()]
        least, most = ([f(numbers) for numbers in values.values()] for f in (min, max))
        axes.hlines(rows, least, most, color=colour, lw=1)
        axes.plot(means, rows, marker, color=colour, ms=5, alpha=0.85, label=legend_text(name))


def histograms_figure(record: Record) -> bytes:
    """Histograms of a run's worst weights, before (line) and after (bars) quantization."""
    labels = worst_weights(record, HISTOGRAMS)
    columns = 4 if len(labels) > 2 else max(len(labels), 1)
    rows = max(math.ceil(len(labels) / columns), 1)
    height = 0.1 + 1.85 * rows
    figure = Figure(figsize=(10.5, height), dpi=DPI, facecolor="white")
    for place, label in enumerate(labels):
        row, column = divmod(place, columns)
        left, width = (column + 0.15) / columns, 0.80 / columns
        low = 1 - (0.05 + 1.85 * (row + 1) - 0.30) / height
        axes = figure.add_axes((left, low, width, 1.12 / height))
        _draw_histogram(axes, label, record)
    return png(figure)


def _draw_histogram(axes: Axes, label: str, record: Record) -> None:
    weight = record.weights[label]
    bins = len(weight.before)
    edges = (np.arange(bins + 1) - bins / 2) / (bins // 2) * (weight.bound or 1.0)
    if weight.after:
        axes.stairs(np.maximum(weight.after, 0.5), edges, baseline=0.5, fill=True, color=_BAR)
    if weight.before:
        axes.stairs(np.maximum(weight.before, 0.5), edges, baseline=0.5, color=_LINE, lw=0.9)
    axes.set_yscale("log")
    top = max(*weight.before, *weight.after, 10)
    axes.set_ylim(0.5, 2 * top)
    powers = range(0, math.floor(math.log10(top)) + 1, 2 if top >= 1e4 else 1)
    axes.yaxis.set_major_locator(FixedLocator([10.0**power for power in powers]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(3, symmetric=True))
    style(axes, "", "")
    axes.tick_params(labelsize=7.5)
    axes.set_title(f"{elided(label, 34)}\n{_subtitle(label, record)}", fontsize=7.5, loc="left")


def _subtitle(label: str, record: Record) -> str:
    weight = record.weights[label]
    told = [plain(format_of(weight, record)), weight.note]
    if math.isfinite(weight.sqnr_db):
        told.append(f"SQNR {weight.sqnr_db:.1f} dB")
    if math.isfinite(weight.range_to_deviation):
        told.append(f"max / std {weight.range_to_deviation:.1f}")
    return ", ".join(filter(None, told))
