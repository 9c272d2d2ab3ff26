"""Reads the folder a sweep leaves behind: one record per point, checked on the way in."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqt_search.report.architecture_file import (
    ElasticDecision,
    read_choices,
    read_elastic,
    read_whole_names,
)
from aqt_search.report.checked_json import (
    ReportError,
    number_of,
    read_object,
    read_steps,
    value_of,
)
from aqt_search.report.weight_file import WeightRow, read_weights
from aqt_search.training import storage

KINDS = (
    "float", "uniform", "search", "retrained", "random", "ptq", "palette", "supernet", "subnet",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SiteFacts:
    """What the report needs to know of a site: its kind, MACs and number of weights."""

    kind: str
    macs: int
    weight_size: int


@dataclasses.dataclass(frozen=True)
class Decision:
    """One choice of the search: the sites it covers and the names of its options."""

    sites: tuple[str, ...]
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One point of a sweep. A failed point has an `error` and none of the measurements.

    Accuracies are fractions (NaN where there is none): `train_accuracy` of the last training steps,
    `train_split_accuracy` of the final model on training images that were not augmented.
    final_entropy is in nats (mean over decisions). `gbops` = 1e-9 * sum over sites of MACs * lhs
    bits * rhs bits; `costs` holds it, `weight_bytes` and any other cost by name, `targets` what a
    search aimed at, the primary cost first. `series` is the front that the point belongs to
    (its kind where the sweep named none), `pair` the search whose formats a retrained point has.
    `policy` maps a site to the formats of (lhs, rhs), None for an operand that is not quantized, in
    network order as `sites`. `weights` holds statistics of the weights by site, {} for runs that
    did not write any. In all of these the sites of a model that was cut out of a larger one have
    the names that they have there.
    """

    name: str
    kind: str
    seed: int
    series: str
    error: str | None = None
    model: str = ""
    data: str = ""
    accuracy: float = math.nan
    loss: float = math.nan
    train_accuracy: float = math.nan
    train_split_accuracy: float = math.nan
    gbops: float = math.nan
    weight_bytes: float = math.nan
    target_gbops: float | None = None
    final_entropy: float | None = None
    steps: int = 0
    seconds: float = math.nan
    command: str = ""
    without_retraining: bool = False
    width: float | None = None
    pair: str | None = None
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    policy: Mapping[str, tuple[str | None, str | None]] = dataclasses.field(default_factory=dict)
    sites: Mapping[str, SiteFacts] = dataclasses.field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    probabilities: tuple[tuple[int, Mapping[str, tuple[float, ...]]], ...] = ()
    space: Mapping[str, Decision] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, WeightRow] = dataclasses.field(default_factory=dict)
    # Of a model that was cut out of a larger one: what was chosen, by decision, and what there was
    # to choose ({} of older runs of experiments.subnets, which did not tell).
    architecture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    elastic: Mapping[str, ElasticDecision] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> str:
        """The name without its seed: runs that differ only in the seed share it."""
        return re.sub(r"_seed\d+$", "", self.name)

    @property
    def primary_target(self) -> float | None:
        """The target of the cost that the search's metrics call "cost"."""
        return next(iter(self.targets.values()), self.target_gbops)

    @property
    def gap(self) -> float:
        """Generalization gap: accuracy on the training images less that on the test images."""
        return self.train_split_accuracy - self.accuracy

    @property
    def policy_path(self) -> str:
        """The formats file, relative to the sweep's folder."""
        return f"points/{self.name}/policy.json"


def load_records(workdir: str | Path) -> tuple[Record, ...]:
    """All points that finished or failed: cheapest first, seeds side by side, failed ones last.

    A folder without a result.json is a point that has not finished: it is left out here and named
    by `unfinished_points`.

    Raises:
      ReportError: `workdir` is no folder, or a file in it is missing, broken or contradictory; the
        message names the file.
    """
    workdir = storage.as_path(workdir)
    if not storage.is_folder(workdir):
        raise ReportError(f"{workdir} is no folder; give the --workdir of a sweep")
    records = [
        _read_record(path.parent) for path in storage.matching(workdir, "points/*/result.json")
    ]
    cheapest: dict[str, float] = {}
    for record in records:
        if record.error is None:
            cheapest[record.group] = min(record.gbops, cheapest.get(record.group, math.inf))
    return tuple(
        sorted(
            records,
            key=lambda r: (r.error is not None, cheapest.get(r.group, 0), r.group, r.seed, r.name),
        )
    )


