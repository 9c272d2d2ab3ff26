"""Sensitivities against numpy in float64, and the job on the digits."""

import copy
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import aqt_search as aqs
from aqt_search.report.sensitivity import load_sensitivity
from aqt_search.report.sensitivity_plot import sensitivity_figure
from aqt_search.training.checkpoint import CheckpointError, save_checkpoint
from aqt_search.training.evaluation import evaluate
from aqt_search.training.search_step import ClassifierSearchState
from aqt_search.training.sensitivity import sensitivity
from aqt_search.training.train_step import init_train_state
from aqt_search.training.workdir import WorkdirError, claim_workdir, write_json
from configs import digits_resnet8
from experiments import finished_run, from_config
from experiments.configured_search import configured_search
from experiments.jobs import sensitivity as job

KEYS = {
    "formats", "sites", "reference", "accuracy", "loss", "sqnr_db", "reference_accuracy",
    "reference_loss", "images",
}  # fmt: skip
RNG = np.random.default_rng(0)
FORMATS = ("int2", "int4", "fp32", "int8")


def apply(variables, x, train=False):
    params = variables["params"]
    return jax.nn.relu(x @ params["first"]) @ params["second"]


VARIABLES = {
    "params": {
        "first": RNG.normal(size=(6, 16)).astype(np.float32),
        "second": RNG.normal(size=(16, 4)).astype(np.float32),
    }
}
BATCHES = [
    {
        "image": RNG.normal(size=(40, 6)).astype(np.float32),
        "label": RNG.integers(0, 4, 40).astype(np.int32),
        "mask": np.ones(40, np.float32),
    }
    for _ in range(2)
]
SITES = aqs.find_sites(apply, VARIABLES, BATCHES[0]["image"])


@pytest.fixture(scope="module")
def found():
    return sensitivity(apply, VARIABLES, SITES, FORMATS, BATCHES)


def noise(x, levels, axis=None):
    """sum (x - xq)^2 / sum x^2 on integers up to `levels`, in float64."""
    x = np.asarray(x, float)
    scale = np.abs(x).max(axis, keepdims=True) / levels
    return np.square(np.round(x / scale) * scale - x).sum() / np.square(x).sum()


def decibels(*ratios):
    return -10 * math.log10(sum(ratios))


def test_a_format_that_loses_nothing_is_the_reference(found):
    column = FORMATS.index("fp32")
    assert (found.loss[:, column] == found.reference_loss).all()
    assert (found.accuracy[:, column] == found.reference_accuracy).all()
    assert np.isnan(found.sqnr_db[:, column]).all()
    assert (found.sites, found.images) == (("first", "second"), 80)


def test_each_cell_is_one_site_in_one_format(found):
    qapply = aqs.quantize(apply, axis_name="batch")
    for row, site in enumerate(found.sites):
        for column, name in enumerate(FORMATS):
            alone = evaluate(qapply, aqs.assign(SITES, [(site, name)]), VARIABLES, BATCHES)
            assert found.loss[row, column] == pytest.approx(alone.loss, rel=1e-5)
            assert found.accuracy[row, column] == alone.accuracy
    assert found.loss[0, 0] != found.loss[1, 0]


def test_sqnr_is_that_of_the_operands_in_the_reference(found):
    first, second = (VARIABLES["params"][k] for k in ("first", "second"))
    images = BATCHES[0]["image"]
    hidden = np.maximum(images.astype(float) @ first, 0)
    # After the relu int4 becomes uint4, of 15 levels; weights have a scale per output channel.
    for column, levels, unsigned in ((0, 1, 3), (1, 7, 15), (3, 127, 255)):
        expected = [
            decibels(noise(images, levels), noise(first, levels, 0)),
            decibels(noise(hidden, unsigned), noise(second, levels, 0)),
        ]
        # Float32 against float64 may put a value or two of 640 on the other side of a border, where
        # both sides lose as much.
        np.testing.assert_allclose(found.sqnr_db[:, column], expected, atol=0.01)


