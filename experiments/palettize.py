"""Stores the weights of a finished run as indices of small tables, and evaluates it from them.

    python -m experiments.palettize --config=configs/digits_resnet8.py --workdir=runs/palette \
        --config.checkpoint=runs/float --config.palette.rules="(('head', None), ('.*', 2))"

Weights are clustered by k-means, or, with `palette.epochs`, trained through soft palettes (DKM)
first; the same command then goes on where it was stopped. Activations stay in float. The workdir
holds what other runs leave, too, and the weights as they are stored (palette.npz) with a table of
their sizes (palette.json).
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from aqt_search.training.workdir import read_json
from experiments import results
from experiments.command_line import run_job
from experiments.jobs.palettize import SIZES_FILE, format_sizes, run


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    result = run(config, workdir)
    print(format_sizes(read_json(workdir / SIZES_FILE)))
    results.print_result(result)


if __name__ == "__main__":
    run_job(main)
