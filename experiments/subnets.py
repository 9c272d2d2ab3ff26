"""Finds subnets of a trained supernet, for any target: no weights are trained.

    python -m experiments.subnets --config=configs/cifar10_16px_fliqnas.py --workdir=runs/subnets \
        --config.data.name=folder:PATH --config.subnets.checkpoint=runs/supernet

The first call judges random subnets and writes a front. A later one with the same workdir and
--config.subnets.target=0.02 (as search.target is given) answers from what was judged, in seconds.
Every point is a plain model: `points/<name>/policy.json` has its architecture and formats, and
`points/<name>/weights` its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from experiments.command_line import run_job
from experiments.jobs.subnets import SUBNETS_FILE, run


def table(found: Mapping[str, Any]) -> str:
    """The subnets found, as aligned text."""
    rows = found["subnets"]
    others = dict.fromkeys(cost for row in rows.values() for cost in row["costs"])
    others.pop("gbops", None)
    titles = "".join(f" {cost:>22}" for cost in others)
    lines = [f"{'subnet':<16} {'test %':>7} {'predicted %':>12} {'GBOPs':>10}{titles}"]
    for name, row in rows.items():
        costs = "".join(f" {row['costs'][cost]:>22.4g}" for cost in others)
        lines.append(
            f"{name:<16} {100 * row['accuracy']:>7.2f} {100 * row['predicted_accuracy']:>12.2f}"
            f" {row['gbops']:>10.4g}{costs}"
        )
    return "\n".join([
        *lines,
        f"predicted by {found['samples']} judged subnets, rank correlation"
        f" {found['rank_correlation']:.2f} on a fifth of them",
    ])  # fmt: skip


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    print(table(run(config, workdir)))
    print(f"\nWritten to {workdir}: {SUBNETS_FILE}, report.html")


if __name__ == "__main__":
    run_job(main)