@pytest.mark.parametrize("operands", ["weight", "activation"])
def test_one_operand_alone_beside_a_quantized_rest(operands):
    found = sensitivity(
        apply, VARIABLES, SITES, ("int4", "int8"), BATCHES, reference="int8", operands=operands
    )
    other = {"weight": "activation", "activation": "weight"}[operands]
    rules = [("second", {operands: "int4", other: "int8"}), ("first", "int8")]
    qapply = aqs.quantize(apply, axis_name="batch")
    alone = evaluate(qapply, aqs.assign(SITES, rules), VARIABLES, BATCHES)
    assert found.loss[1, 0] == pytest.approx(alone.loss, rel=1e-5)
    assert (found.loss[:, 1] == found.reference_loss).all()
    x, axis = {
        "weight": (VARIABLES["params"]["first"], 0),
        "activation": (BATCHES[0]["image"], None),
    }[operands]
    assert found.sqnr_db[0, 0] == pytest.approx(decibels(noise(x, 7, axis)), abs=0.01)


def test_a_bit_is_worth_six_decibels():
    """Steps of max / (2^(b - 1) - 1): 20 log10(127 / 31) = 12.2 dB from int6 to int8."""
    x = RNG.uniform(-1, 1, size=(400, 50)).astype(np.float32)
    variables = {"params": {"w": RNG.uniform(-1, 1, size=(50, 200)).astype(np.float32)}}

    def product(variables, x, train=False):
        return x @ variables["params"]["w"]

    batch = {"image": x, "label": np.zeros(400, np.int32), "mask": np.ones(400, np.float32)}
    found = sensitivity(
        product, variables, aqs.find_sites(product, variables, x), ("int4", "int6", "int8"), [batch]
    )
    steps = np.diff(found.sqnr_db[0])
    # 10,000 and 20,000 squared errors: their means have a standard error of 1 %, 0.04 dB.
    ratios = np.array([31 / 7, 127 / 31])
    np.testing.assert_allclose(steps, 20 * np.log10(ratios), atol=0.2)
    assert (np.abs(steps / 2 - 6.02) < 0.6).all()


def test_sites_in_scans_lookups_and_sites_that_are_refused():
    def model(variables, ids, train=False):
        params = variables["params"]

        def layer(x, w):
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(layer, params["table"][ids], params["layers"])
        return x

    layers = RNG.normal(size=(3, 4, 4)).astype(np.float32)
    variables = {"params": {"table": RNG.normal(size=(9, 4)).astype(np.float32), "layers": layers}}
    batch = {
        "image": np.arange(8, dtype=np.int32),
        "label": np.zeros(8, np.int32),
        "mask": np.ones(8, np.float32),
    }
    sites = aqs.find_sites(model, variables, batch["image"])
    found = sensitivity(model, variables, sites, ("int4",), [batch], operands="weight")
    assert found.sites == ("table", "layers[0]", "layers[1]", "layers[2]")
    assert math.isnan(found.sqnr_db[0, 0])
    # A slice of the layers is one iteration's weight, with scales of its own.
    for i in range(3):
        expected = decibels(noise(layers[i], 7, 0))
        assert found.sqnr_db[1 + i, 0] == pytest.approx(expected, abs=0.01)
    assert (found.loss != found.reference_loss).all()


def test_json_is_strict_and_null_stands_for_what_is_not_finite(found):
    content = found.to_json()
    text = json.dumps(content, allow_nan=False)
    assert set(content) == KEYS
    assert json.loads(text) == content | {"formats": list(FORMATS), "sites": ["first", "second"]}
    assert [row[2] for row in content["sqnr_db"]] == [None, None]
    assert np.array(content["loss"]).shape == np.array(content["accuracy"]).shape == (2, 4)


