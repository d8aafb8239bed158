"""The sections of a card that say how a run went and what came of it."""

from __future__ import annotations

from typing import Any

from lab_utils.runs.card import _words as words
from lab_utils.runs.card._parts import Part, Table, known, reason
from lab_utils.runs.card._words import (
    NOT_RECORDED,
    duration,
    figures,
    moment,
    share,
    short,
    text,
    unit,
    whole,
)


def time(card: dict[str, Any]) -> Part:
    attempts = card["attempts"]
    lines = [
        ("launched", moment(card["created"])),
        ("in the queue and starting up", duration(card["queued_s"])),
        ("began", moment(card["started"])),
        ("ended", moment(card["ended"])),
        ("wall clock, pauses left out", duration(card["wall_clock_s"])),
        ("attempts", whole(len(attempts)) if attempts else NOT_RECORDED),
    ]
    rows = [
        (str(i), moment(a["started"]), moment(a["ended"]), duration(a["seconds"]))
        for i, a in enumerate(attempts, 1)
    ]
    table = Table(("attempt", "began", "ended", "took"), rows, right=(3,))
    return Part("Time", lines, [table] if len(rows) > 1 else [])


def speed(card: dict[str, Any]) -> Part:
    speed, chips, energy = known(card["throughput"]), known(card["chips"]), known(card["energy"])
    mean, median = known(speed.get("mean")), known(speed.get("median"))
    step = known(speed.get("step_time_s"))
    hardware = known(card["hardware"])
    peak = hardware.get("peak_flops")
    against = (
        f"of {short(peak)}FLOP/s a device: {hardware.get('peak_source')}" if peak else "peak not recorded"
    )
    rows = [
        ("tokens/s", whole(mean.get("tokens_per_s")), whole(median.get("tokens_per_s"))),
        ("tokens/s a chip (CPU: a rank)", *(figures(v.get("tokens_per_s_per_chip")) for v in (mean, median))),
        ("TFLOP/s a chip", *(figures(v.get("tflops_per_chip")) for v in (mean, median))),
        (f"MFU ({against})", share(mean.get("mfu")), share(median.get("mfu"))),
        ("padding", share(mean.get("padding_frac")), share(median.get("padding_frac"))),
        ("seconds a step", figures(step.get("mean")), figures(step.get("median"))),
    ]
    split = known(speed.get("time_split"))
    lines = [
        ("tokens/s from start to end, all included", whole(speed.get("end_to_end_tokens_per_s"))),
        ("time in steps", duration(speed.get("seconds_in_steps"))),
        (
            "of which",
            ", ".join(
                f"{key.replace('_', ' ')} {share(part)}" for key, part in split.items() if part > 0.0005
            )
            or NOT_RECORDED,
        ),
        ("chip utilisation, mean", unit(chips.get("util_mean_percent"), "%", figures)),
        ("chip utilisation, idlest", unit(chips.get("util_min_percent"), "%", figures)),
        ("memory at its fullest", share(chips.get("memory_peak_frac"))),
        ("allocator's peak, worst rank", unit(chips.get("allocated_peak_gib"), "GiB", figures)),
        ("hottest chip", unit(chips.get("temp_max_c"), "°C", figures)),
        ("power a package", unit(chips.get("power_mean_w"), "W", figures)),
        ("energy of the chips", words.energy(card["energy_kwh"]) + reason(card, "energy_kwh")),
    ]
    if energy:
        lines.append(("energy a token", unit(energy.get("joules_per_token"), "J", figures)))
        lines.append(("of the run's time, sampled", share(energy.get("covered"))))
    return Part("Throughput, utilisation, energy", lines, [Table(("", "mean", "median"), rows, right=(1, 2))])


def loss(card: dict[str, Any]) -> Part:
    rows = card["loss"] or []
    keys = [key for key in ("train/loss", "eval/loss") if any(key in row for row in rows)]
    if not keys:
        return Part("Loss", [("loss", f"{NOT_RECORDED} (no step was logged)")])
    table = Table(
        ("of the steps", "step", *keys),
        [
            (f"{r['percent']} %", whole(r["step"]), *("" if k not in r else f"{r[k]:.4f}" for k in keys))
            for r in rows
        ],
        right=tuple(range(len(keys) + 2)),
    )
    return Part("Loss", [], [table])


def sides(measure: dict[str, Any]) -> list[str]:
    return [side for side in ("before", "after") if measure[side]]


def measure_text(key: str, measure: dict[str, Any], side: str) -> tuple[str, str]:
    """Value and interval of one side."""
    from lab_utils.evaluation.tables import format_measure

    return format_measure(key, measure[side])


