"""Docstrings as reStructuredText: they are written as plain text with Markdown's few marks.

- a block that is indented by four spaces is a formula or an example and is kept as it stands;
- `name` is code, and a link where the API reference lists the name;
- *, | and _ are characters;
- sections (Args, Attributes, Returns, Raises) end a docstring.

Comments at the fields of a NamedTuple or a dataclass become descriptions of its attributes, and
signatures have the types as the source has them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

_DIRECTIVE = re.compile(
    r"^\.\. (?:py:)?(currentmodule|module|auto\w+|data|type):: ([\w.]+)$", re.MULTILINE
)
_SECTIONS = re.compile(r"^(?=(?:Args|Attributes|Returns|Raises|Raises \(when called\)):$)", re.M)
_TITLES = {"Args": "Parameters"}
# Lines indented by four spaces, with the blank lines between them, after a blank line.
_BLOCK = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n(?:\n+(?= {4}))?)+)")


def listed_names(pages: Path) -> list[tuple[str, str]]:
    """What the API pages list, as (module, name within it)."""
    names = []
    for page in sorted(pages.glob("*.rst")):
        module = ""
        for directive, name in _DIRECTIVE.findall(page.read_text()):
            if directive in ("module", "currentmodule", "automodule"):
                module = name
            elif name.startswith("aqt_search."):
                names.append((name.rpartition(".")[0], name.rpartition(".")[2]))
            else:
                names.append((module, name))
    return names


def restructured(docstring: str, code: Callable[[str], str]) -> str:
    """A docstring as reStructuredText; `code` says how the text within backticks is marked up."""
    body, *sections = _SECTIONS.split(docstring)
    parts = _BLOCK.split(body)
    parts[::2] = [_prose(part, code) for part in parts[::2]]
    parts[1::2] = [f".. code-block:: {_language(block)}\n\n{block}\n" for block in parts[1::2]]
    found = ["".join(parts), *(_section(section, code) for section in sections)]
    return "\n\n".join(part.strip("\n") for part in found) + "\n"


def _language(block: str) -> str:
    """Formulas mostly are no Python."""
    try:
        ast.parse(textwrap.dedent(block))
    except SyntaxError:
        return "text"
    return "python"


def _section(section: str, code: Callable[[str], str]) -> str:
    """A section as a field, with a list of its items unless it is what is returned."""
    title, text = section.rstrip().split(":\n", 1)
    text = textwrap.dedent(text)
    if title == "Returns":
        text = _prose(text, code)
    else:
        items = [item.partition(": ") for item in re.split(r"\n(?=\S)", text)]
        mark = code if title.startswith("Raises") else _strong
        text = "\n".join(
            f"- {', '.join(map(mark, names.split(', ')))}: {_prose(_aligned(what), code)}"
            for names, _, what in items
        )
    return f":{_TITLES.get(title, title)}:\n{textwrap.indent(text, '   ')}"


def _strong(name: str) -> str:
    return f"**{_escaped(name)}**"


def _aligned(item: str) -> str:
    """The text of an item of a list, whose further lines are indented by two."""
    first, *more = item.split("\n")
    return "\n".join([first, *textwrap.indent(textwrap.dedent("\n".join(more)), "  ").split("\n")])


def _escaped(text: str) -> str:
    return re.sub(r"([\\*|]|(?<=\w)_(?!\w))", r"\\\1", text)


def _prose(text: str, code: Callable[[str], str]) -> str:
    parts = re.split(r"`([^`]+)`", text)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = _escaped(part)
        else:
            # Markup has to end at the end of a word; "\ " is such an end, and no space.
            plural = re.match(r"\w", parts[index + 1])
            parts[index] = code(" ".join(part.split())) + ("\\ " if plural else "")
    # A list stands apart from the paragraph before it.
    return re.sub(r"(?m)^(?! *- )(.*\S)\n(?= *- )", r"\1\n\n", "".join(parts))


def field_comments(cls: type) -> dict[str, str]:
    """What the comments behind or above the annotated fields of a class say."""
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    found = {}
    for field in _fields(cls):
        behind = lines[field.end_lineno - 1][field.end_col_offset :].strip()
        above: list[str] = []
        for line in reversed(lines[: field.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line)
        comment = [behind] if behind.startswith("#") else above
        found[field.target.id] = " ".join(line.strip().lstrip("# ") for line in comment)
    return {name: comment for name, comment in found.items() if comment}


def signature(documented: object) -> tuple[str, str | None] | None:
    """(arguments, return type) as the source has them: types are not taken apart.

    Of a class that makes its own __init__, the fields. None where there is no source.
    """
    if inspect.isclass(documented):
        return _fields_signature(documented)
    try:
        node = _parsed(inspect.unwrap(documented))
    except TypeError:
        return None
    for argument in node.args.posonlyargs + node.args.args:
        if argument.arg in ("self", "cls"):
            argument.annotation = None
    node.args.args = [a for a in node.args.args if a.arg not in ("self", "cls")]
    return f"({ast.unparse(node.args)})", node.returns and ast.unparse(node.returns)


def _fields_signature(cls: type) -> tuple[str, None] | None:
    if not _fields(cls) or ("__init__" in vars(cls) and not dataclasses.is_dataclass(cls)):
        return None
    fields = [
        f"{field.target.id}: {ast.unparse(field.annotation)}{_default(field.value)}"
        for field in _fields(cls)
    ]
    return f"({', '.join(fields)})", None


def _default(value: ast.expr | None) -> str:
    """How a field is filled where nothing is given, if it is and if that is shortly said."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "dataclasses.field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        value = given.get("default", given.get("default_factory") and ast.Constant(...))
    text = "" if value is None else f" = {ast.unparse(value)}"
    return text if len(text) < 30 else " = ..."


