"""Shared-KV attention over a sliding window and compressed entries, with sinks and inverse RoPE (TR §2.3.1, §2.3.3).

The definition: dense scores, readable, quadratic memory. Legend: B rows, T tokens, H heads, K head dimension,
C compressed entries, S selected entries, R rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype
from kernels.geometry import Geometry
from kernels.rope.reference import rope


def shared_kv_attention(
    q_BTHK: Tensor,
    kv_BTK: Tensor,
    sinks_H: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    geometry: Geometry,
    *,
    window: int,
    eps: float,
    entries_BCK: Tensor | None = None,
    rate: int | None = None,
    selected_BTS: Tensor | None = None,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention output ``[B, T, H, K]``, and the attention mass over entries if wanted.

    ``q_BTHK`` comes straight from its projection: unit-RMS per head and RoPE are applied here. ``kv_BTK`` (normed and
    rotated) is key and value at once, as are the entries. A query at position p of its document sees the last
    ``window`` tokens of the document and, of its entries, i < (p+1) div rate, or the ``selected_BTS`` ones among them
    (row-local indices, -1 = none). The sink adds to the denominator and no value. The output is rotated back. Of a
    part of a row (``RowPart``) ``kv_BTK`` has the tokens before it in front.

    Returns ``(out_BTHK, mass)``: mass is the probability on entries summed over heads, detached fp32, at the selected
    entries ``[B, T, S]`` or, without a selection, at all of them ``[B, T, C]``.
    """
    full, K, T = full_dtype(q_BTHK), q_BTHK.shape[-1], q_BTHK.shape[1]
    q = q_BTHK.to(full)
    q = rope(q * (q.square().mean(-1, keepdim=True) + eps).rsqrt(), cos_BTR[:, :, None], sin_BTR[:, :, None])
    at_T = torch.arange(T, device=q.device)
    key_X = torch.arange(kv_BTK.shape[1], device=q.device) - geometry.before
    back_TX = at_T[:, None] - key_X
    seen = (back_TX >= 0) & (back_TX < window) & (key_X >= geometry.start_BT[:, :, None])
    keys = kv_BTK.to(full)
    if entries_BCK is not None:
        entries, C = geometry.entries(rate), entries_BCK.shape[1]
        slots_C = torch.arange(C, device=q.device)
        first, visible = entries.first_BT[..., None], entries.visible_BT[..., None]
        seen_BTC = (slots_C >= first) & (slots_C < first + visible)
        if selected_BTS is not None:
            chosen = torch.zeros(*seen_BTC.shape[:2], C + 1, dtype=torch.bool, device=q.device)
            chosen.scatter_(2, torch.where(selected_BTS < 0, C, selected_BTS), True)
            seen_BTC = seen_BTC & chosen[..., :C]
        seen, keys = torch.cat([seen, seen_BTC], 2), torch.cat([keys, entries_BCK.to(full)], 1)
    scores_BTHX = torch.einsum("bthk,bxk->bthx", q, keys) * K**-0.5
    scores_BTHX = scores_BTHX.masked_fill(~seen[:, :, None], float("-inf"))
    sink = sinks_H.to(full)[:, None].expand(*scores_BTHX.shape[:3], 1)
    p_BTHX = torch.cat([scores_BTHX, sink], -1).softmax(-1)[..., :-1]
    out = rope(torch.einsum("bthx,bxk->bthk", p_BTHX, keys), cos_BTR[:, :, None], -sin_BTR[:, :, None])
    mass = None
    if want_mass and entries_BCK is not None:
        mass = p_BTHX[..., len(key_X) :].sum(2).detach()
        if selected_BTS is not None:
            mass = mass.gather(2, selected_BTS.clamp(min=0)) * (selected_BTS >= 0)
    return out.to(q_BTHK.dtype), mass
