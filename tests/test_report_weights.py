"""The report's weights: reading, tables and figures, on statistics made up here."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aqt_search.report import ReportError, load_records, write_report
from aqt_search.report.canvas import DPI, MAX_HEIGHT_INCHES
from aqt_search.report.weight_plot import HISTOGRAMS, histograms_figure, ranges_figure
from aqt_search.report.weight_section import weights_section
from aqt_search.report.weight_table import (
    range_groups,
    reference_group,
    run_rows,
    site_rows,
    worst_weights,
)
from aqt_search.weights.statistics import WeightStatistics
from experiments import results

SITES = ("stem/kernel", "block/kernel", "head/kernel")


def statistics(range_to_deviation=4.0, **changes):
    """A weight as `weights_json` writes it; a float one where changes leave nothing of a format."""
    found = WeightStatistics(
        site=SITES[0], operand="rhs", weights=1000, largest=2.0,
        deviation=None if range_to_deviation is None else 2.0 / range_to_deviation,
        range_to_deviation=range_to_deviation, kurtosis=3.5, outliers=0.0125, sqnr_db=20.04,
        clipped=0.002, codes=15, codes_used=13, code_entropy=3.1415, bound=2.0,
        before=[1, 0, 998, 0, 1], after=[0, 2, 996, 2, 0],
    )  # fmt: skip
    return found._replace(**changes)._asdict()


OF_NO_FORMAT = dict.fromkeys(("sqnr_db", "clipped", "codes", "codes_used", "code_entropy", "after"))


def write_run(workdir, name, weights, *, kind="uniform", series=None, gbops=1.0, seed=0):
    """A finished run of the sites of `weights`; none written where that is a list of names."""
    folder = workdir / "points" / name
    folder.mkdir(parents=True)
    sites = [row["site"] for row in weights.values()] if isinstance(weights, dict) else weights
    pair = {"lhs": None, "rhs": None} if kind == "float" else {"lhs": "int8", "rhs": "int4"}
    facts = {"kind": "conv", "macs": 10, "weight_size": 1000}
    result = {
        "name": name, "kind": kind, "series": series, "seed": seed, "model": "m", "data": "d",
        "command": "c", "accuracy": 0.9, "loss": 0.2, "gbops": gbops, "weight_bytes": 9,
        "steps": 1, "seconds": 1.0,
    }  # fmt: skip
    dump(folder / "sites.json", dict.fromkeys(sites, facts))
    dump(folder / "policy.json", dict.fromkeys(sites, pair))
    dump(folder / "result.json", result)
    dump(workdir / "config.json", {})
    if isinstance(weights, dict):
        dump(folder / "weights.json", weights)
    return folder


def dump(path, value):
    path.write_text(json.dumps(value, allow_nan=False))


def ranges_of(values, **changes):
    """Weights of max|w| / std(w) as given, in the order of SITES."""
    return {s: statistics(v, site=s, **changes) for s, v in zip(SITES, values)}


def plain_and_margin(workdir):
    """Two seeds of float training, without and with a range loss, and a run in int4."""
    for seed, shift in enumerate((-0.5, 0.5)):
        for series, values in (("plain", (5.0, 10.0, 4.0)), ("margin", (4.0, 5.0, 3.3))):
            write_run(workdir, f"{series}_seed{seed}", ranges_of([v + shift for v in values],
                      **OF_NO_FORMAT), kind="float", series=series, seed=seed)  # fmt: skip
    write_run(workdir, "int4", ranges_of((4.0, None, 3.0)), gbops=0.5)


def test_records_hold_what_the_files_say(tmp_path):
    weights = ranges_of((4.0, None, 3.0))
    write_run(tmp_path, "int4", weights)
    (record,) = load_records(tmp_path)
    assert list(record.weights) == list(SITES)
    for label, row in record.weights.items():
        for field, value in weights[label].items():
            found = getattr(row, field)
            expected = tuple(value) if isinstance(value, list) else value
            assert found == expected or (value is None and np.isnan(found))


def test_old_runs_have_no_section(tmp_path):
    write_run(tmp_path, "int4", list(SITES))
    (record,) = load_records(tmp_path)
    assert record.weights == {}
    assert weights_section([record], {}) == ""


def test_falls_of_the_range_are_counted(tmp_path):
    """Means over the seeds: 5, 10, 4 against 4, 5, 3.3, ratios of 0.8, 0.5 and 0.825."""
    plain_and_margin(tmp_path)
    groups = range_groups(load_records(tmp_path))
    assert [g.name for g in groups] == ["int4", "margin", "plain"]
    assert groups[1].means == pytest.approx(dict(zip(SITES, (4, 5, 3.3))))
    assert reference_group(groups).name == "plain"
    assert reference_group(groups[:1]).name == "int4"
    int4, margin, plain = run_rows(groups)
    assert margin == ["margin", "3", "4.00", "0.800", "2 of 3", "", ""]
    assert plain == ["plain", "3", "5.00", "reference", "", "", ""]
    # Of the constant weight nothing is compared: 4 / 5 and 3 / 4.
    assert int4 == ["int4", "2", "3.50", "0.775", "2 of 2", "20.0", "20.0"]


def test_sites_in_numbers(tmp_path):
    weights = ranges_of((4.0, None, None))
    weights[SITES[1]] |= {"largest": 0.0, "deviation": 0.0, "kurtosis": None, "sqnr_db": None}
    nothing = dict.fromkeys(set(statistics()) - {"site", "operand", "weights"})
    weights[SITES[2]] |= nothing
    write_run(tmp_path, "int4", weights)
    (record,) = load_records(tmp_path)
    assert site_rows(record) == [
        [SITES[0], "int4", "", "1000", "4.00", "3.50", "1.25", "20.0", "0.20", "13 of 15", "3.14"],
        [SITES[1], "int4", "all zero", "1000", "", "", "1.25", "", "0.20", "13 of 15", "3.14"],
        [SITES[2], "int4", "not finite", "1000", "", "", "", "", "", "", ""],
    ]


def test_a_constant_weight_is_told(tmp_path):
    write_run(tmp_path, "int4", ranges_of((4.0, 4.0, None)) | {
        SITES[2]: statistics(None, site=SITES[2], deviation=0.0)})  # fmt: skip
    (record,) = load_records(tmp_path)
    assert [row.note for row in record.weights.values()] == ["", "", "constant"]


def test_the_worst_come_first(tmp_path):
    """By SQNR, then those that lose nothing by their range; without a histogram none."""
    weights = {
        name: statistics(spread, site=SITES[0], sqnr_db=sqnr, **more)
        for name, spread, sqnr, more in (
            ("a", 9.0, None, {}), ("b", 2.0, 30.0, {}), ("c", 3.0, 10.0, {}), ("d", 12.0, None, {}),
            ("e", 1.0, 1.0, {"before": None, "after": None}),
        )
    }  # fmt: skip
    write_run(tmp_path, "int4", weights)
    (record,) = load_records(tmp_path)
    assert worst_weights(record, 9) == ["c", "b", "d", "a"]
    assert worst_weights(record, 1) == ["c"]


class Tags(html.parser.HTMLParser):
    """Checks the nesting of tags."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_weights_are_a_section(tmp_path):
    plain_and_margin(tmp_path)
    write_run(tmp_path, "old", list(SITES), gbops=2.0)
    page = write_report(tmp_path).read_text()
    Tags(page)
    section = page.split("<h2>Weights</h2>")[1].split("<h2>")[0]
    assert section.count("<img ") == 1 + 3  # ranges, and the first seed of every point
    assert re.findall("<summary>(.*?): weights", section) == ["int4", "margin_seed0", "plain_seed0"]
    assert "<td" in section
    for text in ("13 of 15", "reference", "2 of 3", "first is shown", "largest max|w| / std(w)"):
        assert text in section


