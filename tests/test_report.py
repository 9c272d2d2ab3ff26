"""Unit tests of the report's reader, tables, figures and page, on records made up here.

Nothing is trained: the numbers are synthetic, and what is judged is that the report shows these
numbers, refuses broken files, and stays legible and self-contained at every size.
"""

import base64
import html.parser
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import aqt_search.report
from aqt_search.report import ReportError, format_table, load_records, write_report
from aqt_search.report.against_uniform import gains_over_uniform
from aqt_search.report.canvas import DPI, MAX_HEIGHT_INCHES, NOT_QUANTIZED, ink_on
from aqt_search.report.curve_plot import entropy_series
from aqt_search.report.format_plot import mapped_records
from aqt_search.report.front_file import front_json
from aqt_search.report.front_plot import FRONT_INCHES, front_figure, place_labels
from aqt_search.report.records import Record, bits_of_format
from aqt_search.report.retraining import group_pairs, retrained_pairs
from aqt_search.report.sensitivity import load_sensitivity, rank_correlation
from aqt_search.report.series import all_series, compare_all
from aqt_search.search.pareto import accuracy_gain
from aqt_search.training.workdir import WorkdirError

OPTIONS = ["int3", "int4", "e4m3"]
VOID_TAGS = {"meta", "img", "br"}


def write_point(workdir, name, kind="uniform", *, sites=3, decisions=None, **result):
    """One finished point, complete in the layout of the sweep driver; keywords override results."""
    folder = workdir / "points" / name
    folder.mkdir(parents=True)
    names = [f"params/Block_{i}/Conv_0/kernel" for i in range(sites)]
    fields = {
        "name": name, "kind": kind, "model": "resnet8", "data": "digits", "seed": 0,
        "accuracy": 0.95, "loss": 0.21, "train_accuracy": 0.99, "gbops": 0.5, "weight_bytes": 12345,
        "target_gbops": None, "final_entropy": None, "steps": 40, "seconds": 33.2,
        "command": f"python -m experiments.search --name={name}", "without_retraining": None,
    }  # fmt: skip
    if kind == "search":
        fields |= {"target_gbops": 0.4, "final_entropy": 0.03, "without_retraining": True}
    pair = {"lhs": None, "rhs": None} if kind == "float" else {"lhs": "int4", "rhs": "int8"}
    dump(folder / "policy.json", dict.fromkeys(names, pair))
    dump(folder / "sites.json", {
        site: {"kind": "conv", "macs": 10 * (i + 1), "weight_size": 9,
               "lhs_shape": [1, 8, 8, 3], "rhs_shape": [3, 3, 3, 1]}
        for i, site in enumerate(names)
    })  # fmt: skip
    lines = [{"step": s, "loss": 1 / (s + 1), "accuracy": 0.5, "quality": 0.1, "expected_cost": 0.5}
             for s in range(40)]  # fmt: skip
    dump_lines(folder / "metrics.jsonl", [*lines, {"step": 39, "eval_accuracy": 0.9}])
    if kind == "search":
        chosen = names[:decisions]
        dump(folder / "space.json", {s: {"sites": [s], "options": OPTIONS} for s in chosen})
        rows = [[1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0]]
        probabilities = [dict.fromkeys(chosen, row) for row in rows]
        dump_lines(
            folder / "probabilities.jsonl",
            [{"step": 20 * i, "probabilities": table} for i, table in enumerate(probabilities)],
        )
    dump(folder / "result.json", fields | result)
    dump(workdir / "config.json", {"model": {"name": "resnet8"}, "note": "<not & a tag>"})
    return folder


def write_failure(workdir, name="search_9.00", error="loss is NaN <b>at\nstep 12</b>"):
    folder = workdir / "points" / name
    folder.mkdir(parents=True)
    dump(folder / "result.json", {"name": name, "kind": "search", "error": error, "seed": 0})
    dump(workdir / "config.json", {})


def dump(path, value):
    path.write_text(json.dumps(value))


def dump_lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def small_sweep(workdir):
    write_point(workdir, "float", "float", gbops=8.0, accuracy=0.98, weight_bytes=99000)
    write_point(workdir, "uniform_int4", gbops=0.25, accuracy=0.91)
    write_point(workdir, "uniform_int8", gbops=1.0, accuracy=0.94)
    write_point(workdir, "search_1.10", "search", gbops=0.5, accuracy=0.96)
    write_failure(workdir)


