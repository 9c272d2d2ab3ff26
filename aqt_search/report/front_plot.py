"""The figure of the front: accuracy against cost, with labels that do not overlap."""

import itertools
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from aqt_search.report.canvas import DPI, plain, png, style
from aqt_search.report.front import Group, group_points
from aqt_search.report.records import Record

FRONT_INCHES = (9.0, 6.0)
_MARKERS = {
    "float": ("D", "#000000"),
    "uniform": ("s", "#0072b2"),
    "search": ("o", "#d55e00"),
    "retrained": ("v", "#009e73"),
}


def front_figure(records: Sequence[Record]) -> bytes:
    """Accuracy in % against GBOPs (log axis), the Pareto front as a step line.

    A mark is the mean over the seeds of a point, its bars reach from the least to the greatest.
    """
    figure = Figure(figsize=FRONT_INCHES, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.08, 0.14, 0.90, 0.79))
    groups = [g for g in group_points(records) if math.isfinite(g.accuracy)]
    if groups:
        _draw_front(axes, groups)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no point has an accuracy", ha="center", va="center")
    lacking = [r.name for r in records if r.error is not None or math.isnan(r.accuracy)]
    if lacking:
        text = "Failed, not shown: " + ", ".join(lacking)
        lines = textwrap.wrap(plain(text), 140, max_lines=2, placeholder=" and more (see table)")
        figure.text(0.02, 0.012, "\n".join(lines), fontsize=8, color="#8b0000", va="bottom")
    return png(figure)


def _draw_front(axes: Axes, groups: Sequence[Group]) -> None:
    style(axes, "cost in GBOPs (log scale)", "test accuracy in %")
    _set_front_limits(axes, groups)
    segments = []
    for group in groups:
        marker, colour = _MARKERS[group.kind]
        face = "white" if _retrained(group) else colour
        x, y = group.gbops, 100 * group.accuracy
        axes.plot(x, y, marker, ms=8, mec=colour, mfc=face, mew=1.5, ls="none", zorder=3)
        if len(group.members) > 1:
            low, high = (100 * accuracy for accuracy in group.accuracy_range)
            cheap, dear = group.gbops_range
            bars = [((cheap, y), (dear, y), "|"), ((x, low), (x, high), "_")]
            for start, end, cap in bars:
                axes.plot(*zip(start, end), color=colour, lw=1, marker=cap, ms=6, zorder=2)
                segments.append((start, end))
    corners = _front_corners(axes, [g for g in groups if g.on_front])
    axes.plot(*zip(*corners), color="#555555", lw=1.2, zorder=1)
    segments += itertools.pairwise(corners)
    handles = _front_legend(groups)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": len(handles)}
    axes.legend(handles=handles, fontsize=9, frameon=False, **place)
    place_labels(axes, [(g.gbops, 100 * g.accuracy, g.name) for g in groups], segments)


def _front_corners(axes: Axes, front: Sequence[Group]) -> list[tuple[float, float]]:
    """The step line: up from the lower edge, right to the next point, up, and so to the right."""
    corners, level = [], axes.get_ylim()[0]
    for group in front:
        corners += [(group.gbops, level), (group.gbops, 100 * group.accuracy)]
        level = 100 * group.accuracy
    return [*corners, (axes.get_xlim()[1], level)]


def _retrained(group: Group) -> bool:
    return group.kind == "search" and not all(m.without_retraining for m in group.members)


def _set_front_limits(axes: Axes, groups: Sequence[Group]) -> None:
    """At least a factor of four in cost and two points in accuracy, so that there are ticks."""
    costs = [cost for g in groups for cost in g.gbops_range]
    accuracies = [100 * a for g in groups for a in g.accuracy_range]
    low, high = min(costs), max(costs)
    margin = max((high / low) ** 0.1, 2 / math.sqrt(high / low), 1.15)
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    pad = max(0.1 * (max(accuracies) - min(accuracies)), 1.0)
    axes.set_ylim(max(min(accuracies) - pad, -0.8), min(max(accuracies) + pad, 100.8))
    steps = (1.0, 2.0, 5.0) if high / low < 1e4 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _front_legend(groups: Sequence[Group]) -> list[Line2D]:
    entries = {}
    for group in groups:
        label = group.kind
        if group.kind == "search":
            label += ", retrained" if _retrained(group) else ", without retraining"
        marker, colour = _MARKERS[group.kind]
        face = "white" if _retrained(group) else colour
        entries[label] = Line2D(
            [], [], ls="none", marker=marker, mec=colour, mfc=face, mew=1.5, ms=8, label=label
        )
    line = Line2D([], [], color="#555555", lw=1.2, label="Pareto front")
    return [*entries.values(), line]


def place_labels(
    axes: Axes,
    items: Sequence[tuple[float, float, str]],
    segments: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> list[Bbox]:
    """Names every mark (x, y, name) where the text covers no mark, no segment and no other text.

    Each label takes the first free place on growing circles around its mark, with a thin leader
    line once it is not adjacent. Where nothing is free it may cover segments (horizontal or
    vertical lines), and where that does not help it goes to the farthest place tried. The limits
    and scales of `axes` must be final. Returns the text boxes in pixels.
    """
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    axes.figure.draw(renderer)
    pixel = axes.figure.dpi / 72
    marks = axes.transData.transform([(x, y) for x, y, _ in items])
    taken = [Bbox.from_extents(*(m - 6 * pixel), *(m + 6 * pixel)) for m in marks]
    lines = [Bbox(np.sort(axes.transData.transform(ends), axis=0)) for ends in segments]
    lines = [line.padded(1.5 * pixel) for line in lines]
    frame, placed = axes.get_window_extent(renderer), []
    for (x, y, name), mark in zip(items, marks):
        text = axes.annotate(plain(name), (x, y), (0, 0), textcoords="offset points", fontsize=9)
        size = text.get_window_extent(renderer)
        offsets = _label_offsets(size.width / pixel, size.height / pixel)
        for avoided, (dx, dy) in itertools.product((taken + lines, taken), offsets):
            origin = mark + np.array([dx, dy]) * pixel
            box = Bbox.from_bounds(*origin, size.width, size.height)
            if box.count_overlaps(avoided) == 0 and _inside(box, frame):
                break
        text.set_position((dx, dy))
        text.set_verticalalignment("bottom")
        taken.append(box)
        placed.append(box)
        near = np.clip(mark, box.min, box.max)
        if np.hypot(*(near - mark)) > 14 * pixel:
            tip = axes.transData.inverted().transform(near)
            axes.plot(*zip((x, y), tip), color="#999999", lw=0.6, zorder=1.5)
    return placed


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def _label_offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Lower left corners, in points from the mark, of a text box placed around it."""
    offsets = []
    for radius in range(8, 160, 8):
        for angle in np.deg2rad([45, 0, 135, -45, 180, -135, 90, -90, 22, 158, -22, -158]):
            x, y = radius * math.cos(angle), radius * math.sin(angle)
            offsets.append(
                (
                    x - width * (1 - math.cos(angle)) / 2,
                    y - height * (1 - math.sin(angle)) / 2,
                )
            )
    return offsets
