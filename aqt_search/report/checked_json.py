"""Reads a sweep's JSON files; what is missing or broken is an error that names the file."""

import json
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqt_search.training import storage

_REPAIR = "the file is broken or half written; delete the point's folder and run the sweep again"


class ReportError(ValueError):
    """A file of the sweep is missing, broken, or contradicts another one."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ReportError if there is none."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: {error}: {_REPAIR}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected a JSON object, not {type(value).__name__}")
    return value


def read_steps(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Every line of a JSONL file with its step; a file that is not there has no lines."""
    if not storage.exists(path):
        return []
    lines = []
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}, line {number}: {error}: {_REPAIR}") from error
        if not isinstance(line, dict):
            raise ReportError(f"{path}, line {number}: expected an object, not {line!r}")
        lines.append((value_of(line, "step", int, path), line))
    return lines


def read_text(path: Path) -> str:
    """The text of a file. Raises ReportError if it cannot be read."""
    try:
        return storage.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: cannot be read ({error}): {_REPAIR}") from error


_REQUIRED = object()


def value_of(
    source: Mapping[str, Any], key: str, kind: type, path: Path, missing: Any = _REQUIRED
) -> Any:
    """The value under `key`, checked to be a `kind`; `missing`, if given, stands for null."""
    value = source.get(key)
    if value is None and missing is not _REQUIRED:
        return missing
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ReportError(f"{path}: {key!r} is {value!r}, expected a value of type {kind.__name__}")
    return value


def number_of(source: Mapping[str, Any], key: str, path: Path, missing: Any = _REQUIRED) -> Any:
    """The number under `key` as a float; `missing`, if given, stands for null."""
    value = source.get(key)
    if value is None and missing is not _REQUIRED:
        return missing
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ReportError(f"{path}: {key!r} is {value!r}, expected a number")
    return float(value)
