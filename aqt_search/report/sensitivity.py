"""Reads the sensitivities of the sites, and ranks them against the bits that searches gave."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aqt_search.report.checked_json import ReportError, number_of, read_object, value_of
from aqt_search.report.records import Record, bits_of_format
from aqt_search.report.table import format_order
from aqt_search.training.storage import as_path, exists

_FLOAT_BITS = 32  # of an operand that is not quantized


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rho of bits with the sensitivity of `sites` sites; NaN if not defined."""

    format: str | None  # the one whose loss increase is the sensitivity; None: no common one
    sites: int
    rho: float
    rho_by_cost: float  # with the sensitivity per MAC: what a bit is worth where bits have a price


def load_sensitivity(workdir: str | Path) -> dict[str, Any] | None:
    """The content of <workdir>/sensitivity.json; None if there is no such file.

    Raises:
      ReportError: it lacks something that the figure shows, or a table is of another size.
    """
    path = as_path(workdir) / "sensitivity.json"
    if not exists(path):
        return None
    content = read_object(path)
    names = {key: value_of(content, key, list, path) for key in ("sites", "formats")}
    for key, values in names.items():
        if not all(isinstance(value, str) for value in values):
            raise ReportError(f"{path}: {key!r} is {values!r}, expected names")
    value_of(content, "reference", str, path)
    for key in ("reference_loss", "reference_accuracy", "images"):
        number_of(content, key, path)
    shape = (len(names["sites"]), len(names["formats"]))
    for key in ("loss", "sqnr_db"):
        _check_table(value_of(content, key, list, path), shape, f"{path}: {key!r}")
    return content


def _check_table(rows: list[Any], shape: tuple[int, int], name: str) -> None:
    """Raises ReportError unless `rows` holds shape[0] rows of shape[1] numbers or nulls."""
    if len(rows) != shape[0] or any(not isinstance(r, list) or len(r) != shape[1] for r in rows):
        raise ReportError(
            f"{name} must have {shape[0]} rows (sites) of {shape[1]} numbers (formats); "
            "make the file again"
        )
    for value in (value for row in rows for value in row):
        if not (value is None or isinstance(value, int | float)):
            raise ReportError(f"{name} has {value!r}, expected a number or null")


def rank_correlation(record: Record, sensitivity: Mapping[str, Any]) -> Correlation:
    """Spearman's rank correlation of a search's bits with the sensitivities of its sites.

    The sensitivity of a site is loss - reference_loss with this site alone in the narrowest format
    that every decision of the search has and the sensitivities cover. Its bits are the mean over
    both operands of the format chosen. Over the sites the search decided; those with an unknown
    loss or format are left out. NaN with fewer than three sites or where either side is constant.
    """
    common = set(sensitivity["formats"])
    for decision in record.space.values():
        common &= set(decision.options)
    if not common:
        return Correlation(None, 0, math.nan, math.nan)
    narrowest = min(common, key=format_order)
    column = sensitivity["formats"].index(narrowest)
    losses = {site: row[column] for site, row in zip(sensitivity["sites"], sensitivity["loss"])}
    decided = {site for decision in record.space.values() for site in decision.sites}
    pairs = []
    for site in sorted(decided & set(losses) & set(record.sites)):  # a skipped block has none
        loss, bits = losses[site], _mean_bits(record, site)
        if loss is not None and math.isfinite(loss) and bits is not None:
            increase = loss - sensitivity["reference_loss"]
            pairs.append((increase, increase / max(record.sites[site].macs, 1), bits))
    increases, by_cost, bits = np.array(pairs).reshape(-1, 3).T
    return Correlation(narrowest, len(pairs), _rho(increases, bits), _rho(by_cost, bits))


def _rho(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3 or not (np.ptp(x) and np.ptp(y)):
        return math.nan
    return float(spearmanr(x, y).statistic)


def _mean_bits(record: Record, site: str) -> float | None:
    """Mean bits of the site's two operands; None if the name of a format does not tell."""
    formats = record.policy[site]
    bits = [_FLOAT_BITS if name is None else bits_of_format(name) for name in formats]
    known = [number for number in bits if number is not None]
    return sum(known) / len(known) if len(known) == len(bits) else None
