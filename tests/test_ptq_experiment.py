"""Quantization of a finished run on the digits: what it writes, how it stops, and in a sweep."""

import json

import numpy as np
import pytest

from aqt_search.report import load_records
from configs import digits_low_bit, digits_resnet8
from experiments import from_config, sweep
from experiments.from_config import ConfigError
from experiments.jobs import ptq, train


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def configured(data_dir, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict(
        {
            "data.data_dir": str(data_dir), "model.width": 0.25, "epochs": 4.0,
            "evaluation.calibration_batches": 2, "log_every": 20, "checkpoint_every": 100,
            "ptq.images": 200, "ptq.batch_size": 100, "ptq.adaround_steps": 200,
        }
        | changes
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "run"
    images = from_config.load_images(configured(data_dir))
    train.run(configured(data_dir), folder, images)
    return folder, images


def read(path):
    return json.loads(path.read_text())


def test_steps_are_reported_one_by_one_and_the_weights_are_served(trained, data_dir, tmp_path):
    folder, images = trained
    steps = ("fold_batch_norm", "equalize", "adaround", "correct_bias")
    formats = ((".*", {"weight": "int3", "activation": "int8"}),)
    more = {"ptq.steps": steps, "quantizers.weight": "mse"}
    config = configured(data_dir, checkpoint=str(folder), formats=formats, **more)
    result = ptq.run(config, tmp_path / "ptq", images)
    rows = read(tmp_path / "ptq" / "ptq.json")["steps"]
    assert [row["step"] for row in rows] == ["float", "nearest", *steps]
    by_step = {row["step"]: row for row in rows}
    # Folding changes nothing but the range of the weights that share a scale: per channel none.
    assert by_step["fold_batch_norm"]["loss"] == pytest.approx(by_step["nearest"]["loss"], rel=0.05)
    # Blocks of a ResNet end in a sum, which equalization cannot move a scale through: it says so.
    assert any("conv2" in reason for reason in by_step["equalize"]["skipped"])
    gap = by_step["nearest"]["loss"] - by_step["float"]["loss"]
    assert by_step["adaround"]["loss"] - by_step["float"]["loss"] < 0.7 * gap
    assert result["kind"] == "ptq"
    assert result["accuracy"] > 0.5
    assert result["gbops"] == pytest.approx(
        sum(8 * 3 * s["macs"] for s in read(tmp_path / "ptq" / "sites.json").values()) / 1e9
    )
    # As resumed: the result is kept, nothing is done again.
    table = ptq.format_steps(rows)
    assert table.splitlines()[2].startswith("nearest")


def test_bounds_without_data_come_from_batch_norm(trained, data_dir, tmp_path):
    folder, images = trained
    largest = float(np.abs((1 - images.mean) / images.std).max())
    config = configured(
        data_dir, checkpoint=str(folder), formats=((".*", "int8"),),
        **{"ptq.data_free": True, "ptq.other_bounds": (("stem/kernel", largest),),
           "ptq.steps": ("fold_batch_norm", "correct_bias")},
    )  # fmt: skip
    result = ptq.run(config, tmp_path / "free", images)
    (tmp_path / "free" / "result.json").unlink()  # as killed just before the end
    again = ptq.run(config, tmp_path / "free", images)
    assert (again["accuracy"], again["loss"]) == (result["accuracy"], result["loss"])
    rows = read(tmp_path / "free" / "ptq.json")["steps"]
    assert result["accuracy"] > 0.5
    assert abs(rows[-1]["accuracy"] - rows[0]["accuracy"]) < 0.05  # 8 bits are enough for digits


def test_a_sweep_quantizes_every_network_it_has_trained(data_dir, tmp_path):
    config = configured(data_dir, epochs=1.0, **{"optimizer.warmup_epochs": 0.0})
    config.sweep.baselines = digits_low_bit.float_networks({"margin": 0.01})[1:]
    config.sweep.stages = (
        ("w2a8", "ptq", {"formats": digits_low_bit.W2A8}),
        ("w2a8_qat", "train", {"formats": digits_low_bit.W2A8, "range_loss.rules": ()}),
    )
    config.sweep.targets = ()
    sweep.run(config, tmp_path)
    records = {record.name: record for record in load_records(tmp_path)}
    assert set(records) == {"margin", "margin_w2a8", "margin_w2a8_qat"}
    assert all(record.error is None for record in records.values())
    assert records["margin"].kind == "float"
    assert records["margin_w2a8"].kind == "ptq"
    assert records["margin_w2a8_qat"].series == "margin w2a8_qat"
    # The weights that were quantized are those that the first point has left.
    sites = {
        name: read(tmp_path / "points" / name / "weights.json")
        for name in ("margin", "margin_w2a8")
    }
    for site, before in sites["margin"].items():
        assert sites["margin_w2a8"][site]["before"] == before["before"]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"checkpoint": ""}, "checkpoint is empty"),
        ({"formats": ()}, "formats is empty"),
        ({"ptq.steps": ("adaroundd",)}, "'adaroundd'; expected .* adaround"),
        ({"ptq.steps": ("equalize",)}, "needs 'fold_batch_norm' before it"),
        ({"ptq.steps": ("gptq", "adaround")}, "cannot come after 'gptq'"),
        ({"ptq.steps": ("adaround",), "ptq.data_free": True}, "needs data"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(trained, data_dir, tmp_path, changes, told):
    folder, images = trained
    config = configured(
        data_dir, **({"checkpoint": str(folder), "formats": ((".*", "int8"),)} | changes)
    )
    with pytest.raises(ConfigError, match=told):
        ptq.run(config, tmp_path / "bad", images)
    assert not (tmp_path / "bad" / "config.json").exists()


def test_the_points_of_a_stage_are_one_group_over_the_seeds(data_dir, tmp_path):
    config = configured(data_dir)
    config.sweep.update({"baselines": ("float", "int8"), "targets": (), "seeds": (0, 1)})
    config.sweep.stages = (("w2a8", "ptq", {"formats": digits_low_bit.W2A8}, ("float",)),)
    points = {point.name: point for point in sweep.sweep_points(config, tmp_path)}
    names = ("float", "float_w2a8", "int8")
    assert set(points) == {f"{name}_seed{n}" for name in names for n in (0, 1)}
    for number in (0, 1):
        own = points[f"float_w2a8_seed{number}"].config
        assert own.checkpoint == str(tmp_path / "points" / f"float_seed{number}")
        assert own.seed == number


@pytest.mark.parametrize("stage", [("x", "distill", {}), ("x", "ptq", {}, ("distilled",))])
def test_an_unknown_stage_is_an_error(data_dir, tmp_path, stage):
    config = configured(data_dir)
    config.sweep.baselines, config.sweep.stages = ("float",), (stage,)
    with pytest.raises(ConfigError, match="distill"):
        sweep.sweep_points(config, tmp_path)
