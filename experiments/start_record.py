"""What a run says of itself when it starts: where it runs, on what, by which code."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import jax
import ml_collections

_PACKAGES = ("aqt-search", "jax", "jaxlib", "flax", "optax")


def commit_of(folder: Path) -> str | None:
    """The commit of the sources in `folder`, "+" behind it where they were changed; None for none.

    None also where the folder lies in another repository, as an installed package may.
    """
    own = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--tags"]
    tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
    try:
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        found = subprocess.run(own, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def start_record(config: ml_collections.ConfigDict) -> str:
    """One line: devices, processes, batch, seed, versions, commit."""
    devices, processes, batch = jax.device_count(), jax.process_count(), config.batch_size
    kinds = sorted({device.device_kind for device in jax.devices()})
    hosts = f" of {processes} processes" if processes > 1 else ""
    return (
        f"{devices} x {', '.join(kinds)}{hosts}, batch {batch} = {devices} x {batch / devices:g},"
        f" seed {config.seed}; {versions_record()}"
    )


def versions_record() -> str:
    """The versions of the packages, and the commit of the first; touches no device."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    if commit := commit_of(Path(__file__).parent):
        versions[0] += f" ({commit})"
    return ", ".join(versions)
