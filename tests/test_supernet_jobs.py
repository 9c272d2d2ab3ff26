"""experiments.supernet and experiments.subnets on scikit-learn's digits."""

import shutil

import jax
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.numerics import learned_scales
from aqt_search.search.options import SpaceError
from aqt_search.search.searchers.predictor import fit_predictor
from aqt_search.training.metrics import read_metrics
from aqt_search.training.workdir import lock_workdir, read_json
from configs import digits_mobilenet_v2
from experiments import finished_run, from_config, schema
from experiments.frozen_run import frozen_run
from experiments.jobs import ptq, subnets, supernet, train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = digits_mobilenet_v2.get_config("quick")
    rules = (("width", "^block3/expand/", (16, 48)), ("window", "^block2/depthwise/", (1, 3)),
             ("depth", ("block4",), (0, 1)))  # fmt: skip
    config.update_from_flattened_dict({
        "data.data_dir": str(tmp_path_factory.mktemp("data")), "model.depths": (1, 1, 2, 1),
        "model.width": 0.25, "epochs": 1.0, "optimizer.warmup_epochs": 0.0, "log_every": 1,
        "evaluation.calibration_batches": 2, "search.architecture_rules": rules,
        "quantizers.weight": "lsq", "quantizers.activation": "batch_quant",  # as QFA has them
        "search.searcher": "critic", "supernet.subnets": 1, "subnets.samples": 20,
        "supernet.phases": ((0.5, ("window",)),), "subnets.images": 100, "subnets.points": 1,
        "subnets.evaluations": 200,
        "search.space": (("stem|head", "int8"), (".*", ("int4", "int8"))),
    })  # fmt: skip
    return config


@pytest.fixture(scope="module")
def images(config):
    return from_config.load_images(config)


