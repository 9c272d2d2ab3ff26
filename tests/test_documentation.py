"""The documentation: its examples run, its links lead somewhere, it lists every public name."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re

import pytest

import aqt_search as aqs

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PUBLIC = (
    "aqt_search", "aqt_search.search", "aqt_search.search.searchers", "aqt_search.ptq",
    "aqt_search.palette", "aqt_search.models", "aqt_search.data", "aqt_search.report",
)  # fmt: skip


def docstrings():
    """docs/docstrings.py, which stands in no package."""
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\)\s+# (.*)", "".join(blocks)):
        assert expected in printed


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# --- Links and tutorials --------------------------------------------------------------------------


def anchors(page: pathlib.Path) -> set[str]:
    """What headings are called in links, on a code host and on the site."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("tutorials/*.md"))],
    ids=lambda page: page.name,
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {path} has no {anchor!r}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("tutorials/*.md")), ids=lambda page: page.name)
def test_tutorials_are_notebooks(page):
    """`make docs` runs them; here each is seen to have cells, of Python."""
    cells = re.findall(r"^```\{code-cell\}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert page.read_text().startswith("---\nfile_format: mystnb\n")
    assert len(cells) > 5
    for cell in cells:
        ast.parse(cell)


# --- API reference --------------------------------------------------------------------------------


def listed():
    """What the API pages list: the objects' full names, and the modules."""
    pages = docstrings().listed_names(DOCS / "api")
    return {f"{module}.{name}" for module, name in pages}, {module for module, _ in pages}


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_listed(package):
    names, modules = listed()
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            assert value.__name__ in modules, f"docs/api has no page with {value.__name__}"
        else:
            assert f"{package}.{name}" in names, f"docs/api lists no {package}.{name}"


def test_every_listed_name_is_there():
    for module, name in docstrings().listed_names(DOCS / "api"):
        assert hasattr(importlib.import_module(module), name), f"docs/api lists {module}.{name}"


def test_every_api_page_is_in_the_index():
    index = (DOCS / "api" / "index.rst").read_text().split()
    for page in DOCS.glob("api/*.rst"):
        assert page.stem in (*index, "index")


# --- Docstrings as reStructuredText ---------------------------------------------------------------


def marked(text: str) -> str:
    """Without links: all that stands in backticks is code."""
    return docstrings().restructured(text, lambda code: f"``{code}``")


def test_formulas_stay_as_they_are():
    text = "Rounds x.\n\n    y = clip(|x| * s_)\n\n    z = 2 *y\n\nWith |s| = `a_`s.\n"
    block = ".. code-block:: text\n\n    y = clip(|x| * s_)\n\n    z = 2 *y\n\n\n"
    assert marked(text) == f"Rounds x.\n\n{block}With \\|s\\| = ``a_``\\ s.\n"


def test_sections_become_lists():
    text = """Does.

Args:
  a, *b: one
    of two.

Returns:
  c: d.

Raises:
  E: if `x`.
"""
    expected = r"""Does.

:Parameters:
   - **a**, **\*b**: one
     of two.

:Returns:
   c: d.

:Raises:
   - ``E``: if ``x``.
"""
    assert marked(text) == expected


def test_fields_and_signatures_are_those_of_the_source():
    module = docstrings()
    comments = module.field_comments(aqs.Quantizer)
    assert comments["key"] == "random key of stochastic rounding; data"  # behind the field
    assert comments["gradient"] == "What stands for the derivative of rounding."  # above it
    assert "calibration" not in comments
    assert module.signature(aqs.Bounds) == ("(high: jax.Array, low: jax.Array | None = None)", None)
    arguments, returned = module.signature(aqs.round_to_format)
    assert arguments == "(x: jax.typing.ArrayLike, fmt: str | NumericFormat)"
    assert returned == "jax.Array"
    assert module.signature(aqs.lsq)[0] == "(*formats: str)"  # through its cache
