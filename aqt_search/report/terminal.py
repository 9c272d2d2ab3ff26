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
    them, and one for every run that failed. Columns that no point has a value for are left out.
    """
    if not records:
        return "no point has finished yet"
    gains = [gain.sentence for gain in gains_over_uniform(records)]
    gains += [""] * bool(gains)
    by_seed = has_seeds(records)
    rows = seed_rows(records) if by_seed else table_rows(records)
    lines = gains + _aligned(rows, _SEED_COLUMNS if by_seed else _POINT_COLUMNS)
    if by_seed:
        lines += [f"{r.name}: failed: {_one_line(r.error)}" for r in records if r.error is not None]
    legend = ["Means over the seeds."] if by_seed else []
    if any(row.cost_to_uniform for row in rows):
        legend.append("cost/uniform: GBOPs relative to the dearest uniform point")
    return "\n".join([*lines, " ".join(legend)]).rstrip()


def _aligned(rows: Sequence[Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of text: a head, a rule, and the named fields of every row, if some row has any."""
    aligned = []
    for field, title in columns:
        texts = [_one_line(getattr(row, field)) for row in rows]
        if not any(texts):
            continue
        cells = [title, *texts]
        width = max(map(len, cells))
        align = str.ljust if field in _LEFT_ALIGNED else str.rjust
        cells = [cells[0], "-" * width, *cells[1:]]
        aligned.append([align(cell, width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*aligned)]


def _one_line(text: str, most: int = 44) -> str:
    """Error texts may have line breaks and no end; the terminal shows their beginning."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
