"""Writes front.json, front.png and report.html of a sweep."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aqt_search.report.checked_json import ReportError
from aqt_search.report.front_file import front_json
from aqt_search.report.records import Record, load_config, load_records, unfinished_points
from aqt_search.training.storage import as_path
from aqt_search.training.workdir import write_bytes, write_text


def write_report(workdir: str | Path) -> Path:
    """Reads the sweep in `workdir` and writes its front.json, front.png and report.html there.

    Each file is written whole or not at all. Returns the path of report.html.

    Raises:
      ReportError: no point has finished or failed yet, or a file of the sweep is broken.
      WorkdirError: a file cannot be written.
    """
    workdir = as_path(workdir)
    records = load_records(workdir)
    if not records:
        raise ReportError(
            f"{workdir} holds no finished point (no points/<name>/result.json); run the sweep first"
        )
    config, unfinished = load_config(workdir), unfinished_points(workdir)
    # Matplotlib takes long to import, and only this function needs it.
    from aqt_search.report import canvas, html
    from aqt_search.report.sensitivity import load_sensitivity

    colours, sensitivity = canvas.format_colours(records), load_sensitivity(workdir)
    figures = _figures(records, sensitivity, colours)
    front = json.dumps(front_json(records), indent=2, allow_nan=False) + "\n"
    page = html.report_page(records, config, unfinished, sensitivity, figures, colours)
    write_text(workdir / "front.json", front)
    write_bytes(workdir / "front.png", figures["front"])
    write_text(workdir / "report.html", page)
    return workdir / "report.html"


def _figures(
    records: Sequence[Record], sensitivity: Mapping[str, Any] | None, colours: Mapping[str, str]
) -> dict[str, bytes]:
    """PNGs by the names that `report_page` wants."""
    from aqt_search.report import (
        architecture_plot,
        curve_plot,
        format_plot,
        front_plot,
        gap_plot,
        weight_plot,
    )

    finished = [r for r in records if r.error is None]
    searches = [r for r in finished if r.kind == "search"]
    figures = {"front": front_plot.front_figure(records)}
    if finished:
        figures["formats"] = format_plot.format_map_figure(finished, colours)
        figures["training"] = curve_plot.training_figure(finished)
    if any(r.architecture for r in finished):
        figures["architecture"] = architecture_plot.architecture_figure(finished)
    if any(math.isfinite(r.gap) for r in finished):
        figures["gap"] = gap_plot.gap_figure(finished)
    if sensitivity is not None:
        from aqt_search.report import sensitivity_plot

        figures["sensitivity"] = sensitivity_plot.sensitivity_figure(sensitivity)
    if shown := weight_plot.shown_records(finished):
        figures["weights"] = weight_plot.ranges_figure(finished)
    for record in shown:
        if any(row.before for row in record.weights.values()):
            figures[f"weights/{record.name}"] = weight_plot.histograms_figure(record)
    if searches:
        figures["search"] = curve_plot.search_figure(searches)
    for record in searches:
        figures[f"policy/{record.name}"] = format_plot.policy_figure(record, colours)
    return figures