def unfinished_points(workdir: str | Path) -> tuple[str, ...]:
    """Names of the points that have a folder but no result yet."""
    there = storage.matching(storage.as_path(workdir), "points/*")
    folders = sorted(path for path in there if storage.is_folder(path))
    return tuple(path.name for path in folders if not storage.exists(path / "result.json"))


def load_config(workdir: str | Path) -> Mapping[str, Any]:
    """The exact configuration of the sweep. Raises ReportError if it cannot be read."""
    return read_object(storage.as_path(workdir) / "config.json")


def bits_of_format(name: str) -> int | None:
    """Bits of a format from its name, or None where the name does not tell.

    int4 -> 4, uint8 -> 8, eXmY -> 1 + X + Y, bf16 and fp16 -> 16.
    """
    if match := re.fullmatch(r"u?int(\d+)|[a-z]*fp?(\d+)", name):
        return int(match[1] or match[2])
    if match := re.fullmatch(r"e(\d+)m(\d+)[a-z]*", name):
        return 1 + int(match[1]) + int(match[2])
    return None


def _read_record(folder: Path) -> Record:
    path = folder / "result.json"
    result = read_object(path)
    name = value_of(result, "name", str, path)
    kind = value_of(result, "kind", str, path)
    seed = value_of(result, "seed", int, path)
    series = value_of(result, "series", str, path, missing="") or kind
    if name != folder.name:
        raise ReportError(f"{path}: the name {name!r} must be that of its folder, {folder.name!r}")
    if kind not in KINDS:
        raise ReportError(f"{path}: the kind {kind!r} must be one of {', '.join(KINDS)}")
    if result.get("error") is not None:
        # The other files of a failed point may be half written, so they are not read.
        error = value_of(result, "error", str, path)
        return Record(name=name, kind=kind, seed=seed, series=series, error=error)
    sites = _read_sites(folder / "sites.json")
    architecture = read_choices(folder / "policy.json")
    known = None if architecture else sites
    space = _read_space(folder / "space.json", known) if kind == "search" else {}
    record = Record(
        name=name,
        kind=kind,
        seed=seed,
        series=series,
        **_measurements(result, path),
        sites=sites,
        policy=_read_policy(folder / "policy.json", sites, optional=kind == "float"),
        metrics=tuple(line for _, line in read_steps(folder / "metrics.jsonl")),
        space=space,
        probabilities=_read_probabilities(folder / "probabilities.jsonl", space),
        weights=read_weights(folder / "weights.json", sites),
        architecture=architecture,
        elastic=read_elastic(folder / "space.json") if architecture else {},
    )
    return _in_whole_model(record, read_whole_names(folder / "policy.json", sites))