class Page(html.parser.HTMLParser):
    """Checks the nesting of tags, and keeps attributes and the cells of the table of points."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.rows, self.in_points = [], [], [], False
        self.feed(text)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID_TAGS:
            self.open.append(tag)
        self.in_points |= ("id", "points") in attributes
        if self.in_points and tag == "tr":
            self.rows.append([])
        if self.in_points and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.in_points &= tag != "table"

    def handle_data(self, data):
        if self.in_points and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def images(self):
        sources = [value for tag, key, value in self.attributes if (tag, key) == ("img", "src")]
        return [Image.open(io.BytesIO(base64.b64decode(s.split(",")[1]))) for s in sources]


def page_of(workdir):
    return Page(write_report(workdir).read_text(encoding="utf-8"))


# ---- reading ----


def test_records_hold_what_the_files_say(tmp_path):
    small_sweep(tmp_path)
    records = load_records(tmp_path)
    assert [r.name for r in records] == [
        "uniform_int4", "search_1.10", "uniform_int8", "float", "search_9.00",
    ]  # fmt: skip
    search, failed = records[1], records[-1]
    result = json.loads((tmp_path / "points/search_1.10/result.json").read_text())
    for field, value in result.items():
        assert getattr(search, field) == value
    sites = list(json.loads((tmp_path / "points/search_1.10/sites.json").read_text()))
    assert list(search.sites) == list(search.policy) == sites
    assert search.policy[sites[0]] == ("int4", "int8")
    assert search.sites[sites[2]].macs == 30
    assert len(search.metrics) == 41
    assert [step for step, _ in search.probabilities] == [0, 20]
    assert failed.error.startswith("loss is NaN")


def test_old_points_lack_the_optional_fields(tmp_path):
    write_point(tmp_path, "uniform_int4", series="")  # of a point whose configuration has none
    given = {
        "series": "int8", "width": 0.5, "pair": "search_1.10", "train_split_accuracy": 0.97,
        "costs": {"latency_ms/h100": 0.2}, "targets": {"latency_ms/h100": 0.25},
    }  # fmt: skip
    write_point(tmp_path, "uniform_int8", gbops=1.0, **given)
    old, new = load_records(tmp_path)
    assert (old.series, old.width, old.pair, old.targets) == ("uniform", None, None, {})
    assert math.isnan(old.train_split_accuracy)
    assert old.costs == {"gbops": 0.5, "weight_bytes": 12345}
    costs = given.pop("costs")
    assert {key: getattr(new, key) for key in given} == given
    assert new.costs == {"gbops": 1.0, "weight_bytes": 12345} | costs
    assert new.gap == pytest.approx(0.97 - 0.95)


def truncate(path):
    path.write_text(path.read_text()[:-7])


def change(key, value):
    return lambda path: dump(path, json.loads(path.read_text()) | {key: value})


@pytest.mark.parametrize(
    "file, harm, message",
    [
        ("result.json", truncate, "half written"),
        ("policy.json", truncate, "half written"),
        ("sites.json", truncate, "half written"),
        ("space.json", truncate, "half written"),
        ("metrics.jsonl", truncate, "line 41"),
        ("probabilities.jsonl", truncate, "line 2"),
        ("sites.json", os.remove, "cannot be read"),
        ("policy.json", os.remove, "cannot be read"),
        ("space.json", os.remove, "cannot be read"),
        ("result.json", lambda p: p.write_bytes(b"\xff\xfe{"), "cannot be read"),
        ("result.json", lambda p: p.write_text("[1]"), "JSON object, not list"),
        ("result.json", change("name", "other"), "that of its folder"),
        ("result.json", change("kind", "magic"), "float, uniform, search"),
        ("result.json", change("gbops", 0.0), "must be positive"),
        ("result.json", change("gbops", None), "expected a number"),
        ("result.json", change("accuracy", 95.0), "fraction in"),
        ("result.json", change("steps", "many"), "type int"),
        ("result.json", change("series", 4), "type str"),
        ("result.json", change("width", -1.0), "must be positive"),
        ("result.json", change("pair", ["search_1.10"]), "type str"),
        ("result.json", change("train_split_accuracy", 99.0), "fraction in"),
        ("result.json", change("costs", [0.5]), "type dict"),
        ("result.json", change("costs", {"latency": None}), "expected a number"),
        ("result.json", change("targets", {"latency": 1.0}), "one of the costs: gbops"),
        ("result.json", change("targets", {"gbops": 0.0}), "must be positive"),
        ("policy.json", change("ghost", {"lhs": None, "rhs": None}), "ghost"),
        ("policy.json", change("params/Block_0/Conv_0/kernel", 4), "expected format names"),
        ("sites.json", change("params/Block_0/Conv_0/kernel", {"kind": "conv"}), "'macs' is None"),
        ("space.json", change("d", {"sites": ["ghost"], "options": ["int4"]}), "unknown sites"),
        ("space.json", change("d", {"sites": [], "options": ["int4"]}), "expected 1 probabilities"),
        ("space.json", change("d", {"sites": [], "options": []}), "must have options"),
        ("metrics.jsonl", lambda p: p.write_text('{"loss": 1}\n'), "'step' is None"),
    ],
)
def test_broken_files_are_named(tmp_path, file, harm, message):
    folder = write_point(tmp_path, "search_1.10", "search")
    harm(folder / file)
    with pytest.raises(ReportError, match=re.escape(message)) as caught:
        load_records(tmp_path)
    culprit = "probabilities.jsonl" if message.startswith("expected 1 prob") else file
    assert str(folder / culprit) in str(caught.value)


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="no folder"):
        load_records(tmp_path / "nowhere")
    (tmp_path / "points" / "begun").mkdir(parents=True)  # no result.json: not finished
    assert load_records(tmp_path) == ()
    with pytest.raises(ReportError, match="no finished point"):
        write_report(tmp_path)
    assert format_table(()) == "no point has finished yet"


def test_missing_config_is_an_error(tmp_path):
    write_point(tmp_path, "uniform_int4")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ReportError, match=r"config\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "name, bits",
    [("int4", 4), ("uint8", 8), ("int16", 16), ("e4m3", 8), ("e2m1", 4), ("e4m3fn", 8),
     ("bf16", 16), ("fp16", 16), ("fp32", 32), ("nvfp4", 4), ("odd", None)],
)  # fmt: skip
def test_bits_of_a_format(name, bits):
    assert bits_of_format(name) == bits


# ---- the front ----


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_front_json_is_strict_and_complete(tmp_path):
    small_sweep(tmp_path)
    write_point(tmp_path, "search_lost", "search", gbops=0.01, accuracy=None)
    write_report(tmp_path)
    front = strict((tmp_path / "front.json").read_text())
    points = {point["name"]: point for point in front["points"]}
    assert len(points) == 6
    # by hand: int8 is dominated by the search, and a point without accuracy is never on the front
    assert front["front"] == ["uniform_int4", "search_1.10", "float"]
    assert [n for n, p in points.items() if p["on_front"]] == front["front"]
    assert points["search_lost"]["accuracy"] is None
    assert "NaN" in points["search_9.00"]["error"]
    search = points["search_1.10"]
    assert (search["accuracy"], search["gbops"], search["target_gbops"]) == (0.96, 0.5, 0.4)
    for name, point in points.items():
        if "error" not in point:
            assert point["formats"] == f"points/{name}/policy.json"
            assert (tmp_path / point["formats"]).exists()


def test_seeds_are_one_group(tmp_path):
    accuracies = [0.90, 0.96, 0.93]
    for seed, accuracy in enumerate(accuracies):
        name = "search_1.10" + (f"_seed{seed}" if seed else "")
        write_point(tmp_path, name, "search", seed=seed, accuracy=accuracy, gbops=0.4 + seed / 10)
    write_point(tmp_path, "uniform_int8", gbops=0.45, accuracy=0.935)
    front = front_json(load_records(tmp_path))
    group = next(g for g in front["groups"] if g["kind"] == "search")
    assert group["points"] == ["search_1.10", "search_1.10_seed1", "search_1.10_seed2"]
    assert group["accuracy_mean"] == pytest.approx(0.93)
    assert group["accuracy_range"] == [0.90, 0.96]
    assert group["gbops_range"] == pytest.approx([0.4, 0.6])
    # the mean (0.5, 0.93) is dominated, though the lucky seed's 0.96 alone would not be
    assert front["front"] == ["uniform_int8"]
    write_report(tmp_path)


def two_series(workdir, seeds=1):
    """int4 is as accurate as bf16 at a quarter of its cost; `seeds` copies, each 0.01 lower."""
    for seed in range(seeds):
        for series, factor in (("bf16", 1.0), ("int4", 0.25)):
            for cost, accuracy in ((1.0, 0.8), (4.0, 0.9)):
                name = f"width{cost:g}_{series}" + (f"_seed{seed}" if seeds > 1 else "")
                write_point(workdir, name, series=series, seed=seed, gbops=cost * factor,
                            accuracy=accuracy - 0.01 * seed, width=cost)  # fmt: skip


def test_two_series_are_compared(tmp_path):
    two_series(tmp_path)
    page = write_report(tmp_path).read_text()
    front = strict((tmp_path / "front.json").read_text())
    # By hand: up to log10 GBOPs of 8 and an accuracy of 0.8, where each least accurate point adds
    # nothing and the other dominates 0.1 of accuracy from its cost on.
    assert front["hypervolume_reference"] == pytest.approx(
        {"log10_gbops": math.log10(8), "accuracy": 0.8}
    )
    int4, bf16 = front["series"]
    assert (int4["name"], int4["groups"]) == ("int4", ["width1_int4", "width4_int4"])
    assert int4["hypervolume"] == pytest.approx(0.1 * math.log10(8))
    assert bf16["hypervolume"] == pytest.approx(0.1 * math.log10(2))
    assert int4["hypervolume_interval"] == [None, None]  # one seed tells nothing
    (pair,) = front["comparisons"]
    assert pair["series"] == ["int4", "bf16"]
    assert pair["points_dominated_by_the_other"] == [0, 2]
    assert pair["cost_ratio"] == pytest.approx(0.25)
    assert pair["accuracy_gain"] == pytest.approx(0.1)  # at 1 GBOP, the only cost of both
    told = (
        "int4 dominates bf16: 2 of 2 points; at equal accuracy int4 costs 0.25 x as much; "
        "at equal cost int4 is 10.00 percentage points more accurate."
    )
    assert told in page
    assert "n/a: one seed" in page


GAINS = [
    # Uniform: 0.80 at 1, 0.90 at 4. Halfway in log cost (at 2) it is 0.85.
    ({0: {2.0: 0.88}}, 0.03, "3.00 percentage points more", "one seed"),
    # Linear between 1 and 4: gains of 0.02 and 0.04 at the ends have the mean 0.03.
    ({0: {1.0: 0.82, 4.0: 0.94}}, 0.03, "3.00 percentage points more", "one seed"),
    # Student's t with one degree of freedom: 12.706 times the standard error of 0.005.
    ({0: {2.0: 0.88}, 1: {2.0: 0.89}}, 0.035, "-2.85 to +9.85 over 2 seeds", "do not tell"),
    ({0: {2.0: 0.80}, 1: {2.0: 0.80}}, -0.05, "5.00 percentage points less", "-5.00 to -5.00"),
]


@pytest.mark.parametrize("searched, mean, words", [(s, m, w) for s, m, *w in GAINS])
def test_gains_over_uniform_formats(tmp_path, searched, mean, words):
    for seed, points in searched.items():
        for cost, accuracy in {1.0: 0.80, 4.0: 0.90}.items():
            name = f"int{cost:g}_seed{seed}"
            write_point(tmp_path, name, gbops=cost, accuracy=accuracy, seed=seed, series="uniform")
        for cost, accuracy in points.items():
            name = f"search_{cost:g}_seed{seed}"
            write_point(tmp_path, name, "search", gbops=cost, accuracy=accuracy, seed=seed)
    records = load_records(tmp_path)
    (gain,) = gains_over_uniform(records)
    assert (gain.series, gain.seeds) == ("search", len(searched))
    assert gain.mean == pytest.approx(mean, abs=1e-12)
    assert all(word in gain.sentence for word in words), gain.sentence
    # The first line of the table, and of the page.
    assert format_table(records).splitlines()[0] == gain.sentence
    page = write_report(tmp_path).read_text()
    assert page.index(gain.sentence) < page.index(" points: ")


def test_one_gain_is_told_wherever_it_is_told(tmp_path):
    """The seeds' fronts differ in shape: the gain of their means is another number."""
    searched = {0: {1.5: 0.84, 3.0: 0.91}, 1: {2.0: 0.80, 3.5: 0.95}}
    for seed, points in searched.items():
        for cost, accuracy in {1.0: 0.80 - 0.1 * seed, 4.0: 0.90}.items():
            name = f"int{cost:g}_seed{seed}"
            write_point(tmp_path, name, gbops=cost, accuracy=accuracy, seed=seed, series="uniform")
        for place, (cost, accuracy) in enumerate(points.items()):
            name = f"search_{place}_seed{seed}"
            write_point(tmp_path, name, "search", gbops=cost, accuracy=accuracy, seed=seed)
    records = load_records(tmp_path)
    (gain,) = gains_over_uniform(records)
    (pair,) = compare_all(all_series(records))
    assert {pair.first.name, pair.second.name} == {"search", "uniform"}
    sign = 1 if pair.first.name == "search" else -1
    assert sign * pair.accuracy_gain == pytest.approx(gain.mean)
    by_means = accuracy_gain(pair.first.front, pair.second.front)
    assert abs(pair.accuracy_gain - by_means) > 1e-3
    page = write_report(tmp_path).read_text()
    told = f"{100 * abs(gain.mean):.2f} percentage points"
    assert page.count(told) == 2
    assert f"{100 * abs(by_means):.2f} percentage points" not in page


