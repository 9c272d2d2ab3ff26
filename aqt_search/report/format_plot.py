"""The figures of formats: all points x all sites, and a policy over time."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from aqt_search.report.canvas import (
    DPI,
    MAX_HEIGHT_INCHES,
    NOT_QUANTIZED,
    elided,
    ink_on,
    legend_text,
    merged,
    plain,
    png,
    thinned,
)
from aqt_search.report.records import Record, bits_of_format
from aqt_search.report.table import format_order

_MAX_COLUMNS = 40


def mapped_records(records: Sequence[Record]) -> list[Record]:
    """All records or, where they are more than fit, of every point its first seed."""
    if len(records) <= _MAX_COLUMNS:
        return list(records)
    return list({record.group: record for record in reversed(records)}.values())[::-1]


def format_map_figure(records: Sequence[Record], colours: Mapping[str, str]) -> bytes:
    """Points x all sites: each cell is split into lhs | rhs and coloured by format.

    The points are those of `mapped_records`.
    """
    records = [r for r in records if r.sites]
    shown = mapped_records(records)
    sites = merged(r.sites for r in shown)
    rows, cols = max(len(sites), 1), max(len(shown), 1)
    header, footer = 1.15 if cols <= 15 else 1.6, 0.6
    height = min(header + footer + 0.15 + 0.26 * rows, MAX_HEIGHT_INCHES)
    figure = Figure(figsize=(10.5, height), dpi=DPI, facecolor="white")
    top, bottom = header / height, footer / height
    axes = figure.add_axes((0.30, bottom, 0.55, 1 - top - bottom))
    axes.imshow(_format_image(shown, sites, colours), aspect="auto", interpolation="nearest")
    for edge in range(1, cols):
        axes.axvline(2 * edge - 0.5, color="white", lw=3 if cols <= 20 else 1)
    for edge in range(1, rows):
        axes.axhline(edge - 0.5, color="white", lw=1.0 if rows <= 60 else 0.3)
    row_points = (height - header - footer) * 72 / rows
    font = min(8.5, 0.85 * row_points)
    _label_rows(axes, sites, font)
    names = [r.name if len(shown) == len(records) else r.group for r in shown]
    axes.xaxis.tick_top()
    axes.set_xticks(
        [2 * i + 0.5 for i in range(len(shown))],
        [elided(name, 22) for name in names],
        rotation=35 if cols <= 15 else 90,
        ha="left" if cols <= 15 else "center",
        fontsize=min(8.5, 400 / cols),
    )
    if rows <= 60 and cols <= 9:
        _write_formats(axes, shown, sites, colours, font)
    _draw_macs(figure.add_axes((0.865, bottom, 0.12, 1 - top - bottom)), shown, sites)
    _format_legend(figure, colours)
    return png(figure)


def _format_image(
    records: Sequence[Record], sites: Sequence[str], colours: Mapping[str, str]
) -> np.ndarray:
    """RGBA [sites, 2 * points, 4]; transparent where a point does not have a site."""
    image = np.zeros((max(len(sites), 1), 2 * max(len(records), 1), 4))
    for column, record in enumerate(records):
        for row, site in enumerate(sites):
            for operand, name in enumerate(record.policy.get(site, ())):
                colour = NOT_QUANTIZED if name is None else colours[name]
                image[row, 2 * column + operand] = colors.to_rgba(colour)
    return image


def _write_formats(
    axes: Axes,
    records: Sequence[Record],
    sites: Sequence[str],
    colours: Mapping[str, str],
    font: float,
) -> None:
    """Format names in the cells: once where both operands have the same."""
    for column, record in enumerate(records):
        for row, site in enumerate(sites):
            pair = record.policy.get(site, ())
            both = [(0.5, name) for name in set(pair)]
            texts = both if len(both) == 1 else list(enumerate(pair))
            for offset, name in texts:
                ink = ink_on(NOT_QUANTIZED if name is None else colours[name])
                label = plain(name or "float")
                size = min(font, 7.5) if len(texts) == 1 else min(font, 36 / len(label), 6.5)
                axes.text(
                    2 * column + offset, row, label, ha="center", va="center",
                    fontsize=size, color=ink,
                )  # fmt: skip


def _label_rows(axes: Axes, sites: Sequence[str], font: float) -> None:
    axes.set_yticks(range(len(sites)), [elided(site, 46) for site in sites], fontsize=font)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_macs(axes: Axes, records: Sequence[Record], sites: Sequence[str]) -> None:
    """Bars: each site's share of the MACs of the first point that has it."""
    macs: dict[str, float] = {}
    for record in records:
        shares = macs_shares(record)
        macs |= {site: share for site, share in shares.items() if site not in macs}
    values = [100 * macs[site] for site in sites]
    axes.barh(range(len(sites)), values, color="#7f7f7f", height=0.75)
    axes.set_ylim(max(len(sites), 1) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(0, max(values, default=1) or 1)
    axes.tick_params(labelsize=8)
    axes.set_title("MACs in %", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def macs_shares(record: Record) -> dict[str, float]:
    """Each site's fraction of the point's MACs."""
    total = sum(facts.macs for facts in record.sites.values())
    return {name: facts.macs / total if total else 0.0 for name, facts in record.sites.items()}


def _format_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """One patch per format, with its bits where the name does not say them."""
    handles = []
    for name, colour in colours.items():
        bits = bits_of_format(name)
        tail = "" if bits is None or str(bits) in name else f" ({bits} bits)"
        handles.append(Patch(color=colour, label=legend_text(name) + tail))
    handles.append(Patch(color=NOT_QUANTIZED, label="not quantized"))
    columns = min(len(handles), 8)
    font = 8 if len(handles) <= 16 else 6
    figure.legend(handles=handles, loc="lower center", ncols=columns, fontsize=font, frameon=False)


def policy_figure(record: Record, colours: Mapping[str, str]) -> bytes:
    """Small multiples, one per decision: the options' probabilities, stacked, over the steps.

    Every panel goes from the first step (left) to the last (right) and from probability 0 to 1.
    """
    decisions = list(record.space)
    columns = min(max(len(decisions), 1), 4 if len(decisions) <= 24 else 6)
    rows = max(math.ceil(len(decisions) / columns), 1)
    height = min(0.5 + 1.05 * rows, MAX_HEIGHT_INCHES)
    figure = Figure(figsize=(10.5, height), dpi=DPI, facecolor="white")
    bottom = 0.42 / height
    axes = figure.add_axes((0.01, bottom, 0.98, 1 - bottom - 0.04 / height))
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    lines = thinned(record.probabilities)
    for index, name in enumerate(decisions):
        row, column = divmod(index, columns)
        _draw_decision(axes, record, lines, name, colours, (column, row))
        axes.text(
            column + 0.03, row + 0.20, elided(name, 38 if columns <= 4 else 32),
            fontsize=8 if columns <= 4 else 6, va="bottom",
        )  # fmt: skip
    used = {option for d in record.space.values() for option in d.options}
    handles = [Patch(color=c, label=legend_text(n)) for n, c in colours.items() if n in used]
    if handles:
        ncols = min(len(handles), 10)
        figure.legend(handles=handles, loc="lower center", ncols=ncols, fontsize=8, frameon=False)
    return png(figure)


def _draw_decision(
    axes: Axes,
    record: Record,
    lines: Sequence[tuple[int, Mapping[str, tuple[float, ...]]]],
    name: str,
    colours: Mapping[str, str],
    corner: tuple[int, int],
) -> None:
    """One panel in the unit cell at `corner` (column, row); the row axis points down."""
    column, row = corner
    left, right, base, top = column + 0.03, column + 0.97, row + 0.93, row + 0.24
    if not lines:
        axes.text(left, (base + top) / 2, "no probabilities recorded", fontsize=6, va="center")
        return
    options = record.space[name].options
    steps = np.array([step for step, _ in lines], dtype=float)
    table = np.array([probabilities[name] for _, probabilities in lines])  # [steps, options]
    if len(lines) == 1:
        steps, table = np.array([0.0, 1.0]), np.repeat(table, 2, axis=0)
    x = left + (right - left) * (steps - steps[0]) / max(steps[-1] - steps[0], 1e-9)
    order = sorted(range(len(options)), key=lambda i: format_order(options[i]))
    edges = np.cumsum(table[:, order], axis=1)
    edges = base - (base - top) * np.concatenate([np.zeros_like(edges[:, :1]), edges], axis=1)
    for place, option in enumerate(order):
        axes.fill_between(
            x, edges[:, place], edges[:, place + 1], color=colours[options[option]], lw=0
        )
    axes.plot([left, right, right, left, left], [base, base, top, top, base], color="#666", lw=0.5)
