"""`import aqt_search` takes jax and flax alone; its public names are spelled out."""

import subprocess
import sys

import pytest

import aqt_search as aqs

HEAVY = [
    "tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "grain", "orbax", "tensorboardX",
]  # fmt: skip


def test_import_leaves_heavy_packages_alone():
    code = f"import sys, aqt_search; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_starts_no_backend():
    code = """
import aqt_search
from jax.extend import backend
import jax
jax.config.update("jax_platforms", "a platform that does not exist")
try:
    jax.devices()
except RuntimeError:
    print("not started")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "not started", result.stderr


@pytest.mark.parametrize("name", aqs.__all__)
def test_public_names_exist_and_say_what_they_are(name):
    assert getattr(aqs, name).__doc__
