"""The report's section of architectures: what every model that was cut out of a larger one has."""

from collections.abc import Sequence
from typing import Any

from aqt_search.report.elements import figure, folded, note, table
from aqt_search.report.format_plot import mapped_records
from aqt_search.report.records import Record

_CAPTION = (
    "The network of every point, from its first block down to its last: a bar for every choice, as "
    "long as the number chosen is of the largest that there was to choose. A block that is skipped "
    "leaves the line. Channels of a width, multiples of an expansion, taps along the axes of a "
    "window."
)
_NOTE = (
    "Channels of a width, multiples of an expansion, taps along an axis of a window, blocks of a "
    "depth. What a model does not have, it does not decide about."
)


def architecture_section(records: Sequence[Record], png: bytes | None) -> str:
    """The figure and, folded, a row for every decision; nothing where no point has one."""
    found = [record for record in records if record.architecture]
    if not found or png is None:
        return ""
    caption = _CAPTION
    if len(mapped_records(found)) < len(found):
        caption = f"{caption} Of points with several seeds the first is shown."
    decisions = dict.fromkeys(name for record in found for name in record.architecture)
    titles = ["decision", *(record.name for record in found)]
    rows = [[name, *(_told(record.architecture, name) for record in found)] for name in decisions]
    return (
        "<h2>Architecture</h2>"
        + figure(png, "architectures of all points", caption)
        + folded("All choices in numbers", table(titles, rows) + note(_NOTE))
    )


def _told(architecture: Any, name: str) -> str:
    value = architecture.get(name, "")
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
