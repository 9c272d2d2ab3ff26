"""What masked subnets cost, and that they are the models that are cut out.

    python -m benchmarks.elastic              # tiny MobileNetV2, 16 x 16, batch 128: 10 minutes
    python -m benchmarks.elastic --quick      # to see that it runs

Training steps of one network run in turn: without masks, and with random subnets in random formats
from spaces of 2 and of 12 options for every decision. Then random points, each against the model
that is cut out for it: logits in float and in native int8, predictions, and GBOPs.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aqt_search as aqs
from aqt_search import models
from aqt_search.architecture.named_spaces import architecture
from aqt_search.architecture.subnet_sites import subnet_sites
from aqt_search.models.fitting import fitted
from aqt_search.search.space import Space, make_space
from aqt_search.training.subnets import of_points
from aqt_search.training.train_step import cross_entropy
from benchmarks import timing
from benchmarks.search_step import random_batch

SIZE = 16
FORMATS = (
    *("int2", "int3", "int4", "int5", "int6", "int7", "int8"),
    *("e2m1", "e3m2", "e2m3", "e4m3", "e5m2"),
)


class Network(NamedTuple):
    """A MobileNetV2 with windows of 5, and variables of which none is 0 or 1 by its start."""

    model: Any
    variables: Any


def network(width: float) -> Network:
    """The tiny form."""
    model = models.build("mobilenet_v2", 10, form="tiny", width=width, windows=5, dropout=0.0)
    variables = model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), train=False)
    rng = np.random.default_rng(0)
    stirred = jax.tree.map(lambda leaf: leaf + 0.1 * rng.uniform(size=leaf.shape), variables)
    return Network(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stirred))


def apply_of(model: Any) -> Callable:
    """The model in evaluation."""
    return functools.partial(model.apply, train=False)


def space_of(net: Network, options: int) -> Space:
    """`options` widths of every expansion and `options` formats of every site."""
    widths = {}
    for number, block in enumerate(net.model.blocks, start=1):
        if block.expands:
            sizes = np.linspace(block.expanded / 2, block.expanded, options).astype(int)
            widths[f"^block{number}/expand/kernel$"] = tuple(sizes.tolist())
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    elastic = aqs.elastic(apply_of(net.model), net.variables, image, widths=widths)
    return make_space(elastic.sites, [(".*", FORMATS[-options:])], net=elastic)


def full_space(net: Network) -> Space:
    """Widths, expansions, windows and depths, and integers of 3 to 8 bits apart."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    choices = architecture("small_mobilenet_v2", net.model)
    elastic = aqs.elastic(apply_of(net.model), net.variables, image, **choices)
    formats = ("int3", "int4", "int6", "int8")
    return make_space(
        elastic.sites, [(".*", {"weight": formats, "activation": formats})], net=elastic
    )


def random_points(space: Space, count: int) -> np.ndarray:
    """[count, decisions]."""
    return np.random.default_rng(1).integers(0, space.mask.sum(1), (count, len(space.mask)))


# --- Steps ----------------------------------------------------------------------------------------


def training_step(net: Network, space: Space, masked: bool) -> Callable:
    """Gradients of the weights under a point that is data, with or without its masks."""
    qapply = aqs.quantize(net.model.apply)
    subnet = of_points(qapply, space.net)

    @jax.jit
    def step(variables, choices, batch):
        def loss(params):
            own = {**variables, "params": params}
            forward = {"train": True, "mutable": ["batch_stats"]}
            rngs = {"dropout": jax.random.key(0)}
            if masked:
                logits, _ = subnet(space.point(choices), own, batch["image"], rngs=rngs, **forward)
            else:
                assignment = space.assignment(choices)
                logits, _ = qapply(assignment, own, batch["image"], rngs=rngs, **forward)
            return cross_entropy(logits, batch["label"], 0.0).mean()

        gradients = jax.grad(loss)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 1e-6 * g, variables["params"], gradients)
        return {**variables, "params": params}

    return step