def test_columns_that_nobody_has_a_value_for_are_left_out(tmp_path):
    write_point(tmp_path, "allocated_1", "ptq", series="allocated")
    told = format_table(load_records(tmp_path))
    for words in ("cost/uniform", "target miss", "uniform"):
        assert words not in told
    page = write_report(tmp_path).read_text()
    assert "95 % interval</th>" in page  # it has a text: one seed
    assert "miss</th>" not in page


def test_no_gain_without_a_uniform_front(tmp_path):
    write_point(tmp_path, "int4", gbops=1.0)
    write_point(tmp_path, "search_1.10", "search", gbops=1.1)
    assert gains_over_uniform(load_records(tmp_path)) == ()


@pytest.mark.parametrize(
    "points, told",
    [
        (  # b has the middle, a both ends: 0.7 at 3 and 0.5 + 0.4 ln 4 / ln 9 = 0.7524 at 4
            {"a": [(1, 0.5), (9, 0.9)], "b": [(3, 0.8), (4, 0.4)]},
            "a dominates 1 of 2 points of b; at equal accuracy a costs 1.73 x as much; "
            "at equal cost a is 7.38 percentage points less accurate.",
        ),
        (
            {"a": [(1, 0.5), (2, 0.6)], "b, c": [(3, 0.7), (4, 0.8)]},
            'neither "b, c" nor a dominates a point of the other; they share no range of accuracy; '
            "they share no range of cost.",
        ),
        (
            {"a": [(1, 0.5), (3, 0.6), (4, 0.65)], "b": [(2, 0.6), (5, 0.5)]},
            "a dominates 1 of 2 points of b, and b 1 of 3 points of a",
        ),
    ],
)
def test_comparisons_in_words(tmp_path, points, told):
    """In the first case b's front is its first point alone; there a's line is at an accuracy of
    0.7, and it reaches b's 0.8 at 9 ** 0.75 GBOPs, sqrt(3) times as much."""
    for series, pairs in points.items():
        for cost, accuracy in pairs:
            write_point(tmp_path, f"{series}{cost}", series=series, gbops=cost, accuracy=accuracy)
    sentences = [pair.sentence for pair in compare_all(all_series(load_records(tmp_path)))]
    assert len(sentences) == 1
    assert sentences[0].startswith(told)


