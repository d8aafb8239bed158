"""What came of a run: evaluation before and after, held-out metrics during training, the audit of its weights."""

from __future__ import annotations

from typing import Any

from lab_utils.runs.card._history import Steps, number
from lab_utils.runs.directory import RunDirectory, read_json

AUDIT = "audit.json"
SIDES = {"before": "base", "after": "target"}


def evaluation(run: RunDirectory, steps: Steps) -> dict[str, Any] | None:
    """``measures`` of report.json, each before and after with interval and n, and ``during``: eval metrics of training.

    None where there is neither.
    """
    from lab_utils.evaluation.report import REPORT, VERSION

    report = read_json(run.path / REPORT)
    report = report if report.get("version") == VERSION else {}
    held_out = during(steps)
    if not report and not held_out:
        return None
    return {
        "report": REPORT if report else None,
        "checkpoint": (report.get("target") or {}).get("checkpoint"),
        "base": (report.get("base") or {}).get("source"),
        "on": report.get("manifests"),
        "settings": report.get("settings"),
        "measures": _measures(report) if report else {},
        "notes": report.get("notes") or {},
        "during": held_out,
    }


def _measures(report: dict[str, Any]) -> dict[str, Any]:
    from lab_utils.evaluation.tables import MEASURES

    found = {}
    for key, (label, unit) in MEASURES.items():
        sides = {"before": (report.get("base") or {}).get(key), "after": report.get(key)}
        if any(sides.values()):
            found[key] = {
                "label": label,
                "unit": unit,
                **{
                    side: {k: measure.get(k) for k in ("value", "interval", "n", "by_family") if k in measure}
                    if measure
                    else None
                    for side, measure in sides.items()
                },
            }
    return found


def during(steps: Steps) -> dict[str, dict[str, float]]:
    """First and last value of each ``eval/`` metric, with their steps."""
    found: dict[str, dict[str, float]] = {}
    for step in sorted(steps):
        for key, value in steps[step].items():
            if key.startswith("eval/") and (plain := number(value)) is not None:
                row = found.setdefault(key, {"first": plain, "first_step": step})
                row |= {"last": plain, "last_step": step}
    return dict(sorted(found.items()))


def audit(run: RunDirectory) -> dict[str, Any] | None:
    """Whether every weight moved, as ``lab audit`` measured it; None where it wasn't measured."""
    report = read_json(run.path / AUDIT)
    if not report:
        return None
    rows = sorted(report["by_tensor"], key=lambda row: row["relative_change"])
    extremes = {"least": rows[0], "most": rows[-1]} if rows else {}
    return {
        "every_weight_moved": report["changed"] == report["tensors"] and report["tensors"] > 0,
        "checkpoint": report["checkpoint"],
        "tensors": report["tensors"],
        "changed": report["changed"],
        "unchanged": report["unchanged"],
        "indexer_changed": report["indexer_changed"],
        "buffers_changed": sum(bool(row["changed"]) for row in report.get("buffers") or ()),
        **{
            k: {"name": row["name"], "relative_change": row["relative_change"]} for k, row in extremes.items()
        },
    }
