"""Trains a supernet: one set of weights whose subnets all work, in all formats (QFA).

    python -m experiments.supernet --config=configs/cifar10_16px_fliqnas.py \
        --workdir=runs/supernet --config.data.name=folder:PATH

config.search.architecture and config.search.space say what subnets there are, config.supernet how
they are trained. experiments.subnets finds those for any target.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from experiments import results
from experiments.command_line import run_job
from experiments.jobs.supernet import run


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    results.print_result(run(config, workdir))


if __name__ == "__main__":
    run_job(main)
