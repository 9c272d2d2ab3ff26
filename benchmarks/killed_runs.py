"""Kills and stops a search at random moments, and compares its files with an undisturbed one's.

    python -m benchmarks.killed_runs --folder=/tmp/killed --kills=20 --stops=10
    python -m benchmarks.killed_runs --folder=/tmp/killed2 --kills=20 --stops=10 --processes=2

Every signal finds the run at another moment: while it imports, compiles, steps, saves or evaluates.
Of several processes, on loopback, one is hit, and the others have to end within a minute; the
undisturbed run is then one process with as many devices. Five to ten minutes on two CPU cores, 15
to 30 for two processes. Exits with 1 if a file differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STEPS = 80
SEARCH = (
    "--config=configs/digits_resnet8.py", "--config.model.width=0.25", "--config.batch_size=32",
    f"--config.epochs={STEPS / 40}", "--config.optimizer.warmup_epochs=0.0",
    "--config.log_every=3", "--config.checkpoint_every=7", "--config.search.searcher=critic",
    "--config.search.target=1.5", "--config.evaluation.calibration_batches=2",
)  # fmt: skip
FILES = ("metrics.jsonl", "probabilities.jsonl", "policy.json", "space.json", "sites.json",
         "weights.json", "config.json", "result.json")  # fmt: skip
OF_THE_START = ("name", "seconds", "command")  # what a result tells of how it was run
SLOWEST_START = 20.0  # seconds until a start makes its first step


def started(folder: Path, workdir: Path, devices: int, *flags: str) -> subprocess.Popen:
    """The search, whose programs are compiled once, and soon."""
    own = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "XLA_FLAGS": own}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    options = [f"--config.data.data_dir={folder / 'data'}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.search", *SEARCH, *options],
        env=os.environ | kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def started_together(folder: Path, workdir: Path, count: int) -> list[subprocess.Popen]:
    """The search by so many processes, with one device each."""
    if count == 1:
        return [started(folder, workdir, 1)]
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        where = f"--coordinator=127.0.0.1:{port.getsockname()[1]}"
    flags = [where, f"--processes={count}", "--wait_seconds=30"]
    return [started(folder, workdir, 1, *flags, f"--process={n}") for n in range(count)]


def size_of(path: Path) -> int:
    """Bytes of a file, 0 without one."""
    return path.stat().st_size if path.exists() else 0


def disturb(
    processes: Sequence[subprocess.Popen], workdir: Path, number: int, rng: random.Random
) -> None:
    """Sends one of them a signal at a random time; most often after the first new record."""
    process = rng.choice(processes)
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + rng.uniform(0, SLOWEST_START)
    before = size_of(metrics)
    if rng.random() < 0.75:
        while process.poll() is None and size_of(metrics) <= before:
            time.sleep(0.005)
        deadline = time.monotonic() + rng.uniform(0, 1.5)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)


# Of a process that has lost another one: told by a collective, or by jax's own watch.
LOST = (1, -signal.SIGABRT)


def ends_of(processes: Sequence[subprocess.Popen]) -> list[int]:
    """The exit codes, all of them expected: none but the one that was hit ends in its own way."""
    codes = []
    for process in processes:
        _, err = process.communicate(timeout=600)
        codes.append(process.returncode)
        expected = (0, 130, -signal.SIGKILL, -signal.SIGTERM, *(LOST if processes[1:] else ()))
        assert process.returncode in expected, err
        if process.returncode == 1:
            assert "another process" in err or "not all of the others came" in err, err
    return codes


def contents(workdir: Path) -> dict[str, str]:
    """What has to be equal: every file, and the bits of the last checkpoint."""
    found = {name: (workdir / name).read_text() for name in FILES}
    result = json.loads(found["result.json"])
    found["result.json"] = json.dumps({k: v for k, v in result.items() if k not in OF_THE_START})
    config = json.loads(found["config.json"])
    config["job"].pop("command")
    found["config.json"] = json.dumps(config)
    manifest = json.loads((workdir / f"checkpoints/step_{STEPS:09d}/manifest.json").read_text())
    found["leaves"] = json.dumps(manifest["content"]["leaves"])
    found["left behind"] = " ".join(sorted(path.name for path in workdir.rglob("*.tmp")))
    found["left behind"] += " ".join(sorted(path.name for path in workdir.rglob(".unfinished*")))
    return found


def main() -> None:
    """Runs the campaign of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    process = started(options.folder, options.folder / "whole", options.processes)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    whole = contents(options.folder / "whole")
    signals = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.stops
    rng.shuffle(signals)
    runs, ends = 0, []
    while signals:
        runs += 1
        workdir = options.folder / f"disturbed{runs}"
        code = None
        while code != 0:
            processes = started_together(options.folder, workdir, options.processes)
            if signals:
                disturb(processes, workdir, signals.pop(), rng)
            codes = ends_of(processes)
            code = codes[0]
            steps = [json.loads(line)["step"] for line in whole_lines(workdir / "metrics.jsonl")]
            ends.append((code, steps[-1] if steps else 0))
            told = ", ".join(map(str, codes))
            print(f"run {runs}: exit {told} at step {ends[-1][1]}", flush=True)
        found = contents(workdir)
        differing = [name for name in whole if found[name] != whole[name]]
        if differing:
            sys.exit(f"{workdir} differs from an undisturbed run in {', '.join(differing)}")
    print(f"{len(ends)} starts of {runs} runs: all files equal those of an undisturbed run")


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that its writer had ended."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


if __name__ == "__main__":
    main()
