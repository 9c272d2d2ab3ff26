"""Reads what policy.json and space.json say of a model that was cut out of a larger one."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aqt_search.report.checked_json import ReportError, read_object, value_of
from aqt_search.training.storage import exists


@dataclasses.dataclass(frozen=True)
class ElasticDecision:
    """One choice about the architecture: its options, and the groups, sites or blocks it is about.

    An option is a number, or a tuple of one for each group.
    """

    options: tuple[Any, ...]
    about: tuple[str, ...]


def read_choices(path: Path) -> dict[str, Any]:
    """What was chosen, by decision, as a policy.json tells; {} of a model that is whole.

    Raises:
      ReportError: it is broken.
    """
    choices = value_of(_architecture(path), "choices", dict, path, missing={})
    return {name: _option(value, name, path) for name, value in choices.items()}


def read_whole_names(path: Path, sites: Iterable[str]) -> dict[str, str]:
    """The names that sites have in the larger model, as a policy.json tells.

    Blocks behind a skipped one have moved up, so the same name is another block in another model.

    Raises:
      ReportError: it is broken.
    """
    told = value_of(_architecture(path), "sites", dict, path, missing={})
    names = {site: told.get(site, site) for site in sites}
    if not all(isinstance(name, str) for name in told.values()):
        raise ReportError(f"{path}: the architecture's sites are {told!r}, expected names of sites")
    if len(set(names.values())) < len(names):
        raise ReportError(f"{path}: two sites have one name in the architecture's sites, {told!r}")
    return names


def read_elastic(path: Path) -> dict[str, ElasticDecision]:
    """The decisions about the architecture in a space.json; {} if there is none.

    Their options are written "c48", "c48+16" (channels), "x6", "k5" (window) and "d2".

    Raises:
      ReportError: it is broken.
    """
    found = {}
    for name, entry in read_object(path).items() if exists(path) else ():
        if not isinstance(entry, dict) or "about" not in entry:
            continue
        options = tuple(
            _labelled(label, name, path) for label in value_of(entry, "options", list, path)
        )
        about = tuple(map(str, value_of(entry, "about", list, path)))
        found[name] = ElasticDecision(options, about)
    return found


def _architecture(path: Path) -> dict[str, Any]:
    policy = read_object(path) if exists(path) else {}
    return value_of(policy, "architecture", dict, path, missing={})


def _option(value: Any, name: str, path: Path) -> Any:
    """A whole number, or a tuple of some."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise ReportError(
            f"{path}: decision {name!r} has {value!r}, expected a whole number or a list of some"
        )
    return tuple(numbers) if isinstance(value, list) else value


def _labelled(label: Any, name: str, path: Path) -> Any:
    """The number, or tuple of some, in the label of an option."""
    if not isinstance(label, str) or not re.fullmatch(r"[cxkd]\d+(\+\d+)*", label):
        raise ReportError(
            f"{path}: decision {name!r} has the option {label!r}, expected a letter and whole"
            " numbers, such as 'c48' or 'c48+16'"
        )
    numbers = tuple(map(int, label[1:].split("+")))
    return numbers if len(numbers) > 1 else numbers[0]