@pytest.fixture(scope="module")
def trained(config, images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("supernet") / "run"
    return workdir, supernet.run(config, workdir, images)


@pytest.fixture(scope="module")
def found(config, images, trained, tmp_path_factory):
    workdir, own = tmp_path_factory.mktemp("subnets") / "run", config.copy_and_resolve_references()
    own.subnets.checkpoint = str(trained[0])
    return workdir, own, subnets.run(own, workdir, images)


def test_a_supernet_trains_its_ends_and_random_subnets(trained):
    workdir, result = trained
    records = read_metrics(workdir)
    assert {"loss", "loss/smallest", "loss/random1", "gradient_norm"} <= set(records[-1])
    assert all(np.isfinite(list(record.values())).all() for record in records)
    assert result["kind"] == "supernet"
    assert len(read_json(workdir / "space.json")) > 10


def test_it_goes_on_from_the_largest_network_sorted(config, images, tmp_path):
    own = config.copy_and_resolve_references()
    own.epochs, own.optimizer.learning_rate = 0.25, 0.5  # so that no channel is like another
    train.run(own, tmp_path / "whole", images)
    there = finished_run.load(own, tmp_path / "whole", images).variables
    own.checkpoint = str(tmp_path / "whole")
    parts = from_config.build_parts(own, images)
    net = supernet.supernet_space(own, parts).net
    (tmp_path / "net").mkdir()
    with lock_workdir(tmp_path / "net"):
        params = supernet.prepare(own, tmp_path / "net", images).run.state.train.params
    images = np.random.default_rng(0).normal(size=(4, *parts.images.splits.image_shape))
    sorted_too = {"params": params, "batch_stats": net.sort(dict(there))["batch_stats"]}
    logits = parts.model.apply(sorted_too, images.astype(np.float32), train=False)
    plain = {name: there[name] for name in ("params", "batch_stats")}
    expected = parts.model.apply(plain, images.astype(np.float32), train=False)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    kernels = [tree["block3"]["expand"]["kernel"] for tree in (params, there["params"])]
    assert not np.array_equal(*kernels)


def test_phases_set_kinds_of_decisions_free(config, images):
    parts = from_config.build_parts(config, images)
    space = supernet.supernet_space(config, parts)
    phases = supernet.allowed_by_step(config, space, 16)
    assert list(phases) == [0, 8]
    names = [decision.name for decision in space.decisions]
    window = names.index("block2/depthwise/kernel:window")
    assert phases[0].sum(1).tolist() == [2 if n == window else 1 for n in range(len(names))]
    np.testing.assert_array_equal(phases[8], space.mask)


def test_subnets_are_plain_models_and_other_targets_need_no_more_images(found, images, monkeypatch):
    workdir, config, told = found
    (name,) = told["subnets"]
    point = workdir / "points" / name
    policy = read_json(point / "policy.json")
    assert set(policy["formats"]) == set(read_json(point / "sites.json"))
    assert (workdir / "report.html").exists()
    assert len(read_json(workdir / "samples.json")["accuracies"]) == 20

    def judged_again(setting):
        def judge(choices):
            raise AssertionError("subnets were judged that are known")

        return judge

    monkeypatch.setattr(subnets, "judged_by", judged_again)
    again = config.copy_and_resolve_references()
    again.subnets.target = 0.9
    answer = subnets.run(again, workdir, images)["subnets"]
    parts = from_config.build_parts(config, images)
    ends = {n: s for n, s in parts.sites.items() if "stem" in n or "head" in n}
    formats = aqs.assign(parts.sites, [(".*", "int4")]) | aqs.assign(ends, [(".*", "int8")])
    assert answer["target_0.9"]["gbops"] <= 0.9 * aqs.cost.gbops(parts.sites, formats) * 1.02
    again.subnets.target = 0.001
    with pytest.raises(SpaceError, match=r"config\.subnets\.target.*0\.001 times uniform int4"):
        subnets.run(again, workdir, images)
    # Another device: a latency, which no bits below 8 change here.
    again.search.cost, again.search.relative_to, again.subnets.target = (
        "latency_ms/edge_int8",
        "int8",
        0.9,
    )
    answer = subnets.run(again, workdir, images)["subnets"]["latency_ms_edge_int8_target_0.9"]
    whole = aqs.assign(parts.sites, [(".*", "int8")])
    limit = 0.9 * aqs.roofline.latency_ms(parts.sites, whole, "edge_int8")
    assert 0.5 * limit < answer["costs"]["latency_ms/edge_int8"] <= 1.02 * limit
    kept = read_json(workdir / "subnets.json")["subnets"]
    assert {name, "target_0.9", "latency_ms_edge_int8_target_0.9"} <= set(kept)


def served_accuracy(config, folder, images):
    """Of the test images, by integer codes alone."""
    apply, frozen = frozen_run(config, folder, images)
    served = jax.jit(aqs.serve(apply))
    right = count = 0
    for batch in from_config.evaluation_batches(config, images, "test"):
        predictions = np.argmax(served(frozen, batch["image"]), -1)
        right += ((predictions == batch["label"]) * batch["mask"]).sum()
        count += batch["mask"].sum()
    return right / count


def test_a_subnet_is_frozen_without_the_supernet(found, trained, images, tmp_path):
    """What was told of it is what it does: at most one image that a rounding decides differs."""
    workdir, config, told = found
    (name,) = told["subnets"]
    alone = config.copy_and_resolve_references()
    alone.subnets.checkpoint = ""
    result = read_json(workdir / "points" / name / "result.json")
    copied = shutil.copytree(workdir / "points" / name, tmp_path / "copied")
    accuracy = served_accuracy(alone, copied, images)
    assert abs(accuracy - result["accuracy"]) <= 1.5 / len(images.splits.test)
    alone.checkpoint, alone.formats = str(copied), ((".*", "int8"),)
    alone.ptq.images, alone.ptq.batch_size = 100, 100
    assert ptq.run(alone, tmp_path / "ptq", images)["gbops"] > result["gbops"]


def test_the_largest_is_frozen(config, trained, images):
    workdir, result = trained
    accuracy = served_accuracy(config, workdir, images)
    assert abs(accuracy - result["accuracy"]) <= 1.5 / len(images.splits.test)


def test_subnets_that_were_stopped_end_in_the_same_answer(found, images, tmp_path, monkeypatch):
    """Behind the first subnets judged, and between the weights of a point and its result."""
    workdir, config, told = found

    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    original, judged = subnets.write_json, []

    def stop_behind_the_first(path, value):
        original(path, value)
        judged.append(len(value["accuracies"]))
        raise Stopped

    for module, name, stopped in (
        (subnets, "write_json", stop_behind_the_first), (subnets.results, "finish", stop)
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stopped)
            with pytest.raises(Stopped):
                subnets.run(config, tmp_path / "run", images)
    assert judged == [16]
    assert subnets.run(config, tmp_path / "run", images) == told
    samples = [read_json(folder / "samples.json") for folder in (tmp_path / "run", workdir)]
    assert samples[0] == samples[1]


def test_subnets_are_drawn_from_one_end_of_the_space_to_the_other(config, images):
    """Mean costs are those asked for: within five standard errors of 200 points."""
    space = supernet.supernet_space(config, from_config.build_parts(config, images))
    costs = space.cost_table(aqs.cost.gbops)
    points = subnets.drawn(space, 4000, seed=0)
    assert (points < space.mask.sum(1)).all()
    shares = (points[::2, :, None] == np.arange(space.max_options)).mean(0)
    uniform = space.mask / space.mask.sum(1, keepdims=True)
    assert np.abs(shares - uniform).max() < 5 * np.sqrt(0.25 / 2000)
    found = costs.of_many(points[1::2])
    for number, target in enumerate(np.geomspace(*costs.range, 10)):
        here = found[number::10]
        # At the ends the tilt is finite, and the mean only close.
        error = 5 * here.std() / np.sqrt(len(here)) + 0.02 * target
        assert abs(here.mean() - target) <= error
    for count in (5, 33):
        np.testing.assert_array_equal(subnets.drawn(space, count, seed=0), points[:count])
    assert not np.array_equal(subnets.drawn(space, 33, seed=1), points[:33])


def test_a_predictor_learns_an_additive_quality():
    """Of 8 decisions of 3 options, with noise of a tenth: ranks of points it never saw."""
    rng = np.random.default_rng(0)
    mask, values = np.ones((8, 3), bool), rng.normal(size=(8, 3))
    points = rng.integers(0, 3, (200, 8))
    qualities = values[np.arange(8), points].sum(1)
    qualities = qualities + 0.1 * qualities.std() * rng.normal(size=200)
    predictor = fit_predictor(points, qualities, mask, lambda c: np.ones((len(c), 8), bool), seed=0)
    assert predictor.rank_correlation > 0.8
    inactive = fit_predictor(points, qualities, mask, lambda c: np.arange(8)[None] < 7 + 0 * c, 0)
    other = points.copy()
    other[:, 7] = (other[:, 7] + 1) % 3
    np.testing.assert_array_equal(inactive.predict(points), inactive.predict(other))
    with pytest.raises(ValueError, match="at least 10 points; got 5"):
        fit_predictor(points[:5], qualities[:5], mask, lambda c: c >= 0, 0)


# --- Bad input ------------------------------------------------------------------------------------


def test_what_is_no_supernet_or_another_is_refused(config, images, trained, found, tmp_path):
    other = config.copy_and_resolve_references()
    with pytest.raises(from_config.ConfigError, match="is empty: give the workdir"):
        subnets.run(other, tmp_path / "a", images)
    other.subnets.checkpoint = str(found[0] / "points" / next(iter(found[2]["subnets"])))
    with pytest.raises(from_config.ConfigError, match=r"no finished run|no supernet"):
        subnets.run(other, tmp_path / "b", images)
    other.subnets.checkpoint = str(trained[0])
    rules = config.search.architecture_rules
    for changes, message in (
        ({"search.architecture_rules": rules[:2]}, r"architecture_rules is .*was trained with"),
        ({"search.architecture_rules": (), "search.architecture": "small_mobilenet_v2"},
         "search.architecture is 'small_mobilenet_v2'.*trained with ''"),
        ({"search.space": ((".*", ("int4", "int8")),)}, "search.space is .*was trained with"),
    ):  # fmt: skip
        another = other.copy_and_resolve_references()
        another.update_from_flattened_dict(changes)
        with pytest.raises(from_config.ConfigError, match=message):
            subnets.run(another, tmp_path / "space", images)
    other.model.width = 0.5
    with pytest.raises(from_config.ConfigError, match=r"model\.width"):
        subnets.run(other, tmp_path / "c", images)
    plain = config.copy_and_resolve_references()
    plain.search.architecture_rules = ()
    with pytest.raises(from_config.ConfigError, match="a supernet has subnets"):
        supernet.run(plain, tmp_path / "d", images)


@pytest.mark.parametrize(
    ("phases", "message"),
    [(((0.6, ("window",)), (0.4, ("depth",))), "sum below 1"), (((0.5, ("windows",)),), "window"),
     (((2.0, ("window",)),), "share"), ((0.5, ("window",)), "phases")],
)  # fmt: skip
def test_phases_that_cannot_be(config, phases, message):
    other = config.copy_and_resolve_references()
    other.supernet.phases = phases
    with pytest.raises(from_config.ConfigError, match=message):
        schema.check(other)


def test_learned_scales_are_loaded_in_a_new_process(config, images, trained):
    """Where no calibration has been made yet: not while the state's shape is traced."""
    aqs.lsq.cache_clear()
    learned_scales._known_formats.cache_clear()
    found = finished_run.load_supernet(config, trained[0], images)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.variables))
