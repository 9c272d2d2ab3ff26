"""The report's architectures, on points made up here: what is drawn against what was chosen."""

import io
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from aqt_search.report import ReportError, load_records, write_report
from aqt_search.report.architecture_plot import KINDS, TRACK, architecture_figure
from aqt_search.report.canvas import DPI, MAX_HEIGHT_INCHES, merged
from aqt_search.report.format_plot import format_map_figure
from aqt_search.report.sensitivity import rank_correlation

KIND_OF = {colour: kind for kind, (colour, *_) in KINDS.items()}
FACTS = {"kind": "conv", "macs": 9, "weight_size": 9}
LAYERS = ("expand", "depthwise", "project")
# Of a stem and three blocks, of which the second and the third can be skipped.
SPACE = {
    "block1/project/kernel:width": (["c8", "c16"], ["block1/project/kernel"]),
    "block3/expand/kernel:width": (["c24+8", "c48+16"], ["block3/expand/kernel", "squeeze"]),
    "stem/kernel:width": (["c4", "c8"], ["stem/kernel"]),
    "block2/expand/kernel:expansion": (["x2", "x6"], ["block2/expand/kernel"]),
    "block1/depthwise/kernel:window": (["k3", "k5"], ["block1/depthwise/kernel"]),
    "block2/depthwise/kernel:window": (["k3", "k7"], ["block2/depthwise/kernel"]),
    "block2:depth": (["d0", "d1"], ["block2"]),
    "block3:depth": (["d0", "d1"], ["block3"]),
}
SMALL = {
    "stem/kernel:width": 4, "block1/project/kernel:width": 8, "block1/depthwise/kernel:window": 3,
    "block3/expand/kernel:width": [24, 8], "block2:depth": 0, "block3:depth": 1,
}  # fmt: skip
LARGE = {
    "stem/kernel:width": 8, "block1/project/kernel:width": 16, "block1/depthwise/kernel:window": 5,
    "block2/expand/kernel:expansion": 2, "block2/depthwise/kernel:window": 7,
    "block2:depth": 1, "block3:depth": 0,
}  # fmt: skip


def write_subnet(workdir, name, choices, blocks, *, space=SPACE, gbops=1.0, kind="subnet"):
    """A finished point of these blocks of a larger model, which its own model numbers anew."""
    folder = workdir / "points" / name
    folder.mkdir(parents=True)
    whole = [
        "stem/kernel",
        *(f"block{b}/{n}/kernel" for b in blocks for n in LAYERS),
        "head/kernel",
    ]
    own = [
        site for n in range(1, len(blocks) + 1) for site in (f"block{n}/{m}/kernel" for m in LAYERS)
    ]
    own = ["stem/kernel", *own, "head/kernel"]
    result = {
        "name": name, "kind": kind, "seed": 0, "model": "m", "data": "d", "command": "c",
        "accuracy": 0.9, "loss": 0.2, "gbops": gbops, "weight_bytes": 9, "steps": 1, "seconds": 1.0,
    }  # fmt: skip
    pair = {"lhs": "int8", "rhs": "int4"}
    architecture = {
        "choices": choices, "sites": {new: old for new, old in zip(own, whole) if new != old}
    }  # fmt: skip
    dump(folder / "result.json", result)
    dump(folder / "sites.json", {site: FACTS for site in own})
    policy = {"architecture": architecture, "formats": dict.fromkeys(own, pair)}
    dump(folder / "policy.json", policy)
    if space:
        dump(folder / "space.json", {
            decision: {"sites": [], "options": options, "about": about}
            for decision, (options, about) in space.items()
        })  # fmt: skip
    dump(workdir / "config.json", {})
    return folder


def two_points(workdir, **options):
    write_subnet(workdir, "small", SMALL, (1, 3), gbops=0.5, **options)
    write_subnet(workdir, "large", LARGE, (1, 2), gbops=1.0, **options)


def dump(path, value):
    path.write_text(json.dumps(value))


def drawn(monkeypatch, module, draw):
    """The first axes of a figure, and its image."""
    made = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(f"aqt_search.report.{module}.Figure", Kept)
    image = Image.open(io.BytesIO(draw()))
    return made[0].axes[0], image


def row_names(axes):
    """By height, the block and the layer of a row of bars."""
    names, block = {}, ""
    for place, label in zip(axes.get_yticks(), axes.get_yticklabels()):
        words = label.get_text().split()
        block = words[0] if len(words) == 2 or words[0] not in LAYERS else block
        names[round(float(place), 3)] = "/".join(dict.fromkeys([block, words[-1]]))
    return names


