"""What the report's figures share: sizes, colours, text and the PNG writer.

Matplotlib is used through its object API with the Agg backend: no global state, no display.
"""

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from aqt_search.report.records import Record
from aqt_search.report.table import format_order

DPI = 130
MAX_HEIGHT_INCHES = 24.0
MAX_CURVE_POINTS = 200
NOT_QUANTIZED = "#d9d9d9"
# Okabe and Ito's colour-blind-safe palette, without its yellow, which is too pale for a thin line.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_DASHES = ("-", "--", ":", "-.")


def format_colours(records: Sequence[Record]) -> dict[str, str]:
    """Hex colour of every format in the report: dark for few bits, light for many."""
    names = {f for r in records for pair in r.policy.values() for f in pair if f is not None}
    names |= {f for r in records for d in r.space.values() for f in d.options}
    order = sorted(names, key=format_order)
    shades = np.linspace(0.12, 0.95, len(order)) if len(order) > 1 else [0.5]
    return {name: colors.to_hex(colormaps["viridis"](s)) for name, s in zip(order, shades)}


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of a line per name: 28 different ones, then they repeat."""
    return {
        name: {"color": _PALETTE[i % 7], "ls": _DASHES[i // 7 % 4]} for i, name in enumerate(names)
    }


def log_cost_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis of cost with a margin, at least a factor of four long, plain labels."""
    margin = max((high / low) ** 0.1, 2 / math.sqrt(high / low), 1.15)
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    steps = (1.0, 2.0, 5.0) if high / low < 1e4 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def merged(sequences: Iterable[Iterable[str]]) -> list[str]:
    """All names in one order: each behind the one it follows in the first sequence that has it.

    For networks of which one has what another has not: what both have stays in its place. Names
    that begin a sequence go before the first that is known of it, or to the end.
    """
    order: list[str] = []
    for sequence in sequences:
        names = list(sequence)
        place = next((order.index(name) for name in names if name in order), len(order))
        for name in names:
            if name in order:
                place = order.index(name)
            else:
                order.insert(place, name)
            place += 1
    return order


def ink_on(colour: str) -> str:
    """Black or white, whichever has the greater contrast on `colour` (WCAG 2 luminance)."""
    rgb = np.asarray(colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def thinned(lines: Sequence[Any]) -> list[Any]:
    """At most 200 lines, evenly chosen, the first and the last among them."""
    picks = np.linspace(0, len(lines) - 1, min(len(lines), MAX_CURVE_POINTS))
    return [lines[round(pick)] for pick in picks]


def style(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels, a faint grid behind the data, and no frame above or to the right."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plain(text: str) -> str:
    """Text the default font can draw, with no line breaks and no mathematics in it."""
    drawable = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    return drawable.replace("$", r"\$")


def elided(text: str, most: int) -> str:
    """The end of a long name: in a site's name the end tells more than the beginning."""
    return plain(text) if len(text) <= most else "..." + plain(text[3 - most :])


def legend_text(text: str) -> str:
    """Matplotlib leaves entries that begin with an underscore out of a legend."""
    text = plain(text)
    return f" {text}" if text.startswith("_") else text


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
