"""Calibration states in training: learned scales in the step, over replicas, and afterwards."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aqt_search as aqs
from aqt_search.numerics.by_name import named_granularity
from aqt_search.numerics.learned_scales import batch_quant, lsq, merge_learned, split_learned
from aqt_search.numerics.quantizer import Quantizer
from aqt_search.search import critic
from aqt_search.training import parallel
from aqt_search.training.evaluation import static_evaluation
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.parallel import AXIS
from aqt_search.training.scales import synchronized, with_learned, with_scales
from aqt_search.training.search_step import ClassifierSearchState, make_search_step
from aqt_search.training.train_step import cross_entropy, init_train_state, make_update
from configs import digits_resnet8
from experiments import finished_run, from_config, results
from experiments.assignment import configured_assignment
from experiments.configured_search import configured_space, first_assignment
from experiments.from_config import ConfigError
from experiments.jobs import train

FEATURES, CLASSES, BATCH = 5, 3, 16
DEVICES = 2


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(6, use_bias=False, name="body")(x))
        return nn.Dense(CLASSES, name="head")(x)


def batch_of(seed):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(BATCH, FEATURES)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, CLASSES, BATCH).astype(np.int32)}


def assigned(weight, activation, fmt="int3"):
    formats = aqs.SiteFormats(Quantizer(fmt, calibration=activation),
                              Quantizer(fmt, calibration=weight))  # fmt: skip
    return {"body/kernel": formats, "head/kernel": formats}


class Setup:
    """A model under an assignment, with its compiled step."""

    def __init__(self, assignment, optimizer, axis_name=AXIS):
        model = Net()
        one = jnp.zeros((1, FEATURES))
        init = functools.partial(aqs.quantize_with_state(model.apply).init, assignment)
        self.state = init_train_state(
            model, optimizer, (FEATURES,), 0, init_scales=lambda variables: init(variables, one)
        )
        stateful = aqs.quantize_with_state(model.apply, axis_name=axis_name)
        self.assignment, self.qapply = assignment, with_scales(stateful)
        update = make_update(self.qapply, optimizer)
        self.step = jax.pmap(
            lambda state, batch: update(state, assignment, batch)[:2],
            axis_name=AXIS, devices=jax.devices()[:DEVICES],
        )  # fmt: skip

    def run(self, batches):
        state = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * DEVICES), self.state)
        for batch in batches:
            split = {k: v.reshape(DEVICES, -1, *v.shape[1:]) for k, v in batch.items()}
            state, _ = self.step(state, split)
        for leaf in jax.tree.leaves(state):
            np.testing.assert_array_equal(leaf[0], leaf[1])
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), state)


def leaves_of(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_the_first_step_sets_step_sizes_and_the_second_moves_them_undecayed():
    rate = 0.1
    setup = Setup(
        assigned(lsq(), lsq()), make_optimizer("sgd", rate, momentum=0.0, weight_decay=0.3)
    )
    first, second = batch_of(0), batch_of(1)
    one = setup.run([first])
    kernel = np.asarray(setup.state.params["body"]["kernel"], np.float64)
    found = one.scales["body/kernel"]["rhs"]["step"].value.reshape(-1)
    # LSQ, section 2.1: 2 E|w| / sqrt(3) per output channel, as int3 ends at 3.
    np.testing.assert_allclose(found, 2 * np.abs(kernel).mean(0) / np.sqrt(3), rtol=1e-6)
    found = one.scales["body/kernel"]["lhs"]["step"].value.item()
    expected = 2 * np.abs(first["image"].astype(np.float64)).mean() / np.sqrt(3)
    assert found == pytest.approx(expected, rel=1e-6)  # of the whole batch, on both devices

    two = setup.run([first, second])
    learned, rest = split_learned(one.scales)

    def loss(learned):
        variables = {"params": one.params, "scales": merge_learned(learned, rest)}
        logits, _ = jax.vmap(
            lambda image: setup.qapply(
                setup.assignment, variables, image, train=True, mutable=["scales"]
            ),
            axis_name=AXIS, out_axes=(0, None),
        )(second["image"][None])  # fmt: skip
        return cross_entropy(logits[0], second["label"], 0.0).mean()

    gradient = jax.jit(jax.grad(loss))(learned)
    moved = jax.tree.map(lambda s, g: s - rate * g, learned, gradient)
    for a, b in zip(leaves_of(split_learned(two.scales)[0]), leaves_of(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert max(np.abs(g).max() for g in leaves_of(gradient)) > 1e-4  # it is about something


def test_replicas_agree_on_what_either_of_them_has_set():
    """In a search each replica has its own format, and so sets the step size of another."""
    table = aqs.stack_formats(["int2", "int8"])
    calibration = lsq("int2", "int8")

    def step(state, index, x):
        fmt = jax.tree.map(lambda column: jnp.asarray(column)[index], table)
        q = Quantizer(fmt, calibration=calibration)
        _, new = aqs.fake_quant_with_state(x, q, state)
        return synchronized({"w": {"rhs": state}}, {"w": {"rhs": new}})["w"]["rhs"]

    x = batch_of(2)["image"]
    state = aqs.init_state(Quantizer("int2", calibration=calibration), x.shape)
    held = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), state)
    found = jax.pmap(step, axis_name=AXIS)(held, jnp.arange(2), jnp.stack([x, x]))
    mean = np.abs(x.astype(np.float64)).mean()
    for replica in np.asarray(found["step"].value):
        np.testing.assert_allclose(
            replica.reshape(-1), [2 * mean, 2 * mean / np.sqrt(127)], rtol=1e-6
        )


def test_evaluation_gathers_statistics_anew_and_keeps_what_was_learned():
    assignment = assigned(lsq(), batch_quant(), "int8")
    setup = Setup(assignment, optax.sgd(0.05))
    trained = setup.run([batch_of(seed) for seed in range(4)])
    variables = trained.variables
    model, batch = Net(), {**batch_of(9), "mask": np.ones(BATCH, np.float32)}
    sites = aqs.find_sites(model.apply, {"params": trained.params}, batch["image"])
    static = static_evaluation(model.apply, assignment, sites, variables, [batch])
    own = static.variables["scales"]["body/kernel"]["lhs"]
    image = batch["image"].astype(np.float64)
    assert float(np.ravel(own.high)[0]) == pytest.approx(image.max(0).mean(), rel=1e-5)
    before = trained.scales["body/kernel"]["lhs"]
    np.testing.assert_array_equal(own.gamma.value, before.gamma.value)
    assert not np.allclose(own.gamma.value, setup.state.scales["body/kernel"]["lhs"].gamma.value)
    learned = with_learned(setup.state.scales, trained.scales)["body/kernel"]["rhs"]["step"].value
    np.testing.assert_array_equal(learned, trained.scales["body/kernel"]["rhs"]["step"].value)


# --- In the jobs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def configured(data_dir, **changes):
    config = digits_resnet8.get_config()
    config.update_from_flattened_dict(
        {
            "data.data_dir": str(data_dir), "model.width": 0.25, "epochs": 1.0,
            "optimizer.warmup_epochs": 0.0, "evaluation.calibration_batches": 2,
            "optimizer.learning_rate": 0.02, "log_every": 10, "checkpoint_every": 20,
        }
        | changes
    )  # fmt: skip
    return config


def test_a_run_learns_scales_and_keeps_them(data_dir, tmp_path):
    config = configured(
        data_dir, formats=((".*", "int4"),),
        **{"quantizers.weight": "lsq", "quantizers.activation": "batch_quant",
           "quantizers.weight_gradient": "ewgs(0.01)"},
    )  # fmt: skip
    images = from_config.load_images(config)
    result = train.run(config, tmp_path / "run", images)
    assert result["accuracy"] > 0.1
    run = finished_run.load(config, tmp_path / "run", images)
    assignment = configured_assignment(run.config, run.parts.sites)
    # The weights as loaded give the accuracy that was reported.
    judged = results.estimated(config, run.parts, assignment, run.variables)
    again = results.evaluate(*judged, from_config.evaluation_batches(config, images, "test"))
    assert again.accuracy == result["accuracy"]


def test_a_search_learns_a_step_size_for_every_format(data_dir):
    config = configured(
        data_dir, **{"quantizers.weight": "lsq", "search.space": ((".*", ("int2", "int4")),)}
    )
    model, optimizer = Net(), optax.sgd(0.05)
    one = jax.ShapeDtypeStruct((1, FEATURES), np.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), one)
    space = configured_space(config, aqs.find_sites(model.apply, variables, one))
    init = functools.partial(aqs.quantize_with_state(model.apply).init, first_assignment(space))
    state = init_train_state(
        model, optimizer, (FEATURES,), 0, init_scales=lambda variables: init(variables, one)
    )
    qapply = with_scales(aqs.quantize_with_state(model.apply))
    costs = {"gbops": space.cost_table(aqs.cost.gbops)}
    one_shot = critic(space, costs, total_steps=8, delay=0.5, axis_name=AXIS)
    step = parallel.pmap_step(
        make_search_step(qapply, make_update(qapply, optimizer), space, one_shot)
    )
    first = one_shot.init({"gbops": sum(costs["gbops"].range) / 2})
    held = parallel.replicate(ClassifierSearchState(state, first))
    sizes = []
    for number in range(8):
        batch, judged = (parallel.shard(batch_of(2 * number + i)) for i in range(2))
        held, metrics = step(held, (), batch, judged)
        learned = split_learned(parallel.unreplicate(held).train.scales)[0]
        sizes.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(learned)]))
    assert np.all(np.isfinite(metrics["loss"]))
    sizes = np.array(sizes)  # rows of "fp32", an option that the space has not, stay 0
    used = np.any(sizes != 0, axis=0)
    assert used.sum() == 2 * (6 + CLASSES)  # two formats, a scale per channel, after 16 samples
    assert np.any(np.diff(sizes[:, used], axis=0)[-1] != 0)


@pytest.mark.parametrize(
    "granularity, scales", [("channel", CLASSES), ("tensor", 1), ("block(2)", 3 * CLASSES)]
)
def test_weights_share_scales_as_configured(granularity, scales):
    config = digits_resnet8.get_config()
    config.formats = ((".*", "int4"),)
    config.quantizers.weight_granularity = granularity
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    args = {"kernel": jnp.float32(w)}, jnp.float32(x)

    def apply(params, x):
        return x @ params["kernel"]

    sites = aqs.find_sites(apply, *args)
    assignment = configured_assignment(config, sites)
    frozen = aqs.freeze(apply, assignment, *args).weights["kernel"]["rhs"]
    assert frozen.scale.size == scales  # 5 features make blocks of 2, 2 and 1
    groups = {"channel": w, "tensor": w.reshape(-1), "block(2)": w[:2]}[granularity]
    top = np.abs(groups).max(0)
    np.testing.assert_allclose(np.ravel(frozen.scale)[: top.size], np.ravel(top) / 7, rtol=1e-6)
    written = results.policy_json(assignment, named_granularity(granularity))
    assert written == {"kernel": {"lhs": "int4", "rhs": "int4"}}


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"quantizers.weight": "lsqq"}, "Unknown calibration 'lsqq'"),
        ({"quantizers.weight": "percentile(120)"}, "percent"),
        ({"quantizers.activation_gradient": "ste"}, "Unknown gradient 'ste'"),
        ({"quantizers.weight": "centred(min_max)"}, "symmetric"),
        ({"quantizers.weight": "mse 3"}, "no name"),
        ({"quantizers.companded": ("nowhere",)}, "nowhere"),
        ({"quantizers.weight_granularity": "row"}, "Unknown granularity 'row'"),
        ({"quantizers.weight_granularity": "block(0)"}, "at least one element"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(data_dir, tmp_path, changes, told):
    config = configured(data_dir, formats=((".*", "int4"),), **changes)
    with pytest.raises((ConfigError, ValueError), match=told):
        train.prepare(config, tmp_path, from_config.load_images(config))
