"""The report of a sweep: reads its folder and writes the front, the figures and an HTML page."""

from aqt_search.report.checked_json import ReportError
from aqt_search.report.records import Record, load_records
from aqt_search.report.terminal import format_table
from aqt_search.report.write import write_report

__all__ = ["Record", "ReportError", "format_table", "load_records", "write_report"]
