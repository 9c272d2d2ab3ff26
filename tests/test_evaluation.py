"""Evaluation with padding, and BatchNorm statistics, against numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.training.evaluation import (
    evaluate,
    reestimate_batch_stats,
    static_evaluation,
)
from aqt_search.training.parallel import AXIS

RNG = np.random.default_rng(0)


class Net(nn.Module):
    momentum: float = 0.9
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3, use_bias=False, name="layer")(x)
        return nn.BatchNorm(not train, momentum=self.momentum, axis_name=self.axis_name, name="bn")(
            x
        )


def variables_of(kernel):
    size = kernel.shape[1]
    return {
        "params": {
            "layer": {"kernel": kernel},
            "bn": {"scale": np.ones(size, np.float32), "bias": np.zeros(size, np.float32)},
        },
        "batch_stats": {"bn": {"mean": np.full(size, 9.0), "var": np.full(size, 0.1)}},
    }


KERNEL = RNG.normal(size=(5, 3)).astype(np.float32)


def test_padding_does_not_count():
    images = RNG.normal(size=(10, 5)).astype(np.float32)
    labels = RNG.integers(0, 3, 10).astype(np.int32)
    padded = np.minimum(np.arange(12), 9)  # as `data.eval_batches` fills up
    masks = (np.arange(12) < 10).astype(np.float32)
    batches = [
        {
            "image": images[padded[i : i + 4]],
            "label": labels[padded[i : i + 4]],
            "mask": masks[i : i + 4],
        }
        for i in (0, 4, 8)
    ]
    variables = variables_of(KERNEL)
    found = evaluate(aqs.quantize(Net().apply), {}, variables, batches)
    stats = variables["batch_stats"]["bn"]
    logits = (images.astype(float) @ KERNEL - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= logits.max(1, keepdims=True)
    assert found.examples == 10
    assert found.accuracy == np.mean(logits.argmax(1) == labels)
    assert found.loss == pytest.approx(-log_p[np.arange(10), labels].mean(), rel=1e-5)


# 1000: float32 has 7 digits, and the variance is 1e6 times the change that tells the momentum.
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("axis_name", [None, AXIS])
@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.5])
def test_batch_norm_statistics_are_means_of_the_batches(momentum, axis_name, scale):
    batches = [
        {"image": (scale * (RNG.normal(size=(8, 5)) + i)).astype(np.float32)} for i in range(3)
    ]
    model = Net(momentum, axis_name)
    found = reestimate_batch_stats(aqs.quantize(model.apply), {}, variables_of(KERNEL), batches)[
        "bn"
    ]
    # Without a shared axis each of the two devices normalises by its own half of the batch.
    groups = np.concatenate([np.split(b["image"] @ KERNEL, 1 if axis_name else 2) for b in batches])
    np.testing.assert_allclose(found["mean"], groups.mean(1).mean(0), rtol=2e-4, atol=2e-4 * scale)
    np.testing.assert_allclose(found["var"], groups.var(1).mean(0), rtol=2e-4)
    assert found["var"].dtype == np.float32


def test_statistics_belong_to_the_formats():
    batches = [{"image": RNG.normal(size=(8, 5)).astype(np.float32)}]
    model, variables = Net(), variables_of(KERNEL)
    sites = aqs.find_sites(model.apply, variables, jnp.zeros((1, 5)))
    assignment = aqs.assign(sites, [(".*", {"weight": "int2"})])
    found = reestimate_batch_stats(aqs.quantize(model.apply), assignment, variables, batches)
    coarse = np.asarray(aqs.fake_quant(jnp.asarray(KERNEL), "int2", channel_axes=(1,)))
    halves = np.stack(np.split(batches[0]["image"] @ coarse, 2))
    np.testing.assert_allclose(found["bn"]["var"], halves.var(1).mean(0), rtol=2e-4)


def test_a_model_without_batch_norm_has_no_statistics():
    assert reestimate_batch_stats(None, {}, {"params": {}, "batch_stats": {}}, []) == {}


def test_no_examples():
    qapply, variables = aqs.quantize(Net().apply), variables_of(KERNEL)
    with pytest.raises(ValueError, match="no examples"):
        evaluate(qapply, {}, variables, [])
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_stats(qapply, {}, variables, [])


def test_evaluation_scales_are_those_of_the_whole_batch():
    """With a shared axis, dynamic activation scales do not depend on the number of devices."""
    images = np.array([[1.0], [0.3], [100.0], [55.0]], np.float32)  # the halves differ in scale
    batch = {"image": images, "label": np.zeros(4, np.int32), "mask": np.ones(4, np.float32)}

    def apply(variables, x, train=False):
        return x @ variables["params"]["w"]

    weights = np.array([[1.0, -1.0]], np.float32)
    variables = {"params": {"w": weights}, "batch_stats": {}}
    sites = aqs.find_sites(apply, variables, jnp.zeros((1, 1)))
    assignment = aqs.assign(sites, [(".*", "int2")])
    found = evaluate(aqs.quantize(apply, axis_name=AXIS), assignment, variables, [batch])
    # int2 over 100: 1, 0.3 -> 0; 100 -> 100; 55 -> 100. Logits (x, -x).
    expected = np.log1p(np.exp(-2 * np.array([0.0, 0.0, 100.0, 100.0]))).mean()
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert jax.local_device_count() == 2


@pytest.mark.parametrize("rules", [[(".*", "int4")], [(".*", {"weight": "int4"})], []])
def test_static_scales_are_means_of_the_batches_and_depend_on_no_other(rules):
    model, variables = Net(), variables_of(KERNEL)
    batches = [{"image": (s * RNG.normal(size=(8, 5))).astype(np.float32)} for s in (1, 2, 3)]
    sites = aqs.find_sites(model.apply, variables, batches[0]["image"])
    assignment = aqs.assign(sites, rules)
    static = static_evaluation(model.apply, assignment, sites, variables, batches)
    images = (100 * RNG.normal(size=(6, 5))).astype(np.float32)

    def logits(images):
        fixed = (static.assignment, static.variables)
        mapped = jax.pmap(static.apply, AXIS, in_axes=(None, None, 0))
        return np.asarray(mapped(*fixed, images.reshape(2, -1, 5))).reshape(-1, 3)

    kernel, inputs = KERNEL, images
    if rules:
        kernel = np.asarray(aqs.fake_quant(KERNEL, "int4", (1,)))
    if assignment["layer/kernel"].lhs is not None:
        bound = np.mean([np.abs(b["image"]).max() for b in batches])
        inputs = np.clip(np.round(images / (bound / 7)), -7, 7) * (bound / 7)
    stats = variables["batch_stats"]["bn"]
    expected = (inputs @ kernel - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(logits(images), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(logits(images)[:2], logits(images[:2]))


def test_assignments_that_look_alike_share_one_program():
    model, variables = Net(), variables_of(KERNEL)
    sites = aqs.find_sites(model.apply, variables, jnp.zeros((1, 5)))
    images = RNG.normal(size=(8, 5)).astype(np.float32)
    batch = {"image": images, "label": np.zeros(8, np.int32), "mask": np.ones(8, np.float32)}
    traces = []

    def counted(variables, *args, **kwargs):
        traces.append(None)
        return model.apply(variables, *args, **kwargs)

    qapply = aqs.quantize(counted, axis_name=AXIS)

    def whole(name):
        assignment = aqs.assign(sites, [(".*", name)])
        reestimate_batch_stats(qapply, assignment, variables, [batch])
        static = static_evaluation(counted, assignment, sites, variables, [batch])
        return evaluate(qapply, assignment, variables, [batch]), evaluate(*static, [batch])

    first = whole("int2")
    before = len(traces)
    second = whole("int8")
    # `init` of the scales looks at the model once, abstractly; nothing is compiled again.
    assert len(traces) <= before + 1
    assert all(a.loss != b.loss for a, b in zip(first, second))


def test_static_scales_need_a_batch():
    with pytest.raises(ValueError, match="at least one batch"):
        static_evaluation(Net().apply, {}, {}, variables_of(KERNEL), [])
