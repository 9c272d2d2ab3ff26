"""The figures of curves over the steps: training, and the course of the searches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from aqt_search.report.canvas import (
    DPI,
    MAX_CURVE_POINTS,
    MAX_HEIGHT_INCHES,
    elided,
    legend_text,
    line_styles,
    png,
    style,
)
from aqt_search.report.records import Record

_MAX_NAMES = 16  # points that a legend names


def training_figure(records: Sequence[Record]) -> bytes:
    """Training loss, training accuracy and gradient norm of all points over the steps."""
    panels = [
        ("training loss", lambda r: _series(r, "loss")),
        ("training accuracy in %", lambda r: _series(r, "accuracy", 100)),
        ("gradient norm", lambda r: _series(r, "gradient_norm")),
    ]
    return _curves_figure([r for r in records if r.error is None], panels, reference=None)


def search_figure(records: Sequence[Record]) -> bytes:
    """Quality, expected cost relative to the target, and policy entropy of the searched points."""
    panels = [
        ("quality of the sampled points", lambda r: _series(r, "quality")),
        ("expected cost / target", _cost_series),
        ("mean entropy of a decision in nats", entropy_series),
    ]
    searches = [r for r in records if r.error is None and r.kind == "search"]
    return _curves_figure(searches, panels, reference=1)


def _cost_series(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Expected cost (that of the sampled assignments where there is none) over the target."""
    target = record.primary_target
    if not target:
        return np.empty(0), np.empty(0)
    steps, values = _series(record, "expected_cost", 1 / target)
    return (steps, values) if len(steps) else _series(record, "cost", 1 / target)


def _curves_figure(
    records: Sequence[Record],
    panels: Sequence[tuple[str, Callable[[Record], tuple[np.ndarray, np.ndarray]]]],
    reference: int | None,
) -> bytes:
    """Panels side by side, one line per run; `reference` is the panel with a line at 1.

    Lines are told apart by point or, where there are too many points for that, by series.
    """
    names = [r.group for r in records]
    if len(set(names)) > _MAX_NAMES:
        names = [r.series for r in records]
    styles = line_styles(list(dict.fromkeys(names)))
    legend_rows = math.ceil(len(styles) / 4)
    height = min(3.2 + 0.2 * legend_rows, MAX_HEIGHT_INCHES)
    figure = Figure(figsize=(12.0, height), dpi=DPI, facecolor="white")
    base = (0.55 + 0.2 * legend_rows) / height
    for index, (title, series) in enumerate(panels):
        axes = figure.add_axes((0.05 + 0.325 * index, base, 0.28, 1 - base - 0.3 / height))
        style(axes, "step", "")
        axes.set_title(title, fontsize=10, loc="left")
        lines = [(name, *series(record)) for name, record in zip(names, records)]
        for name, steps, values in lines:
            axes.plot(*_binned(steps, values), lw=1.2 if len(lines) < 30 else 0.6,
                      marker="." * (len(steps) < 12) or None, **styles[name])  # fmt: skip
        if index == reference:
            axes.axhline(1.0, color="#555555", lw=0.8, ls=(0, (2, 2)))
        if not any(len(steps) for _, steps, _ in lines):
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
    handles = [
        Line2D([], [], lw=1.6, label=legend_text(elided(name, 34)), **style_of_name)
        for name, style_of_name in styles.items()
    ]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    return png(figure)


def _series(record: Record, key: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that hold a finite number under `key`."""
    pairs = [(line["step"], line[key]) for line in record.metrics if _is_finite(line.get(key))]
    steps, values = np.asarray(pairs, dtype=float).reshape(-1, 2).T
    return steps, scale * values


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs of neighbouring steps, so that a curve has at most 200 points."""
    count = min(len(steps), MAX_CURVE_POINTS)
    if count == 0:
        return steps, values

    def means(array: np.ndarray) -> np.ndarray:
        return np.array([part.mean() for part in np.array_split(array, count)])

    return means(steps), means(values)


def entropy_series(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over decisions of - sum_i p_i ln p_i in nats."""
    steps = np.array([step for step, _ in record.probabilities], dtype=float)
    values = [
        np.mean([-sum(p * math.log(p) for p in row if p > 0) for row in table.values()])
        for _, table in record.probabilities
    ]
    return steps, np.asarray(values, dtype=float)
