"""Bad input ends every job with exit code 1 and a message that says what to do, not a traceback."""

import json

import jax
import pytest

from aqt_search.training.workdir import WorkdirError, lock_workdir
from configs import digits_resnet8
from experiments import from_config, sweep
from experiments.command_line import named_errors, start
from experiments.job import claim_run
from experiments.jobs import ptq, search, sensitivity, train
from experiments.option_values import judged_batches

JOBS = {"train": train, "search": search, "sweep": sweep}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def images(data_dir):
    return from_config.load_images(configured(data_dir))


def configured(data_dir, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict(
        {"data.data_dir": str(data_dir), "model.width": 0.25, "epochs": 0.2, "log_every": 1}
        | {"optimizer.warmup_epochs": 0.0, "evaluation.calibration_batches": 1}
        | changes
    )
    return config


def complaint(capsys, job, config, workdir, images=None):
    """Standard error of a job that must end with exit code 1, as from the command line."""
    arguments = () if images is None else (images,)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended, named_errors():
        start(
            lambda config, folder: JOBS[job].run(config, folder, *arguments), config, str(workdir)
        )
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


INT = ("int4", "int8")
GRADIENT = {"search.searcher": "policy_gradient"}
CRITIC = {"search.searcher": "critic"}


@pytest.mark.parametrize(
    "job, changes, words",
    [
        # formats, rules and spaces
        ("train", {"formats": ((".*", "int99"),)}, ["FormatError", "'int99'", "int2..int8"]),
        ("train", {"formats": (("tail", "int4"),)}, ["RuleError", "'tail'", "Nearest names"]),
        ("train", {"formats": (("(", "int4"),)}, ["RuleError", "'('", "regular expression"]),
        ("search", {"search.space": ((".*", ("int4", "int99")),)}, ["FormatError", "'int99'"]),
        ("search", {"search.space": (("tail", INT),)}, ["RuleError", "'tail'", "Nearest names"]),
        ("search", {"search.space": ((".*", "int4"),)}, ["SpaceError", "nothing to choose"]),
        ("search", {"search.space": ((".*", ("int4",)),)}, ["SpaceError", "'int4'", "two"]),
        ("search", {"search.space": (".*", INT)}, ["RuleError", "'.*'", "pair"]),
        ("search", {"search.space": ((".*", *INT),)}, ["RuleError", "'int4', 'int8'", "pair"]),
        ("train", {"formats": (".*", "int4")}, ["RuleError", "'.*'", "pair"]),
        ("search", {"search.decide": "layer"}, ["config.search", "'layer'", "site, block, rule"]),
        ("search", {"search.relative_to": "int99"}, ["FormatError", "'int99'"]),
        ("search", {"search.target": 50.0}, ["SpaceError", "outside", "between"]),
        # from int3 to int8 where int8 is not fixed: little more than (3 / 4)^2 and less than 2^2
        (
            "search",
            {"search.target": 0.0},
            ["config.search.target:", "target 0 times uniform int4", "between 0.6", " and 3."],
        ),
        (
            "search",
            {"search.target": 3.0, "search.relative_to": ""},
            ["config.search.target:", "target 3 is", "between 0.0"],
        ),
        (
            "search",
            {"search.held_out_batch_size": 200, "search.searcher": "critic"},
            ["search.held_out_batch_size is 200", "144 held-out images"],
        ),
        # the search's controls
        ("search", {"search.reward": "sharp"}, ["config.search", "'sharp'", "absolute"]),
        ("search", {"search.quality": "test"}, ["config.search", "'test'", "held_out"]),
        ("search", {"search.entropy_schedule": "sine"}, ["config.search", "'sine'", "cosine"]),
        ("search", {"search.log_probability": "max"}, ["config.search", "'max'", "sum"]),
        ("search", {"search.beta": -1.0}, ["config.search", "-1.0", "at least 0"]),
        ("search", GRADIENT | {"search.learning_rate": -0.1}, ["config.search", "-0.1"]),
        ("search", {"search.delay": 1.5}, ["config.search", "1.5", "at least 0 and below 1"]),
        ("search", {"search.delay": 0.99}, ["config.search", "0.99", "train longer"]),
        ("search", {"search.measure": "f1"}, ["config.search", "'f1'", "accuracy"]),
        ("search", CRITIC | {"search.samples": 1}, ["config.search", "samples is 1", "at least 2"]),
        ("search", {"search.searcher": "grid"}, ["config.search", "'grid'", "policy_gradient"]),
        ("search", {"search.advantage": "raw"}, ["config.search", "'raw'", "centred"]),
        ("search", {"search.penalty": "none"}, ["config.search", "'none'", "annealed"]),
        ("search", CRITIC | {"search.temperature": 2.0}, ["'critic'", "leave temperature", "2.0"]),
        ("search", CRITIC | {"search.reward": "hard"}, ["'critic'", "'hard'", "one_sided"]),
        ("search", CRITIC | {"search.quality": "train"}, ["samples is 2", "'held_out'"]),
        (
            "search",
            GRADIENT | {"search.cost_samples": 0},
            ["'annealed'", "cost_samples", "'sampled'"],
        ),
        ("search", GRADIENT | {"search.samples": 1}, ["samples is 1", "'baseline'"]),
        ("search", GRADIENT | {"search.reward": "soft"}, ["'soft'", "measure to 'accuracy'"]),
        ("search", {"search.cost": "watts"}, ["'watts'", "gbops", "latency_ms/h100"]),
        ("search", {"search.further_costs": ("gbops", 1.0)}, ["'gbops'", "relative_to"]),
        (
            "search",
            {"search.further_costs": (("gbops", 1.0, "int4"),)},
            ["two targets for one cost"],
        ),
        (
            "search",
            {"search.further_costs": (("weight_bytes", 50.0, "int4"),)},
            [
                "SpaceError",
                "config.search.further_costs",
                "weight_bytes target 50",
                "outside",
                "between",
            ],
        ),
        ("search", {"search.score_images": 0}, ["search.score_images is 0", "above 0"]),
        ("search", {"search.held_out_batch_size": 33}, ["held_out_batch_size 33", "multiple"]),
        # the model, the optimizer and the numbers of a run
        ("train", {"model.name": "vgg"}, ["ConfigError", "'vgg'", "mobilenet_v2"]),
        ("train", {"model.name": "resnet9"}, ["config.model", "'resnet9'", "resnet8"]),
        ("train", {"model.form": "mnist"}, ["config.model", "'mnist'", "cifar, imagenet"]),
        ("train", {"model.width": 0.0}, ["config.model", "width is 0.0", "above 0"]),
        ("train", {"model.dtype": "float31"}, ["config.model", "float31"]),
        ("train", {"optimizer.name": "sdg"}, ["config.optimizer", "'sdg'", "sgd, adamw"]),
        ("train", {"optimizer.schedule": "sine"}, ["config.optimizer", "'sine'", "cosine"]),
        ("train", {"optimizer.learning_rate": -0.1}, ["config.optimizer", "-0.1", "at least 0"]),
        ("train", {"optimizer.warmup_epochs": 9.0}, ["config.optimizer", "warmup", "fewer"]),
        ("train", {"label_smoothing": 1.0}, ["label_smoothing is 1.0", "below 1"]),
        # scales of rows, which no calibration can keep
        *(
            (
                "train",
                {"quantizers.activation": kept, "quantizers.activation_granularity": "token"},
                ["config.quantizers", "PER_TOKEN", "with state", "PER_TENSOR", "'tensor'"],
            )
            for kept in ("moving_average(0.9)", "lsq", "pact(6.0)", "batch_quant")
        ),
        ("train", {"batch_size": 63}, ["batch_size 63", "2 devices", "multiple"]),
        ("train", {"batch_size": 0}, ["batch_size is 0", "above 0"]),
        ("train", {"batch_size": 4096}, ["DataError", "4096", "1293 images"]),
        ("train", {"epochs": float("inf")}, ["epochs is inf", "finite"]),
        ("train", {"epochs": 0.0}, ["epochs is 0.0", "above 0"]),
        ("train", {"log_every": 0}, ["log_every is 0", "above 0"]),
        ("train", {"checkpoint_every": 0}, ["checkpoint_every is 0", "above 0"]),
        ("train", {"evaluation.batch_size": 0}, ["evaluation.batch_size is 0", "above 0"]),
        ("train", {"policy": "/nowhere/policy.json"}, ["/nowhere/policy.json", "No such file"]),
        (
            "train",
            {"policy": "policy.json", "formats": ((".*", "int4"),)},
            ["formats or a policy file, not both"],
        ),
    ],
)
def test_a_bad_value(capsys, tmp_path, data_dir, images, job, changes, words):
    workdir = tmp_path / "run"
    err = complaint(capsys, job, configured(data_dir, **changes), workdir, images)
    assert all(word in err for word in words), err
    assert not (workdir / "config.json").exists()  # the mended command may use the same folder


@pytest.mark.parametrize("job", ["train", "search", "sweep"])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data.name": "digitz"}, ["DataError", "'digitz'", "digits", "folder:PATH"]),
        ({"data.name": "folder:{tmp}/empty"}, ["DataError", "empty folder", "train/<class>"]),
        ({"data.name": "folder:{tmp}/missing"}, ["DataError", "/missing", "no such folder"]),
        ({"data.held_out": 5000}, ["DataError", "5000", "1437"]),
    ],
)
def test_bad_data(capsys, tmp_path, data_dir, job, changes, words):
    (tmp_path / "empty").mkdir()
    changes = {
        key: value.format(tmp=tmp_path) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    err = complaint(capsys, job, configured(data_dir, **changes), tmp_path / "run")
    assert all(word in err for word in words), err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ({"a/kernel": {"lhs": "int4", "rhs": "int4"}}, ["a/kernel", "not of this model"]),
        ({}, ["not of this model", "head/kernel"]),
        ([], ["no JSON object"]),
        ({"head/kernel": "int4"}, ["'head/kernel'", "'int4'", "format name"]),
        ({"head/kernel": {"left": "int4"}}, ["'head/kernel'", "left", '"lhs"']),
        (
            {"head/kernel": {"lhs": "int99", "rhs": None}},
            ["ConfigError", "'head/kernel'", "lhs", "'int99'"],
        ),
        ("{", ["not valid JSON"]),
    ],
)
def test_a_bad_policy_file(capsys, tmp_path, data_dir, images, content, words):
    path = tmp_path / "policy.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = configured(data_dir, policy=str(path))
    err = complaint(capsys, "train", config, tmp_path / "run", images)
    assert all(word in err for word in words), err


