"""Depthwise convolutions as shifted products beside lax's: ratios of time and of build time.

    python -m benchmarks.depthwise                        # about 3 minutes
    python -m benchmarks.depthwise --seconds 1

A cell is the time as shifted products over that of `lax.conv_general_dilated`, in float32; the
time of lax's own stands before it. All programs of a row run in turns (`benchmarks.timing`).
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aqt_search.products.depthwise import shifted_products
from benchmarks import timing
from benchmarks.peers import NHWC


class Size(NamedTuple):
    """Images [batch, pixels, pixels, channels] and a square kernel."""

    batch: int
    pixels: int
    channels: int
    taps: int = 3
    stride: int = 1


SIZES = (
    Size(128, 16, 32), Size(128, 8, 96), Size(128, 4, 192), Size(128, 32, 16),
    Size(128, 16, 32, stride=2), Size(128, 32, 16, stride=2), Size(128, 16, 96, stride=2),
    Size(128, 8, 96, taps=5), Size(16, 14, 96, taps=7), Size(1, 112, 32),
)  # fmt: skip


def with_gradients(convolve: Callable) -> Callable:
    """The result and both gradients, of a gradient of ones."""

    def run(x, w):
        y, transpose = jax.vjp(convolve, x, w)
        return y, *transpose(jnp.ones_like(y))

    return run


def ratios(size: Size, seconds: float) -> list[str]:
    """The cells of a row."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(size.batch, size.pixels, size.pixels, size.channels)), "f4")
    w = jnp.asarray(rng.normal(size=(size.taps, size.taps, 1, size.channels)), "f4")
    lax_form = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(size.stride,) * 2, padding="SAME",
        dimension_numbers=NHWC, feature_group_count=size.channels,
    )  # fmt: skip
    params = jax.make_jaxpr(lax_form)(x, w).eqns[0].params
    shifted = functools.partial(shifted_products, params=params)
    cells = []
    for derived in (lambda form: form, with_gradients):
        forms = {"lax": derived(lax_form), "shifted": derived(shifted)}
        builds = {name: timing.build(jax.jit(form), x, w) for name, form in forms.items()}
        runs = {name: functools.partial(b.compiled, x, w) for name, b in builds.items()}
        found = timing.time_in_turns(runs, timing.rounds_within(runs, seconds))
        cells.append(f"{1e3 * statistics.median(found['lax']):.1f} ms")
        cells.append(f"{timing.median_ratio(found['shifted'], found['lax']):.3f}")
        cells.append(f"{builds['lax'].seconds:.1f} -> {builds['shifted'].seconds:.1f} s")
    return cells


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8, help="of counted rounds per cell")
    args = parser.parse_args()
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    head = ["forward", "ratio", "build", "fwd + bwd", "ratio", "build"]
    print(f"{'images, kernel, stride':34}", *(f"{cell:>13}" for cell in head))
    for size in SIZES:
        shape = f"{size.batch} x {size.pixels} x {size.pixels} x {size.channels}"
        title = f"{shape}, {size.taps} x {size.taps}, {size.stride}"
        print(f"{title:34}", *(f"{c:>13}" for c in ratios(size, args.seconds)), flush=True)


if __name__ == "__main__":
    main()