def test_hypervolume_interval_is_over_the_seeds(tmp_path):
    two_series(tmp_path, seeds=3)
    int4 = all_series(load_records(tmp_path))[0]
    assert (int4.name, int4.seeds, len(int4.groups)) == ("int4", 3, 2)
    # the mean over the seeds 0.01 apart, above the worst run's 0.78; the ends are single seeds
    area = math.log10(32) * 0.01 + math.log10(8) * 0.1
    assert int4.hypervolume == pytest.approx(area)
    low, high = int4.interval
    assert (low, high) == pytest.approx((math.log10(8) * 0.1, area + 0.01 * math.log10(32)))


def test_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    figure = Figure(figsize=FRONT_INCHES, dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    items = [(5 + x, 5 + y, f"search_{i}.10") for i, (x, y) in enumerate(rng.normal(size=(20, 2)))]
    boxes = place_labels(axes, items)
    frame = axes.get_window_extent()
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.contains(*axes.transData.transform(item[:2])) for item in items)


# ---- tables ----


def test_terminal_table_shows_the_records(tmp_path):
    small_sweep(tmp_path)
    records = load_records(tmp_path)
    told, blank, *lines = format_table(records).splitlines()
    assert told.startswith("At equal cost search is")
    assert not blank
    starts = [0, *(m.end() for m in re.finditer("-  +", lines[1]))]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])] for line in lines]
    assert cells[0] == ["point", "formats (sites)", "accuracy %", "GBOPs", "cost/uniform",
                        "weights kB", "target miss", "note"]  # fmt: skip
    for record, row in zip(records, cells[2:]):
        assert row[0] == record.name
        if record.error is not None:
            assert row[1:7] == [""] * 6
            assert row[7] == "failed: loss is NaN <b>at step 12</b>"
            continue
        shown = [float(cell) for cell in row[2:6]]
        expected = [100 * record.accuracy, record.gbops, record.gbops / 1.0, 12.345]
        expected[3] = record.weight_bytes / 1000
        assert shown == pytest.approx(expected, rel=1e-2)
    assert cells[2][1] == "lhs int4:3 | rhs int8:3"
    assert cells[5][1] == "float:3"
    assert cells[3][6:] == ["+25.0%", "front, not retrained"]  # 0.5 against a target of 0.4


