"""The card's JSON as a sheet: title, one sentence, the headline figures, and the sections."""

from __future__ import annotations

from typing import Any

from lab_utils.runs.card import _inputs as inputs
from lab_utils.runs.card import _outcome as outcome
from lab_utils.runs.card import _words as words
from lab_utils.runs.card._parts import Sheet, known
from lab_utils.runs.card._words import NOT_RECORDED, duration, share, short, text, whole


def sheet(card: dict[str, Any]) -> Sheet:
    parts = [
        inputs.data(card),
        inputs.model(card),
        inputs.objective(card),
        inputs.optimizer(card),
        inputs.layout(card),
        inputs.hardware(card),
        outcome.time(card),
        outcome.speed(card),
        outcome.loss(card),
        outcome.evaluation(card),
        outcome.audit(card),
        outcome.stability(card),
        outcome.software(card),
        outcome.reproduce(card),
    ]
    return Sheet(card["run"], _lead(card), _headline(card), parts)


# -- head ----------------------------------------------------------------------------------------------------


def _lead(card: dict[str, Any]) -> str:
    """One sentence: what was trained how on what, and how it ended."""
    model, objective, hardware = known(card["model"]), known(card["objective"]), known(card["hardware"])
    moved = ", every tensor of which moved" if known(card["audit"]).get("every_weight_moved") else ""
    size = f" ({short(model['parameters'])} parameters{moved})" if model.get("parameters") else ""
    kinds = dict.fromkeys(str(v) for v in (objective.get("kind"), objective.get("loss")) if v)
    sources = [s for s in known(card["data"]).get("sources") or () if s["role"] == "train"]
    names = ", ".join(dict.fromkeys(s["manifest"] for s in sources))
    where = f", on {_machines(hardware)}" if hardware.get("ranks") else ""
    on = f" on {names}" if names else ""
    what = f"{model.get('source', 'A model')}{size}, {' · '.join(kinds) or 'trained'}{on}{where}"
    error = f": {card['error']}" if card.get("error") else ""
    return f"{what}. State: {text(card['state'])}{error}".rstrip(".") + "."


def _machines(hardware: dict[str, Any]) -> str:
    ranks = hardware["ranks"]
    if hardware.get("chips"):
        device = hardware.get("device") or f"{hardware['kind']} devices"
        return f"{whole(ranks)} × {device}"
    return f"{whole(ranks)} rank{'s' * (ranks != 1)}" + (" of a CPU" if hardware.get("kind") == "cpu" else "")


def _headline(card: dict[str, Any]) -> list[tuple[str, str]]:
    evaluation = known(card["evaluation"])
    measures = known(evaluation.get("measures"))
    shown = []
    if measures:
        key, first = next(iter(measures.items()))
        values = (outcome.measure_text(key, first, side)[0] for side in outcome.sides(first))
        shown.append((first["label"], " → ".join(values)))
    elif loss := known(evaluation.get("during")).get("eval/loss"):
        shown.append(("held-out loss", f"{loss['first']:.3f} → {loss['last']:.3f}"))
    audit = known(card["audit"])
    moved = f"{audit['changed']} of {audit['tensors']}" if audit else NOT_RECORDED
    steps = f"{whole(card['steps'])} of {whole(card['planned_steps'])}" if card["steps"] else NOT_RECORDED
    return [
        ("steps", steps),
        ("tokens", short(card["tokens"])),
        ("wall clock", duration(card["wall_clock_s"])),
        ("tokens/s", whole(card["tokens_per_s"])),
        ("MFU", share(card["mfu"])),
        ("energy", words.energy(card["energy_kwh"])),
        *shown,
        ("tensors that moved", moved),
    ]
