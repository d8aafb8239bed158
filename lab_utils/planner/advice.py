"""What one change would give, as sentences with numbers; and what would have to be true for a wanted MFU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lab_utils.errors import LabError
from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Cluster
from lab_utils.planner.search import KINDS, Candidate, evaluate, search
from lab_utils.recipe import Recipe


def advice(now: Candidate, cluster: Cluster, assumed: Assumptions) -> list[str]:
    """Sentences, the largest gain in MFU first; then what costs, and what doesn't fit. For a layout that doesn't fit,
    what makes it fit comes first."""
    found: list[tuple[float, str]] = []
    for label, recipe in changed(now):
        try:
            other = evaluate(recipe, cluster, now.placed.ranks, assumed)
        except LabError as error:
            found.append((-2.0, f"{label} is refused: {error}"))
            continue
        found.append(_ranked(label, now, other))
    for label, other_assumed in software(assumed):
        found.append(_ranked(label, now, evaluate(now.recipe, cluster, now.placed.ranks, other_assumed)))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def _ranked(label: str, now: Candidate, other: Candidate) -> tuple[float, str]:
    """The sentence, and where it stands among others: above 0 what is faster, below -1 what doesn't fit."""
    if other.fits:
        return other.time.mfu - now.time.mfu + (not now.fits), _sentence(label, now, other)
    over = other.peak_gib - other.room_gib
    text = (
        f"{label}: {other.time.seconds:.1f} s a step, but {other.peak_gib:.1f} GiB a device, {over:.1f} more than it "
        "has."
    )
    return -1.0 - over / (over + 1e3), text


def _sentence(label: str, now: Candidate, other: Candidate) -> str:
    old, new = now.time, other.time
    if old.tokens == new.tokens:
        speed = f"{new.seconds:.1f} s a step instead of {old.seconds:.1f}"
    else:
        speed = f"{new.tokens_per_s:,.0f} tokens/s instead of {old.tokens_per_s:,.0f}"
    return (
        f"{label}: {speed} ({100 * (new.tokens_per_s / old.tokens_per_s - 1):+.0f} %), MFU {100 * new.mfu:.1f} %, "
        f"{other.peak_gib:.1f} GiB a device instead of {now.peak_gib:.1f}."
    )


