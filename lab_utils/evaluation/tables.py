"""A report as tables and a figure, for a notebook, the command line and the page of samples. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab_utils.errors import RunError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# key -> what a person calls it, and its unit
MEASURES = {
    "exact_match": ("exact match", "%"),
    "pass_at_k": ("pass@k", "%"),
    "refusal_rate": ("unsafe questions refused", "%"),
    "over_refusal_rate": ("harmless questions refused", "%"),
    "perplexity": ("perplexity", ""),
    "preference_accuracy": ("preferred answer more probable", "%"),
    "reward_accuracy": ("reward margin positive", "%"),
    "win_rate": ("win rate", "%"),
    "completion_length": ("length of answers, tokens", ""),
    "clipped_ratio": ("answers cut at the budget", "%"),
}


def format_measure(key: str, measure: dict[str, Any] | None) -> tuple[str, str]:
    """A measure's value and interval as text: ``("87.5 %", "[83.1, 90.9]")``; dashes where there is none."""
    if not measure:
        return "–", ""
    percent = MEASURES[key][1] == "%"
    bounds = [_number(key, bound) for bound in measure["interval"] or ()]
    value = _number(key, measure["value"]) + (" %" if percent else "")
    return value, f"[{', '.join(bounds)}]" if bounds else ""


def _number(key: str, value: float) -> str:
    if MEASURES[key][1] == "%":
        return f"{100 * value:.1f}"
    digits = 1 if key != "perplexity" else 3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}"


def summary(report: dict[str, Any], metric: str = "exact_match") -> pd.DataFrame:
    """A measure by family with its 95% intervals, and overall in the last row; before training where there is a base.

    Args:
        report: as ``evaluate`` returns it.
        metric: a key of MEASURES; shares are shown in percent.

    Raises:
        RunError: the report has no such measure.
    """
    import pandas as pd

    sides = _measures(report, metric)
    percent = MEASURES[metric][1]
    scale, digits = (100, 1) if percent else (1, 3)
    rows = []
    for family in [*report[metric]["by_family"], "all"]:
        row: dict[str, Any] = {"family": family}
        for stage, measure in sides.items():
            part = measure and (measure if family == "all" else measure["by_family"].get(family))
            if part:
                row["n"] = part["n"]
                row[f"{stage} {percent}".strip()] = round(scale * part["value"], digits)
                row[f"{stage} 95%"] = format_measure(metric, part)[1]
        rows.append(row)
    frame = pd.DataFrame(rows).set_index("family")
    return frame[["n", *(column for column in frame.columns if column != "n")]]


def lines(report: dict[str, Any]) -> list[tuple[str, str, dict[str, dict[str, Any] | None]]]:
    """Every measure that the report has, as label, key and ``stages``; perplexity also by manifest."""
    found = []
    for key, (label, _) in MEASURES.items():
        sides = stages(report, key)
        if not any(sides.values()):
            continue
        one = next(measure for measure in sides.values() if measure)
        found.append((label.replace("@k", f"@{one.get('k')}"), key, sides))
        for name in one.get("by_manifest", ()):
            found.append(
                (f"{label}, {name}", key, {s: m and m["by_manifest"][name] for s, m in sides.items()})
            )
    return found


def measures(report: dict[str, Any]) -> pd.DataFrame:
    """Every measure that the report has, with its 95% interval; before training where there is a base."""
    import pandas as pd

    rows = []
    for label, key, sides in lines(report):
        row: dict[str, Any] = {"measure": label}
        for stage, found in sides.items():
            row[stage], row[f"{stage} 95%"] = format_measure(key, found)
        rows.append(row | {"n": max(found["n"] for found in sides.values() if found)})
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else ["measure"]).set_index("measure")


def answers(report: dict[str, Any], per_family: int = 1) -> pd.DataFrame:
    """Sample answers side by side: question, expected, and what was answered before and after training."""
    import pandas as pd

    names = {"base": "before", "target": "after"} if report["base"] else {"target": "answer"}
    rows = []
    for sample in (s for s in report["samples"] if s["mode"] == report["settings"]["modes"][0]):
        row = {"family": sample["family"], "question": sample["messages"][-1].get("content")}
        row["expected"] = sample["expected"]
        for side, stage in names.items():
            if given := sample.get(side):
                row[stage] = {True: "✓ ", False: "✗ ", None: ""}[given["ok"]] + _short(given["text"])
        rows.append(row)
    frame = pd.DataFrame(rows, columns=list(rows[0]) if rows else ["family", "question", "expected"])
    frame = frame.groupby("family", sort=True).head(per_family).sort_values("family", kind="stable")
    return frame.set_index("family")


def figure(report: dict[str, Any], metric: str = "exact_match") -> Figure:
    """A measure by family as horizontal bars with 95% intervals, before and after training.

    Raises:
        RunError: the report has no such measure.
    """
    from lab_utils.evaluation.bars import draw

    return draw(_measures(report, metric), label=MEASURES[metric][0], percent=bool(MEASURES[metric][1]))


def by_mode(report: dict[str, Any]) -> pd.DataFrame:
    """Exact match, length and cut answers in each reasoning mode."""
    import pandas as pd

    keys = ("exact_match", "completion_length", "clipped_ratio")
    rows = []
    for mode, found in report["by_mode"].items():
        row = {"mode": mode, "budget": report["settings"]["budgets"][mode]}
        for key in keys:
            row[MEASURES[key][0]] = " ".join(format_measure(key, found[key]))
        rows.append(row)
    return pd.DataFrame(rows).set_index("mode")


def stages(report: dict[str, Any], metric: str) -> dict[str, dict[str, Any] | None]:
    """A measure of each side by what a reader calls it: before and after, or value alone without a base."""
    if report["base"]:
        return {"before": report["base"].get(metric), "after": report.get(metric)}
    return {"value": report.get(metric)}


def _measures(report: dict[str, Any], metric: str) -> dict[str, dict[str, Any] | None]:
    """``stages`` of a measure that the target has."""
    if not report.get(metric):
        known = ", ".join(key for key in MEASURES if report.get(key))
        why = report["notes"].get(metric) or f"the measures are {known}."
        raise RunError(f"The report of {report['target']['name']} has no {metric}: {why}")
    return stages(report, metric)


def _short(text: str) -> str:
    return text if len(text) <= 70 else text[:69] + "…"