def bars(axes):
    """{(column, row's name, kind): length of the bar over that of its track}, of all points."""
    names, tracks, found = row_names(axes), {}, {}
    for patch in axes.patches:
        centre = patch.get_x() + patch.get_width() / 2
        place = (round(centre), names[round(patch.get_y() + patch.get_height() / 2, 3)])
        assert abs(centre - place[0]) < 1e-9  # the network is symmetric
        colour = to_hex(patch.get_facecolor())
        if colour == TRACK:
            tracks[place] = patch.get_width()
        else:
            found[(*place, KIND_OF[colour])] = patch.get_width()
    assert set(tracks) == {key[:2] for key in found}
    return {key: width / tracks[key[:2]] for key, width in found.items()}


def test_bars_are_as_long_as_what_was_chosen(tmp_path, monkeypatch):
    two_points(tmp_path)
    axes, image = drawn(
        monkeypatch, "architecture_plot", lambda: architecture_figure(load_records(tmp_path))
    )
    expected = {
        (0, "stem", "width"): 4 / 8, (1, "stem", "width"): 1,
        (0, "block1/depthwise", "window"): 3 / 5, (1, "block1/depthwise", "window"): 1,
        (0, "block1/project", "width"): 8 / 16, (1, "block1/project", "width"): 1,
        (1, "block2/expand", "expansion"): 2 / 6, (1, "block2/depthwise", "window"): 1,
        (0, "block3/expand", "width"): 24 / 48,
    }  # fmt: skip
    assert bars(axes) == pytest.approx(expected)
    order = ["stem", "block1/depthwise", "block1/project", "block2/expand", "block2/depthwise",
             "block3/expand"]  # fmt: skip
    assert list(row_names(axes).values()) == order  # of the network, not of the decisions
    texts = {text.get_text() for text in axes.texts}
    assert {
        "4",
        "8",
        "16",
        "3\N{MULTIPLICATION SIGN}3",
        "\N{MULTIPLICATION SIGN}2",
        "24+8",
    } <= texts
    # In the picture, too: the stem of the second point has twice the pixels of that of the first.
    blue = np.all(np.asarray(image.convert("RGB")) == (0x56, 0xB4, 0xE9), axis=-1)
    lines = np.flatnonzero(blue.any(1))
    columns = np.flatnonzero(blue[lines[1]])
    gap = int(np.argmax(np.diff(columns))) + 1
    assert np.ptp(columns[gap:]) == pytest.approx(2 * np.ptp(columns[:gap]), abs=3)


def test_choices_about_what_is_skipped_are_not_drawn(tmp_path, monkeypatch):
    """Also where a file tells them."""
    told = SMALL | {"block2/expand/kernel:expansion": 6, "block2/depthwise/kernel:window": 3}
    write_subnet(tmp_path, "small", told, (1, 3))
    axes, _ = drawn(
        monkeypatch, "architecture_plot", lambda: architecture_figure(load_records(tmp_path))
    )
    assert not [row for _, row, _ in bars(axes) if row.startswith("block2")]
    assert "block2/expand" in row_names(axes).values()


def test_blocks_without_other_choices_are_there_or_not(tmp_path, monkeypatch):
    space = {"a..c:depth": (["d1", "d3"], ["a", "b", "c"]), "d:width": (["c2", "c4"], ["d"])}
    for name, depth in (("one", 1), ("three", 3)):
        write_subnet(tmp_path, name, {"a..c:depth": depth, "d:width": 4}, (1,), space=space)
    write_subnet(tmp_path, "without", {"d:width": 2}, (1,), space={}, gbops=9.0)  # of another space
    axes, _ = drawn(
        monkeypatch, "architecture_plot", lambda: architecture_figure(load_records(tmp_path))
    )
    there = {(column, row) for column, row, kind in bars(axes) if kind == "depth"}
    assert there == {(0, "a"), (1, "a"), (1, "b"), (1, "c")}


def test_old_runs_do_not_tell_their_options(tmp_path, monkeypatch):
    """Then the largest is that of the points."""
    two_points(tmp_path, space={})
    axes, _ = drawn(
        monkeypatch, "architecture_plot", lambda: architecture_figure(load_records(tmp_path))
    )
    found = bars(axes)
    assert found[0, "stem", "width"] == pytest.approx(4 / 8)
    assert found[1, "block2/expand", "expansion"] == 1
    assert (0, "block2/expand", "expansion") not in found


