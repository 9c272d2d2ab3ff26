"""The table of a sweep as plain text for the terminal."""

from collections.abc import Sequence
from typing import Any

from aqt_search.report.against_uniform import gains_over_uniform
from aqt_search.report.records import Record
from aqt_search.report.seed_table import has_seeds, seed_rows
from aqt_search.report.table import table_rows

_POINT_COLUMNS = (
    ("name", "point"),
    ("formats", "formats (sites)"),
    ("accuracy", "accuracy %"),
    ("gbops", "GBOPs"),
    ("cost_to_uniform", "cost/uniform"),
    ("weights", "weights kB"),
    ("miss", "target miss"),
    ("note", "note"),
)
_SEED_COLUMNS = (
    ("name", "point"),
    ("seeds", "seeds"),
    ("accuracy", "accuracy %"),
    ("accuracy_range", "over seeds"),
    ("gbops", "GBOPs"),
    ("cost_to_uniform", "cost/uniform"),
    ("weights", "weights kB"),
    ("miss", "target miss"),
    ("note", "note"),
)
_LEFT_ALIGNED = ("name", "formats", "note")


def format_table(records: Sequence[Record]) -> str:
    """The table as aligned plain text, with what was gained above and what columns mean below.

    One line per point; where points were run with several seeds, one line with the means over
    them, and one for every run that failed.
    """
    if not records:
        return "no point has finished yet"
    legend = ["cost/uniform: GBOPs relative to the dearest uniform point"]
    gains = [gain.sentence for gain in gains_over_uniform(records)]
    gains += [""] * bool(gains)
    if not has_seeds(records):
        return "\n".join(gains + _aligned(table_rows(records), _POINT_COLUMNS) + legend)
    lines = gains + _aligned(seed_rows(records), _SEED_COLUMNS)
    lines += [f"{r.name}: failed: {_one_line(r.error)}" for r in records if r.error is not None]
    return "\n".join([*lines, "Means over the seeds. " + legend[0]])


def _aligned(rows: Sequence[Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of text: a head, a rule, and the named fields of every row."""
    aligned = []
    for field, title in columns:
        cells = [title, *(_one_line(getattr(row, field)) for row in rows)]
        width = max(map(len, cells))
        align = str.ljust if field in _LEFT_ALIGNED else str.rjust
        cells = [cells[0], "-" * width, *cells[1:]]
        aligned.append([align(cell, width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*aligned)]


def _one_line(text: str, most: int = 44) -> str:
    """Error texts may have line breaks and no end; the terminal shows their beginning."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