def test_html_table_shows_the_records(tmp_path):
    small_sweep(tmp_path)
    records = load_records(tmp_path)
    head, *rows = page_of(tmp_path).rows
    assert len(rows) == len(records)
    for record, cells in zip(records, rows):
        row = dict(zip(head, cells))
        assert (row["point"], row["kind"]) == (record.name, record.kind)
        if record.error is not None:
            assert record.error in row["note"]
            continue
        expected = {
            "accuracy %": 100 * record.accuracy,
            "GBOPs": record.gbops,
            "cost / float": record.gbops / 8.0,
            "cost / dearest uniform": record.gbops / 1.0,
            "weights kB": record.weight_bytes / 1000,
            "seconds": record.seconds,
            "target GBOPs": record.target_gbops,
            "entropy nats": record.final_entropy,
        }
        for title, value in expected.items():
            shown = float(row[title]) if row[title] else None
            assert shown == (value if value is None else pytest.approx(value, rel=1e-2))


def test_terminal_table_of_seeds_has_the_means(tmp_path):
    for number in range(20):
        for seed in range(3):
            write_point(tmp_path, f"width0.5_search_{number}_seed{seed}", "search", sites=2,
                        seed=seed, gbops=1 + number, target_gbops=1.0 + seed,
                        accuracy=0.9 + 0.01 * seed)  # fmt: skip
    write_failure(tmp_path, "width0.5_search_7_seed3")
    lines = format_table(load_records(tmp_path)).splitlines()
    assert len(lines) == 2 + 20 + 1 + 1
    assert max(map(len, lines)) <= 140
    head = "point seeds accuracy % over seeds GBOPs weights kB target miss note"  # none is uniform
    assert " ".join(lines[0].split()) == head
    # misses of 7 / 1, 7 / 2 and 7 / 3 - 1: by hand 600 %, 250 % and 133.3 %
    row = "width0.5_search_6 3 91.00 90.00 to 92.00 7 12.3 +327.8% not retrained"
    assert " ".join(lines[8].split()) == row
    assert lines[9].endswith("not retrained, 1 failed")
    assert lines[-2] == "width0.5_search_7_seed3: failed: loss is NaN <b>at step 12</b>"


