"""Steps of runs over several processes: what they send, what they wait, and a plan for 256 chips.

    python -m benchmarks.weak_scaling                # 1, 2 and 4 processes on this machine
    python -m benchmarks.weak_scaling --quick
    python -m benchmarks.weak_scaling --paper        # the plan alone

Every process has one device and the same share of the batch, and a core of its own while there are
enough of them. In each round all of them take a step of their own, each as a run of one process,
and then one together, started at the same moment: the ratio is what being one run costs. The bytes
that a step sends are those of the collectives in the compiled program; a ring takes 2 (n - 1) / n
of them over each link for a sum.

On paper, the time of a step is that of the arithmetic (at the model FLOPs utilization that is
stated), then that of the sums: nothing is assumed to overlap. Hence these are lower bounds of the
efficiency of weak scaling by this model, t(1) / t(n).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aqt_search import roofline
from aqt_search.training import parallel
from benchmarks import search_step, timing
from experiments.connection import connect

PROGRAMS = ("float32 training", "int8 training", "search, 4 formats, by scores")
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")
_SHAPE = re.compile(r"(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


class Sent(NamedTuple):
    """The collectives of a step."""

    count: int
    bytes: int  # of their operands


def sent_by(compiled_text: str) -> Sent:
    """What a compiled step sums or gathers over the replicas, from its optimized HLO."""
    count = total = 0
    for shapes, _ in _COLLECTIVE.findall(compiled_text):
        count += 1
        for dtype, sizes in _SHAPE.findall(shapes):
            total += _BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
    return Sent(count, total)


def alone(program: search_step.Program) -> Callable[[], Any]:
    """`search_step.runner` on the device of this process only."""
    step = jax.pmap(program.step, parallel.AXIS, devices=jax.local_devices(), donate_argnums=(0,))
    state, inputs, *batches = jax.tree.map(
        lambda leaf: np.asarray(leaf)[None], (program.state, program.inputs, *program.batches)
    )

    def run():
        nonlocal state
        state, metrics = step(state, inputs, *batches)
        return state, metrics

    return run


def seconds_from_here(run: Callable[[], Any]) -> float:
    """Of a run that all processes start at the same moment."""
    parallel.value_of(parallel.largest(0))
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(depth: int, batch_size: int, image_size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and collectives of the steps of this run, `batch_size` images a process."""
    found, uncounted = {}, timing.UNCOUNTED_ROUNDS
    for program in search_step.make_programs(depth, batch_size, image_size):
        if program.name not in PROGRAMS:
            continue
        sent = sent_by(search_step.build(program).compiled.as_text() or "")
        runs = alone(program), search_step.runner(program)
        seconds = [[seconds_from_here(run) for run in runs] for _ in range(rounds + uncounted)]
        own, together = zip(*seconds[uncounted:])
        found[program.name] = sent._asdict() | {
            "alone": 1e3 * statistics.median(own),
            "together": 1e3 * statistics.median(together),
            "ratio": timing.median_ratio(together, own),
        }
    return found


