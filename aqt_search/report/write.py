"""Writes front.json, front.png and report.html of a sweep."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aqt_search.report.checked_json import ReportError
from aqt_search.report.front_file import front_json
from aqt_search.report.records import Record, load_config, load_records, unfinished_points


def write_report(workdir: str | Path) -> Path:
    """Reads the sweep in `workdir` and writes its front.json, front.png and report.html there.

    Each file is written whole or not at all. Returns the path of report.html.

    Raises:
      ReportError: no point has finished or failed yet, or a file of the sweep is broken.
    """
    workdir = Path(workdir)
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
    _write_whole(workdir / "front.json", front.encode())
    _write_whole(workdir / "front.png", figures["front"])
    _write_whole(workdir / "report.html", page.encode("utf-8"))
    return workdir / "report.html"


def _figures(
    records: Sequence[Record], sensitivity: Mapping[str, Any] | None, colours: Mapping[str, str]
) -> dict[str, bytes]:
    """PNGs by the names that `report_page` wants."""
    from aqt_search.report import curve_plot, format_plot, front_plot, gap_plot, weight_plot

    finished = [r for r in records if r.error is None]
    searches = [r for r in finished if r.kind == "search"]
    figures = {"front": front_plot.front_figure(records)}
    if finished:
        figures["formats"] = format_plot.format_map_figure(finished, colours)
        figures["training"] = curve_plot.training_figure(finished)
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


def _write_whole(path: Path, content: bytes) -> None:
    """Through a temporary name in the same folder, so that no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
