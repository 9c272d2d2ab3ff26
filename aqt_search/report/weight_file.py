"""Reads a run's weights.json: statistics of every weight before and after quantization."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from aqt_search.report.checked_json import ReportError, number_of, read_object, value_of
from aqt_search.training.storage import exists

_NUMBERS = (
    "largest", "deviation", "range_to_deviation", "kurtosis", "outliers", "sqnr_db", "clipped",
    "code_entropy", "bound",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """A weight w and q, its values as served; see `aqt_search.weights.statistics`.

    Numbers that are not defined are NaN. Histograms have an odd number of bins, whose centres go
    from -bound to bound; () where there is none.
    """

    site: str
    operand: str  # "lhs" or "rhs"
    weights: int
    largest: float  # max|w|
    deviation: float  # std(w)
    range_to_deviation: float  # max|w| / std(w)
    kurtosis: float
    outliers: float  # share
    sqnr_db: float
    clipped: float  # share
    codes: int | None
    codes_used: int | None
    code_entropy: float  # bits
    bound: float
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def note(self) -> str:
        """What is odd about the weight; "" for nothing."""
        if math.isnan(self.largest):
            return "not finite"
        if self.deviation == 0:
            return "all zero" if self.largest == 0 else "constant"
        return ""


def read_weights(path: Path, sites: Collection[str]) -> dict[str, WeightRow]:
    """The rows by label, in network order; {} if there is no such file.

    A label is the site's name or, inside a scan, that and the iteration.

    Raises:
      ReportError: it is broken, or of other sites.
    """
    if not exists(path):
        return {}
    return {label: _row(label, facts, path, sites) for label, facts in read_object(path).items()}


def _row(label: str, facts: Any, path: Path, sites: Collection[str]) -> WeightRow:
    if not isinstance(facts, dict):
        raise ReportError(f"{path}: weight {label!r} must be an object, not {facts!r}")
    site = value_of(facts, "site", str, path)
    operand = value_of(facts, "operand", str, path)
    if site not in sites or operand not in ("lhs", "rhs"):
        raise ReportError(
            f"{path}: weight {label!r} is of the operand {operand!r} of site {site!r}, expected lhs"
            " or rhs of a site in sites.json"
        )
    before, after = (_histogram(facts, key, path) for key in ("before", "after"))
    if after and len(after) != len(before):
        raise ReportError(
            f"{path}: weight {label!r} has {len(before)} bins before and {len(after)} after"
            " quantization, expected as many"
        )
    return WeightRow(
        site=site, operand=operand, weights=value_of(facts, "weights", int, path),
        **{key: number_of(facts, key, path, missing=math.nan) for key in _NUMBERS},
        **{key: value_of(facts, key, int, path, missing=None) for key in ("codes", "codes_used")},
        before=before, after=after,
    )  # fmt: skip


def _histogram(facts: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...]:
    counts = value_of(facts, key, list, path, missing=[])
    if not all(type(count) is int and count >= 0 for count in counts) or len(counts) % 2 != bool(
        counts
    ):
        raise ReportError(
            f"{path}: {key!r} is {counts!r}, expected the counts of an odd number of bins"
        )
    return tuple(counts)