def texts_of(monkeypatch, draw):
    """The strings of a figure, and its image."""
    made = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("aqt_search.report.weight_plot.Figure", Kept)
    image = Image.open(io.BytesIO(draw()))
    (figure,) = made
    return figure, image


def test_the_figure_of_ranges_has_a_mark_per_point(tmp_path, monkeypatch):
    plain_and_margin(tmp_path)
    figure, _ = texts_of(monkeypatch, lambda: ranges_figure(load_records(tmp_path)))
    lines = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    assert set(lines) == {"int4", "margin", "plain"}
    np.testing.assert_allclose(lines["plain"], [5, 10, 4])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(SITES)


def test_many_points_have_a_mark_per_series(tmp_path, monkeypatch):
    for number in range(12):
        values = (4.0 + number, 5.0, 6.0)
        write_run(tmp_path, f"p{number}", ranges_of(values), series="ab"[number % 2])
    figure, _ = texts_of(monkeypatch, lambda: ranges_figure(load_records(tmp_path)))
    lines = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    assert set(lines) == {"a", "b"}
    assert lines["a"][0] == pytest.approx(4 + 5)  # the mean of 0, 2, ..., 10
    section = weights_section(load_records(tmp_path), {"weights": b""})
    assert "those of a series are taken together" in section


