"""The job that stores a run's weights with palettes, on the digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.palette import PaletteError, dequantized, encoded, load, serve
from aqt_search.tracing.rules import RuleError
from aqt_search.training.checkpoint import save_checkpoint
from aqt_search.training.workdir import claim_workdir, write_json
from configs import digits_resnet8
from experiments import from_config
from experiments.jobs import palettize as job

RULES = (("head", {"bits": 2, "dimension": 4}), ("stem", 4), (".*", None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("palettize")


def configured(folder, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict(
        {
            "data.data_dir": str(folder / "data"),
            "model.width": 0.25,
            "epochs": 0.1,
            "optimizer.warmup_epochs": 0.0,
            "evaluation.calibration_batches": 1,
            "checkpoint": str(folder / "float"),
            "palette.rules": RULES,
        }
        | changes
    )
    return config


@pytest.fixture(scope="module")
def images(folder):
    return from_config.load_images(configured(folder))


@pytest.fixture(scope="module")
def state(folder, images):
    """That of a finished run, as training begins."""
    config = configured(folder, checkpoint="")
    parts = from_config.build_parts(config, images)
    state = from_config.initial_state(config, parts, aqs.assign(parts.sites, []))
    save_checkpoint(folder / "float" / "checkpoints", 2, state)
    claim_workdir(folder / "float", config.to_dict())
    write_json(folder / "float" / "result.json", {"kind": "float"})
    return state


@pytest.fixture(scope="module")
def stored(folder, images, state):
    result = job.run(configured(folder), folder / "out", images)
    return result, json.loads((folder / "out" / "palette.json").read_text())


def test_the_file_is_the_model_that_was_evaluated(folder, images, state, stored):
    result, _ = stored
    assert result["kind"] == "palette"
    content = load(folder / "out" / "palette.npz")
    variables = dequantized(content)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(state.params)
    config = configured(folder)
    model = from_config.build_model(config, images.splits.num_classes, None)
    served = jax.jit(serve(lambda v, x: model.apply(v, x, train=False)))
    correct = count = 0
    for batch in from_config.evaluation_batches(config, images, "test"):
        predicted = np.asarray(served(content, batch["image"])).argmax(-1)
        correct += np.sum((predicted == batch["label"]) * batch["mask"])
        count += np.sum(batch["mask"])
    # Two devices evaluate in halves, which sum in another order: one image may tip over.
    assert correct / count == pytest.approx(result["accuracy"], abs=1.5 / float(count))


def test_sizes_are_those_of_the_file(folder, state, stored):
    result, sizes = stored
    content = load(folder / "out" / "palette.npz")
    plain = {"params": state.params, "batch_stats": content["batch_stats"]}
    assert sizes["file_bytes"] == (folder / "out" / "palette.npz").stat().st_size
    assert sizes["float_file_bytes"] == len(encoded(plain))
    assert sizes["ratio"] == sizes["float_file_bytes"] / sizes["file_bytes"]
    head = content["params"]["head"]["kernel"]
    assert (head.bits, head.dimension) == (2, 4)
    row = sizes["weights"]["head/kernel"]
    weight, values = np.asarray(state.params["head"]["kernel"], float), head.dequantize()
    assert (row["bytes"], row["weights"]) == (head.nbytes, weight.size)
    ratio = np.square(weight).sum() / np.square(weight - np.asarray(values, float)).sum()
    assert row["sqnr_db"] == pytest.approx(10 * np.log10(ratio), rel=1e-6)
    assert sizes["paletted_bytes"] == sum(row["bytes"] for row in sizes["weights"].values())
    assert set(sizes["weights"]) == {"head/kernel", "stem/kernel"}
    kernels = [w for w in jax.tree.leaves(state.params) if w.ndim > 1]
    paletted = sum(row["weights"] for row in sizes["weights"].values())
    rest = 4 * (sum(w.size for w in kernels) - paletted)
    assert result["weight_bytes"] == sizes["paletted_bytes"] + rest
    lines = job.format_sizes(sizes).splitlines()
    assert len(lines) == 3 + len(sizes["weights"])
    assert f"{sizes['ratio']:.2f} times smaller" in lines[-1]


def test_training_through_soft_palettes(folder, images, state):
    """Two steps, after which the centroids that it learned are those that are stored."""
    config = configured(
        folder, **{"palette.rules": (("head", 2), (".*", None)), "palette.epochs": 0.1}
    )
    result = job.run(config, folder / "dkm", images)
    assert (result["kind"], result["steps"]) == ("palette", 2)
    content = load(folder / "dkm" / "palette.npz")["params"]
    assert content["head"]["kernel"].palette.shape == (1, 4, 1)
    stem = state.params["stem"]["kernel"]
    assert jnp.any(content["stem"]["kernel"] != stem)  # it is trained, too
    sizes = json.loads((folder / "dkm" / "palette.json").read_text())
    assert sizes["method"] == "dkm"


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"checkpoint": ""}, from_config.ConfigError, ["checkpoint is empty"]),
        ({"checkpoint": "/nowhere"}, from_config.ConfigError, ["/nowhere"]),
        ({"formats": ((".*", "int4"),)}, from_config.ConfigError, ["formats", "float"]),
        ({"palette.epochs": -1.0}, from_config.ConfigError, ["palette.epochs", "-1"]),
        ({"palette.temperature": 0.0}, from_config.ConfigError, ["palette.temperature", "0"]),
        ({"palette.rules": (("tail", 2),)}, RuleError, ["'tail'", "Nearest"]),
        ({"palette.rules": ((".*", 9),)}, PaletteError, ["bits", "9"]),
    ],
)
def test_bad_configurations_leave_no_folder(folder, images, state, changes, error, words):
    workdir = folder / "bad"
    with pytest.raises(error) as caught:
        job.run(configured(folder, **changes), workdir, images)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (workdir / "config.json").exists()
