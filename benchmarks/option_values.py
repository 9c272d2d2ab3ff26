"""Values of formats by gradients beside those measured one at a time: rank correlation and time.

    for by in scores one_at_a_time; do
        python -m experiments.allocate --config=CONFIG --config.checkpoint=RUN \
            --config.allocate.by=$by --workdir=runs/by_$by
    done
    python -m benchmarks.option_values runs/by_scores runs/by_one_at_a_time

Times are those that the jobs took, with compilation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr


def values_of(workdir: Path) -> tuple[dict[tuple[str, str], float], float]:
    """Values by decision and option, and the seconds that they took."""
    found = json.loads((workdir / "values.json").read_text())
    table = {
        (decision, option): value
        for decision, options in found["values"].items()
        for option, value in options.items()
    }
    return table, found["seconds"]


def correlations(one: dict, other: dict) -> dict[str, float]:
    """Spearman's rho over all options but each decision's best, which is the reference of both."""
    keys = [key for key in one if other[key] != 0]
    rho = {"all": spearmanr([one[k] for k in keys], [other[k] for k in keys]).statistic}
    for option in dict.fromkeys(option for _, option in keys):
        own = [key for key in keys if key[1] == option]
        if len(own) > 2:
            rho[option] = spearmanr([one[k] for k in own], [other[k] for k in own]).statistic
    return rho


def main() -> None:
    """Runs the comparison of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", type=Path, help="workdir of experiments.allocate by scores")
    parser.add_argument("measured", type=Path, help="the same by one_at_a_time")
    args = parser.parse_args()
    (scores, seconds), (measured, measured_seconds) = map(values_of, (args.scores, args.measured))
    print(f"{len(scores)} options; {seconds:.1f} s by gradients, {measured_seconds:.1f} s measured")
    for option, rho in correlations(scores, measured).items():
        print(f"Spearman's rho, {option:10} {np.round(rho, 3):6}")


if __name__ == "__main__":
    main()
