"""Jobs that search formats and architecture together, on scikit-learn's digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aqt_search as aqs
from aqt_search import search as searches
from aqt_search.architecture.decisions import KINDS
from aqt_search.architecture.named_spaces import NAMED_SPACES, architecture
from aqt_search.models import build
from aqt_search.search.space import make_space
from aqt_search.training.metrics import read_metrics
from aqt_search.training.workdir import read_json
from configs import digits_mobilenet_v2
from experiments import finished_run, from_config, schema
from experiments.architecture import configured_net, parsed_architecture
from experiments.frozen_run import frozen_run
from experiments.jobs import palettize, ptq, search, supernet, train
from experiments.jobs.scored_search import sorted_state


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = digits_mobilenet_v2.get_config("quick")
    config.update_from_flattened_dict({
        "data.data_dir": str(tmp_path_factory.mktemp("data")), "model.windows": (5,),
        "model.depths": (1, 1, 2, 1), "epochs": 1.0, "optimizer.warmup_epochs": 0.0,
        "evaluation.calibration_batches": 2, "log_every": 4, "search.target": 0.4,
        "search.architecture": "small_mobilenet_v2", "search.searcher": "critic",
        # Fine enough for points within 2 % of the target, whatever the architecture is.
        "search.space": (("stem|head", "int8"), (".*", {"weight": ("int3", "int4", "int6", "int8"),
                                                        "activation": ("int4", "int6", "int8")})),
    })  # fmt: skip
    return config


@pytest.fixture(scope="module")
def images(config):
    return from_config.load_images(config)


@pytest.fixture(scope="module")
def finished(config, images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("fliqnas") / "run"
    return workdir, search.run(config, workdir, images)


def test_a_search_ends_with_a_plain_model_on_its_target(finished, config, images):
    workdir, result = finished
    policy = read_json(workdir / "policy.json")
    parts = from_config.build_parts(config, images)
    whole = aqs.assign(parts.sites, [(".*", "int4")])
    whole |= aqs.assign({n: s for n, s in parts.sites.items() if "stem" in n or "head" in n},
                        [(".*", "int8")])  # fmt: skip
    target = 0.4 * aqs.cost.gbops(parts.sites, whole)
    assert abs(result["gbops"] / target - 1) <= 0.02
    assert result["costs"]["gbops"] == pytest.approx(result["gbops"])
    blocks = policy["architecture"]["blocks"]
    assert len(blocks) < 5 or any(block[0] == 3 for block in blocks)
    assert set(policy["formats"]) == set(read_json(workdir / "sites.json"))


def test_its_weights_are_those_of_the_subnet(finished, config, images):
    """Cut out of the checkpoint, they give the accuracy that the search told."""
    workdir, result = finished
    run = finished_run.load(config, workdir, images)
    blocks = read_json(workdir / "policy.json")["architecture"]["blocks"]
    assert [list(block) for block in run.parts.model.blocks] == blocks
    shapes = jax.eval_shape(run.parts.model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert jax.tree.map(jnp.shape, dict(run.variables)) == jax.tree.map(jnp.shape, dict(shapes))
    assert np.isclose(
        aqs.cost.gbops(
            run.parts.sites, aqs.from_json(read_json(workdir / "policy.json")["formats"])
        ),
        result["gbops"],
    )


def test_it_is_served_as_it_was_judged(finished, config, images):
    workdir, result = finished
    apply, frozen = frozen_run(config, workdir, images)
    right = [
        (np.argmax(aqs.serve(apply)(frozen, b["image"]), -1) == b["label"])[b["mask"] > 0]
        for b in from_config.evaluation_batches(config, images, "test")
    ]
    # One image that a rounding decides may differ.
    assert abs(np.concatenate(right).mean() - result["accuracy"]) <= 1.5 / len(images.splits.test)


def test_its_policy_is_trained_and_its_weights_are_quantized(finished, config, images, tmp_path):
    workdir, result = finished
    again = config.copy_and_resolve_references()
    again.policy = str(workdir / "policy.json")
    trained = train.run(again, tmp_path / "retrained", images)
    assert trained["kind"] == "retrained"
    assert trained["gbops"] == pytest.approx(result["gbops"])
    after = config.copy_and_resolve_references()
    after.formats, after.ptq.images, after.ptq.batch_size = ((".*", "int8"),), 100, 100
    architecture = read_json(workdir / "policy.json")["architecture"]
    for folder in (workdir, tmp_path / "retrained"):
        after.checkpoint, quantized = str(folder), tmp_path / f"{folder.name}_ptq"
        assert ptq.run(after, quantized, images)["kind"] == "ptq"
        for each in (folder, quantized):
            assert read_json(each / "policy.json")["architecture"] == architecture


@pytest.mark.parametrize("epochs", [0.0, 0.1])
def test_its_weights_are_stored_with_palettes(finished, config, images, tmp_path, epochs):
    workdir, result = finished
    own = config.copy_and_resolve_references()
    own.checkpoint, own.palette.epochs = str(workdir), epochs
    own.palette.rules = (("^stem/", 2), (".*", None))
    stored = palettize.run(own, tmp_path / "run", images)
    architecture = read_json(workdir / "policy.json")["architecture"]
    assert read_json(tmp_path / "run" / "policy.json")["architecture"] == architecture
    sites = set(read_json(workdir / "sites.json"))
    assert set(read_json(tmp_path / "run" / "palette.json")["weights"]) == {"stem/kernel"} <= sites
    assert stored["weight_bytes"] > result["weight_bytes"]  # float beside it


def test_weights_of_another_architecture_are_refused(finished, config, images, tmp_path):
    workdir, _ = finished
    own = config.copy_and_resolve_references()
    own.checkpoint, own.formats = str(workdir), ((".*", "int8"),)
    with pytest.raises(from_config.ConfigError, match=r"of another architecture.*policy.json"):
        train.run(own, tmp_path / "a", images)
    own.formats = ()
    with pytest.raises(from_config.ConfigError, match=r"is of a subnet.*whole network"):
        supernet.run(own, tmp_path / "b", images)


def test_it_is_decided_once(config, images, tmp_path):
    """The whole network, then one point to the end, by the same program."""
    own = config.copy_and_resolve_references()
    own.search.searcher, own.log_every = "scores", 1
    result = search.run(own, tmp_path / "run", images)
    assert 0.9 * result["target_gbops"] <= result["gbops"] <= result["target_gbops"]
    costs = np.array([record["cost"] for record in read_metrics(tmp_path / "run")])
    steps = len(costs)
    before, after = costs[: steps // 4], costs[steps // 4 :]
    assert np.ptp(after) == 0
    np.testing.assert_allclose(after[0], result["gbops"], rtol=1e-5)
    assert np.ptp(before) == 0
    assert before[0] > after[0]
    policy = read_json(tmp_path / "run" / "policy.json")
    assert set(policy["formats"]) == set(read_json(tmp_path / "run" / "sites.json"))


def test_it_decides_on_sorted_channels(config, images):
    """The same function; what the optimizer remembers of a weight goes where the weight goes."""
    parts = from_config.build_parts(config, images, axis_name=None)
    net = configured_net(config, parts.model, images.splits.image_shape)
    train = from_config.initial_state(config, parts, {})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape) / 10, train.params)
    _, *others = optax.tree.get(train.opt_state, "trace")
    moments = optax.tree.set(train.opt_state, trace=(params, *others))
    found = sorted_state(net, train._replace(params=params, opt_state=moments))
    moved, *_ = optax.tree.get(found.opt_state, "trace")
    jax.tree.map(np.testing.assert_array_equal, moved, found.params)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, found.params)
    assert any(jax.tree.leaves(changed))
    image = jnp.ones((1, *images.splits.image_shape))
    whole = {"params": params, "batch_stats": train.batch_stats}
    before, after = (parts.model.apply(v, image, train=False) for v in (whole, found.variables))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


# --- Spaces ---------------------------------------------------------------------------------------


def of_zoo(name, size, **options):
    model = build(name, 10, **options)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return model, variables, image


WHOLE = {
    "fliqnas_mobilenet_v2": ("mobilenet_v2", 224, {"windows": 7, "width": 2.0}),
    "tunas_mobilenet_v2": ("mobilenet_v2", 224, {"windows": 7}),
    "ofa_mobilenet_v3": ("mobilenet_v3_ofa", 224, {"width": 1.2}),
    "small_mobilenet_v2": ("mobilenet_v2", 16, {"form": "tiny", "windows": 5}),
    "small_mobilenet_v2_own_windows": ("mobilenet_v2", 16, {"form": "tiny"}),
    "small_mobilenet_v3": ("mobilenet_v3_tiny", 16, {"form": "tiny"}),
}


@pytest.mark.parametrize("name", NAMED_SPACES)
def test_named_spaces_are_of_their_networks(name):
    network, size, options = WHOLE[name]
    model, variables, image = of_zoo(network, size, **options)
    net = aqs.elastic(model.apply, variables, image, **architecture(name, model))
    space = make_space(net.sites, [(".*", "int8")], net=net)
    low, high = space.cost_table(aqs.cost.gbops).range
    whole = aqs.cost.gbops(net.sites, aqs.assign(net.sites, [(".*", "int8")]))
    assert high == pytest.approx(whole)
    assert low < 0.6 * high


def test_once_for_all_has_its_published_number_of_subnets():
    """(9^2 + 9^3 + 9^4)^5 = 2.18e19 without resolutions: windows and expansions by depth."""
    model, variables, image = of_zoo("mobilenet_v3_ofa", 224)
    net = aqs.elastic(model.apply, variables, image, **architecture("ofa_mobilenet_v3", model))
    by_kind = {kind: [d for d in net.decisions if d.kind == kind]
               for kind in ("width", "window", "depth")}  # fmt: skip
    assert [len(by_kind[kind]) for kind in by_kind] == [20, 20, 5]
    assert all(len(d.options) == 3 for d in net.decisions)
    of_block = {b: 9 for d in by_kind["depth"] for b in d.about}
    subnets = 1
    for decision in by_kind["depth"]:
        subnets *= sum(int(np.prod([of_block[b] for b in decision.about[:depth]]))
                       for depth in decision.options)  # fmt: skip
    assert subnets == (9**2 + 9**3 + 9**4) ** 5
    assert f"{subnets:.5g}" == "2.1759e+19"


@pytest.mark.parametrize("kinds", [("width", "expansion"), KINDS], ids=["widths", "all"])
def test_the_largest_network_comes_first(kinds):
    model, variables, image = of_zoo("mobilenet_v2", 16, form="tiny", windows=5)
    net = aqs.elastic(model.apply, variables, image, **architecture("small_mobilenet_v2", model))
    space = make_space(net.sites, [(".*", ("int4", "int8"))], net=net)
    costs = {"gbops": space.cost_table(aqs.cost.gbops)}
    plain = searches.uniform(space, costs, total_steps=100)
    warmed = searches.warmed_up(plain, space, 50, kinds)
    state = warmed.init({"gbops": costs["gbops"].range[1]})
    count = len(net.decisions)
    warm = np.array([d.kind in kinds for d in net.decisions])
    sample = jax.jit(lambda step, key: warmed.sample(state._replace(step=step), key)[0])
    keys = jax.random.split(jax.random.key(0), 200)
    for step, share in ((0, 1.0), (25, 0.5), (50, 0.0), (90, 0.0)):
        points = np.array([sample(jnp.int32(step), key) for key in keys])
        whole = np.all(points[:, :count][:, warm] == net.largest[warm], axis=1).mean()
        # Five standard deviations of a mean of 200, and the chance that a sample is the largest.
        assert abs(whole - share) <= 5 * np.sqrt(0.25 / 200) * (0 < share < 1) + 1e-3
        rest = np.concatenate([points[:, :count][:, ~warm], points[:, count:]], axis=1)
        assert len(np.unique(rest, axis=0)) > 20
    with pytest.raises(ValueError, match=r"kinds to warm up.*windows"):
        searches.warmed_up(plain, space, 50, ("windows",))


# --- Bad input ------------------------------------------------------------------------------------

BAD = {
    "windows of the published net": ({"model.windows": ()}, "3 x 3.*config.model"),
    "another network": ({"model.name": "resnet8", "model.form": "cifar", "model.windows": (),
                         "model.depths": ()},
                        "'resnet8'.*MobileNetV2 or MobileNetV3"),
    "a space of another network": ({"search.architecture": "small_mobilenet_v3"},
                                   "MobileNetV2 has no squeeze"),
    "rules of no group": ({"search.architecture": "", "search.architecture_rules": (
        ("width", "blok", (8, 16)),)}, "'blok' matches none"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_an_architecture_that_the_model_has_not(config, images, tmp_path, changes, message):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    with pytest.raises(from_config.ConfigError, match=message):
        search.run(other, tmp_path / "run", images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"search.searcher": "scores", "search.further_costs": (("weight_bytes", 1.0, "int4"),)},
      "under one cost"),
     ({"search.architecture": "mobilenet_v9"}, "small_mobilenet_v2"),
     ({"search.architecture_rules": (("width", "^last/", (64, 128)),)}, "expected one of them"),
     ({"search.architecture": "", "search.architecture_rules": (("wide", "a", 1),)}, "no rule"),
     ({"search.architecture": "", "search.architecture_rules": (("width", "a", 3),)}, "'width'"),
     ({"model.windows": (3, 3)}, "windows.*5 blocks"), ({"model.windows": (4,)}, "odd"),
     ({"model.depths": (1, 2)}, "4 stages")],
)  # fmt: skip
def test_settings_that_cannot_be(config, changes, message):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    with pytest.raises(from_config.ConfigError, match=message):
        schema.check(other)


def test_rules_of_a_configuration_are_arguments_of_elastic(config, images):
    rules = (
        ("width", "^block3/project/", (8, 16)), ("expansion", "^block4/expand/", "^block3/project/",
        (1, 6)), ("window", "^block2/depthwise/", (3, 5)), ("depth", ("block4",), (0, 1)),
    )  # fmt: skip
    other = config.copy_and_resolve_references()
    other.search.architecture, other.search.architecture_rules = "", rules
    parts = from_config.build_parts(other, images)
    net = configured_net(other, parts.model, images.splits.image_shape)
    assert [d.options for d in net.decisions] == [(8, 16), (1, 6), (3, 5), (0, 1)]
    assert parsed_architecture(rules)["depths"] == [(("block4",), (0, 1))]
