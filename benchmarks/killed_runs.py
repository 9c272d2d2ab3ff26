"""Kills and stops a search at random moments, and compares its files with an undisturbed one's.

    python -m benchmarks.killed_runs --folder=/tmp/killed --kills=20 --stops=10

Every signal finds the run at another moment: while it imports, compiles, steps, saves or evaluates.
Five to ten minutes on two CPU cores. Exits with 1 if a file differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
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


def started(folder: Path, workdir: Path) -> subprocess.Popen:
    """The search, whose programs are compiled once, and soon."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "XLA_FLAGS": flags.strip()}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    options = [f"--config.data.data_dir={folder / 'data'}", f"--workdir={workdir}"]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.search", *SEARCH, *options],
        env=os.environ | kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def size_of(path: Path) -> int:
    """Bytes of a file, 0 without one."""
    return path.stat().st_size if path.exists() else 0


def disturb(process: subprocess.Popen, workdir: Path, number: int, rng: random.Random) -> None:
    """Sends a signal at a random time; most often a while after the first new record."""
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


def contents(workdir: Path) -> dict[str, str]:
    """What has to be equal: every file, and the bits of the last checkpoint."""
    found = {name: (workdir / name).read_text() for name in FILES}
    result = json.loads(found["result.json"])
    found["result.json"] = json.dumps({k: v for k, v in result.items() if k not in OF_THE_START})
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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    process = started(options.folder, options.folder / "whole")
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
            process = started(options.folder, workdir)
            if signals:
                disturb(process, workdir, signals.pop(), rng)
            _, err = process.communicate()
            code = process.returncode
            assert code in (0, 130, -signal.SIGKILL, -signal.SIGTERM), err
            steps = [json.loads(line)["step"] for line in whole_lines(workdir / "metrics.jsonl")]
            ends.append((code, steps[-1] if steps else 0))
            print(f"run {runs}: exit {code} at step {ends[-1][1]}", flush=True)
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