def changed(now: Candidate) -> Iterator[tuple[str, Recipe]]:
    """One change of the recipe at a time, with the words for it."""
    recipe, placed = now.recipe, now.placed
    at = KINDS.index(recipe.model.checkpointing)
    near = {at - 1, at + 1} if now.fits else set(range(len(KINDS))) - {at}
    for kind in (kind for i, kind in enumerate(KINDS) if i in near):
        yield f"model.checkpointing={kind}", _with(recipe, "model", checkpointing=kind)
    rows = placed.micro_rows
    yield f"schedule.micro_rows={2 * rows}", _with(recipe, "schedule", micro_rows=2 * rows)
    if rows > 1:
        yield f"schedule.micro_rows={rows // 2}", _with(recipe, "schedule", micro_rows=rows // 2)
    tokens = 2 * recipe.schedule.batch_tokens
    yield f"schedule.batch_tokens={tokens} (double)", _with(recipe, "schedule", batch_tokens=tokens)
    for name, degree in (("pp", placed.pp), ("ep", placed.ep)):
        for value in (2 * degree, degree // 2):
            if value >= 1 and value != degree:
                label = f"parallel.{name}={value}"
                yield label, _with(recipe, "parallel", **{name: value, "dp": None, "virtual_stages": 1})
    if placed.pp > 1:
        v = placed.virtual_stages
        for value in (v + 1, v - 1):
            if value >= 1:
                yield f"parallel.virtual_stages={value}", _with(recipe, "parallel", virtual_stages=value)
    off = not recipe.parallel.offload
    yield f"parallel.offload={str(off).lower()}", _with(recipe, "parallel", offload=off)


def _with(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})


def software(assumed: Assumptions) -> Iterator[tuple[str, Assumptions]]:
    """One change of the software at a time."""
    if assumed.hidden_exchange < 1:
        yield "The all-to-all wholly behind other work", assumed.but(hidden_exchange=1.0)
    if not assumed.swapped:
        yield "Masters and moments swapped to the host, updated on the device", assumed.but(swapped=True)
    if not assumed.hidden_messages:
        yield "Messages between stages behind other work", assumed.but(hidden_messages=True)
    if assumed.kernels == "plain":
        yield "Fused operators", assumed.but(kernels="fused")
    else:
        yield "Plain operators instead of fused ones", assumed.but(kernels="plain")


@dataclass(frozen=True)
class Reach:
    """A layout above a wanted MFU and what would have to be true for it, or the nearest and why not.

    Attributes:
        conditions: what has to be true beside the plan's own assumptions, each needed: without it the MFU in brackets.
    """

    wanted: float
    candidate: Candidate | None
    conditions: tuple[str, ...]

    @property
    def reached(self) -> bool:
        return self.candidate is not None and self.candidate.time.mfu >= self.wanted

    def sentences(self) -> list[str]:
        if self.candidate is None:
            return [f"No layout fits at all, so none reaches {100 * self.wanted:.0f} % MFU."]
        now = self.candidate
        head = (
            f"{now.name}: predicted {100 * now.time.mfu:.1f} % MFU, {now.time.seconds:.1f} s for {now.time.tokens:,} "
            f"tokens, {now.peak_gib:.1f} GiB a device"
        )
        if not self.reached:
            return [
                f"{100 * self.wanted:.0f} % MFU isn't reached; nearest is {head}, with all of:",
                *self.conditions,
            ]
        if not self.conditions:
            return [f"{head}, with the plan's own assumptions."]
        return [f"{head}, if:", *self.conditions]


def reach(recipe: Recipe, cluster: Cluster, ranks: int, assumed: Assumptions, wanted: float) -> Reach:
    """The fewest of a ladder of conditions, software first, then batch, then the device's best, that reach an MFU."""
    ladder = _ladder(recipe, assumed)
    taken: list[int] = []

    def best(indices: list[int]) -> Candidate | None:
        changed_recipe, under = recipe, assumed
        for i in indices:
            changed_recipe, under = ladder[i][1](changed_recipe, under)
        return search(changed_recipe, cluster, ranks, under, offload=False).best

    found = best(taken)
    for i in range(len(ladder)):
        if found is not None and found.time.mfu >= wanted:
            break
        taken.append(i)
        found = best(taken)
    if found is None or found.time.mfu < wanted:
        return Reach(wanted, found, tuple(ladder[i][0] for i in taken))
    texts: dict[int, str] = {}
    for i in list(taken):
        rest = [j for j in taken if j != i]
        without = best(rest)
        if without is not None and without.time.mfu >= wanted:
            taken, found = rest, without
        else:
            texts[i] = (
                f" (without it {100 * without.time.mfu:.1f} %)" if without else " (without it nothing fits)"
            )
    return Reach(wanted, found, tuple(ladder[i][0] + texts.get(i, "") for i in taken))


def _ladder(recipe: Recipe, assumed: Assumptions) -> list[tuple[str, Any]]:
    """``(words, change)``, a change taking and giving a recipe and assumptions."""
    steps: list[tuple[str, Any]] = []
    if not assumed.swapped:
        text = (
            "masters and moments wait in host memory between steps, updated on the device (today kept there)"
        )
        steps.append((text, lambda r, a: (r, a.but(swapped=True))))
    if assumed.hidden_exchange < 1:
        text = "the all-to-all travels wholly behind other work (today behind the shared expert alone)"
        steps.append((text, lambda r, a: (r, a.but(hidden_exchange=1.0))))
    if not assumed.hidden_messages:
        text = "messages between stages travel behind other work (today ColossalAI's overlap_p2p is off: it hangs)"
        steps.append((text, lambda r, a: (r, a.but(hidden_messages=True))))
    if assumed.imbalance > 1:
        text = f"experts are balanced within a micro-batch (taken: the fullest rank gets {assumed.imbalance:.2f} of it)"
        steps.append((text, lambda r, a: (r, a.but(imbalance=1.0))))
    if assumed.case != "high":
        text = "products, attention, memory and network reach the high end of the cluster's figures"
        steps.append((text, lambda r, a: (r, a.but(case="high"))))
    if recipe.model.mtp_loss:
        text = "multi-token prediction isn't trained (model.mtp_loss=0): its FLOPs don't count"
        steps.append((text, lambda r, a: (_with(r, "model", mtp_loss=0.0), a)))
    for times in (2, 4):
        tokens = times * recipe.schedule.batch_tokens
        text = f"a step has {tokens:,} tokens, {times} times as many"
        steps.append((text, lambda r, a, tokens=tokens: (_with(r, "schedule", batch_tokens=tokens), a)))
    return steps
