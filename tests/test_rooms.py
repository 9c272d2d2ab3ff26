"""Every package of the library stands only on those before it (see CONTRIBUTING.md)."""

import ast
import pathlib

import pytest

LIBRARY = pathlib.Path(__file__).parent.parent / "aqt_search"
ROOMS = (
    "numerics", "products", "tracing", "costs", "weights", "architecture", "search", "training",
    "ptq", "palette", "models", "data", "report",
)  # fmt: skip
ALONE = ("models", "data")


def imported_rooms(source: str) -> set[str]:
    """The rooms that a module's imports name, wherever in it they stand."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {p[1] for p in parts if p[0] == "aqt_search" and len(p) > 1}


def test_rooms_are_all_there_is():
    found = {path.name for path in LIBRARY.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert found == set(ROOMS)
    assert [path.name for path in LIBRARY.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_stands_on_those_before_it(room):
    allowed = {room} if room in ALONE else {*ROOMS[: ROOMS.index(room)], room} - set(ALONE)
    for path in (LIBRARY / room).rglob("*.py"):
        odd = imported_rooms(path.read_text(encoding="utf-8")) - allowed
        assert not odd, f"{path.relative_to(LIBRARY)} imports from {', '.join(sorted(odd))}"


@pytest.mark.parametrize(
    "source",
    ["from aqt_search import training", "import aqt_search.training.loop",
     "def f():\n    from aqt_search.training.loop import Run"],
)  # fmt: skip
def test_every_form_of_import_is_seen(source):
    assert imported_rooms(source) == {"training"}
