"""``samples.html``: every question with its answers, for a person to read; one file, nothing from the network."""

from __future__ import annotations

import html
import json
from typing import Any

from lab_utils.evaluation.tables import format_measure, lines, stages

SIDES = {"base": "before", "target": "after", "against": "the other"}
# What changed for a question; the order is that of the filter.
OUTCOMES = {
    "gained": "✗ → ✓ gained",
    "lost": "✓ → ✗ lost",
    "right": "✓ both right",
    "wrong": "✗ both wrong",
    "unchecked": "not checked",
}
ALONE = {"right": "✓ right", "wrong": "✗ wrong", "unchecked": "not checked"}

_STYLE = """
:root { --ink:#1f2933; --muted:#616e7c; --line:#e4e7eb; --page:#f5f7fa; --card:#fff; --user:#e8f0fe; --tool:#f3eefa;
  --good:#187a4c; --good-bg:#e3f4ea; --bad:#b3341d; --bad-bg:#fdebe7; --accent:#2f6fde; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e7eb; --muted:#9aa5b1; --line:#323f4b; --page:#12181f;
  --card:#1b232c; --user:#1f3353; --tool:#332a45; --good:#5fd19b; --good-bg:#16382a; --bad:#ff9d8a; --bad-bg:#43211b;
  --accent:#7aa7f7; } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif }
main, header { max-width:1080px; margin:0 auto; padding:0 20px }
header { padding-top:28px } h1 { font-size:22px; margin:0 } header p { color:var(--muted); margin:4px 0 14px }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; margin-bottom:18px }
th, td { text-align:right; padding:4px 14px 4px 0; border-bottom:1px solid var(--line) }
th { font-weight:600; color:var(--muted); font-size:13px } th:first-child, td:first-child { text-align:left }
td small { color:var(--muted); margin-left:6px }
nav { position:sticky; top:0; z-index:1; background:var(--page); border-bottom:1px solid var(--line) }
nav form { max-width:1080px; margin:0 auto; padding:10px 20px; display:flex; flex-wrap:wrap; gap:10px;
  align-items:center }
select, input { font:inherit; font-size:14px; color:inherit; background:var(--card); border:1px solid var(--line);
  border-radius:6px; padding:5px 8px } input { flex:1; min-width:140px }
output { color:var(--muted); font-size:14px; white-space:nowrap }
article { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px; margin:14px 0 }
article[hidden] { display:none }
.head { display:flex; flex-wrap:wrap; gap:8px; align-items:center; font-size:13px; color:var(--muted);
  margin-bottom:10px }
.tag { border-radius:99px; padding:1px 9px; background:var(--page); border:1px solid var(--line) }
.tag.gained, .tag.win { color:var(--good); background:var(--good-bg); border-color:transparent }
.tag.lost, .tag.loss { color:var(--bad); background:var(--bad-bg); border-color:transparent }
.head a { margin-left:auto; color:inherit; text-decoration:none }
.turn { display:flex; margin:6px 0 } .turn > div { max-width:84%; border-radius:12px; padding:7px 12px;
  background:var(--page); white-space:pre-wrap; overflow-wrap:anywhere }
.turn b { display:block; font-size:11px; font-weight:600; color:var(--muted); letter-spacing:.03em }
.user { justify-content:flex-end } .user > div { background:var(--user) } .tool > div { background:var(--tool) }
.answers { display:grid; grid-template-columns:repeat(auto-fit,minmax(240px,1fr)); gap:10px; margin-top:12px;
  align-items:start }
.answer { border:1px solid var(--line); border-left:4px solid var(--line); border-radius:8px; padding:7px 12px;
  min-width:0 }
.answer.ok { border-left-color:var(--good) } .answer.no { border-left-color:var(--bad) }
.answer.expected { border-left-color:var(--accent) }
.answer h3 { margin:0 0 2px; font-size:12px; font-weight:600; color:var(--muted); display:flex; gap:8px }
.answer h3 span { margin-left:auto; font-weight:400 }
.ok h3 i { color:var(--good); font-style:normal } .no h3 i { color:var(--bad); font-style:normal }
pre { margin:0; white-space:pre-wrap; overflow-wrap:anywhere; font:13.5px/1.5 ui-monospace,Menlo,Consolas,monospace }
details { font-size:13px; color:var(--muted); margin:4px 0 } summary { cursor:pointer } .none { color:var(--muted) }
#empty { color:var(--muted); text-align:center; padding:40px }
"""

