"""What a run goes on from is its own: its data, its weights and its folder, wherever they lie."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aqt_search.training.checkpoint import CheckpointError, save_checkpoint
from aqt_search.training.loop import CHECKPOINT_FOLDER
from aqt_search.training.workdir import WorkdirError, lock_workdir
from configs import digits_resnet8
from experiments import finished_run, from_config, job, sweep
from experiments.job import claim_run
from experiments.jobs import train


def write_images(root, per_class=8):
    """Two classes, of dark and of bright images."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, brightness in (("bright", 128), ("dark", 0)):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(brightness, brightness + 128, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def configured(folder, images_in=None, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict(
        {
            "data.name": f"folder:{images_in or folder / 'images'}",
            "data.data_dir": str(folder / "data"),
            "data.held_out": 4,
            "model.width": 0.25,
            "batch_size": 4,
            "epochs": 2.0,
            "optimizer.warmup_epochs": 0.0,
            "evaluation.calibration_batches": 0,
            "checkpoint_every": 2,
        }
        | changes
    )
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with images, what is prepared of them, and a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images")
    result = train.run(configured(folder), folder / "float")
    assert result["steps"] == 6
    return folder


def test_a_run_does_not_go_on_with_other_images(finished, tmp_path):
    copied = shutil.copytree(
        finished / "images", tmp_path / "images", copy_function=shutil.copyfile
    )
    run = shutil.copytree(finished / "float", tmp_path / "float")
    same = configured(finished, images_in=copied)  # with other times
    claim_run(run, same, from_config.load_images(same), "train")
    assert finished_run.load(same, run).variables["params"]
    (copied / "train/dark/5.png").unlink()
    with pytest.raises(WorkdirError, match=r'inputs.data: there "16 and 16 .*now "15 and 16'):
        claim_run(run, same, from_config.load_images(same), "train")
    # What starts from the weights would hold out images that they were trained on.
    with pytest.raises(from_config.ConfigError, match=r"trained on other images \(there 16"):
        finished_run.load(same, run)
    with lock_workdir(tmp_path / "sweep"):
        points = configured(finished, images_in=copied)
        claim_run(tmp_path / "sweep", points, from_config.load_images(points), "sweep")
    with pytest.raises(WorkdirError, match=r'inputs.data: there "15'):
        sweep.run(configured(finished), tmp_path / "sweep")


def test_a_checkpoint_of_another_configuration_is_not_gone_on_from(finished, tmp_path):
    """As of a run whose folder was deleted, and taken by another, before it saved again."""
    shutil.copytree(finished / "float" / CHECKPOINT_FOLDER, tmp_path / "run" / CHECKPOINT_FOLDER)
    other = configured(finished, **{"optimizer.learning_rate": 0.01})
    with pytest.raises(CheckpointError, match=r"optimizer.learning_rate: there 0.1, now 0.01"):
        train.run(other, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    # Nor evaluated as that run's.
    run = shutil.copytree(finished / "float", tmp_path / "float")
    config = json.loads((run / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.01
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"optimizer.learning_rate: there 0.1, now 0.01"):
        finished_run.load(other, run)


def test_a_result_is_not_written_into_a_folder_that_is_anothers(finished, tmp_path):
    """Deleted and taken by another while the first evaluates."""
    workdir = shutil.copytree(finished / "float", tmp_path / "float")

    def prepare(*arguments):
        prepared = train.prepare(*arguments)

        def finish(end):
            shutil.rmtree(workdir)
            workdir.mkdir()
            (workdir / "run.lock").write_text("1 another\n")
            return prepared.finish(end)

        return prepared._replace(finish=finish)

    with pytest.raises(WorkdirError, match="now that of process 1"):
        job.run_alone(prepare, configured(finished), workdir)
    assert [path.name for path in workdir.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_sweep_whose_folder_was_deleted_runs_no_further_point(finished, tmp_path, side_by_side):
    config, workdir = configured(finished), tmp_path / "sweep"
    config.sweep.baselines, config.sweep.targets = ("float", "int8"), ()
    with lock_workdir(workdir):
        shutil.copytree(finished / "float", workdir / "points" / "float")
        points = sweep.sweep_points(config, workdir)
        found = sweep.run_points(points, workdir / "points", sweep.image_loader(), side_by_side)
        assert next(found)[0].name == "float"
        shutil.rmtree(workdir)
        with pytest.raises(WorkdirError, match="deleted"):
            next(found)
    assert not workdir.exists()


@pytest.mark.parametrize("job_name", ["train", "ptq", "palettize"])
def test_a_stage_goes_on_after_its_sweep_was_moved(finished, tmp_path, monkeypatch, job_name):
    config = configured(finished)
    config.sweep.baselines, config.sweep.targets = ("float",), ()
    config.sweep.stages = (("after", job_name, {}),)
    images = from_config.load_images(config)

    def stage_in(workdir):
        (point,) = (p for p in sweep.sweep_points(config, workdir) if p.follows)
        return claim_run(workdir / "points" / point.name, point.config, images, "train")

    base = tmp_path / "sweep/points/float" / CHECKPOINT_FOLDER
    save_checkpoint(base, 1, {"kernel": jnp.ones(3)}, {"seconds": 1.0})
    before = stage_in(tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    relative = (tmp_path / "sweep").relative_to(tmp_path)
    assert stage_in(relative) == before
    (tmp_path / "sweep").rename(tmp_path / "moved")
    assert stage_in(tmp_path / "moved") == before
    # The same weights saved again are the same; others are not.
    base = tmp_path / "moved/points/float" / CHECKPOINT_FOLDER
    save_checkpoint(base, 1, {"kernel": jnp.ones(3)}, {"seconds": 2.0})
    assert stage_in(tmp_path / "moved") == before
    save_checkpoint(base, 2, {"kernel": jnp.zeros(3)})
    with pytest.raises(WorkdirError, match=r"inputs.checkpoint: there"):
        stage_in(tmp_path / "moved")


def test_a_policy_file_is_known_by_its_content(finished, tmp_path):
    images = from_config.load_images(configured(finished))
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    for path in (one, other):
        path.write_text(json.dumps({"stem/kernel": {"lhs": "int4", "rhs": "int4"}}))
    for path in (one, other):
        own = configured(finished, policy=str(path))
        claim_run(tmp_path / "run", own, images, "train")
    other.write_text("{}")
    with pytest.raises(WorkdirError, match=r"inputs.policy: there"):
        claim_run(tmp_path / "run", own, images, "train")
