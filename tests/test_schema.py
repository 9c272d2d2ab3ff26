"""The schema of a configuration: good ones pass; of bad ones the error names the key."""

import importlib
import os
import pathlib
import subprocess
import sys
import types

import pytest

from aqt_search.training.workdir import WorkdirError, write_json
from configs import base
from experiments import allocate, compare_searchers, sweep
from experiments.command_line import USER_ERRORS, given_workdir, start
from experiments.from_config import ConfigError
from experiments.jobs import palettize, ptq, search, sensitivity, train
from experiments.schema import SCHEMA, check, check_values, flat

ROOT = pathlib.Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")
FORMS = {
    "imagenet": ("resnet18", "resnet50", "mobilenet_v2", "deit_s"),
    "pareto_resnet": ("", "quick", "imagenet"),
    "cifar10_16px_resnet8": ("", "quick", "decisions"),
    "cifar10_16px_low_bit": ("", "quick", "mobilenet_v2"),
}
GOOD = [
    (path.stem, form)
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in ("__init__", "base")
    for form in FORMS.get(path.stem, ("", "quick"))
]


def changed(**values):
    """The defaults with other values, of any type, as a file may have them."""
    config = base.get_config()
    for key, value in values.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        with section.ignore_type():
            section[last] = value
    return config


def test_the_schema_has_the_keys_of_a_configuration():
    assert set(SCHEMA) == set(flat(base.get_config()))
    check(base.get_config())


@pytest.mark.parametrize("key", SCHEMA)
def test_an_example_is_one(key):
    SCHEMA[key].check(SCHEMA[key].example)


