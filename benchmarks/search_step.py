"""Search step against float training step: time, build time, memory, compilations.

    python -m benchmarks.search_step            # ResNet-20, 32 x 32 x 3, batch 128: about 5 minutes
    python -m benchmarks.search_step --quick    # smaller, to see that it runs

All programs are built first, then their steps are run in turn, round after round, so that a machine
whose speed drifts slows all of them alike; ratios are medians of the rounds' own ratios. The goals
are the project's (CONTRIBUTING.md); nothing here fails if one is missed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aqt_search as aqs
from aqt_search import search
from aqt_search.models.resnet import resnet
from aqt_search.training import parallel
from aqt_search.training.evaluation import as_data
from aqt_search.training.optimizer import make_optimizer
from aqt_search.training.search_step import ClassifierSearchState, make_search_step
from aqt_search.training.train_step import cross_entropy, init_train_state, make_update
from benchmarks import timing

TWO = ("int4", "int8")
FOUR = ("int3", "int4", "int6", "int8")
SIXTEEN = (
    *("int2", "int3", "int4", "int5", "int6", "int7", "int8", "bf16"),
    *("e2m1", "e2m2", "e2m3", "e3m1", "e3m2", "e3m3", "e4m3", "e5m2"),
)
HELD_OUT = 32  # examples a search step measures quality on: the default of the configs


class Program(NamedTuple):
    """A step, the state it starts from and the batches it takes."""

    name: str
    step: Callable
    state: Any
    inputs: Any
    batches: tuple[Any, ...]


def random_batch(rng: np.random.Generator, size: int, image_size: int) -> dict[str, np.ndarray]:
    """Normal images and uniform labels: time does not depend on what is in them."""
    images = rng.normal(size=(size, image_size, image_size, 3)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, 10, size).astype(np.int32)}


def make_programs(depth: int, batch_size: int, image_size: int) -> list[Program]:
    """The float step, int8 ones and search steps over 2, 16 and 4 formats."""
    rng = np.random.default_rng(0)
    batch = random_batch(rng, batch_size, image_size)
    held_out = random_batch(rng, HELD_OUT, image_size)
    model = resnet(depth, 10)
    optimizer = make_optimizer("sgd", 0.1, weight_decay=5e-4)
    train = init_train_state(model, optimizer, batch["image"].shape[1:], seed=0)
    image = jax.ShapeDtypeStruct((1, *batch["image"].shape[1:]), jnp.float32)
    variables = {"params": train.params, "batch_stats": train.batch_stats}
    sites = aqs.find_sites(model.apply, variables, image, train=False)
    # As the jobs run it: codes are kept for the backward pass.
    qapply = aqs.quantize(model.apply, residuals="codes", options=SIXTEEN)
    update = make_update(qapply, optimizer)
    static = aqs.assign(sites, [(".*", "int8")])

    def train_step(state, assignment, batch):
        return update(state, assignment, batch)[:2]

    programs = [
        Program("float32 training", train_step, train, {}, (batch,)),
        Program(
            "int8, known formats", lambda s, _, b: train_step(s, static, b), train, (), (batch,)
        ),
        Program("int8 training", train_step, train, as_data(static), (batch,)),
    ]
    space = search.make_space(sites, [(".*", FOUR)])
    table = space.cost_table(aqs.cost.gbops)

    def decided_step(state, _, batch):
        """The default search's: weights under a point that is part of the state."""
        train, choices = state
        train, metrics = train_step(train, space.assignment(choices), batch)
        return (train, choices), metrics | {"cost": table.of(choices)}

    decided = train, table.dearest.astype(np.int32)
    programs.append(Program("search, 4 formats, by scores", decided_step, decided, (), (batch,)))
    target = aqs.cost.gbops(sites, aqs.assign(sites, [(".*", "int4")])) * 1.1
    for formats, samples in ((TWO, 1), (SIXTEEN, 1), (FOUR, 1), (FOUR, 2)):
        space = search.make_space(sites, [(".*", formats)])
        costs = {"gbops": space.cost_table(aqs.cost.gbops)}
        controls = {"total_steps": 1000, "delay": 0.0, "axis_name": parallel.AXIS}
        one_shot = (
            search.critic(space, costs, samples=samples, **controls)
            if samples > 1
            else search.policy_gradient(space, costs, samples=1, baseline_momentum=0.95, **controls)
        )
        step = make_search_step(qapply, update, space, one_shot)
        state = ClassifierSearchState(train, one_shot.init({"gbops": target}))
        name = f"search, {len(formats)} formats, {samples} judged"
        programs.append(Program(name, step, state, (), (batch, held_out)))
    return programs


