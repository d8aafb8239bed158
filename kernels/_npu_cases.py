"""Inputs within the limits of Ascend's fused operators, where those of ``cases.py`` are not and would fall back.

On a chip the check of an ``npu.py`` takes these besides: heads of 512 and 128 channels, a window of 128, four streams.
Small in all else, since the definition runs beside it in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels._cases import Case, normal, packed, part_of, visible_entries, whole
from kernels.indexer_select.cases import selection
from kernels.indexer_select.reference import indexer_select

HEADS, WIDTH = 64, 128  # of the indexer


def fitting(operator: str) -> list[tuple[str, Case]]:
    """``(label, case)`` of an operator; empty where the cases of ``cases.py`` fit."""
    made = _MADE.get(operator, {})
    return [
        (f"within the limits of Ascend: {label}", make(torch.Generator().manual_seed(0)))
        for label, make in made.items()
    ]


def _attention(g: torch.Generator, rate: int | None, topk: int | None) -> Case:
    B, T, H, K, R = 2, 300, 4, 512, 32
    rows, angle = packed(g, B, T, 280), normal(g, B, T, R)
    inputs = {"q_BTHK": normal(g, B, T, H, K), "kv_BTK": normal(g, B, T, K), "sinks_H": normal(g, H)}
    options = {"cos_BTR": angle.cos(), "sin_BTR": angle.sin(), "geometry": rows, "window": 128, "eps": 1e-6}
    if rate:
        inputs["entries_BCK"] = normal(g, B, T // rate, K)
        options |= {"rate": rate, "want_mass": True}
    if topk:
        index = normal(g, B, T, 2, 4), normal(g, B, T // rate, 4), normal(g, B, T, 2)
        options["selected_BTS"] = indexer_select(*index, rows.geometry(), rate=rate, topk=topk)
    return Case(inputs, options, tuple(inputs))


def _select(g: torch.Generator) -> Case:
    """Whole numbers, few channels that are not zero: scores are below 256, exact in bf16, and hardly one is zero."""
    B, T, rate = 2, 300, 4
    q = torch.randint(-1, 2, (B, T, HEADS, WIDTH), generator=g).double()
    q[..., 8:] = 0
    inputs = {
        "q_BTHK": q,
        "keys_BCK": torch.randint(-1, 2, (B, T // rate, WIDTH), generator=g).double(),
        "weights_BTH": torch.ones(B, T, HEADS, dtype=torch.float64),
    }
    return Case(inputs, {"geometry": packed(g, B, T, 280), "rate": rate, "topk": 16}, view=selection)


def _kl(g: torch.Generator, topk: int | None) -> Case:
    B, T, rate = 1, 120, 4
    rows = packed(g, B, T, 110)
    inputs = {
        "q_BTHK": normal(g, B, T, HEADS, WIDTH),
        "keys_BCK": normal(g, B, T // rate, WIDTH),
        "weights_BTH": normal(g, B, T, HEADS) / (HEADS * WIDTH) ** 0.5,
    }
    mass, selected = normal(g, B, T, T // rate).square() * visible_entries(rows.geometry(), rate), None
    if topk:
        selected = indexer_select(*inputs.values(), rows.geometry(), rate=rate, topk=topk)
        mass = mass.gather(2, selected.clamp(min=0)) * (selected >= 0)
    options = {"mass": mass, "geometry": rows, "rate": rate, "selected_BTS": selected}
    return Case(inputs, options, tuple(inputs))


def _way_in(g: torch.Generator) -> Case:
    N, n, D = 48, 4, 256
    inputs = {
        "h_NnD": normal(g, N, n, D),
        "fn": normal(g, n * (n + 2), n * D) / (n * D) ** 0.5,
        "base": normal(g, n * (n + 2)),
        "scale": normal(g, 3),
    }
    wide = ("fn", "base", "scale")
    return Case(inputs, {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}, tuple(inputs), wide)


def _whole_rows(g: torch.Generator) -> Case:
    """One document a row, as most rows of long contexts are."""
    case = _attention(g, 4, 64)
    return Case(
        case.inputs, {**case.options, "geometry": whole(2, 300), "selected_BTS": None}, tuple(case.inputs)
    )


def _part(g: torch.Generator, case: Case) -> Case:
    return part_of(
        case, g, 2, 128, ("q_BTHK", "cos_BTR", "sin_BTR", "selected_BTS", "weights_BTH"), ("kv_BTK",)
    )


_MADE: dict[str, dict[str, Callable[[torch.Generator], Case]]] = {
    "shared_kv_attention": {
        "a part of the rows": lambda g: _part(g, _attention(g, 4, 64)),
        "window": lambda g: _attention(g, None, None),
        "selected entries": lambda g: _attention(g, 4, 64),
        "all entries": lambda g: _attention(g, 128, None),
        "all entries of whole rows": _whole_rows,
    },
    "indexer_select": {"selection": _select, "a part of the rows": lambda g: _part(g, _select(g))},
    "indexer_kl": {"selection": lambda g: _kl(g, 64), "all entries": lambda g: _kl(g, None)},
    "hyper_connection_pre": {"streams": _way_in},
}
