"""The sections of a card that say what went into a run: data, model, settings, layout, machines."""

from __future__ import annotations

from typing import Any

from lab_utils.runs.card._parts import Part, Table, known
from lab_utils.runs.card._words import NOT_RECORDED, figures, short, text, unit, whole


def data(card: dict[str, Any]) -> Part:
    data = known(card["data"])
    lines = [
        (
            "passes over the training data",
            f"{data['epochs']:.3f}" if data.get("epochs") is not None else NOT_RECORDED,
        ),
        ("tokens trained on, no padding", whole(card["tokens"])),
        ("row", unit(data.get("row_tokens"), "tokens")),
        (
            "encoding",
            f"{text(data.get('mode'))}, earlier thinking dropped: {text(data.get('drop_thinking'))}",
        ),
    ]
    if data.get("held_out_questions"):
        lines.append(("held-out questions asked in training", whole(data["held_out_questions"])))
    sources = data.get("sources") or []
    table = Table(
        ("role", "data set", "split", "version", "licence", "rows", "used", "tokens a pass", "weight"),
        [
            (
                s["role"],
                s["manifest"] + (f" ({', '.join(s['families'])})" if s["families"] else ""),
                s["split"],
                text(s["version"]),
                text(s["licence"]),
                whole(s["rows"]),
                whole(s["units"]),
                whole(s["tokens_per_pass"]),
                text(s["weight"]),
            )
            for s in sources
        ],
        right=(5, 6, 7, 8),
    )
    files = Table(
        ("data set", "file", "rows", "bytes", "sha256"),
        [
            (
                f"{s['manifest']}:{s['split']}",
                text(f.get("path")),
                whole(f.get("rows")),
                whole(f.get("bytes")),
                text(f.get("sha256")),
            )
            for s in sources
            for f in s["files"]
        ],
        right=(2, 3),
        folded="Files and their sha256",
    )
    origins = Table(
        ("data set", "where it comes from"),
        list({s["manifest"]: (s["manifest"], text(s["provenance"])) for s in sources}.values()),
        folded="Where the data come from",
    )
    return Part("Data", lines, [t for t in (table, files, origins) if t.rows])


def model(card: dict[str, Any]) -> Part:
    model = known(card["model"])
    config = known(model.get("config"))
    lines = [
        ("weights to start from", text(model.get("source"))),
        *([("which are those of the run", model["from_run"])] if model.get("from_run") else []),
        ("parameters trained", whole(model.get("parameters"))),
        ("tensors trained", whole(model.get("tensors"))),
        *((key.replace("_", " "), text(value)) for key, value in config.items()),
        ("precision", text(model.get("dtype"))),
        ("activation checkpointing", text(model.get("checkpointing"))),
        (
            "indexer",
            f"{text(model.get('indexer_phase'))}, weight of its loss {text(model.get('indexer_loss'))}",
        ),
        ("weight of multi-token prediction", text(model.get("mtp_loss"))),
        (
            "experts' balance",
            f"loss {text(model.get('balance_loss'))}, bias {text(model.get('balance_rate'))}",
        ),
        ("last checkpoint", text(model.get("checkpoint"))),
    ]
    hashes = known(model.get("checkpoint_sha256"))
    table = Table(
        ("file", "sha256"), list(hashes.items()), folded="Weights of the last checkpoint and their sha256"
    )
    return Part("Model", lines if model else [("model", NOT_RECORDED)], [table] if hashes else [])


def objective(card: dict[str, Any]) -> Part:
    lines = [(key.replace("_", " "), _setting(value)) for key, value in known(card["objective"]).items()]
    if card["rollout"]:
        lines += [
            (f"rollout: {key.replace('_', ' ')}", _setting(value)) for key, value in card["rollout"].items()
        ]
    return Part("Objective", lines or [("objective", NOT_RECORDED)])


def _setting(value: Any) -> str:
    """A setting of a recipe: an absent one is known to be absent."""
    return "–" if value is None else text(value)