def test_sites_have_the_names_of_the_whole_model(tmp_path, monkeypatch):
    """Block 3 is `block2` in the model that skips block 2: it is no other model's block 2."""
    two_points(tmp_path)
    records = load_records(tmp_path)
    rows = ["stem/kernel", *(f"block{b}/{n}/kernel" for b in (1, 2, 3) for n in LAYERS),
            "head/kernel"]  # fmt: skip
    assert [r.name for r in records] == ["small", "large"]
    assert list(records[0].sites) == list(records[0].policy) == rows[:4] + rows[7:]
    colours = {"int4": "#202020", "int8": "#404040"}
    axes, _ = drawn(monkeypatch, "format_plot", lambda: format_map_figure(records, colours))
    assert [label.get_text() for label in axes.get_yticklabels()] == rows  # in network order
    blank = np.asarray(axes.images[0].get_array())[:, ::2, 3] == 0
    assert [rows[i] for i in np.flatnonzero(blank[:, 0])] == [r for r in rows if "block2" in r]
    assert [rows[i] for i in np.flatnonzero(blank[:, 1])] == [r for r in rows if "block3" in r]


def test_sensitivities_of_skipped_blocks_are_left_out(tmp_path):
    folder = write_subnet(tmp_path, "search", SMALL, (1, 3), kind="search")
    sites = [f"block{b}/{n}/kernel" for b in (1, 2, 3) for n in LAYERS]
    space = json.loads((folder / "space.json").read_text())
    formats = {site: {"sites": [site], "options": ["int3", "int4"]} for site in sites}
    dump(folder / "space.json", space | formats)
    (record,) = load_records(tmp_path)
    content = {"formats": ["int3"], "sites": sites, "loss": [[1.0]] * 9, "reference_loss": 0.5}
    assert rank_correlation(record, content).sites == 6


@pytest.mark.parametrize("points, blocks", [(1, 1), (12, 13), (40, 20), (60, 40)])
def test_figures_fit_at_every_size(tmp_path, points, blocks):
    names = range(1, blocks + 1)
    space = {f"block{b}/expand/kernel:expansion": (["x2", "x6"], ["a"]) for b in names}
    space |= {f"block{b}/depthwise/kernel:window": (["k3", "k7"], ["a"]) for b in names}
    space |= {f"block{b}:depth": (["d0", "d1"], [f"block{b}"]) for b in names}
    rng = np.random.default_rng(0)
    for point in range(points):
        choices = {name: int(rng.choice(options)[1:]) for name, (options, _) in space.items()}
        kept = [b for b in names if choices[f"block{b}:depth"]]
        write_subnet(tmp_path, f"a_long_name_of_a_$ubnet_{point}", choices, kept, space=space)
    image = Image.open(io.BytesIO(architecture_figure(load_records(tmp_path))))
    assert image.width == 10.5 * DPI
    assert image.height <= MAX_HEIGHT_INCHES * DPI


def test_architectures_are_a_section(tmp_path):
    two_points(tmp_path)
    page = write_report(tmp_path).read_text()
    section = page.split("<h2>Architecture</h2>")[1].split("<h2>")[0]
    assert section.count("<img ") == 1
    assert "<td" in section
    assert "24, 8" in section
    assert "names of the whole network" in page


def test_a_point_without_an_architecture_has_no_section(tmp_path):
    folder = write_subnet(tmp_path, "plain", {}, (1,))
    policy = json.loads((folder / "policy.json").read_text())
    dump(folder / "policy.json", policy["formats"])
    assert "<h2>Architecture</h2>" not in write_report(tmp_path).read_text()


def changed(file, change):
    def harm(folder):
        value = json.loads((folder / file).read_text())
        change(value)
        dump(folder / file, value)

    return harm


def told(facts):
    return changed("policy.json", lambda value: value["architecture"].update(facts))


@pytest.mark.parametrize(
    "harm, message",
    [
        (told({"choices": []}), "'choices' is"),
        (told({"choices": {"a": "c4"}}), "whole number"),
        (told({"choices": {"a": []}}), "whole number"),
        (told({"sites": {"a": 4}}), "names of sites"),
        (told({"sites": {"stem/kernel": "head/kernel"}}), "two sites have one name"),
        (changed("policy.json", lambda v: v.update(architecture=4)), "'architecture' is 4"),
        (changed("space.json", lambda v: v["block2:depth"].update(options=["2"])), "such as 'c48'"),
        (changed("space.json", lambda v: v["block2:depth"].update(about=4)), "'about' is 4"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, harm, message):
    folder = write_subnet(tmp_path, "small", SMALL, (1, 3))
    harm(folder)
    with pytest.raises(ReportError, match=message) as caught:
        load_records(tmp_path)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "sequences, order",
    [
        (["ace", "abc", "cde", "ef"], "abcdef"),
        (["cd", "abd"], "cabd"),  # what begins goes before what is known behind it
        (["ab", "cd"], "abcd"),
        (["abc", "cab"], "abc"),  # of two orders the first
        ([], ""),
    ],
)
def test_names_are_merged_in_their_order(sequences, order):
    assert "".join(merged(sequences)) == order
