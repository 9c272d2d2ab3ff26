"""The training step of a supernet, against losses written down one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aqt_search as aqs
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.models import build
from aqt_search.models.fitting import fitted
from aqt_search.search.space import make_space
from aqt_search.training import parallel
from aqt_search.training.scales import with_scales
from aqt_search.training.supernet_step import (
    SmallestSubnet,
    SupernetState,
    _alike,
    make_supernet_step,
)
from aqt_search.training.train_step import init_train_state

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


def quantized(model):
    return with_scales(aqs.quantize_with_state(model.apply))


@functools.cache
def supernet():
    options = {"form": "tiny", "width": 0.25, "depths": (1, 2, 1, 1), "dropout": 0.0}
    model = build("mobilenet_v2", 4, **options)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGE.shape))
    net = aqs.elastic(
        functools.partial(model.apply, train=False), variables, IMAGE,
        widths={"block4/expand": (8, 16, 48)}, kernels={"block(2|4)/depthwise": (1, 3)},
        depths=[(("block3",), (0, 1))],
    )  # fmt: skip
    space = make_space(net.sites, [("stem|head", "int8"), (".*", ("int4", "int8"))], net=net)
    matrices = net.matrices()

    def cut(params, matrices):
        kept = net.extract(net.smallest, {"params": params}, matrices or None)
        return fitted(model, kept)[1]["params"]

    abstract = net.extract(net.smallest, jax.tree.map(lambda s: np.zeros(s.shape), variables))
    small, own = fitted(model, abstract)
    sites = aqs.find_sites(functools.partial(small.apply, train=False), own, IMAGE)
    names = dict(zip(sites, subnet_sites(net, net.smallest), strict=True))
    return model, net, space, matrices, SmallestSubnet(quantized(small), cut, names, net.smallest)


def batch_of(seed, size=16):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    labels = (images.mean((1, 2, 3)) > 0).astype(np.int32) + 2 * (images[:, 0, 0, 0] > 0)
    return {"image": images, "label": labels.astype(np.int32)}


def state_of(optimizer):
    model, _, space, matrices, _ = supernet()
    train = init_train_state(model, optimizer, (8, 8, 1), 0, lambda params: matrices)
    return SupernetState(train, jnp.asarray(space.mask))


def test_a_step_moves_by_the_mean_of_the_gradients_of_its_subnets():
    """With one option a decision, so that what is drawn is known: three losses by hand."""
    model, net, space, matrices, smallest = supernet()
    optimizer = optax.sgd(1.0)
    state = state_of(optimizer)
    chosen = np.array([1, 0, 1, 1, *[i % 2 for i in range(len(space.decisions) - 4)]])
    allowed = np.arange(space.max_options)[None] == chosen[:, None]
    step = make_supernet_step(quantized(model), space, optimizer, smallest, subnets=1)
    replicas = jax.local_device_count()
    batch = {k: np.tile(v, (replicas, *[1] * (v.ndim - 1))) for k, v in batch_of(0).items()}
    compiled = parallel.pmap_step(step, donate_state=False)
    placed = parallel.replicate(state._replace(allowed=jnp.asarray(allowed)))
    new, told = compiled(placed, {}, parallel.shard(batch))
    new = parallel.unreplicate(new)

    def logits(architecture, params, matrices):
        point = np.concatenate([architecture, chosen[4:]])
        variables = net.variables(architecture, {"params": params}, matrices)
        qapply = aqs.quantize(model.apply)
        found, _ = qapply(space.assignment(point), variables, batch_of(0)["image"], train=True,
                          mutable=["batch_stats"])  # fmt: skip
        return found

    def loss(trained):
        labels = jax.nn.one_hot(batch_of(0)["label"], 4)
        first, *others = [
            logits(a, *trained) for a in (net.largest, net.smallest, chosen[:4])
        ]  # fmt: skip
        teacher = jax.nn.softmax(jax.lax.stop_gradient(first))
        hard = [optax.softmax_cross_entropy(x, labels).mean() for x in (first, *others)]
        soft = [optax.softmax_cross_entropy(x, teacher).mean() for x in others]
        return (hard[0] + sum((h + s) / 2 for h, s in zip(hard[1:], soft))) / 3

    gradient = jax.grad(loss)((state.train.params, matrices))
    moved = jax.tree.map(jnp.subtract, (state.train.params, matrices),
                         (new.train.params, new.train.auxiliary))  # fmt: skip
    # In int4 and int8 a rounding may fall to the other side: compared as whole vectors.
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (gradient, moved)]
    assert np.linalg.norm(flat[0] - flat[1]) < 0.02 * np.linalg.norm(flat[0])
    assert np.linalg.norm(flat[0]) > 0.1
    assert int(new.train.step) == 1
    assert {"loss", "loss/smallest", "loss/random1", "accuracy", "gradient_norm"} <= set(told)
    jax.tree.map(np.testing.assert_array_equal, new.train.batch_stats, state.train.batch_stats)


def test_it_learns_in_one_program():
    model, _, space, _, smallest = supernet()
    optimizer = optax.adam(3e-3)
    step = make_supernet_step(quantized(model), space, optimizer, smallest, subnets=1)
    traced = []

    def counted(*arguments):
        traced.append(1)
        return step(*arguments)

    compiled = parallel.pmap_step(counted)
    state, losses = parallel.replicate(state_of(optimizer)), []
    for number in range(120):
        state, told = compiled(state, {}, parallel.shard(batch_of(number % 4, 32)))
        losses.append([float(told[k][0]) for k in ("loss", "loss/smallest", "loss/random1")])
    assert len(traced) == 1  # for all subnets and formats
    first, last = np.mean(losses[:8], 0), np.mean(losses[-8:], 0)
    assert np.all(last < 0.9 * first), (first, last)
    assert np.all(np.isfinite(losses))


def test_all_formats_have_one_place_among_their_options():
    allowed = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]], bool)
    drawn = np.array([_alike(k, allowed) for k in jax.random.split(jax.random.key(0), 400)])
    assert np.all(allowed[np.arange(4)[None], drawn])
    share = np.array([[np.mean(drawn[:, d] == o) for o in range(4)] for d in range(4)])
    expected = allowed / allowed.sum(1, keepdims=True)
    # Five standard deviations of a share of 400.
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(0.25 / 400))
    lowest = drawn[drawn[:, 0] == 0]
    assert np.all(lowest == [0, 0, 2, 0])
    assert np.all(drawn[drawn[:, 0] == 3] == [3, 3, 2, 1])


@pytest.mark.parametrize(
    "options", [{"subnets": -1}, {"distillation": -0.5}, {"label_smoothing": 1}]
)
def test_numbers_out_of_range(options):
    model, _, space, _, smallest = supernet()
    with pytest.raises(ValueError, match=next(iter(options))):
        make_supernet_step(quantized(model), space, optax.sgd(0.1), smallest, **options)
