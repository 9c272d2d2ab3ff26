"""Many assignments in one program against one after another."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aqt_search as aqs
from aqt_search.search.space import make_space
from aqt_search.training.assignment_batch import evaluate_assignments
from aqt_search.training.parallel import AXIS

RNG = np.random.default_rng(0)
CLASSES, FEATURES, COUNT = 4, 6, 7


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(12, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, axis_name=self.axis_name)(x))
        return nn.Dense(CLASSES)(x)


def make_batch(size, padding=0):
    mask = np.arange(size) < size - padding
    return {
        "image": RNG.normal(size=(size, FEATURES)).astype(np.float32),
        "label": RNG.integers(0, CLASSES, size).astype(np.int32),
        "mask": mask.astype(np.float32),
    }


BATCHES = [make_batch(10), make_batch(10, padding=3)]
VARIABLES = jax.tree.map(np.asarray, Net().init(jax.random.key(0), BATCHES[0]["image"]))
VARIABLES["batch_stats"] = jax.tree.map(lambda s: s + 0.5, VARIABLES["batch_stats"])
SPACE = make_space(
    aqs.find_sites(Net().apply, VARIABLES, BATCHES[0]["image"]),
    [(".*", ("int2", "int4", None, "e4m3"))],
)
CHOICES = RNG.integers(0, 4, (COUNT, len(SPACE.decisions)))


def assignments(choices=CHOICES):
    return jax.vmap(SPACE.assignment)(choices)


@functools.cache
def one_by_one(train):
    """Accuracy and loss in float64 of each choice, unpadded examples only."""
    found = []
    for choices in CHOICES:
        right, losses = [], []
        for batch in BATCHES:
            logits = aqs.quantize(Net().apply)(
                SPACE.concrete_assignment(choices), VARIABLES, batch["image"], train=train,
                mutable=["batch_stats"] if train else False,
            )  # fmt: skip
            logits = np.asarray(logits[0] if train else logits, float)
            kept, labels = batch["mask"] > 0, batch["label"]
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            right += list((logits.argmax(1) == labels)[kept])
            losses += list(-log_p[np.arange(len(labels)), labels][kept])
        found.append((np.mean(right), np.mean(losses)))
    return np.array(found).T


# A replica of a data-parallel model holds half a batch in training, but the whole one here.
@pytest.mark.parametrize(
    "batch_stats, axis_name, chunk, vectorized",
    [
        ("batch", AXIS, 3, None),
        ("batch", AXIS, 4, True),
        ("running", AXIS, 3, True),
        ("running", None, 100, None),
    ],
)
def test_equals_one_evaluation_after_another(batch_stats, axis_name, chunk, vectorized):
    qapply = aqs.quantize(Net(axis_name).apply, axis_name=axis_name)
    found = evaluate_assignments(
        qapply, assignments(), VARIABLES, BATCHES,
        chunk=chunk, batch_stats=batch_stats, vectorized=vectorized,
    )  # fmt: skip
    accuracy, loss = one_by_one(batch_stats == "batch")
    assert jax.local_device_count() == 2
    assert found.examples == 17
    assert found.accuracy.dtype == found.loss.dtype == np.float64
    # Products of 6 and 12 terms and sums of 10 losses, in float32: a few units of 6e-8 each. None
    # of the 1,500 activations lies so near to the border of a code that this moves it.
    np.testing.assert_array_equal(found.accuracy, accuracy)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    assert len(set(found.loss.round(6))) > 4


def test_the_order_is_kept_and_filling_is_dropped():
    qapply = aqs.quantize(Net().apply)
    found = [
        evaluate_assignments(qapply, assignments(CHOICES[order]), VARIABLES, BATCHES, chunk=4)
        for order in (np.arange(COUNT), np.arange(COUNT)[::-1], np.arange(5))
    ]
    assert [len(f.loss) for f in found] == [7, 7, 5]
    np.testing.assert_array_equal(found[0].loss, found[1].loss[::-1])
    np.testing.assert_array_equal(found[0].loss[:5], found[2].loss)


def test_one_compilation_for_chunks_batches_and_calls():
    traces = 0

    def counted(*args, **kwargs):
        nonlocal traces
        traces += 1
        return aqs.quantize(Net().apply)(*args, **kwargs)

    evaluate_assignments(counted, assignments(), VARIABLES, BATCHES, chunk=2)
    assert traces == 1
    evaluate_assignments(counted, assignments(CHOICES[:3]), VARIABLES, BATCHES[::-1], chunk=2)
    assert traces == 1


def test_a_model_without_batch_norm_is_evaluated_without_dropout():
    def apply(variables, x, train):
        assert not train
        return x @ variables["params"]["w"]

    variables = {"params": {"w": np.eye(FEATURES, CLASSES, dtype=np.float32)}}
    space = make_space(
        aqs.find_sites(apply, variables, BATCHES[0]["image"], train=False),
        [(".*", ("int2", None))],
    )
    formats = jax.vmap(space.assignment)(jnp.array([[1], [0]]))
    found = evaluate_assignments(aqs.quantize(apply), formats, variables, BATCHES)
    images, labels, kept = (
        np.concatenate([b[k] for b in BATCHES]) for k in ("image", "label", "mask")
    )
    right = images[:, :CLASSES].argmax(1) == labels
    assert found.accuracy[0] == np.mean(right[kept > 0])


def test_losses_that_are_not_finite_stay_with_their_assignment():
    def apply(variables, x, train):
        return 1 / (x @ variables["params"]["w"])  # int2 rounds some sums to zero

    variables = {"params": {"w": np.eye(FEATURES, CLASSES, dtype=np.float32)}}
    sites = aqs.find_sites(apply, variables, BATCHES[0]["image"], train=False)
    space = make_space(sites, [(".*", ("int2", None))])
    formats = jax.vmap(space.assignment)(jnp.array([[0], [1]]))
    found = evaluate_assignments(aqs.quantize(apply), formats, variables, BATCHES)
    assert np.isfinite(found.loss).tolist() == [False, True]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"chunk": 0}, ["chunk is 0", "at least 1"]),
        ({"batch_stats": "own"}, ["'own'", "batch or running"]),
        ({"batches": []}, ["no examples"]),
        ({"assignments": {}}, ["[]", "jax.vmap"]),
        ({"assignments": SPACE.concrete_assignment(CHOICES[0])}, ["[()]", "jax.vmap"]),
        ({"assignments": (np.zeros(3), np.zeros(4))}, ["(3,), (4,)"]),
        ({"assignments": (np.zeros(0),)}, ["(0,)", "n > 0"]),
    ],
)
def test_errors(changes, words):
    arguments = {"assignments": assignments(), "batches": BATCHES} | changes
    with pytest.raises(ValueError) as caught:
        evaluate_assignments(
            aqs.quantize(Net().apply), arguments.pop("assignments"), VARIABLES, **arguments
        )
    assert all(word in str(caught.value) for word in words), str(caught.value)
