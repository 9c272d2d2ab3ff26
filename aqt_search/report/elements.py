"""The pieces of the HTML report: cells, tables and figures, with their text escaped."""

import base64
from collections.abc import Iterable, Sequence
from html import escape


def cell(tag: str, content: str, style: str) -> str:
    """A `th` or `td` of a CSS class; in one of class "text lines", " | " ends a line."""
    if style == "text lines":
        content = content.replace(" | ", "\n")
    return f'<{tag} class="{style}">{escape(content)}</{tag}>'


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table of text, with a cell per title in every row; words in the first `text_columns`.

    Columns without any text are left out.
    """
    styles = ["text"] * text_columns + ["number"] * (len(titles) - text_columns)
    rows = list(rows)
    columns = list(zip(titles, styles, *rows, strict=True))
    shown = [column for column in columns if any(column[2:])]
    head = "".join(cell("th", title, style) for title, style, *_ in shown)
    lines = []
    for number in range(len(rows)):
        cells = "".join(cell("td", texts[number], style) for _, style, *texts in shown)
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll tall"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Content that is shown once its summary is clicked; `content` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def items(sentences: Sequence[str]) -> str:
    """A list of plain sentences."""
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def figure(png: bytes, alt: str, caption: str) -> str:
    """An image inside the page, with a caption."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><div class="scroll"><img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        f"</div><figcaption>{escape(caption)}</figcaption></figure>"
    )
