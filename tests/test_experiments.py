"""The jobs from end to end on the digits: what they write, and how a sweep goes on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from aqt_search.report import load_records
from aqt_search.report.records import bits_of_format
from aqt_search.training import parallel
from aqt_search.training.metrics import read_metrics
from configs import digits_resnet8
from experiments import compare_searchers, from_config, sweep
from experiments.compiled_programs import keep_compiled
from experiments.jobs import search, train

ROOT = Path(__file__).parent.parent
SEARCHED = ("e2m1", "int4", "e4m3")
RESULT_KEYS = {
    "name", "kind", "model", "data", "seed", "accuracy", "loss", "held_out_accuracy",
    "train_accuracy", "train_split_accuracy", "gbops", "weight_bytes", "target_gbops",
    "final_entropy", "without_retraining", "command", "steps", "seconds", "width", "series",
}  # fmt: skip
OWN_KEYS = {"search": {"targets", "costs"}, "random": {"targets", "costs"}, "retrained": {"pair"}}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of equal shapes and formats compile the same programs; here they share them."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is settings:
            yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def images(data_dir):
    return from_config.load_images(configured(data_dir))


def configured(data_dir, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict(
        {
            "data.data_dir": str(data_dir),
            "model.width": 0.25,
            "epochs": 1.0,
            "optimizer.warmup_epochs": 0.0,
            "evaluation.calibration_batches": 2,
            "log_every": 5,
            "checkpoint_every": 10,
            "search.learning_rate": 0.3,
            "search.tolerance": 0.0,
        }
        | changes
    )
    return config


def read(path):
    return json.loads(path.read_text())


def cost_from_files(folder):
    """MACs times bits of both operands, in billions, from sites.json and policy.json alone."""
    policy = read(folder / "policy.json")

    def bits(name):
        return 32 if name is None else bits_of_format(name)

    return sum(
        facts["macs"] * bits(policy[name]["lhs"]) * bits(policy[name]["rhs"]) / 1e9
        for name, facts in read(folder / "sites.json").items()
    )


def check_run(folder, kind, result=None):
    """What every finished run leaves behind."""
    found = read(folder / "result.json")
    assert result is None or found == result
    assert set(found) == RESULT_KEYS | OWN_KEYS.get(kind, set())
    assert found["name"] == folder.name
    assert found["kind"] == kind
    assert (found["model"], found["data"], found["steps"]) == ("resnet8", "digits", 20)
    assert found["gbops"] == pytest.approx(cost_from_files(folder), rel=1e-9)
    assert 0.1 < found["accuracy"] <= 1  # ten classes; a broken network is at 0.1 or below
    assert 0 < found["held_out_accuracy"] <= 1
    assert found["seconds"] > 0
    records = read_metrics(folder)
    assert [r["step"] for r in records] == [5, 10, 15, 20]
    assert records[-1]["accuracy"] == found["train_accuracy"]
    assert read(folder / "config.json")["model"]["width"] == 0.25
    assert list((folder / "tensorboard").iterdir())
    return found


def check_search(folder, options, *, sampled=False):
    found = check_run(folder, "search")
    assert found["without_retraining"] is True
    if sampled:
        assert 0 <= found["final_entropy"] <= math.log(len(options))
    else:  # decided by gradients: there is no policy that has an entropy
        assert found["final_entropy"] is None
        assert found["gbops"] <= found["target_gbops"] * (1 + 1e-6)
    space, policy = read(folder / "space.json"), read(folder / "policy.json")
    lines = [json.loads(line) for line in (folder / "probabilities.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for name, decision in space.items():
        assert decision["options"] == list(options)
        for line in lines:
            assert sum(line["probabilities"][name]) == pytest.approx(1, abs=1e-5)
        # The answer is the most probable option, not what was sampled last.
        best = decision["options"][int(np.argmax(lines[-1]["probabilities"][name]))]
        for site in decision["sites"]:
            assert_formats(policy[site], best)
    assert max(
        abs(p - 1 / len(options)) for row in lines[-1]["probabilities"].values() for p in row
    )
    return found, space, policy


def assert_formats(sides, option):
    if option == "none":
        assert sides == {"lhs": None, "rhs": None}
    elif option.startswith("weight="):
        assert sides == {"lhs": None, "rhs": option.removeprefix("weight=")}
    else:
        assert sides == {"lhs": option, "rhs": option}


# --- A sweep: training in float, under rules and under a policy file, and a search ----------------


@pytest.fixture(scope="module")
def swept(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    config = configured(
        data_dir,
        **{
            "search.space": (("stem|head", "int8"), (".*", ("int4", "int6", "int8"))),
            "sweep.baselines": ("float", "int4", ("odd", (("nowhere", "int4"),))),
            "sweep.targets": (1.5,),
            "sweep.retrain": True,
        },
    )
    return config, sweep.run(config, workdir).parent


def test_a_sweep_trains_searches_and_reports(swept, capsys):
    _, workdir = swept
    points = workdir / "points"
    floats = check_run(points / "float", "float")
    uniform = check_run(points / "int4", "uniform")
    searched, space, policy = check_search(points / "search_1.5", ("int4", "int6", "int8"))
    retrained = check_run(points / "retrained_1.5", "retrained")
    sites = read(points / "float" / "sites.json")
    assert sites["stem/kernel"] == {
        "kind": "conv", "macs": 8 * 8 * 9 * 4, "weight_size": 9 * 4,
        "lhs_shape": [1, 8, 8, 1], "rhs_shape": [3, 3, 1, 4],
    }  # fmt: skip
    assert floats["weight_bytes"] == 4 * sum(site["weight_size"] for site in sites.values())
    four_bits = read(points / "int4" / "policy.json")
    assert four_bits.pop("stem/kernel") == four_bits.pop("head/kernel") == {
        "lhs": "int8", "rhs": "int8",
    }  # fmt: skip
    assert set(space) == set(four_bits)
    assert all(sides == {"lhs": "int4", "rhs": "int4"} for sides in four_bits.values())
    assert searched["target_gbops"] == pytest.approx(1.5 * uniform["gbops"])
    assert read(points / "retrained_1.5" / "policy.json") == policy
    assert retrained["gbops"] == searched["gbops"]
    for name in ("front.json", "front.png", "report.html"):
        assert (workdir / name).stat().st_size > 100
    assert {r.name for r in load_records(workdir)} == {
        "float", "int4", "odd", "search_1.5", "retrained_1.5",
    }  # fmt: skip


def test_a_point_that_fails_is_recorded_and_does_not_end_the_sweep(swept):
    result = read(swept[1] / "points" / "odd" / "result.json")
    assert result["error"].startswith("RuleError: Rule 'nowhere' matches no site")
    assert (result["name"], result["kind"], result["seed"]) == ("odd", "uniform", 0)


def test_a_sweep_keeps_finished_points_and_tries_failed_ones_again(swept, capsys):
    config, workdir = swept
    points = sorted((workdir / "points").iterdir())

    def times():
        return {p.name: (p / "result.json").stat().st_mtime_ns for p in points}

    before = times()
    sweep.run(config, workdir)
    again = times()
    assert {name for name in before if before[name] != again[name]} == {"odd"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("[1/5] float: ")
    assert "RuleError" in lines[2]


def test_a_finished_run_is_evaluated_again_and_not_trained(swept, images):
    config, workdir = swept
    folder = workdir / "points" / "int4"
    point = next(p for p in sweep.sweep_points(config, workdir) if p.name == "int4")
    before, records = read(folder / "result.json"), read_metrics(folder)
    again = train.run(point.config, folder, images)
    assert again.pop("seconds") == before.pop("seconds")
    assert again == before
    assert read_metrics(folder) == records


def test_a_sweeps_point_is_the_run_of_its_configuration(data_dir, tmp_path):
    """Each seed has its own held-out images, as it has when the point is run alone."""
    options = {"sweep.baselines": ("float",), "sweep.targets": ()}
    config = configured(data_dir, **options, **{"sweep.seeds": (0, 1)})
    sweep.run(config, tmp_path / "sweep")
    point = read(tmp_path / "sweep" / "points" / "float_seed1" / "result.json")
    alone = train.run(configured(data_dir, **options, seed=1), tmp_path / "float_seed1")
    for key in ("accuracy", "loss", "held_out_accuracy", "train_accuracy", "seed"):
        assert point[key] == alone[key], key


def test_other_searchers_on_the_weights_of_a_search(swept, images, tmp_path):
    config, workdir = swept
    folder = workdir / "points" / "search_1.5"
    point = next(p for p in sweep.sweep_points(config, workdir) if p.name == "search_1.5")
    names = ("random", "greedy", "evolution", "critic", "policy_gradient", "scores")
    values = {"checkpoint": str(folder), "evaluations": 24, "images": 100, "names": names}
    point.config.searchers.update(values)
    found = compare_searchers.run(point.config, tmp_path / "compared", images)
    assert found["target"] == pytest.approx(read(folder / "result.json")["target_gbops"])
    assert found["points"] == 3**8
    assert tuple(found["searchers"]) == names
    assert min(row["regret"] for row in found["searchers"].values()) == 0
    for row in found["searchers"].values():
        assert row["cost"] <= 1.02 * found["target"]
        assert row["evaluations"] <= 24
        assert set(row["formats"]) == set(read(folder / "space.json"))
        assert 0 <= row["accuracy_other_half"] <= 1
    assert len(compare_searchers.format_outcomes(found).splitlines()) == 2 + len(names)
    few = point.config.copy_and_resolve_references()
    few.searchers.update({"names": ("greedy",), "evaluations": 5})
    with pytest.raises(from_config.ConfigError, match=r"config.searchers: evaluations is 5.*least"):
        compare_searchers.run(few, tmp_path / "few", images)
    assert not (tmp_path / "few" / "config.json").exists()
    point.config.searchers.names = ("grid",)
    with pytest.raises(from_config.ConfigError, match=r"'grid'; expected .* random"):
        compare_searchers.run(point.config, tmp_path / "refused", images)
    assert not (tmp_path / "refused").exists()


# --- Points side by side --------------------------------------------------------------------------


def test_a_sweep_side_by_side_with_a_grid_of_sizes_and_spaces(data_dir, tmp_path):
    """Two devices: two baselines of one program, and two kinds of search alone."""
    config = configured(
        data_dir,
        **{
            "search.space": (("stem|head", "int8"), (".*", ("int4", "int6", "int8"))),
            "sweep.side_by_side": True,
            "sweep.grid": (("model.name", ("resnet8",)), ("model.width", (0.25,))),
            "sweep.baselines": ("int4", ("mine", ((".*", "int6"),))),
            "sweep.spaces": (
                ("sites", {"search.further_costs": (("weight_bytes", 1.5, "int4"),)}),
                ("random", {"search.searcher": "random"}),
            ),
            "sweep.targets": (1.5, 99.0),
            "sweep.retrain": False,
            "sweep.sensitivity": "mine",
            "sensitivity.formats": ("int2", "int4"),
            "sensitivity.images": 50,
        },
    )
    points = sweep.run(config, tmp_path).parent / "points"
    place = "resnet8_width0.25_"
    for name, bits in {"int4": 4, "mine": 6}.items():
        found = check_run(points / f"{place}{name}", "uniform")
        assert (found["series"], found["width"]) == (name, 0.25)
        assert read(points / f"{place}{name}" / "policy.json")["stage1_block1/conv1/kernel"] == {
            "lhs": f"int{bits}", "rhs": f"int{bits}",
        }  # fmt: skip
    found, _, _ = check_search(points / f"{place}search_sites_1.5", ("int4", "int6", "int8"))
    assert found["series"] == "search sites"
    assert set(found["targets"]) == set(found["costs"]) == {"gbops", "weight_bytes"}
    drawn = check_run(points / f"{place}random_random_1.5", "random")
    assert 0.9 * drawn["target_gbops"] <= drawn["gbops"] <= 1.02 * drawn["target_gbops"]
    for kind in ("search_sites", "random_random"):
        failed = read(points / f"{place}{kind}_99" / "result.json")
        assert "outside of the space" in failed["error"]
    assert len(load_records(tmp_path)) == 6
    alone = read(tmp_path / "sensitivity.json")
    assert len(alone["sites"]) == len(alone["loss"]) == 10
    assert "Sensitivity" in (tmp_path / "report.html").read_text()


def test_runs_side_by_side_compile_once():
    """The step of the first job serves all that are equal, however many batches of devices."""
    traces = []

    def step(state, factor, batch):
        traces.append(None)
        return state + factor * batch["x"].sum(), {"loss": jax.numpy.float32(0)}

    for _ in range(3):
        placement = parallel.side_by_side(2)
        state = placement.put([np.float32(0), np.float32(1)])
        factors = placement.put([np.float32(2), np.float32(3)])
        batch = placement.shard([{"x": np.ones(2, np.float32)}] * 2)
        for _ in range(2):  # what a step returned is as good as what was put there
            state, _ = placement.compile(step)(state, factors, batch)
    assert np.asarray(state).tolist() == [8.0, 13.0]
    assert len(traces) == 1


# --- Another space, and other data ---------------------------------------------------------------


def test_a_space_of_float_formats_decided_by_rule(data_dir, images, tmp_path):
    options = ("e2m1", "e4m3", {"weight": "e3m2"}, None)
    changes = {
        "search.space": (("stem", "bf16"), ("stage1", options), (".*", options)),
        "search.decide": "rule",
        "search.target": 2.0,
        "search.relative_to": "e2m1",
        "search.searcher": "critic",
    }
    search.run(configured(data_dir, **changes), tmp_path / "floats", images)
    labels = ("e2m1", "e4m3", "weight=e3m2", "none")
    _, space, policy = check_search(tmp_path / "floats", labels, sampled=True)
    assert policy["stem/kernel"] == {"lhs": "bf16", "rhs": "bf16"}
    assert set(space) == {"stage1", ".*"}
    assert sorted(s for d in space.values() for s in d["sites"]) == sorted(
        set(policy) - {"stem/kernel"}
    )


def test_training_without_held_out_images(data_dir, tmp_path):
    changes = {"data.held_out": 0, "evaluation.calibration_batches": 0}
    result = train.run(configured(data_dir, **changes), tmp_path / "all")
    assert result["held_out_accuracy"] is None
    assert 0 <= result["accuracy"] <= 1


def test_any_evaluation_batch_size_is_divided_over_the_devices(data_dir, images):
    config = configured(data_dir, **{"evaluation.batch_size": 75})
    sizes = [len(b["label"]) for b in from_config.evaluation_batches(config, images, "test")]
    assert sizes == [76] * 5  # 360 images, 2 devices


def test_a_sweep_keeps_its_programs_unless_jax_keeps_them_elsewhere(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    keep_compiled(tmp_path)
    assert jax.config.jax_compilation_cache_dir == before[names[0]]  # this file's own
    try:
        jax.config.update(names[0], None)
        keep_compiled(tmp_path)
        kept = jax.config.jax_compilation_cache_dir
        assert Path(kept).parent == tmp_path
        jax.config.update(names[0], None)
        keep_compiled(tmp_path)
        assert jax.config.jax_compilation_cache_dir == kept  # of the same processor
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# --- The command line -----------------------------------------------------------------------------

CONFIG = "--config=configs/digits_resnet8.py"
COMMANDS = {
    "unknown key": [CONFIG, "--workdir=/nowhere/a", "--config.optimizer.learning_rat=0.1"],
    "bad value": [CONFIG, "--workdir=/nowhere/a", "--config.epochs=many"],
    "no file": ["--config=configs/missing.py", "--workdir=/nowhere/a"],
    "unknown form": [CONFIG + ":quik", "--workdir=/nowhere/a"],
    "no workdir": [CONFIG],
    "arguments": [CONFIG, "--workdir=/nowhere/a", "stray"],
    "helpfull": ["--helpfull"],
}


@pytest.fixture(scope="module")
def command_lines():
    """Exit code, standard output and error of each command; they run side by side."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *arguments],
            cwd=ROOT, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, arguments in COMMANDS.items()
    }  # fmt: skip
    ended = {name: process.communicate(timeout=600) for name, process in started.items()}
    return {name: (started[name].returncode, *ended[name]) for name in COMMANDS}


@pytest.mark.parametrize(
    "name, words",
    [
        ("unknown key", ["learning_rat", "learning_rate", "configs/base.py"]),
        ("bad value", ["--config.epochs=many"]),
        ("no file", ["no file 'configs/missing.py'", "get_config"]),
        ("unknown form", ["'quik'", "CONFIG.py:quick"]),
        ("no workdir", ["--workdir"]),
        ("arguments", ["stray"]),
    ],
)
def test_bad_command_lines(command_lines, name, words):
    code, out, err = command_lines[name]
    assert code == 1
    assert "Traceback" not in err
    assert all(word in out + err for word in words), err


def test_helpfull(command_lines):
    code, out, _ = command_lines["helpfull"]
    assert code == 1  # as absl ends after help
    assert "--config" in out
    assert "--workdir" in out
    assert "configs/base.py explains the keys" in " ".join(out.split())