_SCRIPT = """
const form = document.querySelector("nav form"), cards = [...document.querySelectorAll("article")];
function filter() {
  const wanted = [...form.querySelectorAll("select")].map(s => [s.name, s.value]).filter(([, value]) => value);
  const text = form.elements.text.value.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    const fits = wanted.every(([name, value]) => card.dataset[name] === value)
      && (!text || card.textContent.toLowerCase().includes(text));
    card.hidden = !fits;
    shown += fits;
  }
  form.querySelector("output").textContent = `${shown} of ${cards.length}`;
  document.getElementById("empty").hidden = shown > 0;
}
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
filter();
"""


def samples_page(report: dict[str, Any]) -> str:
    """The page of a report: its headline numbers, then a card a question, filtered by family, outcome, mode and text.

    Args:
        report: as ``worker`` writes it; ``samples`` holds the questions and answers.
    """
    samples = report["samples"]
    name = report["target"]["name"]
    sets = ", ".join(f"{m['name']}:{m['split']}" for m in report["manifests"])
    left = report["samples_left_out"]
    more = f" · {left:,} more are not shown" if left else ""
    cards = "\n".join(_card(number, sample, report) for number, sample in enumerate(samples, 1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Answers of {_text(name)}</title><style>{_STYLE}</style></head><body>
<header><h1>Answers of {_text(name)}</h1>
<p>{_text(sets)} · {len(samples):,} answers{more} · 95% intervals in brackets</p>
{_numbers(report)}</header>
<nav><form>{_filters(samples, report)}<input name="text" type="search" placeholder="Search questions and answers"
 aria-label="Search questions and answers"><output></output></form></nav>
<main>{cards}<p id="empty" hidden>No answer fits these filters.</p></main>
<script>{_SCRIPT}</script></body></html>
"""


def outcome(sample: dict[str, Any]) -> str:
    """What a sample shows: gained, lost, right (both), wrong (both), unchecked."""
    ok = sample["target"]["ok"]
    if ok is None:
        return "unchecked"
    before = sample["base"]["ok"] if sample.get("base") else ok
    if ok == before:
        return "right" if ok else "wrong"
    return "gained" if ok else "lost"


def _text(value: Any) -> str:
    return html.escape(str(value))


# -- head ----------------------------------------------------------------------------------------------------


def _numbers(report: dict[str, Any]) -> str:
    """Every measure of all sides, a column each."""

    rows = []
    for label, key, sides in lines(report):
        cells = "".join(
            f"<td>{_numbers_cell(format_measure(key, measure))}</td>" for measure in sides.values()
        )
        n = max(measure["n"] for measure in sides.values() if measure)
        rows.append(f"<tr><td>{_text(label)}</td>{cells}<td>{n:,}</td></tr>")
    head = "".join(f"<th>{stage}</th>" for stage in stages(report, "exact_match"))
    return f"<table><tr><th></th>{head}<th>n</th></tr>{''.join(rows)}</table>" if rows else ""


def _numbers_cell(shown: tuple[str, str]) -> str:
    value, interval = shown
    return f"{value}<small>{interval}</small>" if interval else value


def _filters(samples: list[dict[str, Any]], report: dict[str, Any]) -> str:
    names = OUTCOMES if report["base"] else ALONE
    groups = {
        "family": ("family", {f: f.replace("_", " ") for f in sorted({s["family"] for s in samples})}),
        "outcome": ("outcome", {o: names[o] for o in names if any(outcome(s) == o for s in samples)}),
        "mode": ("mode", {m: m for m in dict.fromkeys(s["mode"] for s in samples)}),
        "verdict": (
            "verdict",
            {v: v for v in ("win", "tie", "loss") if any(s.get("verdict") == v for s in samples)},
        ),
    }
    parts = []
    for key, (label, options) in groups.items():
        if len(options) < 2:
            continue
        counts = {value: sum(_data(s)[key] == value for s in samples) for value in options}
        choices = "".join(
            f'<option value="{_text(value)}">{_text(shown)} ({counts[value]})</option>'
            for value, shown in options.items()
        )
        parts.append(
            f'<select name="{key}" aria-label="{label}"><option value="">every {label}</option>{choices}</select>'
        )
    return "".join(parts)


def _data(sample: dict[str, Any]) -> dict[str, str]:
    return {
        "family": sample["family"],
        "outcome": outcome(sample),
        "mode": sample["mode"],
        "verdict": sample.get("verdict") or "",
    }


# -- cards ---------------------------------------------------------------------------------------------------


def _card(number: int, sample: dict[str, Any], report: dict[str, Any]) -> str:
    data = "".join(f' data-{key}="{_text(value)}"' for key, value in _data(sample).items())
    result = outcome(sample)
    names = OUTCOMES if report["base"] else ALONE
    tags = [f'<span class="tag">{_text(sample["family"].replace("_", " "))}</span>']
    tags.append(f'<span class="tag {result}">{names[result]}</span>')
    if len(report["settings"]["modes"]) > 1:
        tags.append(f'<span class="tag">{_text(sample["mode"])}</span>')
    if sample.get("verdict"):
        reason = _text(sample.get("reason") or "")
        tags.append(
            f'<span class="tag {sample["verdict"]}" title="{reason}">{sample["verdict"]} against the other</span>'
        )
    if sample.get("drawn"):
        tags.append(f"{sample['drawn']['right']} of {sample['drawn']['of']} sampled answers right")
    turns = "".join(_turn(message) for message in sample["messages"])
    tools = ""
    if sample.get("tools"):
        shown = json.dumps(sample["tools"], indent=1, ensure_ascii=False)
        names = "tools: " + ", ".join(tool["function"]["name"] for tool in sample["tools"])
        tools = f"<details><summary>{_text(names)}</summary><pre>{_text(shown)}</pre></details>"
    sides = {side: label for side, label in SIDES.items() if sample.get(side)}
    answers = "".join(
        _answer(label if len(sides) > 1 else "answer", sample[side]) for side, label in sides.items()
    )
    expected = ""
    if sample.get("expected") is not None:
        expected = (
            f'<div class="answer expected"><h3>expected</h3><pre>{_text(sample["expected"])}</pre></div>'
        )
    return (
        f'<article id="a{number}"{data}><div class="head">{"".join(tags)}<a href="#a{number}">#{number}</a></div>'
        f'{tools}{turns}<div class="answers">{expected}{answers}</div></article>'
    )


def _turn(message: dict[str, Any]) -> str:
    role = message["role"]
    text = message.get("content") or ""
    if message.get("tool_calls"):
        calls = [call.get("function", call) for call in message["tool_calls"]]
        text = "\n".join([text, *(f"{c['name']}({c.get('arguments')})" for c in calls)]).strip()
    kind = role if role in ("user", "tool") else "other"
    return f'<div class="turn {kind}"><div><b>{_text(role)}</b>{_text(text)}</div></div>'


def _answer(label: str, answer: dict[str, Any]) -> str:
    ok = answer["ok"]
    kind = "" if ok is None else "ok" if ok else "no"
    mark = "" if ok is None else "<i>✓</i>" if ok else "<i>✗</i>"
    cut = "" if answer["finished"] else ", cut"
    reasoning = ""
    if answer["reasoning"]:
        reasoning = f"<details><summary>reasoning</summary><pre>{_text(answer['reasoning'])}</pre></details>"
    text = (
        f"<pre>{_text(answer['text'])}</pre>"
        if answer["text"].strip()
        else '<span class="none">no answer</span>'
    )
    return (
        f'<div class="answer {kind}"><h3>{label} {mark}<span>{answer["tokens"]} tokens{cut}</span></h3>'
        f"{reasoning}{text}</div>"
    )
