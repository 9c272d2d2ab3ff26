"""What the weights of a supernet are worth to its subnets.

    python -m benchmarks.supernet_quality --supernet=runs/supernet --points=12 --policies=runs/alone

The smallest, the largest and random subnets in random formats: test accuracy with BatchNorm's
statistics estimated for each, and with those of the largest, which is what one set of running
statistics would be. With --policies the subnets are written there, each to be trained alone:

    for n in runs/alone/*; do python -m experiments.train --config=THE_SUPERNETS \
        --config.policy=$n/policy.json --workdir=$n/run; done

and where those runs have ended, the same command tells how both rank the subnets. With
--subnets=runs/subnets (of experiments.subnets) it compares what the predictor found with random
search: for every point found, the best of as many random subnets that cost no more. With
--trained=runs/alone, a trained largest network, it cuts narrow subnets out of that, as it is and
sorted by importance.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from scipy.stats import spearmanr

import aqt_search as aqs
from aqt_search.training.evaluation import StaticEvaluation, evaluate
from aqt_search.training.parallel import release_programs
from aqt_search.training.workdir import CONFIG_FILE, read_json, write_json
from experiments import finished_run, from_config, results
from experiments.architecture import ARCHITECTURE, FORMATS
from experiments.job import INPUTS, JOB
from experiments.jobs import subnets
from experiments.jobs.supernet import most_bits
from experiments.subnet import Subnet, subnet_of


def setting_of(folder: Path) -> subnets.Setting:
    """The supernet in a workdir, by the configuration that lies there."""
    there = read_json(folder / CONFIG_FILE)
    config = ml_collections.ConfigDict({k: v for k, v in there.items() if k not in (INPUTS, JOB)})
    config.subnets.checkpoint = str(folder)
    return subnets.load(config, from_config.load_images(config))


def cut_out(setting: subnets.Setting, choices: np.ndarray, variables: Any) -> Subnet:
    """A point [decisions] as a model of its own."""
    space = setting.space
    assert space.net is not None
    return subnet_of(
        setting.parts, space.net, np.asarray(space.architecture(choices)),
        space.concrete_assignment(choices), variables, np.asarray(space.active(choices)),
        setting.matrices,
    )  # fmt: skip


def accuracy_of(setting: subnets.Setting, subnet: Subnet, own_statistics: bool) -> float:
    """In percent, with statistics of its own or those that its variables have."""
    config, parts = setting.config, subnet.parts
    if own_statistics:
        judged = results.estimated(config, parts, subnet.formats, subnet.variables)
    else:
        qapply = from_config.quantized(parts.model)
        judged = StaticEvaluation(qapply, subnet.formats, subnet.variables)
    batches = from_config.evaluation_batches(config, parts.images, "test")
    accuracy = 100 * evaluate(*judged, batches).accuracy
    release_programs()  # of this subnet alone
    return accuracy


def with_statistics_of_the_largest(setting: subnets.Setting) -> Mapping[str, Any]:
    """The supernet's variables with BatchNorm statistics of the largest subnet in most bits."""
    parts, space = setting.parts, setting.space
    formats = space.concrete_assignment(most_bits(space))
    found = results.estimated(setting.config, parts, formats, setting.variables)
    return {**setting.variables, "batch_stats": found.variables["own"]["batch_stats"]}


def points_of(setting: subnets.Setting, count: int) -> dict[str, np.ndarray]:
    """The two ends in most bits, and random points: [decisions] each."""
    space = setting.space
    assert space.net is not None
    largest = most_bits(space)
    smallest = np.concatenate([space.net.smallest, largest[len(space.net.smallest) :]])
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, space.mask.sum(1), (count, len(space.mask)))
    return {"largest": largest, "smallest": smallest} | {
        f"random_{n}": point for n, point in enumerate(drawn, start=1)
    }


def write_policy(setting: subnets.Setting, subnet: Subnet, folder: Path) -> None:
    """What `experiments.train --config.policy=` reads."""
    assert subnet.architecture is not None
    formats = results.policy_json(subnet.formats)
    policy = {ARCHITECTURE: dict(subnet.architecture), FORMATS: formats}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / results.POLICY_FILE, policy)


