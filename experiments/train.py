"""Trains a model in float or under fixed formats (quantization-aware training).

    python -m experiments.train --config=configs/digits_resnet8.py --workdir=runs/int4 \
        --config.formats="((('.*', 'int4'),))"

The same command goes on where an interrupted run stopped. The workdir holds the configuration,
metrics.jsonl, TensorBoard events, checkpoints, the formats of every layer (policy.json) and the
result on the test images (result.json).
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from experiments import results
from experiments.command_line import run_job
from experiments.jobs.train import run


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    results.print_result(run(config, workdir))


if __name__ == "__main__":
    run_job(main)