def evaluation(card: dict[str, Any]) -> Part:
    evaluation = known(card["evaluation"])
    if not evaluation:
        return Part("Evaluation", [("evaluation", NOT_RECORDED + reason(card, "evaluation"))])
    measures, tables, lines = known(evaluation["measures"]), [], []
    if measures:
        sets = ", ".join(
            f"{m['name']}:{m['split']} ({whole(m['rows'])} rows)" for m in evaluation["on"] or ()
        )
        lines += [
            ("checkpoint", text(evaluation["checkpoint"])),
            ("compared with", text(evaluation["base"])),
            ("on", sets or NOT_RECORDED),
            ("settings", text({k: v for k, v in known(evaluation["settings"]).items() if v is not None})),
        ]
        rows = []
        for key, m in measures.items():
            cells = [" ".join(measure_text(key, m, side)).strip() for side in ("before", "after")]
            rows.append((m["label"], *cells, whole(max(m[s]["n"] for s in sides(m)))))
        tables.append(Table(("", "before", "after", "n"), rows, right=(1, 2, 3)))
        tables += _families(next(iter(measures)), measures)
    else:
        lines.append(("answers before and after", f"{NOT_RECORDED} (lab eval {card['run']})"))
    if during := known(evaluation["during"]):
        rows = [
            (key, f"{v['first']:.4g}", whole(v["first_step"]), f"{v['last']:.4g}", whole(v["last_step"]))
            for key, v in during.items()
        ]
        columns = ("held out, while training", "first", "at step", "last", "at step")
        tables.append(
            Table(
                columns,
                rows,
                right=(1, 2, 3, 4),
                folded="" if not measures else "Held-out metrics of training",
            )
        )
    return Part("Evaluation, before and after", lines, tables)


def _families(key: str, measures: dict[str, Any]) -> list[Table]:
    """The first measure by family, where it has several."""
    measure = measures[key]
    names = list(known(measure["after"]).get("by_family") or {})
    if len(names) < 2:
        return []
    rows = []
    for name in names:
        parts = [(known(measure[side]).get("by_family") or {}).get(name) for side in ("before", "after")]
        part = {"before": parts[0], "after": parts[1]}
        cells = [" ".join(measure_text(key, part, side)).strip() for side in part]
        rows.append((name.replace("_", " "), *cells, whole(parts[1]["n"])))
    return [
        Table(
            ("family", "before", "after", "n"),
            rows,
            right=(1, 2, 3),
            folded=f"{measure['label'].capitalize()}, by family",
        )
    ]


def audit(card: dict[str, Any]) -> Part:
    audit = known(card["audit"])
    if not audit:
        return Part("Did every weight move", [("audit", NOT_RECORDED + reason(card, "audit"))])
    lines = [
        ("every weight moved", text(audit["every_weight_moved"])),
        (
            "tensors that changed",
            f"{whole(audit['changed'])} of {whole(audit['tensors'])}, by {audit['checkpoint']}",
        ),
        *([("unchanged", text(audit["unchanged"][:20]))] if audit["unchanged"] else []),
    ]
    if audit["indexer_changed"] is not None:
        lines.append(("every tensor of the lightning indexer moved", text(audit["indexer_changed"])))
    for key, label in (("least", "least relative change"), ("most", "greatest relative change")):
        if row := audit.get(key):
            lines.append((label, f"{row['relative_change']:.2e}, {row['name']}"))
    lines.append(("buffers that changed", whole(audit["buffers_changed"])))
    return Part("Did every weight move", lines)


def stability(card: dict[str, Any]) -> Part:
    found = known(card["stability"])
    restarts = len(card["attempts"]) - 1 if card["attempts"] else None
    lines = [
        ("restarts and resumes", whole(restarts)),
        ("logged steps done twice after a resume", whole(found.get("lines_repeated_after_resumes"))),
        ("steps skipped, not finite", whole(found.get("skipped_steps"))),
        ("checkpoints written", whole(found.get("checkpoints"))),
        ("alerts and warnings", whole(found.get("alert_count"))),
    ]
    rows = [(moment(a["time"]), text(a["kind"]), text(a["message"])) for a in found.get("alerts") or ()]
    return Part("Stability", lines, [Table(("when", "what", ""), rows)] if rows else [])


def software(card: dict[str, Any]) -> Part:
    software = known(card["software"])
    on_ascend = known(card["hardware"]).get("kind") not in ("cpu", "cuda")
    dirty = software.get("dirty")
    changes = NOT_RECORDED if dirty is None else "none"
    if dirty:
        diff, files = whole(software.get("diff_lines")), whole(software.get("untracked"))
        changes = f"{diff} lines of diff, {files} untracked files"
    lines = [
        ("commit", text(software.get("commit"))),
        ("branch", text(software.get("branch"))),
        ("changes that are not committed", changes),
        ("Python", text(software.get("python"))),
        *((name, version) for name, version in known(software.get("main")).items()),
        *(
            [("CANN", text(software.get("cann"))), ("driver", text(software.get("driver")))]
            if on_ascend
            else []
        ),
        ("sha256 of requirements.lock", text(software.get("lock_sha256"))),
        ("sha256 of the installed set", text(software.get("packages_sha256"))),
    ]
    packages = known(software.get("packages"))
    table = Table(("package", "version"), list(packages.items()), folded=f"All {len(packages)} packages")
    return Part("Software", lines, [table] if packages else [])


def reproduce(card: dict[str, Any]) -> Part:
    found = known(card["reproduce"])
    lines = [
        ("recipe", text(found.get("recipe_hash"))),
        ("sha256 of recipe.yaml", text(found.get("recipe_sha256"))),
        ("seed", text(found.get("seed"))),
        *([("notebook", found["notebook"])] if found.get("notebook") else []),
    ]
    return Part("Do it again", lines, [], found.get("commands") or [], found.get("recipe") or "")