@pytest.mark.parametrize("job", ["train", "search", "sweep"])
def test_a_workdir_in_use(capsys, tmp_path, data_dir, job):
    with lock_workdir(tmp_path):
        err = complaint(capsys, job, configured(data_dir), tmp_path)
    assert all(word in err for word in ("WorkdirError", "in use by process", "--workdir"))


def test_a_workdir_that_is_a_file(capsys, tmp_path, data_dir):
    (tmp_path / "file").write_text("")
    err = complaint(capsys, "train", configured(data_dir), tmp_path / "file")
    assert all(word in err for word in ("WorkdirError", "not a folder", "--workdir"))


def test_a_diverged_run_and_a_workdir_of_another_configuration(capsys, tmp_path, data_dir, images):
    config = configured(data_dir, **{"optimizer.learning_rate": 1e30})
    err = complaint(capsys, "train", config, tmp_path, images)
    assert all(word in err for word in ("DivergedError", "at step", "learning rate", "--workdir"))
    assert not (tmp_path / "result.json").exists()

    err = complaint(capsys, "train", configured(data_dir, seed=3), tmp_path, images)
    for words in (
        "WorkdirError", "another configuration", "seed: there 0, now 3",
        "optimizer.learning_rate: there 1e+30, now 0.1", "--workdir",
    ):  # fmt: skip
        assert words in err


