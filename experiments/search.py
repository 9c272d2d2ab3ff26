"""Searches the formats of every layer while it trains the weights: one run, no retraining.

    python -m experiments.search --config=configs/digits_resnet8.py --workdir=runs/search

The workdir holds, beside what experiments.train writes, the formats found (policy.json), the space
(space.json) and the policy's probabilities over time (probabilities.jsonl).
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from experiments import results
from experiments.command_line import run_job
from experiments.jobs.search import run


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    results.print_result(run(config, workdir))


if __name__ == "__main__":
    run_job(main)
