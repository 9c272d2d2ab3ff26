"""Measures how much each site of a trained model suffers from each format: trains nothing.

    python -m experiments.sensitivity --config=configs/digits_resnet8.py --workdir=runs/alone \
        --config.sensitivity.checkpoint=runs/float

The weights are those of a finished run of experiments.train or experiments.search with the same
model, data and seed; the images are held out of its training. The workdir holds the configuration,
sensitivity.json and sensitivity.png.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from experiments.command_line import run_job
from experiments.jobs.sensitivity import FIGURE_FILE, SENSITIVITY_FILE, run, sensitivity_table


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    print(sensitivity_table(run(config, workdir)))
    print(f"\nWritten to {workdir}: {SENSITIVITY_FILE}, {FIGURE_FILE}")


if __name__ == "__main__":
    run_job(main)
