"""The figure of the front: accuracy against cost, with labels that do not overlap."""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from aqt_search.report.canvas import DPI, line_styles, log_cost_axis, plain, png, style
from aqt_search.report.front import Group, group_points
from aqt_search.report.records import Record
from aqt_search.search.pareto import pareto_front

Segment = tuple[tuple[float, float], tuple[float, float]]  # both ends, in data coordinates

FRONT_INCHES = (10.0, 6.8)
MARKERS = {
    "float": "D", "uniform": "s", "search": "*", "retrained": "v", "random": "X", "ptq": "P",
    "palette": "h", "supernet": "o", "subnet": "^",
}  # fmt: skip
_COORDINATES = ("gbops", "accuracy")
_ALL_NAMES = 16  # with more points than this, only those on the Pareto front are named


def front_figure(records: Sequence[Record]) -> bytes:
    """Accuracy in % against GBOPs (log axis), the Pareto front as a step line.

    Colours are series, each with a line through its own front and its name at the line's end;
    markers are kinds. A mark is the mean over the seeds of a point, its bars reach from the least
    to the greatest.
    """
    figure = Figure(figsize=FRONT_INCHES, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.08, 0.13, 0.90, 0.81))
    groups = [g for g in group_points(records) if math.isfinite(g.accuracy)]
    if groups:
        _draw_front(axes, groups)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no point has an accuracy", ha="center", va="center")
    lacking = [r.name for r in records if r.error is not None or math.isnan(r.accuracy)]
    if lacking:
        text = "Failed, not shown: " + ", ".join(lacking)
        lines = textwrap.wrap(plain(text), 150, max_lines=2, placeholder=" and more (see table)")
        figure.text(0.02, 0.012, "\n".join(lines), fontsize=8, color="#8b0000", va="bottom")
    return png(figure)


def _draw_front(axes: Axes, groups: Sequence[Group]) -> None:
    style(axes, "cost in GBOPs (log scale)", "test accuracy in %")
    _set_front_limits(axes, groups)
    styles = line_styles(list(dict.fromkeys(g.series for g in groups)))
    corners = _front_corners(axes, [g for g in groups if g.on_front])
    axes.plot(*zip(*corners), color="#c4c4c4", lw=4, zorder=0.5, solid_joinstyle="miter")
    segments = list(itertools.pairwise(corners))
    labels = []
    for name, line in styles.items():
        members = [g for g in groups if g.series == name]
        ends, pieces = _draw_series(axes, members, line)
        segments += pieces
        if len(members) > 1 or len(groups) > _ALL_NAMES:
            labels.append((*ends, name, {"color": _darker(line["color"]), "weight": "bold"}))
    for group in groups:
        segments += _draw_group(axes, group, styles[group.series]["color"])
        if len(groups) <= _ALL_NAMES or group.on_front:
            labels.append((group.gbops, 100 * group.accuracy, group.name, {"color": "#333333"}))
    handles = _front_legend(groups)
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles),
        fontsize=9, frameon=False,
    )  # fmt: skip
    place_labels(axes, [label[:3] for label in labels], segments, [label[3] for label in labels])


def _darker(colour: str) -> tuple[float, float, float]:
    """The palette's light colours are too pale for letters."""
    red, green, blue = colors.to_rgb(colour)
    return 0.75 * red, 0.75 * green, 0.75 * blue


def _draw_series(
    axes: Axes, members: Sequence[Group], line: Mapping[str, Any]
) -> tuple[tuple[float, float], list[Segment]]:
    """The line through a series' own front; returns its dear end, and itself in short pieces."""
    costs, accuracies = (np.array([getattr(g, key) for g in members]) for key in _COORDINATES)
    front = pareto_front(costs, accuracies)
    x, y = costs[front], 100 * accuracies[front]
    axes.plot(x, y, lw=1.3, zorder=2, **line)
    # Labels avoid the box around a piece: short pieces have boxes close to the line.
    places = np.linspace(0, len(x) - 1, 12 * len(x))
    fine_x = np.exp(np.interp(places, np.arange(len(x)), np.log(x)))
    fine_y = np.interp(places, np.arange(len(x)), y)
    return (x[-1], y[-1]), list(itertools.pairwise(zip(fine_x, fine_y)))


