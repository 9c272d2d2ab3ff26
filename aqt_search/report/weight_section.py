"""The report's section of weights: their range over deviation, and what quantization loses."""

from collections.abc import Mapping, Sequence

from aqt_search.report.elements import figure, folded, note, table
from aqt_search.report.records import Record
from aqt_search.report.weight_plot import HISTOGRAMS, by_series, shown_records
from aqt_search.report.weight_table import (
    RUN_TITLES,
    SITE_TITLES,
    range_groups,
    run_rows,
    site_rows,
)

_RANGES = (
    "max|w| / std(w) of every weight, log scale, in network order: the further to the right, the "
    "more of a format's codes go to outliers. Marks are means over the seeds, bars go from the "
    "least to the greatest."
)
_BY_SERIES = " There are many points: those of a series are taken together."
_RUNS = (
    "The reference is the float point, or else the point, with the largest median over the sites; "
    "of the others stand here the median of the ratios to it at common sites, and the number of "
    "sites where max / std is at least 20 % lower. Of a point with several seeds, max / std is the "
    "mean; the SQNR is over all of them."
)
_SITES = (
    "w is the weight as it enters the product, q its values as served. SQNR = 20 log10(||w|| / "
    "||w - q||), empty where nothing is lost; outliers lie more than three deviations from the "
    "mean (0.27 % of a normal distribution do), clipped weights more than half a step beyond the "
    "format's ends; the kurtosis of a normal distribution is 3, of a uniform one 1.8; the entropy "
    "is that of the codes."
)
_HISTOGRAMS = (
    "Number of weights, log scale, over their value: the line is w, the bars are q. At most "
    f"{HISTOGRAMS} weights are shown: those with the least SQNR, worst first."
)
_FLOAT_HISTOGRAMS = (
    "Number of weights, log scale, over their value. At most "
    f"{HISTOGRAMS} weights are shown: those with the largest max|w| / std(w), largest first."
)


def weights_section(records: Sequence[Record], figures: Mapping[str, bytes]) -> str:
    """Runs side by side, then each one's weights; nothing where no run has statistics of them.

    `figures` holds PNGs: weights, and weights/<name> of each of the `shown_records`.
    """
    groups = range_groups(records)
    if not groups:
        return ""
    caption = _RANGES + (_BY_SERIES if by_series(groups) else "")
    parts = ["<h2>Weights</h2>", figure(figures["weights"], "range of the weights", caption)]
    parts.append(table(RUN_TITLES, run_rows(groups)))
    parts.append(note(_RUNS))
    for record in shown_records(records):
        parts.append(folded(f"{record.name}: weights by site", _run(record, figures)))
    if any(len(group.members) > 1 for group in groups):
        parts.append(note("Of points with several seeds the first is shown by site."))
    return "".join(parts)


def _run(record: Record, figures: Mapping[str, bytes]) -> str:
    parts = [table(SITE_TITLES, site_rows(record), text_columns=3), note(_SITES)]
    if png := figures.get(f"weights/{record.name}"):
        quantized = any(row.after for row in record.weights.values())
        caption = _HISTOGRAMS if quantized else _FLOAT_HISTOGRAMS
        parts.append(figure(png, f"histograms of the weights of {record.name}", caption))
    return "".join(parts)
