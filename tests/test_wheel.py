"""The wheel holds the library, the whole of it and nothing beside it."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names of the files in a wheel, which setuptools builds from a copy of the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder / "clone", ignore=leave)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder / "clone", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return [pathlib.PurePosixPath(name) for name in archive.namelist()]


def test_the_library_is_all_that_is_installed(wheel):
    tops = {path.parts[0] for path in wheel}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"aqt_search"}


def test_every_file_of_the_library_is_installed(wheel):
    library = ROOT / "aqt_search"
    wanted = {path.relative_to(ROOT).as_posix() for path in library.rglob("*.py")}
    wanted.add("aqt_search/py.typed")
    assert {path.as_posix() for path in wheel if path.parts[0] == "aqt_search"} == wanted
