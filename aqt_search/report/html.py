"""The HTML report: one self-contained page, from the records and the finished figures."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from aqt_search.report.against_uniform import gains_over_uniform
from aqt_search.report.architecture_section import architecture_section
from aqt_search.report.canvas import NOT_QUANTIZED, ink_on
from aqt_search.report.comparison_sections import (
    fronts_section,
    gap_section,
    retraining_section,
    seeds_section,
    sensitivity_section,
    targets_section,
)
from aqt_search.report.elements import cell, figure
from aqt_search.report.format_plot import macs_shares, mapped_records
from aqt_search.report.front import Group, group_points
from aqt_search.report.records import KINDS, Record
from aqt_search.report.table import format_order, table_rows
from aqt_search.report.weight_section import weights_section

_CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --page: #ffffff; --soft: #f3f4f6;
  --line: #d5d8dd; --faint: #5b6169; --bad: #a11212; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --page: #16181b; --soft: #22252a;
  --line: #3b4048; --faint: #a6adb7; --bad: #ff9c9c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 1rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p.note, figcaption { color: var(--faint); font-size: .88rem; margin: .4rem 0; }
.scroll { overflow-x: auto; } .tall { max-height: 44rem; overflow-y: auto; }
figure { margin: .5rem 0; } figure .scroll { background: #ffffff; border: 1px solid var(--line);
  border-radius: 6px; padding: 4px; }
img { display: block; width: 100%; min-width: 640px; height: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  text-align: right; vertical-align: top; }
th.text, td.text { text-align: left; } td.wrap { white-space: normal; min-width: 7rem; }
td.lines { white-space: pre; }
th { white-space: normal; }
thead th { background: var(--soft); position: sticky; top: 0; vertical-align: bottom; }
tr.front td:first-child { font-weight: 600; } .bad { color: var(--bad); }
table.map td, table.map th { padding: .08rem .4rem; } table.map td.cell { text-align: center;
  min-width: 3.6rem; border-left: 1px solid var(--line); }
.bar { display: inline-block; height: .6rem; background: var(--faint); margin-left: .4rem; }
.share { width: 9rem; text-align: left; }
pre { background: var(--soft); border-radius: 4px; font: .82rem/1.45 ui-monospace, monospace;
  padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""

_COLUMNS = (  # field, title, CSS class
    ("name", "point", "text"),
    ("kind", "kind", "text"),
    ("series", "series", "text"),
    ("accuracy", "accuracy %", "number"),
    ("gbops", "GBOPs", "number"),
    ("cost_to_float", "cost / float", "number"),
    ("cost_to_uniform", "cost / dearest uniform", "number"),
    ("weights", "weights kB", "number"),
    ("target", "target GBOPs", "number"),
    ("miss", "miss", "number"),
    ("entropy", "entropy nats", "number"),
    ("seconds", "seconds", "number"),
    ("note", "note", "text wrap"),
    ("formats", "formats: number of sites", "text lines"),
)


def report_page(
    records: Sequence[Record],
    config: Mapping[str, Any],
    unfinished: Sequence[str],
    sensitivity: Mapping[str, Any] | None,
    figures: Mapping[str, bytes],
    colours: Mapping[str, str],
) -> str:
    """The whole page as text.

    `figures` holds PNGs: front; formats and training if a point finished; search and policy/<name>
    if a search finished; architecture if a point was cut out of a larger model; gap if a point has
    one; sensitivity if there are some; weights and, of the first seed of every point,
    weights/<name> where runs have statistics of them. `colours` holds the hex colour of
    every format.
    """
    finished = [r for r in records if r.error is None]
    searches = [r for r in finished if r.kind == "search"]
    parts = [f"<h1>Accuracy against cost: {escape(_subject(finished))}</h1>", _summary(records)]
    if unfinished:
        parts.append(f'<p class="bad">Not finished yet: {escape(", ".join(unfinished))}.</p>')
    parts += [_points_section(records), _front_section(figures)]
    parts += [
        fronts_section(records),
        seeds_section(records),
        retraining_section(records),
        targets_section(records),
        gap_section(records, figures.get("gap")),
        sensitivity_section(searches, sensitivity, figures.get("sensitivity")),
    ]
    if finished:
        parts.append(architecture_section(finished, figures.get("architecture")))
        parts.append(_formats_section(finished, searches, figures, colours))
        parts.append(weights_section(finished, figures))
        parts.append(_curves_section(searches, figures))
    parts += [_commands_section(finished), _config_section(config)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_subject(finished))}: accuracy against cost</title>\n"
        f"<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def _subject(finished: Sequence[Record]) -> str:
    pairs = dict.fromkeys((r.model, r.data) for r in finished)
    return ", ".join(f"{model} on {data}" for model, data in pairs) or "no finished point"


# ---- summary ----


def _summary(records: Sequence[Record]) -> str:
    """What the sweep found, in words."""
    groups = [g for g in group_points(records) if math.isfinite(g.accuracy)]
    failed = sum(r.error is not None for r in records)
    counts = [(k, sum(r.kind == k and r.error is None for r in records)) for k in KINDS]
    words = {"search": "searched", "subnet": "of a supernet", "palette": "with palettes"}
    told = ", ".join(f"{n} {words.get(k, k)}" for k, n in counts if n)
    items = [f"{len(records)} points: {told or 'none finished'}"]
    items[0] += f', <span class="bad">{failed} failed</span>.' if failed else ", none failed."
    if groups:
        best = max(groups, key=lambda g: g.accuracy)
        items.append(f"Most accurate: {_told(best)}.")
    items = [escape(gain.sentence) for gain in gains_over_uniform(records)] + items
    uniform = [g for g in groups if g.kind == "uniform"]
    searches = [g for g in groups if g.kind == "search"]
    items += [_compared(g, uniform) for g in searches]
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _told(group: Group) -> str:
    seeds = f", mean of {len(group.members)} seeds" if len(group.members) > 1 else ""
    how = ", without retraining" if all(m.without_retraining for m in group.members) else ""
    return (
        f"<b>{escape(group.name)}</b> with {100 * group.accuracy:.2f} % at "
        f"{group.gbops:.4g} GBOPs{seeds}{how}"
    )


def _compared(group: Group, uniform: Sequence[Group]) -> str:
    """A searched point beside the most accurate uniform point that costs no more than it."""
    cheaper = [u for u in uniform if u.gbops <= group.gbops]
    if not cheaper:
        return f"{_told(group)}; no uniform point is as cheap."
    rival = max(cheaper, key=lambda u: u.accuracy)
    gain = 100 * (group.accuracy - rival.accuracy)
    return (
        f"{_told(group)}: {abs(gain):.2f} percentage points {'above' if gain >= 0 else 'below'} "
        f"{escape(rival.name)}, the most accurate uniform point that costs no more, at "
        f"{group.gbops / rival.gbops:.3f} times its cost."
    )


# ---- sections ----


def _points_section(records: Sequence[Record]) -> str:
    rows = table_rows(records)
    columns = [c for c in _COLUMNS if any(getattr(row, c[0]) for row in rows)]
    head = "".join(cell("th", title, style) for _, title, style in columns)
    body = []
    for row, record in zip(rows, records):
        cells = [cell("td", getattr(row, field), style) for field, _, style in columns]
        if record.error is None:
            link = f'<a href="{escape(quote(record.policy_path))}">{escape(row.name)}</a>'
            cells[0] = f'<td class="text">{link}</td>'
        else:
            place = [field for field, _, _ in columns].index("note")
            cells[place] = cell("td", row.note, "text wrap bad")
        style = "front" if row.on_front else "dominated"
        body.append(f'<tr class="{style}">{"".join(cells)}</tr>')
    return (
        '<h2>All points</h2><div class="scroll tall"><table id="points"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">Accuracy is that of the test set. 1 GBOP = 10<sup>9</sup> bit operations: '
        "MACs times lhs bits times rhs bits. Miss is positive where the point costs more than its "
        "target. Entropy is that of the final policy, mean over decisions. A name links to the "
        "point's formats file, if the report still lies in the sweep's folder.</p>"
    )


def _front_section(figures: Mapping[str, bytes]) -> str:
    caption = (
        "Accuracy against cost. The grey steps are the Pareto front: no point is both cheaper and "
        "more accurate. Coloured lines are the fronts of the series, as they are compared below. "
        "Where a point was run with several seeds, the mark is the mean and the bars go from the "
        "least to the greatest."
    )
    return "<h2>Front</h2>" + figure(figures["front"], "accuracy-cost front", caption)


def _formats_section(
    finished: Sequence[Record],
    searches: Sequence[Record],
    figures: Mapping[str, bytes],
    colours: Mapping[str, str],
) -> str:
    caption = (
        "Formats of all points at all sites, in network order. A cell is split into lhs (left, "
        "most often the activation) and rhs (right, most often the weight)."
    )
    if len(mapped_records(finished)) < len(finished):
        caption = f"{caption} Of points with several seeds the first is shown."
    if any(record.architecture for record in finished):
        caption = (
            f"{caption} Sites have the names of the whole network; what a point does not have is "
            "blank. MACs are those of the first point that has the site."
        )
    parts = ["<h2>Formats</h2>", figure(figures["formats"], "formats of all points", caption)]
    for record in searches:
        parts.append(f"<h3>{escape(record.name)}: formats by site</h3>{_map(record, colours)}")
    return "".join(parts)


def _map(record: Record, colours: Mapping[str, str]) -> str:
    """Rows are sites in network order, columns the formats the point could use or uses."""
    names = {f for pair in record.policy.values() for f in pair}
    names |= {option for decision in record.space.values() for option in decision.options}
    columns = sorted(names, key=format_order)
    head = "".join(f"<th>{escape(name or 'float')}</th>" for name in columns)
    shares = macs_shares(record)
    widest = max(shares.values(), default=0) or 1
    body = []
    for site, pair in record.policy.items():
        bar = f'<span class="bar" style="width:{5 * shares[site] / widest:.2f}rem"></span>'
        cells = "".join(_map_cell(name, pair, colours) for name in columns)
        body.append(
            f'<tr><td class="text">{escape(site)}</td><td class="share">'
            f"{100 * shares[site]:.1f} %{bar}</td>{cells}</tr>"
        )
    return (
        '<div class="scroll tall"><table class="map"><thead><tr><th class="text">site</th>'
        f'<th class="text">MACs</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _map_cell(
    name: str | None, pair: tuple[str | None, str | None], colours: Mapping[str, str]
) -> str:
    operands = [label for label, chosen in zip(("lhs", "rhs"), pair) if chosen == name]
    if not operands:
        return '<td class="cell"></td>'
    colour = NOT_QUANTIZED if name is None else colours[name]
    style = f"background:{colour};color:{ink_on(colour)}"
    return f'<td class="cell" style="{style}">{" ".join(operands)}</td>'


def _curves_section(searches: Sequence[Record], figures: Mapping[str, bytes]) -> str:
    parts = ["<h2>Training</h2>"]
    caption = "All points over the steps; each curve is averaged into at most 200 values."
    parts.append(figure(figures["training"], "training curves of all points", caption))
    if not searches:
        return "".join(parts)
    caption = (
        "Searched points: the quality, the cost expected under the policy (that of the sampled "
        "assignments if it was not recorded) relative to the target, and the entropy."
    )
    parts.append(figure(figures["search"], "search curves", caption))
    parts.append("<h2>Policy over time</h2>")
    caption = (
        "One panel per decision; left to right: first to last step; bottom to top: probability 0 "
        "to 1, stacked over the options."
    )
    for record in searches:
        parts.append(f"<h3>{escape(record.name)}</h3>")
        alt = f"policy of {record.name} over time"
        parts.append(figure(figures[f"policy/{record.name}"], alt, caption))
    return "".join(parts)


def _commands_section(finished: Sequence[Record]) -> str:
    commands = "\n".join(
        f"# {r.name}, seed {r.seed}, {r.steps} steps\n{r.command}\n" for r in finished
    )
    return f"<h2>Commands</h2><p>Each repeats one point.</p><pre>{escape(commands)}</pre>"


def _config_section(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return (
        "<h2>Configuration</h2><details><summary>The exact configuration</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )
