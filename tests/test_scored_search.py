"""A search that decides once, by gradients: what it trains under, and what a stop leaves behind."""

import jax
import numpy as np
import pytest

from aqt_search.training.checkpoint import restore_latest
from aqt_search.training.loop import CHECKPOINT_FOLDER, run_steps
from aqt_search.training.metrics import read_metrics
from aqt_search.training.workdir import lock_workdir, read_json
from configs import digits_resnet8
from experiments import finished_run, from_config
from experiments.configured_search import configured_search
from experiments.jobs import scored_search, search

STEPS, DECIDES = 20, 10


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict({
        "data.data_dir": str(tmp_path_factory.mktemp("data")), "model.width": 0.25, "epochs": 1.0,
        "optimizer.warmup_epochs": 0.0, "evaluation.calibration_batches": 2, "log_every": 1,
        "checkpoint_every": 5, "search.searcher": "scores", "search.score_images": 100,
        "search.delay": DECIDES / STEPS, "search.target": 1.5,
        "search.space": (("stem|head", "int8"), (".*", ("int3", "int4", "int8"))),
    })  # fmt: skip
    return config


@pytest.fixture(scope="module")
def images(config):
    return from_config.load_images(config)


@pytest.fixture(scope="module")
def finished(config, images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scored") / "run"
    return workdir, search.run(config, workdir, images)


def test_it_trains_under_most_bits_and_then_under_its_answer(finished, config, images):
    workdir, result = finished
    run = finished_run.load(config, workdir, images)
    setting = configured_search(config, run.parts.sites, STEPS)
    policy, space = read_json(workdir / "policy.json"), read_json(workdir / "space.json")
    records = read_metrics(workdir)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        for name, decision in space.items():
            p = [record[f"probability/{name}/{label}"] for label in decision["options"]]
            # Told after a step; the point changes just before the one after the delay.
            taken = "int8" if record["step"] <= DECIDES else policy[decision["sites"][0]]["rhs"]
            assert p == [float(label == taken) for label in decision["options"]]
        dearest = setting.costs["gbops"].range[1]
        cost = dearest if record["step"] <= DECIDES else result["gbops"]
        assert record["cost"] == pytest.approx(cost, rel=1e-6)
    assert result["kind"] == "search"
    assert result["without_retraining"] is True
    # The best under the target leaves no room for more bits in the cheapest of its decisions.
    assert result["gbops"] <= setting.targets["gbops"] * (1 + 1e-6)
    assert result["gbops"] > 0.9 * setting.targets["gbops"]


def test_a_search_that_was_stopped_around_its_decision_ends_in_the_same_bits(
    finished, config, images, tmp_path
):
    class Stopped(Exception):
        pass

    def stop_at(number):
        def check(step, metrics):
            if step == number:
                raise Stopped

        return check

    for number in (DECIDES + 2, DECIDES + 1):  # the newest checkpoint is just before it
        job = scored_search.prepare(config, tmp_path, images)
        with lock_workdir(tmp_path), pytest.raises(Stopped):
            run_steps(job.step, job.run._replace(check=stop_at(number)), job.schedule)
    job = scored_search.prepare(config, tmp_path, images)
    with lock_workdir(tmp_path):
        again = run_steps(job.step, job.run, job.schedule).state
    whole = restore_latest(finished[0] / CHECKPOINT_FOLDER, jax.tree.map(np.asarray, again)).state
    jax.tree.map(np.testing.assert_array_equal, again, whole)
