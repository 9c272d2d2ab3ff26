"""The table of all points, as rows of text."""

import collections
import dataclasses
import math
from collections.abc import Sequence

from aqt_search.report.against_uniform import uniform_points
from aqt_search.report.front import front_names
from aqt_search.report.records import Record, bits_of_format


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; every field is the text to show, "" where there is no value."""

    name: str
    kind: str
    series: str  # "" where it is the kind
    formats: str = ""
    accuracy: str = ""  # %
    gbops: str = ""
    cost_to_float: str = ""  # ratio
    cost_to_uniform: str = ""  # ratio
    weights: str = ""  # kB = 1000 bytes
    target: str = ""  # GBOPs
    miss: str = ""  # % of the target; positive: over it
    entropy: str = ""  # nats, mean over decisions
    seconds: str = ""
    note: str = ""
    on_front: bool = False


def table_rows(records: Sequence[Record]) -> tuple[Row, ...]:
    """One row per point. Costs are relative to the float point and to the dearest uniform one."""
    front = front_names(records)
    float_cost = dearest_cost([record for record in records if record.kind == "float"])
    uniform_cost = dearest_cost(uniform_points(records))
    return tuple(_row(r, r.name in front, float_cost, uniform_cost) for r in records)


def dearest_cost(records: Sequence[Record]) -> float | None:
    """GBOPs of the dearest finished point; None if there is none."""
    return max((r.gbops for r in records if r.error is None), default=None)


def formats_summary(record: Record, most: int = 5) -> str:
    """How many sites use each format, fewest bits first, as "int4:7 int8:2".

    The operands are told apart, as "lhs int8:9 | rhs int4:9", where they differ at some site.
    """
    pairs = list(record.policy.values())
    lhs, rhs = ([pair[i] for pair in pairs] for i in (0, 1))
    if lhs == rhs:
        return _counts(lhs, most)
    return f"lhs {_counts(lhs, most)} | rhs {_counts(rhs, most)}"


def format_order(name: str | None) -> tuple[float, str]:
    """Sort key of formats: by bits, then name; what is not quantized or not known comes last."""
    bits = bits_of_format(name) if name else None
    return (math.inf if bits is None else bits, name or "~")


def _counts(names: Sequence[str | None], most: int) -> str:
    counts = collections.Counter(names)
    order = sorted(counts, key=format_order)
    shown = [f"{name or 'float'}:{counts[name]}" for name in order[:most]]
    return " ".join(shown + ([f"+{len(order) - most} more"] if len(order) > most else []))


def _row(record: Record, on_front: bool, float_cost: float | None, uniform_cost: float | None):
    series = "" if record.series == record.kind else record.series
    if record.error is not None:
        note = f"failed: {record.error}"
        return Row(record.name, record.kind, series, note=note)
    target = record.target_gbops
    notes = ["front"] * on_front + ["not retrained"] * record.without_retraining
    return Row(
        name=record.name,
        kind=record.kind,
        series=series,
        formats=formats_summary(record),
        accuracy=f"{100 * record.accuracy:.2f}",
        gbops=f"{record.gbops:.4g}",
        cost_to_float=f"{record.gbops / float_cost:.4f}" if float_cost else "",
        cost_to_uniform=f"{record.gbops / uniform_cost:.3f}" if uniform_cost else "",
        weights=f"{record.weight_bytes / 1000:.1f}",
        target=f"{target:.4g}" if target else "",
        miss=f"{100 * (record.gbops - target) / target:+.1f}%" if target else "",
        entropy=f"{record.final_entropy:.3f}" if record.final_entropy is not None else "",
        seconds=f"{record.seconds:.0f}",
        note=", ".join(notes),
        on_front=on_front,
    )