# ---- retraining, targets, gap, sensitivity ----


def test_searches_are_compared_with_their_retrained_pairs(tmp_path):
    write_point(tmp_path, "search_1_seed0", "search", accuracy=0.90)
    write_point(tmp_path, "search_1_seed1", "search", accuracy=0.94, seed=1)
    for seed, accuracy in enumerate((0.91, 0.92, 0.93)):
        write_point(tmp_path, f"retrained_1_seed{seed}", "retrained", accuracy=accuracy, seed=seed,
                    pair=f"search_1_seed{seed}")  # fmt: skip
    write_failure(tmp_path, "search_1_seed2")
    pairs = retrained_pairs(load_records(tmp_path))
    differences = [pair.difference for pair in pairs]
    assert differences == pytest.approx([-0.01, 0.02, math.nan], nan_ok=True)
    (group,) = group_pairs(pairs)
    assert group.means == pytest.approx((0.92, 0.915, 0.005))
    assert [pair.difference for pair in group.pairs] == differences[:2]
    text = write_report(tmp_path).read_text()
    assert "are on average 0.50 percentage points above" in text
    assert "(pairs: 2, from -1.00 to +2.00)" in text
    assert "search_1_seed2: no result" in text


def test_targets_of_several_costs_are_shown(tmp_path):
    targets = {"latency_ms/h100": 0.4, "weight_bytes": 12345.0}
    write_point(tmp_path, "search_1", "search", gbops=0.5, target_gbops=0.4, targets=targets,
                costs={"latency_ms/h100": 0.3})  # fmt: skip
    write_point(tmp_path, "search_gbops", "search", target_gbops=0.4, targets={"gbops": 0.4})
    records = load_records(tmp_path)
    assert {r.name: r.primary_target for r in records} == {"search_1": 0.4, "search_gbops": 0.4}
    text = write_report(tmp_path).read_text()
    assert '<td class="text">search_gbops</td><td class="text">gbops</td>' not in text
    for name, miss in (
        ("gbops", "+25.0%"),
        ("latency_ms/h100", "-25.0%"),
        ("weight_bytes", "+0.0%"),
    ):
        numbers = r'(<td class="number">[^<]*</td>){2}'
        assert re.search(rf">{name}</td>{numbers}<td[^>]*>{re.escape(miss)}</td>", text)


def test_gap_is_shown_by_series(tmp_path):
    two_series(tmp_path)
    for folder in (tmp_path / "points").iterdir():
        change("train_split_accuracy", 0.95)(folder / "result.json")
    page = page_of(tmp_path)
    assert len(page.images()) == 4  # front, gap, formats, training
    text = (tmp_path / "report.html").read_text()
    cells = '</td><td class="number">'.join(
        ["int4", "2", "95.00", "85.00", "+10.00", "+5.00 to +15.00"]
    )
    assert f'<td class="text">{cells}</td>' in text


