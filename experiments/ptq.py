"""Quantizes the weights of a finished run without training, step by step.

    python -m experiments.ptq --config=configs/digits_resnet8.py --workdir=runs/ptq \
        --config.checkpoint=runs/float --config.formats="((('.*', 'int4'),))" \
        --config.ptq.steps="('fold_batch_norm', 'equalize', 'adaround', 'correct_bias')"

The table printed, and ptq.json, have the accuracy on held-out images after every step, and the
sites that a step had to leave. The workdir holds what other runs leave, too: the result on the test
images, the formats, and in `quantized` the weights with their static bounds.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections

from aqt_search.training.workdir import read_json
from experiments import results
from experiments.command_line import run_job
from experiments.jobs.ptq import PTQ_FILE, format_steps, run


def main(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Runs the job of the command line."""
    result = run(config, workdir)
    print(format_steps(read_json(workdir / PTQ_FILE)["steps"]))
    results.print_result(result)


if __name__ == "__main__":
    run_job(main)
