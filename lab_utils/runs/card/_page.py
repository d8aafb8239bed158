"""card.html: one file that asks nobody for anything, readable on a screen and on paper."""

from __future__ import annotations

import html
from typing import Any

from lab_utils.runs.card._charts import charts
from lab_utils.runs.card._parts import Part, Sheet, Table, columns_of
from lab_utils.runs.card._words import NOT_RECORDED

_STYLE = """
:root { --ink:#1f2933; --muted:#616e7c; --line:#e4e7eb; --page:#f5f7fa; --card:#fff; --accent:#2f6fde }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:14.5px/1.5 system-ui,"Segoe UI",sans-serif }
main { max-width:1120px; margin:0 auto; padding:28px 20px 60px }
h1 { font-size:23px; margin:0; overflow-wrap:anywhere } .lead { color:var(--muted); margin:4px 0 18px; max-width:85ch }
h2 { font-size:15.5px; margin:0 0 8px }
.headline { display:grid; grid-template-columns:repeat(4,1fr); gap:10px; margin:0 0 14px }
.headline div { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:9px 12px }
.headline dt { color:var(--muted); font-size:12.5px } .headline dd { margin:0; font-size:17px; font-weight:600;
  font-variant-numeric:tabular-nums } .headline dd.none { font-size:14px; font-weight:400; line-height:25px }
.curves { display:grid; grid-template-columns:repeat(auto-fill,minmax(300px,1fr)); gap:10px; margin:0 0 14px }
figure { margin:0; background:var(--card); border:1px solid var(--line); border-radius:10px; padding:10px 12px 6px }
figcaption { font-weight:600; font-size:13.5px }
figcaption small { color:var(--muted); font-weight:400; margin-left:6px }
svg { display:block; width:100%; height:auto } .grid { stroke:var(--line) }
.tick { fill:var(--muted); font-size:10.5px; font-family:inherit }
.curve polyline { fill:none; stroke:var(--c); stroke-width:1.6; stroke-linejoin:round } .curve circle { fill:var(--c) }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px; margin:0 0 12px }
dl.lines { display:grid; grid-template-columns:repeat(auto-fill,minmax(430px,1fr)); gap:2px 28px; margin:0 }
dl.lines div { display:grid; grid-template-columns:210px 1fr; gap:14px } dl.lines div.long { grid-column:1/-1 }
dl.lines dt { color:var(--muted) } dl.lines dd { margin:0; overflow-wrap:anywhere }
.none { color:var(--muted); font-style:italic }
.wide { overflow-x:auto; margin-top:10px }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; font-size:13.5px }
th, td { text-align:left; padding:3px 16px 3px 0; border-bottom:1px solid var(--line); vertical-align:top }
th { color:var(--muted); font-weight:600; font-size:12.5px; white-space:nowrap } td { overflow-wrap:anywhere }
.n { text-align:right; white-space:nowrap }
details { margin-top:10px } summary { cursor:pointer; color:var(--accent); font-size:13.5px }
pre { background:var(--page); border:1px solid var(--line); border-radius:8px; padding:9px 12px; margin:10px 0 0;
  font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace; white-space:pre-wrap; overflow-wrap:anywhere }
.sha { font:12px/1.6 ui-monospace,Menlo,Consolas,monospace }
@media (max-width:620px) { .headline { grid-template-columns:1fr 1fr } dl.lines, dl.lines div { display:block } }
@media print { body { background:#fff; font-size:11px } main { max-width:none; padding:0 }
  section, figure, .headline div { break-inside:avoid; border-color:#ccc } section { padding:8px 10px }
  .curves { grid-template-columns:repeat(3,1fr) } h2 { break-after:avoid } .wide { overflow:visible } }
"""


def page(sheet: Sheet, card: dict[str, Any]) -> str:
    headline = "".join(f"<div><dt>{_text(k)}</dt>{_dd(v)}</div>" for k, v in sheet.headline)
    drawn = charts(card["curves"] or {}, (card["objective"] or {}).get("kind"))
    figures = "".join(
        f"<figure><figcaption>{_text(title)}<small>{_text(unit)}</small></figcaption>{svg}</figure>"
        for title, unit, svg in drawn
    )
    curves = f'<div class="curves">{figures}</div>' if figures else ""
    body = "".join(map(_section, sheet.parts))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Run card: {_text(sheet.title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{_text(sheet.title)}</h1><p class="lead">{_text(sheet.lead)}</p>
<dl class="headline">{headline}</dl>
{curves}
{body}
</main></body></html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def _dd(value: str) -> str:
    return (
        f'<dd class="none">{_text(value)}</dd>'
        if value.startswith(NOT_RECORDED)
        else f"<dd>{_text(value)}</dd>"
    )


def _section(part: Part) -> str:
    lines = "".join(_line(label, value) for label, value in part.lines)
    found = [f"<h2>{_text(part.title)}</h2>", f'<dl class="lines">{lines}</dl>' if lines else ""]
    found += [_folded(table) if table.folded else _table(table) for table in part.tables]
    if part.commands:
        found.append(f"<pre>{_text(chr(10).join(part.commands))}</pre>")
    if part.source:
        found.append(
            f"<details><summary>recipe.yaml</summary><pre>{_text(part.source.rstrip())}</pre></details>"
        )
    return f"<section>{''.join(found)}</section>\n"


def _line(label: str, value: str) -> str:
    long = ' class="long"' if len(value) > 48 else ""
    return f"<div{long}><dt>{_text(label)}</dt>{_dd(value)}</div>"


def _folded(table: Table) -> str:
    return f"<details><summary>{_text(table.folded)}</summary>{_table(table)}</details>"


def _table(table: Table) -> str:
    columns = columns_of(table)
    head = "".join(
        f'<th class="n">{_text(t)}</th>' if right else f"<th>{_text(t)}</th>" for t, right in columns
    )
    rows = "".join(
        "<tr>" + "".join(_cell(cell, title, right) for cell, (title, right) in zip(row, columns)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _cell(cell: str, title: str, right: bool) -> str:
    classes = [
        c
        for c, wanted in (("n", right), ("sha", "sha256" in title), ("none", cell == NOT_RECORDED))
        if wanted
    ]
    mark = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{mark}>{_text(cell)}</td>"