def test_a_report_that_cannot_be_written_is_named(tmp_path):
    write_point(tmp_path, "int4")
    dump(tmp_path / "config.json", {})
    (tmp_path / "front.png").mkdir()  # as on a full disk, os.replace fails
    with pytest.raises(WorkdirError, match=r"could not write .*front\.png: Is a directory"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*"))


def write_sensitivity(workdir, losses, formats=("int3", "int4"), **changes):
    sites = [f"params/Block_{i}/Conv_0/kernel" for i in range(len(losses))]
    content = {
        "formats": formats, "sites": sites, "reference": "float", "reference_loss": 0.5,
        "loss": losses, "accuracy": losses, "sqnr_db": losses, "reference_accuracy": 0.9,
        "images": 10,
    }  # fmt: skip
    dump(workdir / "sensitivity.json", content | changes)


def searched_bits(workdir, chosen):
    folder = write_point(workdir, "search_1", "search", sites=len(chosen))
    names = json.loads((folder / "sites.json").read_text())
    dump(folder / "policy.json", {n: {"lhs": f, "rhs": f} for n, f in zip(names, chosen)})
    return load_records(workdir)[0]


@pytest.mark.parametrize(
    "chosen, losses, sites, rho",
    [
        (["int8", "int6", "int4", "int3"], [0.9, 0.8, 0.7, 0.6], 4, 1.0),
        (["int3", "int6", "int4", "int8"], [0.9, 0.8, 0.7, 0.6], 4, -0.8),  # 1 - 6 * 18 / 60
        (["int3", "int4", "int8", "e4m3"], [0.6, 0.7, 0.9, 0.8], 4, 4.5 / math.sqrt(5 * 4.5)),
        (["int3", "int4", None, "int6"], [0.6, 0.7, 0.9, math.nan], 3, 1.0),  # float: 32 bits
        (["int3", "int6", "int4", "odd"], [0.9, 0.8, 0.7, 0.6], 3, -0.5),
        (["int4"] * 4, [0.9, 0.8, 0.7, 0.6], 4, math.nan),
        (["int8", "int6", "int4"], [0.7] * 3, 3, math.nan),
        (["int8", "int6"], [0.9, 0.7], 2, math.nan),
    ],
)
def test_rank_correlation_by_hand(tmp_path, chosen, losses, sites, rho):
    """1 - 6 sum d^2 / (n (n^2 - 1)) for distinct ranks; where two have 8 bits, by covariance."""
    record = searched_bits(tmp_path, chosen)
    # OPTIONS has int3, int4 and e4m3; the other columns must not be looked at
    table = [[9.0 - loss, loss, 1.0] for loss in losses]
    write_sensitivity(tmp_path, table, ("int8", "int3", "int4"))
    found = rank_correlation(record, load_sensitivity(tmp_path))
    assert (found.format, found.sites) == ("int3", sites)
    assert found.rho == pytest.approx(rho, nan_ok=True)


def test_rank_correlation_per_mac_by_hand(tmp_path):
    searched_bits(tmp_path, ["int8", "int6", "int4", "int3"])
    path = tmp_path / "points" / "search_1" / "sites.json"
    sites = json.loads(path.read_text())
    for facts, macs in zip(sites.values(), (1000, 100, 10, 1)):
        facts["macs"] = macs
    dump(path, sites)
    # Increases of 0.4, 0.3, 0.2 and 0.1; divided by the MACs the last is the largest.
    write_sensitivity(tmp_path, [[0.9], [0.8], [0.7], [0.6]], ("int3",))
    found = rank_correlation(load_records(tmp_path)[0], load_sensitivity(tmp_path))
    assert (found.rho, found.rho_by_cost) == (pytest.approx(1.0), pytest.approx(-1.0))


def test_no_common_format_has_no_correlation(tmp_path):
    record = searched_bits(tmp_path, ["int3", "int4", "int6"])
    write_sensitivity(tmp_path, [[0.9], [0.8], [0.7]], ("bf16",))
    found = rank_correlation(record, load_sensitivity(tmp_path))
    assert (found.format, found.sites, math.isnan(found.rho)) == (None, 0, True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"formats": None}, "'formats' is None"),
        ({"reference_loss": "low"}, "expected a number"),
        ({"loss": [[0.9, 0.8]]}, "2 rows"),
        ({"loss": [[0.9], [0.8]]}, "2 numbers"),
        ({"loss": [0.9, 0.8]}, "2 numbers"),
        ({"sqnr_db": None}, "'sqnr_db'"),
        ({"sqnr_db": [[20.0], [30.0]]}, "'sqnr_db'"),
        ({"sites": [1, 2]}, "names"),
        ({"reference": None}, "'reference'"),
        ({"reference_accuracy": None}, "'reference_accuracy'"),
        ({"loss": [[0.9, "0.8"], [0.7, 0.6]]}, "'0.8'"),
    ],
)
def test_broken_sensitivities_are_named(tmp_path, changes, message):
    assert load_sensitivity(tmp_path) is None
    write_sensitivity(tmp_path, [[0.9, 0.8], [0.7, 0.6]], **changes)
    with pytest.raises(ReportError, match=message):
        load_sensitivity(tmp_path)


def test_sensitivities_are_a_section(tmp_path, monkeypatch):
    searched_bits(tmp_path, ["int3", "int4", "int6"])
    losses = [[0.6, 0.5], [0.7, 0.6], [0.8, 0.7]]
    write_sensitivity(tmp_path, losses)
    plot = types.ModuleType("aqt_search.report.sensitivity_plot")
    drawn = []
    plot.sensitivity_figure = lambda content: drawn.append(content) or front_figure([])
    monkeypatch.setitem(sys.modules, plot.__name__, plot)
    monkeypatch.setattr(aqt_search.report, "sensitivity_plot", plot, raising=False)
    page = page_of(tmp_path)
    assert [content["loss"] for content in drawn] == [losses]
    assert len(page.images()) == 6
    text = (tmp_path / "report.html").read_text()
    assert text.count("<h2>Sensitivity</h2>") == 1
    assert (
        '<td class="text">int3</td><td class="number">3</td><td class="number">+1.00</td>' in text
    )


# ---- the page and the figures ----


