"""What the pages beside the form show, as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from lab_utils.panels.chat import chat_box, chat_key
from lab_utils.widgets._field import MISSING

TERMS, ADVICE = 5, 6  # of a plan that are shown
PREDICTED = (
    "Predicted from counts and the cluster's figures; docs/planner.md says how, docs/calibration.md how well."
)


def text(value: Any) -> str:
    """A value as HTML text."""
    return html.escape(str(value))


def note(sentence: str) -> str:
    return f'<div class="lab-soft">{text(sentence)}</div>'


def table(rows: list[tuple[str, str]], head: str = "") -> str:
    """Two columns; the values are HTML."""
    body = "".join(f"<tr><td>{text(name)}</td><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="lab-table">{head}{body}</table>'


# -- plan ----------------------------------------------------------------------------------------------------


def plan(found: dict[str, Any]) -> str:
    """Does it fit, how long, how much; and what to turn."""
    e = found["estimate"]
    step, total = e["step_seconds"], e["total_seconds"]
    memory = f"{gib(e['state_gib'])} of state a device; activations come on top"
    if e["device_gib"]:
        memory = f"{gib(e['state_gib'])} of {gib(e['device_gib'])}{_meter(e['state_gib'] / e['device_gib'])}"
    split = " + ".join(f"{gib(e[f'{part}_gib'])} {part}" for part in ("weights", "gradients", "optimizer"))
    host = f" + {gib(e['host_gib'])} in host memory" if e["host_gib"] else ""
    unknown = f"unknown: the job's devices ({e['device']}) are not on this machine"
    rows = [
        ("memory a device", f'{memory}<div class="lab-soft">{split}{host}</div>'),
        ("step", f"{duration(step)} at {100 * e['utilisation']:.0f} % of the peak" if step else unknown),
        ("run", f"{duration(total)}, {e['steps']:,} steps" if total else f"{e['steps']:,} steps"),
    ]
    if total:
        rows.append(("cost", f"{number(e['device_hours'])} device-hours on {e['ranks']:,} × {e['device']}"))
    rows += [
        ("tokens", f"{number(e['tokens_per_step'] * e['steps'])} ({e['tokens_per_step']:,} a step)"),
        ("training FLOPs", f"{e['flops_per_step'] * e['steps']:.3g}"),
        ("parameters", f"{e['parameters']:,}, every one trained"),
    ]
    return _verdict(e, found["knobs"]) + table(rows) + note("Counted from shapes; times are predicted.")


def planned(found: dict[str, Any]) -> str:
    """The same by the planner, on a cluster: memory and step by term, and what one change would give."""
    peak, room, step = found["memory_peak_gib"], found["room_gib"], found["step_s"]
    total, chips = step * found["steps"], found["chips"]
    if found["fits"]:
        verdict = f'<div class="lab-good">✓ It fits: {text(found["name"])} on {text(found["cluster"])}</div>'
    else:
        verdict = f'<div class="lab-bad">✗ {text(found["why"])}</div>'
    memory = _largest(found["memory_gib"], gib)
    terms = _largest(found["step_terms_s"], lambda seconds: f"{100 * seconds / step:.0f} %")
    shown = [
        (
            "memory a device",
            f'{gib(peak)} of {gib(room)}{_meter(peak / room)}<div class="lab-soft">stage {found["memory_stage"]}: '
            f"{memory}</div>",
        ),
        (
            "step",
            f'{duration(step)}, {found["tokens_per_s"]:,.0f} tokens/s<div class="lab-soft">{terms}</div>',
        ),
        ("MFU", f"{100 * found['mfu']:.1f} % of {found['mfu_denominator_tflops']:.0f} TFLOPS a device"),
        ("run", f"{duration(total)}, {found['steps']:,} steps"),
        ("cost", f"{number(total * chips / 3600)} chip-hours on {chips:,.0f} chips"),
        ("binding", text(found["binding"])),
    ]
    turn = "".join(f"<li>{text(sentence)}</li>" for sentence in found["advice"][:ADVICE])
    return verdict + table(shown) + f"<div>One change would give:</div><ul>{turn}</ul>" + note(PREDICTED)


def _largest(values: dict[str, float], say: Callable[[float], str]) -> str:
    """The largest terms, and how many others there are."""
    names = sorted((name for name in values if values[name] > 0), key=lambda name: -values[name])
    rest = len(names) - TERMS
    parts = [f"{text(name.replace('_', ' '))} {say(values[name])}" for name in names[:TERMS]]
    return ", ".join([*parts, f"and {rest} more"] if rest > 0 else parts)


def _verdict(e: dict[str, Any], knobs: list[str]) -> str:
    if e["fits"] is None:
        return ""
    if e["fits"]:
        said = "It fits: weights, gradients and optimizer state leave room for activations."
        return f'<div class="lab-good">✓ {said}</div>'
    turn = "".join(f"<li>{text(knob)}</li>" for knob in knobs)
    return f'<div class="lab-bad">✗ It does not fit. What would make room:</div><ul>{turn}</ul>'


def _meter(share: float) -> str:
    over = " lab-over" if share > 1 else ""
    return f'<div class="lab-meter{over}"><div style="width:{100 * min(share, 1.0):.1f}%"></div></div>'


def gib(value: float) -> str:
    if value < 0.1:
        return f"{value * 1024:.3g} MiB"
    return f"{value:.3g} GiB" if value < 1000 else f"{value:,.0f} GiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def number(value: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# -- data, script, changes, checks ---------------------------------------------------------------------------


def rows(found: dict[str, Any], start: int) -> str:
    """Rows as chat, what bears loss coloured."""
    total = f" of {found['total']:,}" if found["total"] else ""
    if not found["rows"]:
        return note(f"{found['name']} has no row {start}.")
    parts = [chat_key(f"{found['name']} · {found['format']}")]
    for offset, row in enumerate(found["rows"]):
        loss = f"{row['with_loss']} bear loss" if row["with_loss"] else "a prompt: none bears loss"
        parts.append(
            f'<div class="lab-soft">row {start + offset:,}{total} · {row["tokens"]} tokens, {loss}</div>'
        )
        for side, segments in row["parts"].items():
            if len(row["parts"]) > 1:
                parts.append(f'<div class="lab-head">{text(side)}</div>')
            parts.append(chat_box(map(tuple, segments)))
    return "".join(parts)


def script(rendered: str) -> str:
    said = "What a launch submits, to the letter; the time in the run's name is that of the launch."
    return f'{note(said)}<pre class="lab-script">{text(rendered)}</pre>'


def changes(name: str, found: list[tuple[str, Any, Any]]) -> str:
    """Keys in which the form differs from the recipe that it began with."""
    if not found:
        return note(f"Nothing differs from {name}.")
    lines = [
        (key, f'<span class="lab-soft">{_value(was)}</span> → <b>{_value(now)}</b>')
        for key, was, now in found
    ]
    return table(lines, f"<tr><th>from {text(name)}</th><th>was → is</th></tr>")


def _value(value: Any) -> str:
    if value is MISSING:
        return "not there"
    return text("absent" if value is None else str(value).lower() if isinstance(value, bool) else value)


def checks(found: list[dict[str, Any]]) -> str:
    failed = sum(not check["ok"] for check in found)
    said = (
        f'<div class="lab-bad">{failed} of {len(found)} checks would keep the run from starting.</div>'
        if failed
        else '<div class="lab-good">Nothing keeps the run from starting.</div>'
    )
    marks = {True: '<span class="lab-good">✓</span>', False: '<span class="lab-bad">✗</span>'}
    return said + table([(check["name"], f"{marks[check['ok']]} {text(check['text'])}") for check in found])