def test_a_point_goes_on_after_a_stage_was_added_to_its_sweep(tmp_path, data_dir, images):
    claim_run(tmp_path, configured(data_dir), images, "train")
    more = {"sweep.stages": (("w4a8", "ptq", {}),)}
    claim_run(tmp_path, configured(data_dir, **more), images, "train")
    with pytest.raises(WorkdirError, match="seed: there 0, now 3"):
        claim_run(tmp_path, configured(data_dir, seed=3), images, "train")


def test_a_folder_of_another_job_says_of_which(capsys, tmp_path, data_dir, images):
    claim_run(tmp_path, configured(data_dir), images, "train")
    err = complaint(capsys, "search", configured(data_dir), tmp_path, images)
    for words in ("experiments.train, and this is experiments.search", "own command", "python -m"):
        assert words in err
    # Folders of earlier versions do not say so.
    path = tmp_path / "config.json"
    claimed = json.loads(path.read_text())
    del claimed["job"]
    path.write_text(json.dumps(claimed))
    claim_run(tmp_path, configured(data_dir), images, "train")


@pytest.mark.parametrize(
    "key, batches, there",
    [
        ("ptq.images", lambda c, i: ptq.calibration_batches(c, i), 1293),
        ("search.score_images", lambda c, i: judged_batches(c, i), 1293),
        ("sensitivity.images", lambda c, i: list(sensitivity.image_batches(c, i)), 144),
        (
            "evaluation.train_images",
            lambda c, i: list(from_config.evaluation_batches(c, i, "train")),
            1293,
        ),
    ],
)
def test_more_images_than_there_are_are_all_of_them_and_it_says_so(
    caplog, data_dir, images, key, batches, there
):
    def count(wanted):
        caplog.clear()
        found = batches(configured(data_dir, **{key: wanted}), images)
        if key == "evaluation.train_images":  # the last batch is filled up
            return int(sum(batch["mask"].sum() for batch in found))
        return sum(len(batch if key == "ptq.images" else batch["image"]) for batch in found)

    found = count(10**6)
    assert there - 21 <= found <= there  # in equal batches, of which there are 21 at most
    assert f"{key} is 1000000, but there are {there} " in caplog.text
    # Whole batches once left out 49 of 99 images.
    assert 98 <= count(99) <= 250
    assert not caplog.text


def test_a_defect_is_not_dressed_up_as_bad_input():
    with pytest.raises(ZeroDivisionError), named_errors():
        raise ZeroDivisionError


def test_the_table_is_for_two_devices():
    assert jax.local_device_count() == 2