def runner(step: Callable, net: Network, space: Space, batch: Any) -> Callable:
    """The next step, under the next of 50 random points, at every call."""
    points, calls, variables = random_points(space, 50), 0, net.variables

    def run():
        nonlocal calls, variables
        variables = step(variables, points[calls % len(points)], batch)
        calls += 1
        return variables

    return run


def compare_steps(net: Network, batch_size: int, rounds: int) -> None:
    """Prints what masks and options cost, and the compilations of every program."""
    batch = random_batch(np.random.default_rng(0), batch_size, SIZE)
    two, twelve = (space_of(net, options) for options in (2, 12))
    steps = {
        "no masks": (training_step(net, two, masked=False), two),
        "2 options": (training_step(net, two, masked=True), two),
        "12 options": (training_step(net, twelve, masked=True), twelve),
    }
    seconds = timing.time_in_turns(
        {name: runner(step, net, space, batch) for name, (step, space) in steps.items()}, rounds
    )
    for name, reference in (("2 options", "no masks"), ("12 options", "2 options")):
        ratio = timing.median_ratio(seconds[name], seconds[reference])
        print(f"training step: {name} / {reference}: {ratio:.3f}")
    for name, (step, _) in steps.items():
        print(f"{name}: {1e3 * np.median(seconds[name]):.1f} ms, {step._cache_size()} compilation")


# --- Masked against cut out -----------------------------------------------------------------------


def compare_points(net: Network, count: int) -> None:
    """Prints how far random masked subnets are from the models that are cut out."""
    space = full_space(net)
    elastic, table = space.net, space.cost_table(aqs.cost.gbops)
    assert elastic is not None
    images = jnp.asarray(random_batch(np.random.default_rng(2), 32, SIZE)["image"])
    every = aqs.assign(elastic.sites, [(".*", "int8")])

    @jax.jit
    def masked(choices, variables):
        own = elastic.variables(choices, variables)
        native = aqs.quantize(apply_of(net.model), execution="int8")
        return apply_of(net.model)(own, images), native(every, own, images)

    worst, differing, flipped, costs = 0.0, 0, 0, 0.0
    for point in random_points(space, count):
        choices = np.asarray(space.architecture(point))
        small, cut = fitted(net.model, elastic.extract(choices, net.variables))
        sites = aqs.find_sites(apply_of(small), cut, images[:1])
        eights = aqs.assign(sites, [(".*", "int8")])
        native = jax.jit(aqs.quantize(apply_of(small), execution="int8"))(eights, cut, images)
        plain = jax.jit(apply_of(small))(cut, images)
        mine, mine_native = masked(choices, net.variables)
        worst = max(worst, float(jnp.max(jnp.abs(mine - plain)) / jnp.max(jnp.abs(plain))))
        differing += int(jnp.any(mine_native != native))
        flipped += int(jnp.sum(mine_native.argmax(-1) != native.argmax(-1)))
        flipped += int(jnp.sum(mine.argmax(-1) != plain.argmax(-1)))
        old = space.concrete_assignment(point)
        formats = dict(zip(sites, (old[name] for name in subnet_sites(elastic, choices))))
        exact = aqs.cost.gbops(sites, formats)
        costs = max(costs, abs(table.of_many(point[None])[0] / exact - 1))
    print(f"{count} random points against the models cut out for them:")
    print(f"  float: largest difference / largest logit {worst:.2g}")
    print(f"  native int8: {differing} differ in any bit; {flipped} predictions differ")
    print(f"  GBOPs: largest relative difference {costs:.2g}")
    print(f"  {masked._cache_size()} compilation of the masked network")


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="width 0.5, batch 32, 5 points")
    parser.add_argument("--points", type=int, default=100, help="random points")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds")
    args = parser.parse_args()
    net = network(0.5 if args.quick else 1.0)
    compare_steps(net, 32 if args.quick else 128, 5 if args.quick else args.rounds)
    compare_points(net, 5 if args.quick else args.points)


if __name__ == "__main__":
    main()
