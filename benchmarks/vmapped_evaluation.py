"""Evaluation of many assignments: a call for each, a loop in one program, or vectorized.

    python -m benchmarks.vmapped_evaluation            # 64 of ResNet-20, 64 images of 32 x 32
    python -m benchmarks.vmapped_evaluation --quick    # 16 of ResNet-8, 64 images of 8 x 8

One batch is evaluated under all assignments, in chunks of 16. All programs are built first and then
run in turns; ratios are medians of the rounds' own ratios. `evaluate_assignments` is the loop on
CPU, the vectorized form elsewhere, with what Python adds: transfers and sums in float64.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aqt_search as aqs
from aqt_search.models.resnet import resnet
from aqt_search.search.space import make_space
from aqt_search.training.assignment_batch import evaluate_assignments, forward_arguments
from aqt_search.training.train_step import cross_entropy
from benchmarks import timing

FORMATS = ("int3", "int4", "int6", "int8")
IMAGES, CHUNK = 64, 16


class Problem(NamedTuple):
    """Weights, a batch and assignments of random formats."""

    qapply: Callable
    variables: Any
    batch: dict[str, np.ndarray]
    assignments: Any  # leaves [n]
    count: int


def make_problem(depth: int, image_size: int, count: int) -> Problem:
    """Random weights and images: time does not depend on what is in them."""
    rng = np.random.default_rng(0)
    shape = (IMAGES, image_size, image_size, 3)
    batch = {
        "image": rng.normal(size=shape).astype(np.float32),
        "label": rng.integers(0, 10, IMAGES).astype(np.int32),
        "mask": np.ones(IMAGES, np.float32),
    }
    model = resnet(depth, 10)
    variables = jax.jit(model.init)(jax.random.key(0), batch["image"][:1])
    space = make_space(aqs.find_sites(model.apply, variables, batch["image"]), [(".*", FORMATS)])
    choices = rng.integers(0, len(FORMATS), (count, len(space.decisions)))
    assignments = jax.tree.map(np.asarray, jax.vmap(space.assignment)(choices))
    return Problem(aqs.quantize(model.apply), variables, batch, assignments, count)


def quality(problem: Problem, assignment: Any, variables: Any, batch: Any) -> Any:
    """Correct predictions and sum of losses under one assignment."""
    logits, _ = problem.qapply(
        assignment, variables, batch["image"], **forward_arguments(variables, "batch")
    )
    losses = cross_entropy(logits, batch["label"], 0.0)
    return jnp.sum(jnp.argmax(logits, -1) == batch["label"]), jnp.sum(losses)


def make_forms(problem: Problem) -> dict[str, tuple[Any, list[Any]]]:
    """By name: the jitted program, and the assignments of each of its calls."""
    single = functools.partial(quality, problem)

    def loop(assignments, variables, batch):
        return jax.lax.map(lambda a: single(a, variables, batch), assignments)

    def parts(rows: list) -> list[Any]:
        return [jax.tree.map(lambda leaf, r=r: leaf[r], problem.assignments) for r in rows]

    chunks = [slice(start, start + CHUNK) for start in range(0, problem.count, CHUNK)]
    return {
        "a call for each": (jax.jit(single), parts(list(range(problem.count)))),
        "lax.map": (jax.jit(loop), parts(chunks)),
        "vmap": (jax.jit(jax.vmap(single, in_axes=(0, None, None))), parts(chunks)),
    }


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-8, 8 x 8, 16 assignments")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    args = parser.parse_args()
    depth, image_size, count = (8, 8, 16) if args.quick else (20, 32, 64)
    problem = make_problem(depth, image_size, count)
    held = jax.device_put((problem.variables, problem.batch))
    runs, builds = {}, {}
    for name, (program, calls) in make_forms(problem).items():
        builds[name] = timing.build(program, calls[0], *held)
        compiled = builds[name].compiled
        runs[name] = lambda c=compiled, calls=calls: [c(part, *held) for part in calls]
    runs["evaluate_assignments"] = lambda: evaluate_assignments(
        problem.qapply, problem.assignments, problem.variables, [problem.batch], chunk=CHUNK
    )[:2]
    seconds = timing.time_in_turns(runs, args.rounds)
    base = next(iter(runs))
    print(
        f"{count} assignments of ResNet-{depth}, {IMAGES} images of {image_size} x {image_size}, on"
    )
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'form':22} {'ms each':>8} {'ratio':>6} {'build s':>8} {'MB':>7}")
    for name, values in seconds.items():
        line = f"{name:22} {1e3 * statistics.median(values) / count:8.2f}"
        line += f" {timing.median_ratio(values, seconds[base]):6.3f}"
        if name in builds:
            built = builds[name]
            line += f" {built.seconds:8.2f} {built.temporary_bytes / 1e6:7.1f}"
        print(line)


if __name__ == "__main__":
    main()