def test_histograms_are_drawn_in_their_bins(tmp_path, monkeypatch):
    write_run(tmp_path, "int4", ranges_of((4.0, 5.0, 6.0)))
    (record,) = load_records(tmp_path)
    figure, _ = texts_of(monkeypatch, lambda: histograms_figure(record))
    assert len(figure.axes) == 3
    after, before = (patch.get_data() for patch in figure.axes[0].patches)
    np.testing.assert_allclose(before.edges, [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_allclose(before.values, [1, 0.5, 998, 0.5, 1])  # 0.5 stands for none
    np.testing.assert_allclose(after.values, [0.5, 2, 996, 2, 0.5])
    assert "SQNR 20.0 dB" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("count", [1, 300])
def test_figures_fit_at_every_size(tmp_path, count):
    sites = [f"$block_{i}$/a very long name of a module/{i}/kernel" for i in range(count)]
    weights = {s: statistics(2.0 + i, site=s) for i, s in enumerate(sites)}
    weights[sites[0]] |= {"range_to_deviation": None, "bound": 0.0}
    write_run(tmp_path, "int4", weights)
    records = load_records(tmp_path)
    for png in (ranges_figure(records), histograms_figure(records[0])):
        image = Image.open(io.BytesIO(png))
        assert image.width == 10.5 * DPI
        assert image.height <= MAX_HEIGHT_INCHES * DPI
    assert len(worst_weights(records[0], HISTOGRAMS)) == min(count, HISTOGRAMS)


def test_nothing_but_odd_weights(tmp_path):
    nothing = dict.fromkeys(set(statistics()) - {"site", "operand", "weights"})
    write_run(tmp_path, "int4", {SITES[0]: statistics(None) | nothing})
    records = load_records(tmp_path)
    assert "not finite" in weights_section(records, {"weights": ranges_figure(records)})


def change(**values):
    def harm(path):
        content = json.loads(path.read_text())
        content[SITES[0]] |= values
        dump(path, content)

    return harm


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda path: path.write_text(path.read_text()[:-5]), "half written"),
        (lambda path: path.write_text("[1]"), "JSON object, not list"),
        (lambda path: dump(path, {"a": 1}), "must be an object"),
        (change(site="ghost"), "'ghost'"),
        (change(operand="out"), "'out'"),
        (change(weights="many"), "type int"),
        (change(codes=1.5), "type int"),
        (change(sqnr_db="20"), "expected a number"),
        (change(before=[1, 2]), "odd number of bins"),
        (change(before=[1, -2, 3]), "odd number of bins"),
        (change(before=[1, 2, 3]), "3 bins before and 5 after"),
    ],
)
def test_broken_files_are_named(tmp_path, harm, message):
    folder = write_run(tmp_path, "int4", ranges_of((4.0, 5.0, 6.0)))
    harm(folder / results.WEIGHTS_FILE)
    with pytest.raises(ReportError, match=re.escape(message)) as caught:
        load_records(tmp_path)
    assert str(folder / "weights.json") in str(caught.value)
