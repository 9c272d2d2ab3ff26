"""The figure of the generalization gap: against cost, a line per series."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from aqt_search.report.canvas import DPI, legend_text, line_styles, log_cost_axis, png, style
from aqt_search.report.front import group_points
from aqt_search.report.front_plot import MARKERS
from aqt_search.report.records import Record

GAP_INCHES = (10.0, 3.8)


def gap_figure(records: Sequence[Record]) -> bytes:
    """Accuracy on training images less accuracy on test images, in points, against GBOPs (log).

    Colours and dashes are those of the front's figure. Records without a gap are left out; one of
    them must have it.
    """
    everything = group_points(records)
    finite = [g for g in everything if math.isfinite(g.accuracy)]
    styles = line_styles(list(dict.fromkeys(g.series for g in finite)))
    figure = Figure(figsize=GAP_INCHES, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.08, 0.15, 0.70, 0.80))
    style(axes, "cost in GBOPs (log scale)", "gap in percentage points")
    groups = group_points([r for r in records if math.isfinite(r.gap)])
    log_cost_axis(axes, min(g.gbops for g in groups), max(g.gbops for g in groups))
    axes.axhline(0.0, color="#555555", lw=0.8, zorder=1)
    for series in dict.fromkeys(g.series for g in groups):
        colour, label = styles[series]["color"], legend_text(series)
        members = [g for g in groups if g.series == series]
        gaps = [[100 * m.gap for m in g.members] for g in members]
        costs = [g.gbops for g in members]
        marker = MARKERS[members[0].kind]
        axes.plot(costs, [np.mean(g) for g in gaps], marker=marker, ms=6, lw=1.3, label=label,
                  **styles[series])  # fmt: skip
        axes.vlines(costs, [min(g) for g in gaps], [max(g) for g in gaps], color=colour, lw=1)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=9, frameon=False)
    return png(figure)