def optimizer(card: dict[str, Any]) -> Part:
    optimizer = dict(known(card["optimizer"]))
    groups, table = known(optimizer.pop("groups", None)), optimizer.pop("table", None) or []
    schedule = known(optimizer.pop("schedule", None))
    lines = [(key.replace("_", " "), _setting(value)) for key, value in optimizer.items()]
    lines += [(f"schedule: {key.replace('_', ' ')}", _setting(value)) for key, value in schedule.items()]
    tables = []
    if groups:
        rows = [
            (
                kind,
                whole(g["tensors"]),
                "–" if g["matrices"] is None else whole(g["matrices"]),
                whole(g["parameters"]),
            )
            for kind, g in groups.items()
        ]
        tables.append(Table(("optimizer", "tensors", "matrices", "parameters"), rows, right=(1, 2, 3)))
        tables.append(
            Table(
                ("parameter", "optimizer", "shape", "count", "parameters", "weight decay"),
                [
                    (
                        row["name"],
                        row["algorithm"],
                        " × ".join(map(str, row["shape"])) or "scalar",
                        whole(row["count"]),
                        whole(row["parameters"]),
                        text(row["weight_decay"]),
                    )
                    for row in table
                ],
                right=(3, 4, 5),
                folded="Every parameter and its optimizer",
            )
        )
    elif lines:
        lines.append(("tensors by optimizer", f"{NOT_RECORDED} (no checkpoint)"))
    return Part("Optimizer", lines or [("optimizer", NOT_RECORDED)], tables)


# -- where it ran ----------------------------------------------------------------------------------------------


def layout(card: dict[str, Any]) -> Part:
    layout = dict(known(card["layout"]))
    names = {
        "ranks": "ranks",
        "dp": "data parallel",
        "cp": "context parallel",
        "ep": "expert parallel",
        "pp": "pipeline stages",
        "virtual_stages": "virtual stages a rank",
        "zero": "ZeRO stage",
        "offload": "optimizer in host memory",
        "micro_rows": "rows in a micro-batch",
        "accumulation": "micro-batches a step",
        "batch_tokens": "tokens in a global batch, padding included",
    }
    lines = [(label, text(layout.get(key))) for key, label in names.items()]
    for each in layout.get("earlier") or ():
        lines.append(
            ("an earlier attempt", ", ".join(f"{key} {text(each[key])}" for key in names if key in each))
        )
    return Part("Parallel layout", lines)


def hardware(card: dict[str, Any]) -> Part:
    hardware = known(card["hardware"])
    chips = hardware.get("chips")
    peak = hardware.get("peak_flops")
    source = f" ({hardware['peak_source']})" if hardware.get("peak_source") else ""
    lines = [
        ("device", text(hardware.get("device"))),
        ("chips", "none: CPU" if chips == 0 else whole(chips)),
        *([("packages of two dies", whole(hardware["packages"]))] if hardware.get("packages") else []),
        ("memory of a device", unit(hardware.get("device_gib"), "GiB", figures)),
        ("peak rate of a device", (f"{short(peak)}FLOP/s" if peak else NOT_RECORDED) + source),
        ("nodes", whole(hardware.get("nodes"))),
        ("ranks a node", whole(hardware.get("ranks_per_node"))),
        ("cabinets", _places(hardware.get("cabinets"))),
        ("SuperPoDs", _places(hardware.get("superpods"))),
        ("fabric", text(hardware.get("fabric"))),
        ("machine", text(hardware.get("machine"))),
        ("storage", text(hardware.get("storage"))),
        ("host", f"{text(hardware.get('host_platform'))}, {text(hardware.get('host_cores'))} cores"),
        ("launcher", text(hardware.get("launcher"))),
        *([("its settings", text(hardware["options"]))] if hardware.get("options") else []),
        *([("variables", text(hardware["environment"]))] if hardware.get("environment") else []),
    ]
    names = hardware.get("node_names") or []
    table = Table(("node",), [(name,) for name in names], folded=f"Names of the {len(names)} nodes")
    return Part("Hardware", lines, [table] if len(names) > 1 else [])


def _places(found: list[str] | None) -> str:
    return f"{len(found)}: {', '.join(found)}" if found else NOT_RECORDED