def _draw_group(axes: Axes, group: Group, colour: str) -> list[Segment]:
    """The mark of a group and its bars; returns the bars."""
    x, y = group.gbops, 100 * group.accuracy
    face = "white" if _retrained(group) else colour
    size = 15 if group.kind == "search" else 8
    edge = "white" if group.kind == "search" and not _retrained(group) else colour
    level = 3 if group.kind == "search" else 3.1  # a star still shows below a smaller mark
    axes.plot(
        x, y, MARKERS[group.kind], ms=size, mec=edge, mfc=face, mew=1.2, ls="none", zorder=level
    )
    if len(group.members) == 1:
        return []
    low, high = (100 * accuracy for accuracy in group.accuracy_range)
    cheap, dear = group.gbops_range
    bars = [((cheap, y), (dear, y), "|"), ((x, low), (x, high), "_")]
    for start, end, cap in bars:
        axes.plot(*zip(start, end), color=colour, lw=1, marker=cap, ms=6, zorder=2.5)
    return [(start, end) for start, end, _ in bars]


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
    """At least two points of accuracy high, so that there are ticks."""
    costs = [cost for g in groups for cost in g.gbops_range]
    accuracies = [100 * a for g in groups for a in g.accuracy_range]
    log_cost_axis(axes, min(costs), max(costs))
    pad = max(0.1 * (max(accuracies) - min(accuracies)), 1.0)
    axes.set_ylim(max(min(accuracies) - pad, -0.8), min(max(accuracies) + pad, 100.8))


def _front_legend(groups: Sequence[Group]) -> list[Line2D]:
    entries = {}
    for group in groups:
        label = group.kind
        if group.kind == "search":
            label += ", retrained" if _retrained(group) else ", without retraining"
        face = "white" if _retrained(group) else "#555555"
        size = 13 if group.kind == "search" else 8
        entries[label] = Line2D(
            [], [], ls="none", marker=MARKERS[group.kind], mec="#555555", mfc=face, mew=1.2,
            ms=size, label=label,
        )  # fmt: skip
    line = Line2D([], [], color="#c4c4c4", lw=4, label="Pareto front")
    return [*entries.values(), line]


def place_labels(
    axes: Axes,
    items: Sequence[tuple[float, float, str]],
    segments: Sequence[Segment] = (),
    styles: Sequence[Mapping[str, Any]] = (),
) -> list[Bbox]:
    """Names every mark (x, y, name) where the text covers no mark, no segment and no other text.

    Each label takes the first free place on growing circles around its mark, with a thin leader
    line once it is not adjacent. Of a segment the box around it is avoided. Where nothing is free a
    text may cover segments, and where that does not help it goes to the farthest place tried. The
    limits and scales of `axes` must be final. `styles` are Matplotlib's text properties, one per
    item. Returns the text boxes in pixels.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)  # not a part of one
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    pixel = figure.dpi / 72
    marks = axes.transData.transform([(x, y) for x, y, _ in items])
    taken = [Bbox.from_extents(*(m - 6 * pixel), *(m + 6 * pixel)) for m in marks]
    lines = [Bbox(np.sort(axes.transData.transform(ends), axis=0)) for ends in segments]
    lines = [line.padded(2.5 * pixel) for line in lines]
    frame, placed = axes.get_window_extent(renderer), []
    for (x, y, name), mark, look in zip(items, marks, styles or [{}] * len(items)):
        text = axes.annotate(
            plain(name), (x, y), (0, 0), textcoords="offset points", fontsize=9, **look
        )
        size = text.get_window_extent(renderer)
        offsets = _label_offsets(size.width / pixel, size.height / pixel)
        corners = mark + np.array(offsets) * pixel
        boxes = [Bbox.from_bounds(left, low, size.width, size.height) for left, low in corners]
        chosen = _first_free(boxes, (taken + lines, taken), frame)
        box = boxes[chosen]
        text.set_position(offsets[chosen])
        text.set_verticalalignment("bottom")
        taken.append(box)
        placed.append(box)
        near = np.clip(mark, box.min, box.max)
        if np.hypot(*(near - mark)) > 14 * pixel:
            tip = axes.transData.inverted().transform(near)
            axes.plot(*zip((x, y), tip), color="#999999", lw=0.6, zorder=1.5)
    return placed


def _first_free(boxes: Sequence[Bbox], avoided: Sequence[Sequence[Bbox]], frame: Bbox) -> int:
    """The first box in the frame that covers none of the first group, or else of the next."""
    for group in avoided:
        for index, box in enumerate(boxes):
            if box.count_overlaps(group) == 0 and _inside(box, frame):
                return index
    return len(boxes) - 1


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