def _parsed(documented: object) -> ast.ClassDef | ast.FunctionDef:
    return ast.parse(textwrap.dedent(inspect.getsource(documented))).body[0]


def _fields(cls: type) -> list[ast.AnnAssign]:
    return [node for node in _parsed(cls).body if isinstance(node, ast.AnnAssign)]


class Reference:
    """Sphinx's hooks; `names` is what the API pages list, as (module, name within it)."""

    def __init__(self, names: Collection[tuple[str, str]]):
        self._names: dict[str, dict[str, str]] = {}  # last part -> {module: full name}
        for module, name in names:
            self._names.setdefault(name.split(".")[-1], {})[module] = f"{module}.{name}"

    def full_name(self, name: str, module: str | None) -> str | None:
        """The listed name that ends as `name` does: of `module` before all others."""
        found = self._names.get(name.split(".")[-1], {})
        return found.get(module or "", next(iter(found.values()), None))

    def docstring(self, app, what, name, documented, options, lines) -> None:
        """autodoc-process-docstring: in place."""
        text = "\n".join(lines)
        known = _parameters(documented)

        def code(text: str) -> str:
            target = None if text in known else self.full_name(text, name.rpartition(".")[0])
            linked = target is not None and re.fullmatch(r"[\w.]+", text) and target != name
            return f":py:obj:`{text} <{target}>`" if linked else f"``{text}``"

        if inspect.isclass(documented) and "Attributes:" not in lines:
            comments = field_comments(documented)
            if comments:
                described = [f"  {field}: {comment}" for field, comment in comments.items()]
                text += "\n".join(["\nAttributes:", *described, ""])
        lines[:] = restructured(text, code).split("\n")

    def signature(self, app, what, name, documented, options, arguments, returned):
        """autodoc-process-signature."""
        if what in ("class", "exception", "function", "method"):
            return signature(documented)
        return None

    def link(self, app, env, node, contnode):
        """missing-reference: types go by their last name."""
        if node.get("refdomain") != "py":
            return None
        target = self.full_name(node["reftarget"], node.get("py:module"))
        if target is None:
            return None
        domain, page = env.get_domain("py"), node["refdoc"]
        return domain.resolve_xref(env, page, app.builder, "obj", target, node, contnode)


def _parameters(documented: Any) -> Collection[str]:
    try:
        return inspect.signature(documented).parameters
    except (TypeError, ValueError):
        return ()


def setup(app, pages: Path) -> None:
    """Connects the hooks."""
    reference = Reference(listed_names(pages))
    app.connect("autodoc-process-docstring", reference.docstring)
    app.connect("autodoc-process-signature", reference.signature)
    app.connect("missing-reference", reference.link)
