"""The report's section of architectures: what every model that was cut out of a larger one has."""

from collections.abc import Sequence
from typing import Any

from aqt_search.report.elements import note, table
from aqt_search.report.records import Record

_NOTE = (
    "Channels of a width, multiples of an expansion, taps along an axis of a window, blocks of a "
    "depth. What a model does not have, it does not decide about."
)


def architecture_section(records: Sequence[Record]) -> str:
    """A row for every decision, a column for every point; nothing where none has one."""
    found = [record for record in records if record.architecture]
    if not found:
        return ""
    decisions = dict.fromkeys(name for record in found for name in record.architecture)
    titles = ["decision", *(record.name for record in found)]
    rows = [[name, *(_told(record.architecture, name) for record in found)] for name in decisions]
    return "<h2>Architecture</h2>" + table(titles, rows) + note(_NOTE)


def _told(architecture: Any, name: str) -> str:
    value = architecture.get(name, "")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
