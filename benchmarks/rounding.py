"""What AdaRound and GPTQ of all sites of a ResNet-20 take, at 4-bit weights and 8-bit activations.

    python -m benchmarks.rounding              # ResNet-20, 1000 images of 32 x 32: some minutes
    python -m benchmarks.rounding --quick      # smaller, to see that it runs

Weights are initial ones and images normal noise: time does not depend on what is in them, but for
AdaRound's last search, whose rounds stop when no element gains. The goal is at most 5 minutes for
AdaRound; a float training step of the same network tells how fast the machine is.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import aqt_search as aqs
from aqt_search import ptq
from aqt_search.models.resnet import resnet
from aqt_search.numerics.calibration import mse
from aqt_search.numerics.quantizer import Quantizer
from benchmarks.low_bit_step import make_programs
from benchmarks.search_step import runner
from benchmarks.timing import time_in_turns
from experiments.allocator import keep_freed_memory

ROUNDINGS: dict[str, Callable] = {"adaround": ptq.adaround, "gptq": ptq.gptq}
GOAL = 300.0  # seconds


def network(depth: int, image_size: int, batches: int) -> tuple[Callable, Any, Sequence[Any]]:
    """(apply, variables, images)."""
    model = resnet(depth, num_classes=10)
    shape = batches, 250, image_size, image_size, 3
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images[0, :1])
    return functools.partial(model.apply, train=False), variables, list(images)


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-8, 250 images of 16 x 16")
    args = parser.parse_args()
    keep_freed_memory()  # as every job does
    depth, size, batches = (8, 16, 1) if args.quick else (20, 32, 4)
    apply, variables, images = network(depth, size, batches)
    sites = aqs.find_sites(apply, variables, images[0])
    rules = [(".*", {"weight": Quantizer("int4", calibration=mse()), "activation": "int8"})]
    calibrated = ptq.calibrate(apply, aqs.assign(sites, rules), variables, images)
    print(f"ResNet-{depth}, {len(sites)} sites, {250 * batches} images of {size} x {size}")
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    step = runner(make_programs(depth, 128, size)["float32"])
    seconds = time_in_turns({"step": step}, 5)["step"]
    print(f"float32 training step, batch 128: {statistics.median(seconds):.3f} s")
    for name, rounding in ROUNDINGS.items():
        start, start_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(rounding(apply, *calibrated, variables, images))
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        goal = f" (goal: at most {GOAL:.0f} s)" if name == "adaround" else ""
        print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU{goal}")


if __name__ == "__main__":
    main()