def build(program: Program) -> timing.Build:
    """Builds a program's step from nothing."""
    state, inputs = parallel.replicate((program.state, program.inputs))
    batches = [parallel.shard(b) for b in program.batches]
    return timing.build(parallel.pmap_step(program.step), state, inputs, *batches)


def runner(program: Program) -> Callable[[], Any]:
    """Runs the program's next step at every call."""
    step = parallel.pmap_step(program.step)
    batches = [parallel.shard(b) for b in program.batches]
    state, inputs = parallel.replicate((program.state, program.inputs))

    def run():
        nonlocal state
        state, metrics = step(state, inputs, *batches)
        return state, metrics

    return run


def count_compilations(program: Program, steps: int) -> int:
    """Compilations in `steps` search steps after the first, each with another sample of formats."""
    step = parallel.pmap_step(program.step)
    state, inputs = parallel.replicate((program.state, program.inputs))
    batches = [parallel.shard(b) for b in program.batches]
    state, _ = step(state, inputs, *batches)
    events: list[str] = []

    def listen(name: str, _seconds: float, **_: Any) -> None:
        if name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(steps):
        state, metrics = step(state, inputs, *batches)
        jax.block_until_ready(metrics)
    return len(events)


SCORED, SCORED_BATCH = 512, 64  # images: the defaults of the search by scores


def scoring_seconds(depth: int, image_size: int) -> float:
    """Seconds that scoring takes once in a search, with its compilation."""
    model = resnet(depth, 10)
    image = jnp.zeros((1, image_size, image_size, 3))
    variables = model.init(jax.random.key(0), image, train=False)
    sites = aqs.find_sites(model.apply, variables, image, train=False)
    space = search.make_space(sites, [(".*", FOUR)])
    batch = random_batch(np.random.default_rng(0), SCORED_BATCH, image_size)

    def apply(variables, batch):
        return model.apply(variables, batch["image"], train=False)

    def loss(logits, batch):
        return cross_entropy(logits, batch["label"], 0.0).mean()

    start = time.monotonic()
    search.score(apply, loss, variables, [batch] * (SCORED // SCORED_BATCH), space)
    return time.monotonic() - start


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-8, 16 x 16, batch 32")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--builds", type=int, default=5, help="timed builds")
    args = parser.parse_args()
    size = (8, 32, 16) if args.quick else (20, 128, 32)
    programs = make_programs(*size)
    builds = timing.build_in_turns(
        {p.name: functools.partial(build, p) for p in programs}, args.builds
    )
    seconds = timing.time_in_turns({p.name: runner(p) for p in programs}, args.rounds)
    base = programs[0].name
    print(f"ResNet-{size[0]}, batch {size[1]}, {size[2]} x {size[2]} x 3, on", end=" ")
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        f"{'program':28} {'ms':>7} {'ratio':>6} {'build s':>8} {'ratio':>6} {'MB':>6} {'ratio':>6}"
    )
    for program in programs:
        name = program.name
        built = [b.seconds for b in builds[name]]
        base_built = [b.seconds for b in builds[base]]
        memory, base_memory = (builds[n][0].temporary_bytes for n in (name, base))
        print(
            f"{name:28} {1e3 * statistics.median(seconds[name]):7.1f}"
            f" {timing.median_ratio(seconds[name], seconds[base]):6.3f}"
            f" {statistics.median(built):8.2f} {timing.median_ratio(built, base_built):6.3f}"
            f" {memory / 1e6:6.1f} {memory / base_memory:6.3f}"
        )
    int8, scores, two, sixteen, _, both = (program.name for program in programs[2:])
    print(f"16 formats / 2 formats: {timing.median_ratio(seconds[sixteen], seconds[two]):.3f}")
    for name in (scores, both):
        ratio = timing.median_ratio(seconds[name], seconds[int8])
        slower = timing.median_ratio(*([b.seconds for b in builds[n]] for n in (name, int8)))
        print(f"{name} / int8 training: {ratio:.3f}, its build: {slower:.3f}")
    print(f"scoring of {SCORED} images, once in a search: {scoring_seconds(*size[::2]):.1f} s")
    print(f"compilations in 50 more search steps: {count_compilations(programs[-1], 50)}")


if __name__ == "__main__":
    main()