def _measurements(result: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a finished point other than its name, kind, seed and series, checked."""
    fields: dict[str, Any] = {
        key: value_of(result, key, str, path) for key in ("model", "data", "command")
    }
    for key in ("accuracy", "loss", "train_accuracy", "train_split_accuracy"):
        fields[key] = number_of(result, key, path, missing=math.nan)
    for key in ("gbops", "weight_bytes", "seconds"):
        fields[key] = number_of(result, key, path)
    for key in ("target_gbops", "final_entropy", "width"):
        fields[key] = number_of(result, key, path, missing=None)
    for key in ("gbops", "target_gbops", "width"):
        if fields[key] is not None and not 0 < fields[key] < math.inf:
            raise ReportError(f"{path}: {key} is {fields[key]}, but must be positive and finite")
    for key in ("accuracy", "train_accuracy", "train_split_accuracy"):
        if not (math.isnan(fields[key]) or 0 <= fields[key] <= 1):
            raise ReportError(f"{path}: {key} is {fields[key]}, but must be a fraction in [0, 1]")
    fields["steps"] = value_of(result, "steps", int, path)
    fields["without_retraining"] = bool(result.get("without_retraining"))
    fields["pair"] = value_of(result, "pair", str, path, missing=None)
    return fields | _costs(result, path)


def _costs(result: Mapping[str, Any], path: Path) -> dict[str, dict[str, float]]:
    """All costs by name, and the targets of those that have one."""
    costs, targets = (value_of(result, key, dict, path, missing={}) for key in ("costs", "targets"))
    costs = {key: number_of(costs, key, path) for key in costs}
    costs |= {key: number_of(result, key, path) for key in ("gbops", "weight_bytes")}
    targets = {key: number_of(targets, key, path) for key in targets}
    for key, target in targets.items():
        if key not in costs or not 0 < target < math.inf:
            raise ReportError(
                f"{path}: the target {key!r} is {target}, but must be positive and finite, and one "
                f"of the costs: {', '.join(costs)}"
            )
    return {"costs": costs, "targets": targets}


def _read_sites(path: Path) -> dict[str, SiteFacts]:
    sites = {}
    for name, facts in read_object(path).items():
        if not isinstance(facts, dict):
            raise ReportError(f"{path}: site {name!r} must be an object, not {facts!r}")
        sites[name] = SiteFacts(
            value_of(facts, "kind", str, path),
            value_of(facts, "macs", int, path),
            value_of(facts, "weight_size", int, path),
        )
    return sites


def _read_policy(path: Path, sites: Mapping[str, SiteFacts], *, optional: bool) -> dict:
    """The formats of every site, in the order of `sites`; all None if optional and not there."""
    if optional and not storage.exists(path):
        return {name: (None, None) for name in sites}
    policy = read_object(path)
    if "architecture" in policy:  # of a model that was cut out of the configured one
        policy = value_of(policy, "formats", dict, path)
    if set(policy) != set(sites):
        odd = sorted(set(policy) ^ set(sites))
        raise ReportError(f"{path} and sites.json must name the same sites, but differ in {odd}")
    for name, formats in policy.items():
        values = [_format_label(formats, k) for k in ("lhs", "rhs")]
        if not all(value is None or isinstance(value, str) for value in values):
            raise ReportError(
                f"{path}: site {name!r} has {formats!r}, expected format names or null under "
                "'lhs' and 'rhs'"
            )
    return {
        name: (_format_label(policy[name], "lhs"), _format_label(policy[name], "rhs"))
        for name in sites
    }


def _format_label(formats: Any, side: str) -> Any:
    """A format's name, also where it stands beside options of its quantizer; else 0."""
    value = formats.get(side) if isinstance(formats, dict) else 0
    return value.get("format", 0) if isinstance(value, dict) else value


def _in_whole_model(record: Record, names: Mapping[str, str]) -> Record:
    """A record whose sites have the names of the model that its own was cut out of."""
    return dataclasses.replace(
        record,
        sites={names[site]: facts for site, facts in record.sites.items()},
        policy={names[site]: formats for site, formats in record.policy.items()},
        weights={
            # A label is the site's name, or begins with it.
            label.replace(row.site, names[row.site], 1): dataclasses.replace(
                row, site=names[row.site]
            )
            for label, row in record.weights.items()
        },
    )


def _read_space(path: Path, sites: Mapping[str, SiteFacts] | None) -> dict[str, Decision]:
    """The decisions about formats; of a searched architecture (None) not all sites stay."""
    space = {}
    for name, entry in read_object(path).items():
        if not isinstance(entry, dict):
            raise ReportError(f"{path}: decision {name!r} must be an object, not {entry!r}")
        options = value_of(entry, "options", list, path)
        if not options or not all(isinstance(option, str) for option in options):
            raise ReportError(f"{path}: decision {name!r} must have options that are format names")
        own = value_of(entry, "sites", list, path)
        if "about" in entry:  # the architecture
            continue
        space[name] = Decision(tuple(own), tuple(options))
        if sites is not None and (unknown := set(space[name].sites) - set(sites)):
            raise ReportError(f"{path}: decision {name!r} covers unknown sites {sorted(unknown)}")
    return space


def _read_probabilities(path: Path, space: Mapping[str, Decision]) -> tuple:
    """(step, {decision: probabilities}) of every line, checked against the space."""
    steps = []
    for step, line in read_steps(path) if space else ():
        table = value_of(line, "probabilities", dict, path)
        for name, decision in space.items():
            row = table.get(name)
            if not isinstance(row, list) or len(row) != len(decision.options):
                raise ReportError(
                    f"{path}: step {step} has {row!r} for decision {name!r}, expected "
                    f"{len(decision.options)} probabilities as in space.json"
                )
        steps.append((step, {name: tuple(map(float, table[name])) for name in space}))
    return tuple(steps)