def started(count: int, arguments: Sequence[str]) -> list[subprocess.Popen]:
    """This benchmark's own processes, one device each."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{port.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.weak_scaling", *arguments]
            + ["--child", where, str(count), str(number)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip


def print_measured(counts: Sequence[int], arguments: Sequence[str]) -> None:
    """Runs every number of processes and prints the steps of the first."""
    print(f"{'program':30} {'processes':>9} {'ms':>8} {'alone':>8} {'ratio':>6}", end="")
    print(f" {'collectives':>11} {'kB':>8} {'kB a link':>9}")
    for count in counts:
        outputs = [process.communicate()[0] for process in started(count, arguments)]
        for name, row in json.loads(outputs[0].splitlines()[-1]).items():
            link = 2 * (count - 1) / count * row["bytes"]
            print(
                f"{name:30} {count:9} {row['together']:8.1f} {row['alone']:8.1f}"
                f" {row['ratio']:6.2f} {row['count']:11} {row['bytes'] / 1e3:8.0f}"
                f" {link / 1e3:9.0f}"
            )


class Fabric(NamedTuple):
    """Chips and the links between them, published figures."""

    chip: str
    near: int  # chips that the fast links reach
    near_bandwidth: float  # bytes per second of a chip, in one direction
    far_bandwidth: float  # beyond them
    hop_seconds: float  # of one step of a ring


# H100: NVLink 4, 900 GB/s in both directions among 8, ConnectX-7 of 400 Gb/s a GPU beyond (NVIDIA
# DGX H100 data sheet). TPU v5e: 1,600 Gb/s of interchip links a chip, in both directions, up to 256
# in a slice; v5p: 4,800 Gb/s (Google Cloud documentation, pages of both). A microsecond a hop is
# assumed within, five over the network.
FABRICS = {
    "h100": Fabric("h100", 8, 450e9, 50e9, 5e-6),
    "tpu_v5e": Fabric("tpu_v5e", 256, 100e9, 100e9, 1e-6),
    "tpu_v5p": Fabric("tpu_v5p", 8960, 300e9, 300e9, 1e-6),
}


class Workload(NamedTuple):
    """A training step on one chip."""

    name: str
    macs: float  # of an image's forward pass
    parameters: float
    batch: int  # images on a chip
    forward_passes: float  # in units of one forward: 3 for training, more with judged samples


# MACs and parameters: He et al. 2016 (ResNet-50), Dosovitskiy et al. 2021 (ViT-B/16).
WORKLOADS = (
    Workload("ResNet-50 training", 4.09e9, 25.6e6, 128, 3),
    Workload("ResNet-50 search, judged", 4.09e9, 25.6e6, 128, 4),
    Workload("ViT-B/16 training", 17.6e9, 86.6e6, 64, 3),
)
UTILIZATION = 0.4  # of the peak of bfloat16: assumed


def seconds_of_sum(size: float, chips: int, fabric: Fabric) -> float:
    """A sum of `size` bytes over rings: within the fast links, then between their groups.

    2 (n - 1) / n size / bandwidth for each ring of n (Patarasuk and Yuan, JPDC 69(2), 2009), and
    2 (n - 1) hops; between groups every chip sums its own share of the bytes.
    """
    near = min(chips, fabric.near)
    far = chips // near
    inside = 2 * (near - 1) / near * size / fabric.near_bandwidth
    outside = 2 * (far - 1) / far * size / near / fabric.far_bandwidth
    return inside + outside + 2 * (near + far - 2) * fabric.hop_seconds


def print_paper(counts: Sequence[int]) -> None:
    """Efficiencies of weak scaling by the model above."""
    head = "".join(f"{count:>8}" for count in counts)
    print(
        f"\nOn paper: efficiency at so many chips, utilization {UTILIZATION:g} of bfloat16's peak"
    )
    print(f"{'step':26} {'chip':8} {'ms':>7}{head}")
    for workload in WORKLOADS:
        for name, fabric in FABRICS.items():
            rates: Mapping[str, Any] = roofline.CHIPS[fabric.chip].rates._asdict()
            operations = 2 * workload.macs * workload.forward_passes * workload.batch
            alone = operations / (UTILIZATION * rates["bf16"])
            sizes = 4 * workload.parameters  # gradients in float32
            shares = [alone / (alone + seconds_of_sum(sizes, n, fabric)) for n in counts]
            told = "".join(f"{share:8.3f}" for share in shares)
            print(f"{workload.name:26} {name:8} {1e3 * alone:7.1f}{told}")


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-8, 16 x 16, batch 16")
    parser.add_argument("--paper", action="store_true", help="run nothing")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = (8, 16, 16) if args.quick else (20, 32, 32)
    if args.child:
        where, count, number = args.child[0], int(args.child[1]), int(args.child[2])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})  # before XLA starts its threads
        connect(where, count, number)
        print(json.dumps(measure(*size, args.rounds)))
        return
    if not args.paper:
        cores = len(os.sched_getaffinity(0))
        print(
            f"ResNet-{size[0]}, {size[2]} x {size[2]}, {size[1]} images a process, {cores} cores,"
        )
        print(f"jax {jax.__version__}")
        own = [*(["--quick"] if args.quick else []), f"--rounds={args.rounds}"]
        print_measured(args.processes, own)
    print_paper([1, 8, 32, 64, 256])


if __name__ == "__main__":
    main()
