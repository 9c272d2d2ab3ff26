"""Reads the folder a sweep leaves behind: one record per point, checked on the way in."""

import dataclasses
import json
import math
import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = ("float", "uniform", "search", "retrained")
_REPAIR = "the file is broken or half written; delete the point's folder and run the sweep again"


class ReportError(ValueError):
    """A file of the sweep is missing, broken, or contradicts another one."""


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

    accuracy and train_accuracy are fractions (NaN where training gave none), final_entropy is in
    nats (mean over decisions), costs are in GBOPs = 1e-9 * sum over sites of MACs * lhs bits * rhs
    bits. `policy` maps a site to the formats of (lhs, rhs), None for an operand that is not
    quantized, in network order as `sites`.
    """

    name: str
    kind: str
    seed: int
    error: str | None = None
    model: str = ""
    data: str = ""
    accuracy: float = math.nan
    loss: float = math.nan
    train_accuracy: float = math.nan
    gbops: float = math.nan
    weight_bytes: float = math.nan
    target_gbops: float | None = None
    final_entropy: float | None = None
    steps: int = 0
    seconds: float = math.nan
    command: str = ""
    without_retraining: bool = False
    policy: Mapping[str, tuple[str | None, str | None]] = dataclasses.field(default_factory=dict)
    sites: Mapping[str, SiteFacts] = dataclasses.field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    probabilities: tuple[tuple[int, Mapping[str, tuple[float, ...]]], ...] = ()
    space: Mapping[str, Decision] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> str:
        """The name without its seed: runs that differ only in the seed share it."""
        return re.sub(r"_seed\d+$", "", self.name)

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
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ReportError(f"{workdir} is no folder; give the --workdir of a sweep")
    records = [_read_record(path.parent) for path in workdir.glob("points/*/result.json")]
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
    folders = sorted(path for path in Path(workdir).glob("points/*") if path.is_dir())
    return tuple(path.name for path in folders if not (path / "result.json").exists())


def load_config(workdir: str | Path) -> Mapping[str, Any]:
    """The exact configuration of the sweep. Raises ReportError if it cannot be read."""
    return _read_object(Path(workdir) / "config.json")


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
    result = _read_object(path)
    name = _value(result, "name", str, path)
    kind = _value(result, "kind", str, path)
    seed = _value(result, "seed", int, path)
    if name != folder.name:
        raise ReportError(f"{path}: the name {name!r} must be that of its folder, {folder.name!r}")
    if kind not in KINDS:
        raise ReportError(f"{path}: the kind {kind!r} must be one of {', '.join(KINDS)}")
    if result.get("error") is not None:
        # The other files of a failed point may be half written, so they are not read.
        return Record(name=name, kind=kind, seed=seed, error=_value(result, "error", str, path))
    sites = _read_sites(folder / "sites.json")
    space = _read_space(folder / "space.json", sites) if kind == "search" else {}
    return Record(
        name=name,
        kind=kind,
        seed=seed,
        **_measurements(result, path),
        sites=sites,
        policy=_read_policy(folder / "policy.json", sites, optional=kind == "float"),
        metrics=tuple(line for _, line in _read_steps(folder / "metrics.jsonl")),
        space=space,
        probabilities=_read_probabilities(folder / "probabilities.jsonl", space),
    )


def _measurements(result: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a finished point other than its name, kind and seed, checked."""
    fields: dict[str, Any] = {
        key: _value(result, key, str, path) for key in ("model", "data", "command")
    }
    for key in ("accuracy", "loss", "train_accuracy"):
        fields[key] = _number(result, key, path, missing=math.nan)
    for key in ("gbops", "weight_bytes", "seconds"):
        fields[key] = _number(result, key, path)
    for key in ("target_gbops", "final_entropy"):
        fields[key] = _number(result, key, path, missing=None)
    for key in ("gbops", "target_gbops"):
        if fields[key] is not None and not 0 < fields[key] < math.inf:
            raise ReportError(f"{path}: {key} is {fields[key]}, but must be positive and finite")
    for key in ("accuracy", "train_accuracy"):
        if not (math.isnan(fields[key]) or 0 <= fields[key] <= 1):
            raise ReportError(f"{path}: {key} is {fields[key]}, but must be a fraction in [0, 1]")
    fields["steps"] = _value(result, "steps", int, path)
    fields["without_retraining"] = bool(result.get("without_retraining"))
    return fields


def _read_sites(path: Path) -> dict[str, SiteFacts]:
    sites = {}
    for name, facts in _read_object(path).items():
        if not isinstance(facts, dict):
            raise ReportError(f"{path}: site {name!r} must be an object, not {facts!r}")
        sites[name] = SiteFacts(
            _value(facts, "kind", str, path),
            _value(facts, "macs", int, path),
            _value(facts, "weight_size", int, path),
        )
    return sites


def _read_policy(path: Path, sites: Mapping[str, SiteFacts], *, optional: bool) -> dict:
    """The formats of every site, in the order of `sites`; all None if optional and not there."""
    if optional and not path.exists():
        return {name: (None, None) for name in sites}
    policy = _read_object(path)
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


def _read_space(path: Path, sites: Mapping[str, SiteFacts]) -> dict[str, Decision]:
    space = {}
    for name, entry in _read_object(path).items():
        if not isinstance(entry, dict):
            raise ReportError(f"{path}: decision {name!r} must be an object, not {entry!r}")
        options = _value(entry, "options", list, path)
        if not options or not all(isinstance(option, str) for option in options):
            raise ReportError(f"{path}: decision {name!r} must have options that are format names")
        space[name] = Decision(tuple(_value(entry, "sites", list, path)), tuple(options))
        if unknown := set(space[name].sites) - set(sites):
            raise ReportError(f"{path}: decision {name!r} covers unknown sites {sorted(unknown)}")
    return space


def _read_probabilities(path: Path, space: Mapping[str, Decision]) -> tuple:
    """(step, {decision: probabilities}) of every line, checked against the space."""
    steps = []
    for step, line in _read_steps(path) if space else ():
        table = _value(line, "probabilities", dict, path)
        for name, decision in space.items():
            row = table.get(name)
            if not isinstance(row, list) or len(row) != len(decision.options):
                raise ReportError(
                    f"{path}: step {step} has {row!r} for decision {name!r}, expected "
                    f"{len(decision.options)} probabilities as in space.json"
                )
        steps.append((step, {name: tuple(map(float, table[name])) for name in space}))
    return tuple(steps)


def _read_steps(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Every line of a JSONL file with its step; a file that is not there has no lines."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(_read_text(path).splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}, line {number}: {error}: {_REPAIR}") from error
        if not isinstance(line, dict):
            raise ReportError(f"{path}, line {number}: expected an object, not {line!r}")
        lines.append((_value(line, "step", int, path), line))
    return lines


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: {error}: {_REPAIR}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected a JSON object, not {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}): {_REPAIR}") from error


def _value(source: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    value = source.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ReportError(f"{path}: {key!r} is {value!r}, expected a value of type {kind.__name__}")
    return value


_REQUIRED = object()


def _number(source: Mapping[str, Any], key: str, path: Path, missing: Any = _REQUIRED) -> Any:
    """The number under `key` as a float; `missing`, where one is given, stands for null."""
    value = source.get(key)
    if value is None and missing is not _REQUIRED:
        return missing
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ReportError(f"{path}: {key!r} is {value!r}, expected a number")
    return float(value)