def test_the_figure_shows_unknown_values_in_grey(found, tmp_path):
    content = found.to_json()
    content["loss"][0][0] = None
    for sites in (2, 80):  # with and without numbers
        names = [f"site{i}" for i in range(sites)]
        rows = {k: (content[k] * 40)[:sites] for k in ("loss", "sqnr_db")}
        (tmp_path / "f.png").write_bytes(sensitivity_figure(content | rows | {"sites": names}))
        pixels = imread(tmp_path / "f.png")[..., :3]
        width = pixels.shape[1]
        assert width > 1000
        grey = (np.abs(pixels - 0xD9 / 255) < 0.01).all(-1)
        assert grey[:, : int(0.62 * width)].sum() > 1000  # the loss that is unknown
        assert grey[:, int(0.63 * width) :].sum() > 1000  # the SQNR of fp32


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"formats": ("int4", "int99")}, aqs.FormatError, ["int99"]),
        ({"formats": ("int4", "int4")}, ValueError, ["different formats"]),
        ({"formats": ("int4",), "reference": "int4"}, ValueError, ["at least two"]),
        ({"operands": "lhs"}, ValueError, ["'lhs'", "both, weight, activation"]),
        ({"batches": []}, ValueError, ["at least one batch"]),
        ({"batch_stats": "own"}, ValueError, ["'own'"]),
    ],
)
def test_errors(changes, error, words):
    arguments = {"formats": FORMATS, "batches": BATCHES} | changes
    with pytest.raises(error) as caught:
        sensitivity(apply, VARIABLES, SITES, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- The job -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sensitivity")


def configured(folder, run, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict(
        {
            "data.data_dir": str(folder / "data"),
            "model.width": 0.25,
            "epochs": 0.1,
            "optimizer.warmup_epochs": 0.0,
            "evaluation.calibration_batches": 0,
            "search.searcher": "critic",
            "sensitivity.checkpoint": str(folder / run),
            "sensitivity.formats": ("int2", "int8"),
            "sensitivity.images": 100,
        }
        | changes
    )
    return config


@pytest.fixture(scope="module")
def images(folder):
    return from_config.load_images(configured(folder, ""))


def leave_run(folder, images, name, kind):
    """What a finished run leaves, with random weights; a search's state holds its policy, too."""
    config = configured(folder, name, **{"sensitivity.checkpoint": ""})
    parts = from_config.build_parts(config, images)

    def initial():
        state = init_train_state(parts.model, parts.optimizer, images.splits.image_shape, 0)
        if kind != "search":
            return state
        setting = configured_search(config, parts.sites, parts.schedule.total_steps)
        return ClassifierSearchState(state, setting.one_shot.init(setting.targets))

    state = jax.tree.map(
        lambda s: (9 * RNG.normal(size=s.shape)).astype(s.dtype), jax.eval_shape(initial)
    )
    save_checkpoint(folder / name / "checkpoints", 2, state)
    claim_workdir(folder / name, config.to_dict())
    write_json(folder / name / "result.json", {"kind": kind})
    return parts, state


@pytest.fixture(scope="module")
def trained(folder, images):
    return leave_run(folder, images, "float", "float")


def test_a_run_of_train(folder, images, trained):
    workdir = folder / "out"
    found = job.run(configured(folder, "float"), workdir, images)
    content = load_sensitivity(workdir)
    assert content == json.loads(json.dumps(found.to_json()))
    assert content["images"] == 100
    assert content["sites"] == list(trained[0].sites)
    assert (workdir / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert content["sqnr_db"][0][0] < content["sqnr_db"][0][1]
    table = job.sensitivity_table(found).splitlines()
    assert len(table) == 2 + len(found.sites)
    assert table[1].split()[0] == "stem/kernel"
    assert float(table[1].split()[1]) == pytest.approx(
        found.loss[0, 0] - found.reference_loss, abs=1e-4
    )


def test_weights_of_a_search(folder, images):
    parts, state = leave_run(folder, images, "search", "search")
    run = folder / "search"
    config = finished_run.run_config(configured(folder, "search"), run)
    found = finished_run.trained_state(config, run, parts).variables
    jax.tree.map(np.testing.assert_array_equal, found["params"], state.train.params)
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], state.train.batch_stats)
    write_json(run / "result.json", {"kind": "uniform"})
    with pytest.raises(CheckpointError, match="does not fit"):
        finished_run.trained_state(config, run, parts)


def test_a_run_may_be_older_than_keys_of_the_configuration(folder, images):
    leave_run(folder, images, "older", "uniform")
    run, asked = folder / "older", configured(folder, "older")
    whole = json.loads((run / "config.json").read_text())
    older = copy.deepcopy(whole)
    del older["model"]["activation"], older["ptq"], older["quantizers"]["weight_granularity"]
    write_json(run / "config.json", older)
    found = finished_run.run_config(asked, run)
    assert json.loads(json.dumps(found.to_dict())) == whole  # defaults all
    asked.model.activation = "relu"  # which it had not
    with pytest.raises(from_config.ConfigError, match=r"model.activation: there , now relu"):
        finished_run.run_config(asked, run)


def test_weights_of_a_run_that_failed_are_refused(folder, images):
    """Its checkpoint is of some step before the end."""
    leave_run(folder, images, "failed", "uniform")
    run, asked = folder / "failed", configured(folder, "failed")
    finished_run.run_config(asked, run)
    write_json(run / "result.json", {"kind": "uniform", "error": "LoopError: stopped"})
    with pytest.raises(from_config.ConfigError, match="no finished run"):
        finished_run.run_config(asked, run)


def test_images_are_each_taken_once(folder, images):
    for limit, size in ((1000, 50), (1000, 1000), (60, 25)):
        config = configured(folder, "", **{"sensitivity.images": limit})
        config.evaluation.batch_size = size
        batches = list(job.image_batches(config, images))
        taken = sum(len(b["label"]) for b in batches)
        count = min(limit, len(images.splits.reward))
        assert count - len(batches) < taken <= count
        assert {len(b["label"]) for b in batches} == {len(batches[0]["label"])}
        assert len(batches[0]["label"]) <= size
        pictures = np.concatenate([b["image"] for b in batches])
        assert len(np.unique(pictures, axis=0)) == taken


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sensitivity.checkpoint": ""}, ["checkpoint is empty", "finished run"]),
        ({"sensitivity.checkpoint": "/nowhere"}, ["/nowhere", "result.json"]),
        ({"sensitivity.split": "test"}, ["'test'", "'reward'"]),
        ({"sensitivity.formats": ("int4", "in8")}, ["config.sensitivity", "'in8'"]),
        ({"sensitivity.formats": ()}, ["formats is ()"]),
        ({"sensitivity.formats": ("float",)}, ["'float'"]),
        ({"sensitivity.reference": "flaot"}, ["config.sensitivity", "'flaot'"]),
        ({"sensitivity.images": 0}, ["images is 0"]),
        ({"model.width": 0.5}, ["model.width: there 0.25, now 0.5"]),
        ({"seed": 1}, ["seed: there 0, now 1"]),
    ],
)
def test_errors_of_the_job(folder, images, trained, changes, words, tmp_path):
    with pytest.raises((from_config.ConfigError, aqs.FormatError)) as caught:
        job.run(configured(folder, "float", **changes), tmp_path / "out", images)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_reference_without_a_loss(found):
    broken = dataclasses.replace(found, reference_loss=math.nan)
    assert broken.to_json()["reference_loss"] is None
    with pytest.raises(from_config.ConfigError, match=r"runs/x is nan .* 'float'"):
        job.check_finite(broken, "runs/x")


def test_without_held_out_images(folder):
    config = configured(folder, "", **{"data.held_out": 0})
    with pytest.raises(from_config.ConfigError, match="no held-out images"):
        job.image_batches(config, from_config.load_images(config))


def test_the_runs_own_folder_is_refused(folder, images, trained):
    with pytest.raises(WorkdirError, match="another configuration"):
        job.run(configured(folder, "float"), folder / "float", images)