@pytest.mark.parametrize("name, form", GOOD)
def test_the_configurations_pass(name, form, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config(form)
    check_values(config)
    sweep.check_points(config, sweep.sweep_points(config, tmp_path))


# --- The campaign ---------------------------------------------------------------------------------


def bad_values(key):
    """Values that a key cannot have, by the type of its default."""
    default = flat(base.get_config())[key]
    if isinstance(default, bool):
        return (2, "maybe", None, (), NAN)
    if isinstance(default, int):
        return (NAN, INF, -INF, -1, 10**30, 0.5, "many", None, ("1",), True)
    if isinstance(default, float):
        return (NAN, INF, -INF, -1.0, 1e39, "many", None, ("1",))
    if isinstance(default, str):
        return (5, None, ("a",), b"a", "two\nlines")
    return ("int4", 5, None, (NAN,), (None,), ((),), (("a", "b", "c", "d", "e"),))


CAMPAIGN = [(key, value) for key in SCHEMA for value in bad_values(key)]
# What a type alone does not tell.
CAMPAIGN += [
    *(("formats", value) for value in [
        (".*", "int4"), ((".*", "int99"),), ((".*",),), (("(", "int4"),), ((5, "int4"),),
        ((".*", {"weigth": "int4"}),), ((".*", {}),), ((".*", ("int4", "int8")),),
        ((".*", {"weight": "int4", "unsigned": 3}),), ((".*", {5: "int4"}),), "('.*', 'int4'),",
    ]),
    *(("search.space", value) for value in [
        (), (".*", ("int4", "int8")), ((".*", ("int4",)),), ((".*", ("int4", "int4")),),
        ((".*", ("int4", "in8")),), ((".*", {"weight": ("int4", "int8"), "lhs": "int4"}),),
        ((".*", {"weight": ("int4", "in8")}),), ((".*", ()),), ((".*", "fliqs_xl"),),
    ]),
    *(("search.further_costs", value) for value in [
        ("gbops", 1.0, "int4"), (("gbops", 1.0),), (("watts", 1.0, "int4"),),
        (("weight_bytes", NAN, "int4"),), (("weight_bytes", 1.0, "int99"),),
    ]),
    *(("sweep.grid", value) for value in [
        ("model.width", (0.5,)), (("model.width", 0.5),), (("model.width", ()),),
        (("model.widht", (0.5,)),), (("model.width", (0.5, NAN)),), (("seed", (0, 1)),),
        (("model", (1,)),), (("model.width", ("wide",)),), (("search.target", (1.0,)),),
    ]),
    *(("sweep.stages", value) for value in [
        ("w4", "ptq", {}), (("w4", "ptq"),), (("w4", "distill", {}),), (("a/b", "ptq", {}),),
        (("..", "ptq", {}),), (("", "ptq", {}),), (("w4", "ptq", {"ptq.step": ()}),),
        (("w4", "ptq", {"ptq.smoothing": 2.0}),), (("w4", "ptq", ()),),
        (("w4", "ptq", {"model.width": 2.0}),), (("w4", "ptq", {}, "float"),),
    ]),
    *(("sweep.spaces", value) for value in [
        ("int", {}), (("int",),), (("int", {"search.spaec": ()}),), (("a/b", {}),), (("int", 5),),
        (("int", {"search.space": (".*", ("int4", "int8"))}),), (("int", {"search.beta": NAN}),),
    ]),
    *(("sweep.baselines", value) for value in [
        ("int99",), ("mine", ((".*", "int4"),)), (("mine", (".*", "int4")),), (("../x", ()),),
        (("mine", (), {"epocs": 2.0}),), (("mine", (), {"epochs": NAN}),), (("mine",),),
    ]),
    *(("sweep.targets", value) for value in [(-1.0,), (1.1, "2"), 1.1]),
    *(("sweep.seeds", value) for value in [(), (-1,), (2**40,), (0.5,)]),
    *(("palette.rules", value) for value in [
        (), (".*", 2), ((".*", 9),), ((".*", 0),), ((".*", True),), ((".*", {"bit": 2}),),
        ((".*", {"bits": 2.5}),),
    ]),
    *(("range_loss.rules", value) for value in [(".*", "margin"), ((".*", "margins"),)]),
    *((f"quantizers.{role}", value) for role in ("weight", "activation") for value in [
        "", "mse(0)", "mse(-1)", "mse(1000000000)", "percentile(0)", "percentile(nan)", "absmax(3)",
        "percentile", "centred", "centred(5)", "fixed(-1)", "fixed(1e999)", "lsq('x')", "mse(",
        "moving_average(2)", "pact(-1)", "batch_quant('x')", "__import__('os')", "a.b(1)",
    ]),
    *((f"quantizers.{role}_gradient", value) for role in ("weight", "activation") for value in [
        "", "ste", "ewgs", "ewgs(-1)", "ewgs(1e999)", "ewgs('x')",
    ]),
    *(("quantizers.weight_granularity", v) for v in ["", "row", "block", "block(0)", "block(1.5)"]),
    *(("quantizers.activation_granularity", v) for v in ["", "row", "channel", "token(2)"]),
    ("quantizers.companded", ("(",)),
    *(("data.crop_area", value) for value in [
        ("0.1", "1"), (0.5,), (1.0, 0.1), (0.1, 2.0), (0.0, 1.0), (NAN, 1.0), (0.1, 0.5, 1.0),
    ]),
    *(("data.held_out", value) for value in [1.0, 1, 1.5]),
    *(("data.image_size", value) for value in [100_000, 8.0]),
    ("data.folds", 1), ("data.name", ""), ("data.name", " "), ("data.crop_fraction", 1.5),
    *(("model.width", value) for value in [0.0, 1e9]),
    *(("model.dtype", value) for value in ["int8", "float31", "complex64", ""]),
    ("model.name", "resnet9"), ("model.activation", "gelu"), ("epochs", 0.0), ("epochs", 1e300),
    ("optimizer.name", "sdg"), ("optimizer.schedule", "sine"), ("optimizer.momentum", 2.0),
    ("optimizer.momentum", 1.0), ("label_smoothing", 1.0), ("search.delay", 1.0),
    ("search.searcher", "grid"), ("search.cost", "latency_ms/abacus"), ("search.decide", "layer"),
    ("search.cost_samples", 1), ("search.temperature", 0.0), ("search.relative_to", "int99"),
    ("searchers.names", ()), ("searchers.names", ("grid",)), ("searchers.images", 1),
    ("allocate.by", "luck"), ("allocate.targets", ()), ("allocate.uniform", ("int99",)),
    ("sensitivity.formats", ()), ("sensitivity.formats", ("float",)), ("sensitivity.split", "test"),
    ("sensitivity.reference", "flaot"), ("ptq.steps", ("adaroundd",)), ("ptq.smoothing", 1.5),
    ("ptq.other_bounds", (("stem", -1.0),)), ("ptq.other_bounds", ("stem", 1.0)),
]  # fmt: skip


def test_the_campaign_is_large():
    assert len(CAMPAIGN) > 300


@pytest.mark.parametrize("key", SCHEMA)
def test_a_bad_value_is_told_with_its_key_and_an_example(key):
    """No other error than those that the command line prints in one line, exit status 1."""
    for value in [value for k, value in CAMPAIGN if k == key]:
        with pytest.raises(USER_ERRORS) as caught:
            check(changed(**{key: value}))
        message = str(caught.value)
        assert message.startswith(f"config.{key} is "), (value, message)
        for part in ("; expected ", ", such as "):
            assert part in message, (value, message)


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("allocate.targets", (1.1, -1.0), "its value 2 is -1.0; expected a tuple of at least one"),
        ("sweep.stages", (("w4", "ptq", {"ptq.smoothing": 2.0}),),
         "ptq.smoothing is 2.0; expected a finite number at least 0 and at most 1, such as 0.5."),
        ("sweep.stages", ("w4", "ptq", {}), "such as (('w4a8', 'ptq', {"),
        ("sweep.baselines", ("int99",), "Unknown format 'int99'"),
    ],
)  # fmt: skip
def test_what_fits_least_is_what_was_expected(key, value, told):
    with pytest.raises(USER_ERRORS) as caught:
        check(changed(**{key: value}))
    assert told in str(caught.value)