def compare_statistics(setting: subnets.Setting, count: int, policies: Path | None) -> None:
    """Prints every point's accuracies, and how those of points trained alone rank them."""
    shared, mine, alone = with_statistics_of_the_largest(setting), [], []
    titles = ("GBOPs", "own statistics", "of the largest", "alone")
    print(f"{'subnet':12} {titles[0]:>9} {titles[1]:>15} {titles[2]:>15} {titles[3]:>7}")
    for name, choices in points_of(setting, count).items():
        subnet = cut_out(setting, choices, setting.variables)
        own = accuracy_of(setting, subnet, own_statistics=True)
        running = accuracy_of(setting, cut_out(setting, choices, shared), own_statistics=False)
        trained = None
        if policies is not None:
            write_policy(setting, subnet, policies / name)
            result = policies / name / "run" / results.RESULT_FILE
            trained = 100 * read_json(result)["accuracy"] if result.exists() else None
        if trained is not None and name.startswith("random"):
            mine.append(own)
            alone.append(trained)
        told = "" if trained is None else f"{trained:.2f}"
        price = setting.costs.of_many(choices[None])[0]
        print(f"{name:12} {price:9.5f} {own:15.2f} {running:15.2f} {told:>7}", flush=True)
    if len(mine) > 2:
        correlation = spearmanr(mine, alone).statistic
        print(f"rank correlation of {len(mine)} random subnets with those trained alone:"
              f" {correlation:.3f}")  # fmt: skip


def compare_with_random_search(setting: subnets.Setting, workdir: Path) -> None:
    """Prints, for every point found, the best random subnet that costs no more."""
    samples = read_json(workdir / subnets.SAMPLES_FILE)
    drawn, judged = np.array(samples["choices"]), np.array(samples["accuracies"])
    prices = setting.costs.of_many(drawn)
    told = read_json(workdir / subnets.SUBNETS_FILE)
    print(f"predictor's rank correlation on samples held out: {told['rank_correlation']:.3f}")
    print(f"{'point':12} {'GBOPs':>9} {'found':>7} {'best of random':>15} {'GBOPs':>9}")
    for name in told["subnets"]:
        found = read_json(workdir / "points" / name / results.RESULT_FILE)
        fits = prices <= found["gbops"]
        if not fits.any():
            print(f"{name:12} {found['gbops']:9.5f} {100 * found['accuracy']:7.2f} {'none':>15}")
            continue
        best = drawn[fits][np.argmax(judged[fits])]
        other = accuracy_of(setting, cut_out(setting, best, setting.variables), True)
        print(f"{name:12} {found['gbops']:9.5f} {100 * found['accuracy']:7.2f} {other:15.2f}"
              f" {setting.costs.of_many(best[None])[0]:9.5f}", flush=True)  # fmt: skip


def compare_sorted(setting: subnets.Setting, trained: Path, count: int) -> None:
    """Prints accuracies of random widths of a network that was trained as a whole, in int8."""
    space = setting.space
    net = space.net
    assert net is not None
    images = setting.parts.images
    plain = finished_run.load(setting.config, trained, images).variables
    by_order = {"as trained": plain, "sorted": dict(net.sort(plain))}
    rng, most = np.random.default_rng(0), most_bits(space)
    found: dict[str, list[float]] = {name: [] for name in by_order}
    for _ in range(count):
        choices = most.copy()
        for number, decision in enumerate(net.decisions):
            if decision.kind in ("width", "expansion"):
                choices[number] = rng.integers(len(decision.options))
        for name, variables in by_order.items():
            cut = cut_out(setting._replace(matrices=()), choices, variables)
            cut = cut._replace(formats=aqs.assign(cut.parts.sites, [(".*", "int8")]))
            found[name].append(accuracy_of(setting, cut, own_statistics=True))
    for name, accuracies in found.items():
        print(f"{count} random widths of {trained.name}, {name}: mean {np.mean(accuracies):.2f},"
              f" {' '.join(f'{a:.1f}' for a in accuracies)}")  # fmt: skip


def main() -> None:
    """Runs the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--supernet", type=Path, required=True, help="workdir of a supernet")
    parser.add_argument("--points", type=int, default=12, help="random subnets")
    parser.add_argument("--policies", type=Path, help="folder of subnets to train alone")
    parser.add_argument("--trained", type=Path, help="workdir of the largest network, trained")
    parser.add_argument("--subnets", type=Path, help="workdir of experiments.subnets")
    args = parser.parse_args()
    setting = setting_of(args.supernet)
    compare_statistics(setting, args.points, args.policies)
    if args.trained is not None:
        compare_sorted(setting, args.trained, 8)
    if args.subnets is not None:
        compare_with_random_search(setting, args.subnets)


if __name__ == "__main__":
    main()
