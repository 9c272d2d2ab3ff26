"""The figure of sensitivities: loss increase and signal-to-noise ratio of every site and format."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aqt_search.report.canvas import (
    DPI,
    MAX_HEIGHT_INCHES,
    NOT_QUANTIZED,
    elided,
    ink_on,
    plain,
    png,
)

MOST_SITES_WITH_NUMBERS = 30
_SMALLEST_INCREASE = 1e-3  # nats; what is below has the lightest colour
_SPANS = 1e4  # at most, from the lightest colour to the darkest


def sensitivity_figure(sensitivity: Mapping[str, Any]) -> bytes:
    """All sites x all formats: the increase of the loss, in a log scale of colours, and the SQNR.

    Args:
      sensitivity: the content of a sensitivity.json. What is null there is grey.
    """
    sites, formats = sensitivity["sites"], sensitivity["formats"]
    increase = _array(sensitivity["loss"], sites, formats) - sensitivity["reference_loss"]
    sqnr = _array(sensitivity["sqnr_db"], sites, formats)
    rows = max(len(sites), 1)
    header, footer = 0.85, 0.75
    height = min(header + footer + 0.27 * rows, MAX_HEIGHT_INCHES)
    figure = Figure(figsize=(10.5, height), dpi=DPI, facecolor="white")
    font = min(8.5, 0.85 * (height - header - footer) * 72 / rows)
    bottom, panel = footer / height, 1 - (header + footer) / height
    left = figure.add_axes((0.27, bottom, 0.34, panel))
    right = figure.add_axes((0.65, bottom, 0.34, panel))
    low, high = _increase_range(increase)
    shade = colors.LogNorm(low, high, clip=True)
    _draw(left, np.maximum(increase, low), shade, "YlOrRd", formats, font)
    _draw(right, sqnr, _range_of(sqnr), "YlGnBu_r", formats, font)
    if len(sites) <= MOST_SITES_WITH_NUMBERS:
        size = min(font, 60 / max(len(formats), 1), 7.5)
        _write_numbers(left, increase, _increase_text, size)
        _write_numbers(right, sqnr, "{:.1f}".format, size)
    left.set_yticks(range(len(sites)), [elided(site, 40) for site in sites], fontsize=font)
    right.set_yticks([])
    for axes, title, place in (
        (left, "loss increase in nats, this site alone", 0.27),
        (right, "SQNR of its operands in dB", 0.65),
    ):
        axes.set_title(title, fontsize=9, pad=22)
        bar = figure.add_axes((place, 0.32 / height, 0.34, 0.11 / height))
        figure.colorbar(axes.images[0], cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=7.5)
    figure.text(0.01, 1 - 0.16 / height, _reference_text(sensitivity), fontsize=8, va="top")
    return png(figure)


def _array(rows: Sequence[Sequence[float | None]], sites: Sequence, formats: Sequence):
    """[sites, formats], float64, with NaN for null."""
    return np.array(rows, dtype=float).reshape(len(sites), len(formats))


def _increase_range(increase: np.ndarray) -> tuple[float, float]:
    """Ends of a log scale up to the largest increase, over at most four powers of ten."""
    largest = max(np.nanmax(increase, initial=-np.inf), 10 * _SMALLEST_INCREASE)
    return max(_SMALLEST_INCREASE, largest / _SPANS), largest


def _range_of(values: np.ndarray) -> colors.Normalize:
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    return colors.Normalize(low, high if high > low else low + 1)


def _draw(
    axes: Axes,
    values: np.ndarray,
    shade: colors.Normalize,
    colours: str,
    formats: Sequence[str],
    font: float,
) -> None:
    """A heat map with the formats above it."""
    cmap = colormaps[colours].with_extremes(bad=NOT_QUANTIZED)
    axes.imshow(
        np.ma.masked_invalid(values).reshape(len(values), len(formats)),
        aspect="auto", interpolation="nearest", norm=shade, cmap=cmap,
    )  # fmt: skip
    axes.xaxis.tick_top()
    names = [plain(name) for name in formats]
    axes.set_xticks(range(len(formats)), names, fontsize=min(8.5, 110 / max(len(formats), 1)))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for edge in range(1, len(formats)):
        axes.axvline(edge - 0.5, color="white", lw=1.5)
    for edge in range(1, len(values)):
        axes.axhline(edge - 0.5, color="white", lw=1.0 if font > 5 else 0.3)


def _increase_text(value: float) -> str:
    """Three significant digits above 1, three decimals below."""
    return f"{value:.3g}" if abs(value) >= 1 else f"{round(value, 3) + 0.0:.3f}"  # no "-0.000"


def _write_numbers(axes: Axes, values: np.ndarray, text: Any, size: float) -> None:
    """The values in the cells; "-" where there is none."""
    image = axes.images[0]
    shades = image.to_rgba(np.ma.asarray(image.get_array()))
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column, row, text(value) if np.isfinite(value) else "-", ha="center", va="center",
            fontsize=size, color=ink_on(colors.to_hex(shades[row, column])),
        )  # fmt: skip


def _reference_text(sensitivity: Mapping[str, Any]) -> str:
    return plain(
        f"All other sites {sensitivity['reference']}:"
        f" loss {sensitivity['reference_loss']:.4g},"
        f" accuracy {100 * sensitivity['reference_accuracy']:.2f} %"
        f" on {sensitivity['images']} images. Grey: not defined."
    )
