"""The figure of architectures: the network of every point, from its first block to its last.

A bar for every decision that a point has, as long as what was chosen is of the largest option. The
bars of a block stand together; a block that is skipped leaves the thin line that runs through all.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from aqt_search.report.canvas import DPI, MAX_HEIGHT_INCHES, elided, merged, png
from aqt_search.report.format_plot import mapped_records
from aqt_search.report.records import Record

# By kind: colour, what the legend calls it, and how a number is written. All bear black text.
KINDS: Mapping[str, tuple[str, str, str]] = {
    "width": ("#56b4e9", "channels", "{0}"),
    "expansion": ("#e69f00", "expansion", "\N{MULTIPLICATION SIGN}{0}"),
    "window": ("#5fc9a5", "window", "{0}\N{MULTIPLICATION SIGN}{0}"),
    "depth": ("#b8b8b8", "block without other choices", ""),
}
TRACK = "#ececec"
_LINE = "#8a8a8a"
_CELL = 0.88  # of a column's width
_GAP = 0.45  # between blocks, in bars
_LEAST_FONT = 4.0
_MOST_SLANTED = 15  # points whose labels are slanted; those of more are upright


class Lane(NamedTuple):
    """A row of bars: one decision, or a block that is there or not."""

    block: str
    layer: str  # "" where it is the block itself
    name: str  # of the decision
    kind: str
    largest: int  # number of all options


def architecture_figure(records: Sequence[Record]) -> bytes:
    """Networks side by side, points from left to right as in the map of formats, blocks downwards.

    The points are those of `mapped_records` that have an architecture.
    """
    records = [record for record in records if record.architecture]
    shown = mapped_records(records)
    lanes = _lanes_of(shown)
    places = _places(lanes)
    cols, rows = max(len(shown), 1), places[-1] + 1 if places else 1.0
    upright = cols > _MOST_SLANTED
    header, footer = (1.6, 1.95) if upright else (1.15, 1.25)
    height = min(header + footer + 0.19 * rows, MAX_HEIGHT_INCHES)
    figure = Figure(figsize=(10.5, height), dpi=DPI, facecolor="white")
    width = min(0.76 if upright else 0.68, 0.15 * cols)
    axes = figure.add_axes((0.22, footer / height, width, 1 - (header + footer) / height))
    axes.set_xlim(-0.5, cols - 0.5)
    axes.set_ylim(rows - 0.25, -0.75)
    lane_points = 72 * (height - header - footer) / rows
    optional = _optional_blocks(shown)
    table = [_choices(record, lanes, optional) for record in shown]
    for column, choices in enumerate(table):
        _draw_network(axes, column, choices, lanes, places)
    _write_choices(axes, table, lanes, places, (72 * 10.5 * width / cols * _CELL, lane_points))
    _label_lanes(axes, lanes, places, min(8.5, 0.85 * lane_points))
    _label_points(axes, shown, [r.name if cols == len(records) else r.group for r in shown])
    used = {lane.kind for lane in lanes}
    handles = [
        Patch(color=colour, label=told) for kind, (colour, told, _) in KINDS.items() if kind in used
    ]
    handles.append(Patch(color=TRACK, label="largest option"))
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8, frameon=False)
    return png(figure)


# ---- lanes ----


def _lanes_of(records: Sequence[Record]) -> list[Lane]:
    """The decisions of all records about widths, expansions and windows, in network order.

    Blocks that can be skipped and have none of these have a lane of their own.
    """
    largest: dict[str, int] = {}
    for record in records:
        # Older runs do not tell the options: then it is the largest that a point has.
        known = [(name, option) for name, d in record.elastic.items() for option in d.options]
        for name, choice in (*record.architecture.items(), *known):
            largest[name] = max(largest.get(name, 1), _number(choice))
    lanes = [
        Lane(*_block_and_layer(name.rpartition(":")[0]), name, _kind(name), number)
        for name, number in largest.items()
        if _kind(name) in KINDS and _kind(name) != "depth"
    ]
    for name, blocks in _optional_blocks(records).items():
        for block in blocks:
            if not any(_inside(lane.block, block) for lane in lanes):
                lanes.append(Lane(block, "", name, "depth", 1))
    return _in_network_order(lanes, records)


def _optional_blocks(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    """The blocks that each depth is about, as any of the records tells."""
    return {
        name: decision.about
        for record in records
        for name, decision in record.elastic.items()
        if _kind(name) == "depth"
    }


def _number(choice: Any) -> int:
    """A choice; of one for several groups that of the first, which the decision is named by."""
    return choice[0] if isinstance(choice, tuple) else choice


def _kind(name: str) -> str:
    return name.rpartition(":")[2]


def _block_and_layer(path: str) -> tuple[str, str]:
    """Those of `block/layer/leaf`; the layer is "" in `block/leaf`."""
    parts = path.split("/")[:-1] or [path]
    return ("/".join(parts[:-1]), parts[-1]) if len(parts) > 1 else (parts[0], "")


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}/")


def _in_network_order(lanes: Sequence[Lane], records: Sequence[Record]) -> list[Lane]:
    """Blocks and layers in the order of the sites; what no record has a site of, by its number.

    A model that was cut out numbers its own blocks anew, from the first: their order stays.
    """
    places = [[_block_and_layer(site) for site in record.sites] for record in records]
    blocks = [list(dict.fromkeys(block for block, _ in sites)) for sites in places]
    layers: dict[tuple[int, str], list[str]] = {}
    for number, sites in enumerate(places):
        for block, layer in sites:
            layers.setdefault((number, block), []).append(layer)
    block_order = merged([*blocks, *_numbered(lane.block for lane in lanes)])
    layer_order = merged([*layers.values(), [lane.layer for lane in lanes]])
    return sorted(
        lanes,
        key=lambda lane: (block_order.index(lane.block), layer_order.index(lane.layer)),
    )


def _numbered(names: Any) -> list[list[str]]:
    """Names that differ in their numbers alone, by these: block1, block2, block10."""
    alike: dict[str, set[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "0", name), set()).add(name)
    return [
        sorted(group, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        for group in alike.values()
    ]


def _places(lanes: Sequence[Lane]) -> list[float]:
    """The vertical place of each lane, in bars, with a gap before every block but the first."""
    places, place = [], 0.0
    for number, lane in enumerate(lanes):
        if number:
            place += 1 if lane.block == lanes[number - 1].block else 1 + _GAP
        places.append(place)
    return places


# ---- drawing ----


def _choices(
    record: Record, lanes: Sequence[Lane], optional: Mapping[str, Sequence[str]]
) -> list[Any]:
    """What a point has of each lane: a number, or a tuple of some; None where it has nothing."""
    chosen = record.architecture
    skipped = [
        block
        for name, blocks in optional.items()
        if name in chosen
        for block in blocks[_number(chosen[name]) :]
    ]
    found = []
    for lane in lanes:
        choice = chosen.get(lane.name)
        if any(_inside(lane.block, block) for block in skipped):
            choice = None
        found.append(1 if lane.kind == "depth" and choice is not None else choice)
    return found


def _draw_network(
    axes: Axes, column: int, choices: Sequence[Any], lanes: Sequence[Lane], places: Sequence[float]
) -> None:
    """The bars of one point, centred on its column."""
    axes.axvline(column, color=_LINE, lw=0.8, zorder=1)
    for kind, (colour, *_) in KINDS.items():
        here = [
            (place, _CELL * _number(choice) / lane.largest)
            for lane, place, choice in zip(lanes, places, choices)
            if lane.kind == kind and choice is not None
        ]
        heights, sizes = [place for place, _ in here], [size for _, size in here]
        lefts = [column - size / 2 for size in sizes]
        axes.barh(heights, _CELL, left=column - _CELL / 2, height=1, color=TRACK, lw=0, zorder=2)
        axes.barh(heights, sizes, left=lefts, height=0.92, color=colour, lw=0, zorder=3)


def _write_choices(
    axes: Axes,
    table: Sequence[Sequence[Any]],
    lanes: Sequence[Lane],
    places: Sequence[float],
    cell: tuple[float, float],
) -> None:
    """The numbers in the bars, where the longest of them fits; `cell` is in points."""
    texts = []
    for column, choices in enumerate(table):
        for lane, place, choice in zip(lanes, places, choices):
            if choice is not None and lane.kind != "depth":
                numbers = choice if isinstance(choice, tuple) else (choice,)
                told = "+".join(KINDS[lane.kind][2].format(number) for number in numbers)
                texts.append((column, place, told))
    longest = max((len(told) for *_, told in texts), default=1)
    font = min(8.0, cell[0] / (0.66 * longest), 0.72 * cell[1])
    if font < _LEAST_FONT:
        return
    for column, place, told in texts:
        axes.text(column, place, told, ha="center", va="center", fontsize=font, zorder=4)


def _label_lanes(axes: Axes, lanes: Sequence[Lane], places: Sequence[float], font: float) -> None:
    """Layers beside their bars, the block's name before the first of them."""
    labels = []
    for number, lane in enumerate(lanes):
        first = not number or lanes[number - 1].block != lane.block
        parts = [elided(lane.block, 26)] if first else []
        labels.append("   ".join([*parts, *([elided(lane.layer, 16)] if lane.layer else [])]))
    axes.set_yticks(places, labels, fontsize=font)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label_points(axes: Axes, records: Sequence[Record], names: Sequence[str]) -> None:
    """Names above, cost and accuracy below."""
    cols = len(records)
    upright = cols > _MOST_SLANTED
    font, angle = min(8.5, 400 / max(cols, 1)), 90 if upright else 35
    told = [
        f"{r.gbops:.3g} GBOPs"
        + (f"\n{100 * r.accuracy:.1f} %" if math.isfinite(r.accuracy) else "")
        for r in records
    ]
    if upright:  # no room for two lines
        told = [text.replace("\n", ", ") for text in told]
    axes.set_xticks(
        range(cols), told, rotation=angle, ha="center" if upright else "right", fontsize=font
    )
    axes.tick_params(length=0)
    above = axes.secondary_xaxis("top")
    above.set_xticks(
        range(cols), [elided(name, 22) for name in names], rotation=angle,
        ha="center" if upright else "left", fontsize=font,
    )  # fmt: skip
    above.tick_params(length=0)
    above.spines[:].set_visible(False)
