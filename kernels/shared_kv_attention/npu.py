"""Shared-KV attention on Ascend: by the operators of torch_npu, or of CANN's extension where it is installed.

Queries get their norm and turn by ``npu_rms_norm`` and ``npu_rotary_mul``, and the output is turned back. Between,
V4's own ``sparse_flash_mla`` of the extension (``kernels._npu_sparse_mla``) where it is there and takes the call; else
``npu_fusion_attention`` and ``npu_sparse_flash_attention``, put together by hand (``kernels._npu_attention``). None
hands out the mass over entries that trains the indexer: that is made again here.

Limits (op-plugin's and CANN's documents): bf16 or fp16; 512 channels and 1, 2, 4 … 128 heads for selected entries, of
which there are at most 2048; up to 512 channels otherwise. Legend as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _npu, _npu_attention, _npu_sparse_mla
from kernels.geometry import Geometry
from kernels.rms_norm.npu import rms_norm
from kernels.rope.npu import rope
from kernels.shared_kv_attention.torch import shared_kv_attention as by_torch

OPERATORS = (*_npu_attention.OPERATORS, "npu::npu_rms_norm", "npu::npu_rotary_mul")
unsupported = _npu.runs(OPERATORS, _npu.HALVES)
SELECTED = _npu_attention.SELECTED
MASK = 1 << 31  # bytes of a mask over all entries: 92,000 tokens at a rate of 4, half a million at 128
HELD = 1 << 27  # scores held at once where the mass over entries is wanted


def mass_of(q_BTHK, entries_BCK, selected_BTS, top_BTH, total_BTH, geometry, rate, scale) -> Tensor:
    """The probability on entries, summed over heads, in chunks of queries: no operator hands it out."""
    (B, T, H, _K), C, entries = q_BTHK.shape, entries_BCK.shape[1], geometry.entries(rate)
    S = C if selected_BTS is None else selected_BTS.shape[-1]
    mass_BTS, step = top_BTH.new_zeros(B, T, S), max(1, HELD // (B * H * C))
    slots_C, keys_BKC = torch.arange(C, device=q_BTHK.device), entries_BCK.transpose(1, 2)
    for start in range(0, T, step):
        part = (slice(None), slice(start, start + step))
        q = q_BTHK[part].flatten(1, 2)
        scores = (torch.bmm(q, keys_BKC).to(top_BTH.dtype) * scale).view(B, -1, H, C)
        p_BtC = (scores.sub_(top_BTH[part][..., None]).exp_() / total_BTH[part][..., None]).sum(2)
        first, visible = entries.first_BT[part][..., None], entries.visible_BT[part][..., None]
        p_BtC = p_BtC.masked_fill_((slots_C < first) | (slots_C >= first + visible), 0.0)
        if selected_BTS is None:
            mass_BTS[part] = p_BtC
        else:
            selected = selected_BTS[part]
            mass_BTS[part] = p_BtC.gather(2, selected.clamp(min=0)) * (selected >= 0)
    return mass_BTS


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
    """See ``reference.shared_kv_attention``; angles and selection get no gradient."""
    if entries_BCK is not None and entries_BCK.shape[1] == 0:
        entries_BCK = selected_BTS = None
    (B, T, H, K), chosen = q_BTHK.shape, selected_BTS is not None
    C = 0 if entries_BCK is None else entries_BCK.shape[1]
    if _npu.outside(
        "shared_kv_attention",
        (K > 512, f"npu_fusion_attention takes at most 512 channels, not {K}"),
        (H > 256, f"npu_fusion_attention takes at most 256 heads, not {H}"),
        (chosen and K != 512, f"npu_sparse_flash_attention takes 512 channels, not {K}"),
        (
            chosen and (H > 128 or H & (H - 1) > 0),
            f"npu_sparse_flash_attention takes 1, 2, 4 … 128 heads, not {H}",
        ),
        (
            chosen and selected_BTS.shape[-1] > SELECTED,
            f"its gradient takes at most {SELECTED} selected entries",
        ),
        (bool(C) and not chosen and B * T * C > MASK, "the mask over all entries of a row passes 2 GiB"),
        *([_npu.undetermined("shared_kv_attention")] if chosen else []),
    ):
        return by_torch(
            q_BTHK,
            kv_BTK,
            sinks_H,
            cos_BTR,
            sin_BTR,
            geometry,
            window=window,
            eps=eps,
            entries_BCK=entries_BCK,
            rate=rate,
            selected_BTS=selected_BTS,
            want_mass=want_mass,
        )
    kv_BTK = kv_BTK[:, max(0, geometry.before - window) :]  # more keys than the window come along with a part
    scale, angles = K**-0.5, (cos_BTR[:, :, None], sin_BTR[:, :, None])
    q_BTHK = rope(rms_norm(q_BTHK, q_BTHK.new_ones(K), eps), *angles)
    mla = _npu_sparse_mla.fits(q_BTHK, geometry, window, C, rate if C else None, selected_BTS)
    attend = _npu_sparse_mla.attention if mla else _npu_attention.attention
    out, top, total = attend(
        q_BTHK, kv_BTK, entries_BCK, sinks_H, geometry, window, rate, selected_BTS, scale
    )
    out = rope(out, cos_BTR[:, :, None], -sin_BTR[:, :, None])
    if not want_mass or not C:
        return out, None
    with torch.no_grad():
        mass = mass_of(q_BTHK, entries_BCK, selected_BTS, top, total, geometry, rate, scale)
    return out, mass