def test_a_missing_comma_is_shown_with_one():
    with pytest.raises(USER_ERRORS, match=r"A rule is '\.\*'.*such as \(\('\.\*', 'int4'\),\)"):
        check(changed(formats=(".*", "int4")))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"optimizer.warmup_epochs": 10.0}, ["optimizer.warmup_epochs", "fewer", "epochs"]),
        (
            {"optimizer.warmup_epochs": 1.0, "epochs": 0.5},
            ["epochs is 0.5", "if it was not given", "--config.optimizer.warmup_epochs=0.125"],
        ),
        ({"model.form": "imagenet"}, ["config.model", "form"]),
        ({"model.activation": "relu"}, ["config.model", "activation"]),
        ({"ptq.steps": ("equalize",)}, ["ptq.steps", "'fold_batch_norm' before"]),
        ({"search.searcher": "critic", "search.temperature": 2.0}, ["'critic'", "temperature"]),
        ({"search.further_costs": (("gbops", 1.0, ""),)}, ["two targets for one cost"]),
    ],
)
def test_values_that_exclude_one_another(values, words):
    with pytest.raises(ConfigError) as caught:
        check(changed(**values))
    assert all(word in str(caught.value) for word in words), str(caught.value)


JOBS = {
    "train": train.run, "search": search.run, "ptq": ptq.run, "palettize": palettize.run,
    "sensitivity": sensitivity.run, "allocate": allocate.run, "sweep": sweep.run,
    "compare_searchers": compare_searchers.run,
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_every_job_checks_its_configuration_whoever_calls_it(name, tmp_path):
    """A value that no job looks at itself, before there is a folder or an image."""
    config = changed(
        checkpoint="/nowhere", **{"sensitivity.checkpoint": "/nowhere", "batch_size": 0.5}
    )
    with pytest.raises(ConfigError, match=r"config.batch_size is 0.5; expected a whole number"):
        JOBS[name](config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


UNREAD_KEYS = [
    *(("search", key) for key in ("formats", "policy", "checkpoint")),
    *(("sensitivity", key) for key in ("formats", "policy", "checkpoint")),
    *(("compare_searchers", key) for key in ("formats", "policy", "checkpoint")),
    *(("palettize", key) for key in ("formats", "policy")),
    *(("allocate", key) for key in ("formats", "policy")),
]


@pytest.mark.parametrize("name, key", UNREAD_KEYS)
def test_formats_and_weights_that_a_job_does_not_read_are_refused(name, key, tmp_path):
    given = {"formats": ((".*", "int4"),), "policy": "runs/policy.json", "checkpoint": "runs/float"}
    needed = {"checkpoint": "runs/float"} if name in ("palettize", "allocate") else {}
    images = types.SimpleNamespace(splits=types.SimpleNamespace(fingerprint="of no images"))
    with pytest.raises(ConfigError, match=rf"{key}.*[Ll]eave"):
        JOBS[name](changed(**needed, **{key: given[key]}), tmp_path / "run", images)
    assert not (tmp_path / "run" / "config.json").exists()


def test_unknown_and_missing_keys():
    config = base.get_config()
    config.optimizer.learning_rat = 0.1
    with pytest.raises(ConfigError, match=r"config.optimizer.learning_rat.*learning_rate"):
        check(config)
    config = base.get_config()
    del config.optimizer.momentum
    with pytest.raises(ConfigError, match=r"config.optimizer.momentum is missing.*below 1"):
        check(config)


# --- Sweeps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        ({"sweep.targets": (1.1234567, 1.1234568)}, ["two points", "'search_1.12346'"]),
        ({"sweep.grid": (("model.width", (0.5, 0.50000001)),)}, ["two points", "width0.5"]),
        ({"sweep.stages": (("a", "ptq", {}), ("a", "ptq", {}))}, ["two points", "float_a"]),
        ({"sweep.spaces": (("a", {}), ("a", {}))}, ["two points", "'search_a_1.1'"]),
        ({"sweep.baselines": (("search_1.1", ()),)}, ["two points", "'search_1.1'"]),
        ({"sweep.seeds": (0, 0)}, ["two points", "_seed0"]),
        ({"sweep.grid": (("data.name", ("folder:/a",)),)}, ["namefolder:/a", "no /"]),
        ({"sweep.grid": (("series", ("x",)),)}, ["sweep.grid", "series"]),
        ({"sweep.baselines": (), "sweep.targets": ()}, ["no points"]),
        ({"formats": ((".*", "int4"),)}, ["config.formats is", "sweep.baselines"]),
        ({"policy": "runs/search/policy.json"}, ["config.policy is", "sweep.baselines"]),
        ({"checkpoint": "runs/float"}, ["search_1.1", "config.checkpoint is", "from scratch"]),
        ({"sweep.sensitivity": "nope"}, ["sweep.sensitivity", "'nope'", "float, int8, int4"]),
        ({"sweep.stages": (("a", "ptq", {"ptq.steps": ("equalize",)}),)}, ["float_a", "ptq.steps"]),
        ({"sweep.spaces": (("a", {"search.samples": 1, "search.searcher": "critic"}),)},
         ["search_a_1.1", "samples is 1"]),
    ],
)  # fmt: skip
def test_a_sweep_refuses_before_anything_runs(values, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        sweep.run(changed(**values), tmp_path / "sweep")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def idle(monkeypatch):
    """A sweep whose points do nothing, on images of which no more is known than which they are."""
    images = types.SimpleNamespace(splits=types.SimpleNamespace(fingerprint="of no images"))
    monkeypatch.setattr(sweep, "image_loader", lambda: lambda point: images)
    monkeypatch.setattr(sweep, "run_points", lambda *_: iter(()))
    monkeypatch.setattr(sweep, "measure_sensitivity", lambda *_: None)
    monkeypatch.setattr(sweep, "write_report", lambda workdir: workdir / "report.html")


UNREAD = {"sweep.sensitivity": "int4", "sensitivity.images": 5, "searchers.images": 7}


def test_a_sweep_goes_on_after_a_value_that_no_point_reads(idle, tmp_path):
    sweep.run(base.get_config(), tmp_path)
    sweep.run(changed(**UNREAD, **{"ptq.images": 9}), tmp_path)
    points = [sweep.sweep_points(c, tmp_path) for c in (base.get_config(), changed(**UNREAD))]
    left, right = ([flat(p.config) for p in each] for each in points)
    for one, other in zip(left, right):
        assert {k for k in one if one[k] != other[k]} <= {"sweep.sensitivity"}
    stages = {"sweep.stages": (("w4", "ptq", {}),)}
    sweep.run(changed(**stages), tmp_path / "staged")
    with pytest.raises(WorkdirError, match=r"ptq.images: there 1000, now 9"):
        sweep.run(changed(**stages, **{"ptq.images": 9}), tmp_path / "staged")
    with pytest.raises(WorkdirError, match=r"epochs: there 10.0, now 9.0"):
        sweep.run(changed(epochs=9.0), tmp_path)


def test_what_a_sensitivity_was_measured_with_stays(idle, tmp_path):
    sweep.run(base.get_config(), tmp_path)
    write_json(tmp_path / "sensitivity.json", {})
    with pytest.raises(WorkdirError, match=r"sensitivity.images: there 1000, now 5"):
        sweep.run(changed(**UNREAD), tmp_path)


@pytest.mark.parametrize("errors", [("no",), ("no", None)])
def test_a_sweep_without_a_result_is_a_failure(errors, monkeypatch, tmp_path, capsys):
    class Record:
        def __init__(self, error):
            self.error = error

    monkeypatch.setattr(sweep, "keep_compiled", lambda folder: None)
    monkeypatch.setattr(sweep, "load_records", lambda folder: [Record(e) for e in errors])
    monkeypatch.setattr(sweep, "format_table", lambda records: "table")
    job = lambda: sweep.main(base.get_config(), tmp_path, lambda *_: tmp_path / "report.html")  # noqa: E731
    if None in errors:
        job()
    else:
        with pytest.raises(USER_ERRORS, match="All 1 points failed"):
            job()
    assert "table" in capsys.readouterr().out


# --- Folders --------------------------------------------------------------------------------------


def test_an_empty_workdir_is_refused():
    for empty in ("", " "):
        with pytest.raises(WorkdirError, match="workdir is empty"):
            start(lambda *_: None, base.get_config(), empty)
    with pytest.raises(WorkdirError, match="nobody_at_all"):
        given_workdir("~nobody_at_all/x")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    got = []
    config = changed(checkpoint="~/float", **{"data.name": "folder:~/images", "policy": "a/~"})
    start(lambda *arguments: got.extend(arguments), config, "~/run")
    config, workdir = got
    assert workdir == tmp_path / "run"
    assert config.checkpoint == f"{tmp_path}/float"
    assert config.data.name == f"folder:{tmp_path}/images"
    assert config.policy == "a/~"


# --- The command line -----------------------------------------------------------------------------

CONFIG = "--config=configs/digits_resnet8.py"
COMMANDS = {
    "no configuration": (["--config=README.md"], ["README.md", "line"]),
    "a file without one": (["--config=experiments/results.py"], ["no configuration"]),
    "no comma": ([CONFIG, "--config.formats=(('.*','int4'))"], ["config.formats", "(('.*', 'i"]),
    "a type": ([CONFIG, "--config.seed=1.5"], ["config.seed=1.5", "a whole number", "such as"]),
    "nan": ([CONFIG, "--config.optimizer.momentum=nan"], ["config.optimizer.momentum is nan"]),
    "a key of a text": ([CONFIG, "--config.model.name.x=1"], ["no such configuration key"]),
    "a section": ([CONFIG, "--config.optimizer={}"], ["config.optimizer", "is missing"]),
    "no workdir": ([CONFIG, "--workdir="], ["workdir is empty"]),
}


@pytest.fixture(scope="module")
def command_lines():
    """Exit code and standard error of each command, run one after another."""
    found = {}
    for name, (arguments, _) in COMMANDS.items():
        ended = subprocess.run(
            [sys.executable, "-m", "experiments.sweep", "--workdir=/nowhere/a", *arguments],
            cwd=ROOT, env=os.environ, text=True, capture_output=True, timeout=300,
        )  # fmt: skip
        found[name] = ended.returncode, ended.stderr
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_malformed_command_line_ends_in_one_message(command_lines, name):
    code, err = command_lines[name]
    assert code == 1
    assert "Traceback" not in err
    assert all(word in err for word in COMMANDS[name][1]), err
