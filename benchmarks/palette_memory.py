"""Memory and time of a training step through soft palettes (DKM), as multiples of plain QAT's.

    python -m benchmarks.palette_memory
    python -m benchmarks.palette_memory --seconds 1

The layer is a 3 x 3 convolution of 512 to 512 channels: 2.36 M weights. Memory is the peak by XLA's
own plan (`memory_analysis`); the goal is at most 1.5 times that of QAT at int2. Steps are timed in
turns (`benchmarks.timing`).
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aqt_search as aqs
from aqt_search.palette import Palette, differentiable_palettes, soft_apply
from benchmarks import timing
from benchmarks.peers import NHWC

CHANNELS = 512
PALETTES = (Palette(1), Palette(2), Palette(4), Palette(4, 4))
GOAL = 1.5


def convolve(params: Any, x: jax.Array) -> jax.Array:
    """The layer."""
    return jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=NHWC)


def step_of(forward: Callable) -> Any:
    """One step of gradient descent on `forward(params, x, extra) -> (outputs, extra)`."""

    def loss(params, x, extra):
        outputs, extra = forward(params, x, extra)
        return jnp.mean(jnp.square(outputs)), extra

    def step(params, x, extra):
        gradient, extra = jax.grad(loss, has_aux=True)(params, x, extra)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient), extra

    return jax.jit(step)


def cases(params: Any, x: jax.Array) -> dict[str, tuple[Any, Any]]:
    """By name a step, and what it carries beside the weights."""
    sites = aqs.find_sites(convolve, params, x)
    int2 = aqs.assign(sites, [(".*", {"weight": "int2"})])
    qfun = aqs.quantize(convolve)
    steps = {
        "float": (step_of(lambda p, x, extra: (convolve(p, x), extra)), ()),
        "int2": (step_of(lambda p, x, extra: (qfun(int2, p, x), extra)), ()),
    }
    for palette in PALETTES:
        soft = soft_apply(convolve, differentiable_palettes(sites, [(".*", palette)]))
        rows = jnp.linspace(-1, 1, palette.clusters)[None, :, None]
        centroids = {"kernel": jnp.tile(rows, (1, 1, palette.dimension))}
        step = step_of(lambda p, x, c, soft=soft: soft(p, c, 0.05, x))
        steps[f"DKM {palette.bits} bits x {palette.dimension}"] = step, centroids
    return steps


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="of counted rounds")
    parser.add_argument("--batch", type=int, default=16, help="images of 8 x 8 pixels")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 3, CHANNELS, CHANNELS)), "f4")}
    x = jnp.asarray(rng.normal(size=(options.batch, 8, 8, CHANNELS)), "f4")
    steps = cases(params, x)
    builds = {name: timing.build(step, params, x, more) for name, (step, more) in steps.items()}
    runs = {n: functools.partial(b.compiled, params, x, steps[n][1]) for n, b in builds.items()}
    seconds = timing.time_in_turns(runs, timing.rounds_within(runs, options.seconds))
    print(f"{'step':<16} {'peak MiB':>9} {'of int2':>8} {'ms':>8} {'of int2':>8} {'build s':>8}")
    for name, build in builds.items():
        memory = build.peak_bytes / builds["int2"].peak_bytes
        ratio = timing.median_ratio(seconds[name], seconds["int2"])
        print(
            f"{name:<16} {build.peak_bytes / 2**20:>9.1f} {memory:>8.3f}"
            f" {1e3 * statistics.median(seconds[name]):>8.1f} {ratio:>8.2f} {build.seconds:>8.1f}"
        )
    print(f"goal: memory at most {GOAL} of int2's; {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
