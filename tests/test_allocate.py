"""Formats for a network that is trained already: what the job decides, keeps and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aqt_search as aqs
from aqt_search.report import format_table, load_records
from aqt_search.search import allocate
from aqt_search.training.workdir import WorkdirError, read_json
from configs import digits_resnet8
from experiments import allocate as job
from experiments import finished_run, from_config
from experiments.configured_search import plain_space
from experiments.jobs import train
from experiments.option_values import VALUES, judged_batches

FORMATS = ("int2", "int4", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("allocate")


def configured(folder, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict({
        "data.data_dir": str(folder / "data"), "model.width": 0.25, "epochs": 2.0,
        "optimizer.warmup_epochs": 0.0, "evaluation.calibration_batches": 2,
        "search.score_images": 100, "search.space": (("stem|head", "int8"), (".*", FORMATS)),
        "ptq.images": 100, "ptq.batch_size": 50, "checkpoint": str(folder / "float"),
        "allocate.targets": (1.5,), "allocate.uniform": ("int4",),
    } | changes)  # fmt: skip
    return config


@pytest.fixture(scope="module")
def images(folder):
    return from_config.load_images(configured(folder))


@pytest.fixture(scope="module")
def trained(folder, images):
    config = configured(folder, checkpoint="")
    train.run(config, folder / "float", images)
    return finished_run.load(config, folder / "float", images)


@pytest.fixture(scope="module")
def allocated(folder, trained, images):
    job.run(configured(folder), folder / "front", images)
    return folder / "front"


def test_a_front_and_then_more_of_it(allocated, folder, trained, images):
    policy = read_json(allocated / "policies" / "allocated_1.5.json")
    values = read_json(allocated / job.VALUES_FILE)["values"]
    sites = trained.parts.sites
    limit = 1.5 * float(aqs.cost.gbops(sites, aqs.assign(sites, job.uniform_rules(
        configured(folder), "int4"))))  # fmt: skip
    found = {record.name: record for record in load_records(allocated)}
    assert set(found) == {"allocated_1.5", "int4"}
    assert found["allocated_1.5"].gbops <= limit * (1 + 1e-6)
    # The table has what the points were to cost, and what uniform formats do.
    assert found["allocated_1.5"].targets == {"gbops": pytest.approx(limit)}
    assert found["int4"].target_gbops is None
    lines = format_table(tuple(found.values())).splitlines()
    head = next(line for line in lines if line.startswith("point"))
    assert "cost/uniform" in head
    assert "target miss" in head
    miss = 100 * (found["allocated_1.5"].gbops / limit - 1)
    assert any("allocated_1.5" in line and f"{miss:+.1f}%" in line for line in lines)
    # No single change of an option is worth more and fits.
    space = plain_space(configured(folder), sites)
    table = np.array([[values[d.name][label] for label in d.labels] for d in space.decisions])
    costs = space.cost_table(aqs.cost.gbops)
    taken = [d.labels.index(policy[d.sites[0]]["rhs"]) for d in space.decisions]
    np.testing.assert_array_equal(taken, allocate(table, {"gbops": costs}, {"gbops": limit}))
    before = (allocated / job.VALUES_FILE).stat().st_mtime_ns
    more = configured(folder, **{"allocate.targets": (1.5, 1.0), "allocate.uniform": ()})
    job.run(more, allocated, images)
    assert (allocated / job.VALUES_FILE).stat().st_mtime_ns == before
    assert len(load_records(allocated)) == 3
    with pytest.raises(WorkdirError, match="score_images"):
        job.run(configured(folder, **{"search.score_images": 99}), allocated, images)


def test_one_at_a_time_is_the_loss_of_each_change(folder, trained):
    """Against the plain quantized function; batches of one size weigh alike."""
    config = configured(folder)
    space = plain_space(config, trained.parts.sites)
    found = VALUES["one_at_a_time"](config, trained.parts, space, trained.variables)
    model = trained.parts.model

    def loss(choices):
        qapply = jax.jit(aqs.quantize(model.apply), static_argnames=("train", "mutable"))
        losses = []
        for batch in judged_batches(config, trained.parts.images):
            logits, _ = qapply(
                space.assignment(np.array(choices)), trained.variables,
                jnp.asarray(batch["image"]), train=True, mutable=("batch_stats",),
            )  # fmt: skip
            losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
        return float(np.mean(losses))

    most = [2] * len(space.decisions)
    assert not found[:, 2].any()
    for decision in (0, len(space.decisions) - 1):
        changed = [*most]
        changed[decision] = 0
        expected = loss(most) - loss(changed)
        assert found[decision, 0] == pytest.approx(expected, abs=2e-6)  # float32 means of 0 to 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"checkpoint": ""}, ["checkpoint is empty", "workdir"]),
        ({"checkpoint": "/nowhere"}, ["/nowhere holds no finished run"]),
        ({"allocate.by": "hessian"}, ["'hessian'", "scores, one_at_a_time"]),
        ({"allocate.targets": ()}, ["allocate.targets is ()", "at least one"]),
        ({"allocate.targets": (1.1234567, 1.1234568)}, ["two points", "allocated_1.12346"]),
        ({"allocate.uniform": ("int4", "int4")}, ["two points", "'int4'"]),
        ({"allocate.targets": (0.01,)}, ["outside of the space"]),
        ({"allocate.targets": (1.0, 9.0)}, ["config.allocate.targets:", "target 9 times uniform"]),
        ({"seed": 3}, ["seed", "another model or data"]),
    ],
)
def test_what_is_refused(folder, trained, images, tmp_path, changes, words):
    with pytest.raises(ValueError) as caught:
        job.run(configured(folder, **changes), tmp_path / "run", images)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run" / "config.json").exists()