def test_page_is_self_contained_and_escaped(tmp_path):
    small_sweep(tmp_path)
    evil = "search_<b>&_$x^$_\u6f22"  # markup, mathematics, and a letter the font does not have
    folder = write_point(tmp_path, evil, "search", command="echo '<script>alert(1)</script>'")
    sites = json.loads((folder / "sites.json").read_text())
    policy = json.loads((folder / "policy.json").read_text())
    dump(folder / "sites.json", sites | {"_<i>$site": next(iter(sites.values()))})
    dump(folder / "policy.json", policy | {"_<i>$site": {"lhs": None, "rhs": "int4"}})
    page = page_of(tmp_path)  # checks the nesting
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for fragment in ("<script", "<i>", "<b>&", "http://", "https://", "url(", "@import"):
        assert fragment not in text
    assert "&lt;not &amp; a tag&gt;" in text  # from the configuration
    for tag, key, value in page.attributes:
        if key == "src":
            assert value.startswith("data:image/png;base64,")
        if key == "href":
            assert (tag, value[:7]) == ("a", "points/")
    assert evil in [row[0] for row in page.rows]


def test_front_png_has_its_size(tmp_path):
    small_sweep(tmp_path)
    page = page_of(tmp_path)
    with Image.open(tmp_path / "front.png") as image:
        image.verify()
        size = image.size
    assert size == tuple(round(DPI * inches) for inches in FRONT_INCHES)
    assert len(page.images()) == 5  # front, formats, training, search, one policy


def lone_point(workdir):
    write_point(workdir, "uniform_int4")


def only_failures(workdir):
    write_failure(workdir)
    write_failure(workdir, "search_2.00")


def one_decision(workdir):
    write_point(workdir, "search_1.10", "search", sites=1)


def resnet152(workdir):
    write_point(workdir, "float", "float", sites=160)
    write_point(workdir, "search_1.10", "search", sites=160)


def no_accuracy(workdir):
    write_point(workdir, "uniform_int4", accuracy=None, loss=None, train_accuracy=None)


def no_curves(workdir):
    folder = write_point(workdir, "search_1.10", "search", target_gbops=None)
    (folder / "metrics.jsonl").unlink()
    (folder / "probabilities.jsonl").unlink()


def float_without_policy(workdir):
    (write_point(workdir, "float", "float") / "policy.json").unlink()


def diverged(workdir):
    folder = write_point(workdir, "uniform_int4")
    lines = [{"step": s, "loss": math.nan if s > 5 else 1.0, "accuracy": None} for s in range(9)]
    dump_lines(folder / "metrics.jsonl", lines)


def random_search(workdir):
    write_point(workdir, "random_1.10", "random", without_retraining=True, target_gbops=0.5)


def many_points(workdir):
    for i in range(30):
        write_point(workdir, f"search_{i}.00", "search", sites=2, decisions=1, gbops=1 + i / 9)


@pytest.mark.parametrize(
    "sweep, images",
    [
        (lone_point, 3),
        (only_failures, 1),
        (one_decision, 5),
        (resnet152, 5),
        (no_accuracy, 3),
        (no_curves, 5),
        (float_without_policy, 3),
        (diverged, 3),
        (random_search, 3),
        (many_points, 34),
    ],
)
def test_every_size_of_sweep_has_a_report(tmp_path, sweep, images):
    sweep(tmp_path)
    page = page_of(tmp_path)
    assert len(page.images()) == images
    assert max(image.height for image in page.images()) <= MAX_HEIGHT_INCHES * DPI
    strict((tmp_path / "front.json").read_text())


def test_map_of_many_seeds_shows_the_first():
    records = [Record(f"search_{i}_seed{s}", "search", s, "") for i in range(21) for s in range(2)]
    assert [r.name for r in mapped_records(records)] == [f"search_{i}_seed0" for i in range(21)]
    assert mapped_records(records[:40]) == records[:40]


def test_unfinished_points_are_named(tmp_path):
    lone_point(tmp_path)
    (tmp_path / "points" / "search_7.00").mkdir()
    assert "Not finished yet: search_7.00." in write_report(tmp_path).read_text()


def test_entropy_is_that_of_the_probabilities(tmp_path):
    write_point(tmp_path, "search_1.10", "search")
    steps, entropy = entropy_series(load_records(tmp_path)[0])
    assert steps.tolist() == [0, 20]
    assert entropy == pytest.approx([math.log(3), 0.0])  # uniform over three, then certain


def test_cells_are_readable():
    """At least 4.5 : 1, the WCAG 2 contrast for text, on every colour of a 16-format palette."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    shades = [f"#{int(255 * v):02x}{int(255 * w):02x}80" for v in (0, 0.5, 1) for w in (0, 0.5, 1)]
    for shade in [NOT_QUANTIZED, *shades]:
        dark, light = sorted([luminance(shade), luminance(ink_on(shade))])
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_files_are_whole_or_untouched(tmp_path, monkeypatch):
    lone_point(tmp_path)
    before = write_report(tmp_path).read_bytes()

    def refuse(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WorkdirError, match="no space"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "front.json", "front.png", "points", "report.html",
    ]  # fmt: skip


def test_import_leaves_matplotlib_alone():
    code = "import sys, aqt_search.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
