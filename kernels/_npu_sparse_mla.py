"""Attention by ``sparse_flash_mla`` of CANN's extension ``cann_ops_transformer``, where it is installed (A2, A3).

It knows window, compressed entries, selection and sinks, document by document (layout TND with their ends), and has a
gradient for all of them: V4's attention in one call, for V4's numbers alone. An adapter: arguments as the extension's
document for CANN 9.1 gives them, not yet run on hardware. It returns no mass over entries; that is made from the
logarithm of the softmax's denominator, which is taken to include the sink. Legend as in ``shared_kv_attention``; M =
B·T tokens, D documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _npu
from kernels._support import apply, full_dtype
from kernels.geometry import Geometry

OPERATORS = tuple(
    f"cann_ops_transformer::sparse_flash_mla{ending}"
    for ending in ("", "_grad", "_metadata", "_grad_metadata")
)
FORWARD, BACKWARD, METADATA, GRADIENT_METADATA = OPERATORS
WINDOW, CHANNELS = 128, 512
SELECTING, WHOLE = 4, 128  # the rate of entries that are selected, and of those that are all attended
SELECTIONS = (512, 1024)


def fits(
    q_BTHK: Tensor,
    geometry: Geometry,
    window: int,
    entries: int,
    rate: int | None,
    selected_BTS: Tensor | None,
) -> bool:
    """Whether the extension is there and takes this call; where it isn't or doesn't, torch_npu's operators do."""
    if geometry.before or not all(_npu.has(name) for name in OPERATORS):
        return False  # of a part of a row it would take the keys in front for all that came before
    H, K = q_BTHK.shape[2:]
    # At its rate of 4 a selection is expected: where there is none, all entries are one.
    chosen = selected_BTS.shape[-1] if selected_BTS is not None else entries if rate == SELECTING else 0
    return not _npu.outside(
        "shared_kv_attention",
        (
            window != WINDOW or K != CHANNELS,
            f"sparse_flash_mla takes a window of {WINDOW} and {CHANNELS} channels",
        ),
        (H > 128 or H & (H - 1) > 0, f"sparse_flash_mla takes 1, 2, 4 … 128 heads, not {H}"),
        (
            rate not in (None, SELECTING, WHOLE) or (rate == WHOLE and selected_BTS is not None),
            f"sparse_flash_mla takes a rate of {SELECTING}, or of {WHOLE} without a selection, not {rate}",
        ),
        (chosen > SELECTIONS[-1], f"sparse_flash_mla takes at most {SELECTIONS[-1]} selected entries"),
        _npu.undetermined("shared_kv_attention"),
    )


class Documents:
    """Ends of the documents in tokens and in entries, and where their entries lie: made once for a geometry and
    rate."""

    def __init__(self, geometry: Geometry, rate: int | None):
        found = _npu.documents(geometry)
        counts = [length // rate if rate else 0 for _, _, length in found]
        place = lambda x: torch.tensor(x, dtype=torch.int32).to(geometry.device)  # noqa: E731
        ends = lambda sizes: place([0, *sizes]).cumsum(0, dtype=torch.int32)  # noqa: E731
        self.token_ends, self.entry_ends = ends([length for *_, length in found]), ends(counts)
        self.rest = place([length % rate if rate else 0 for *_, length in found])
        rows, C, seen = [], geometry.T // (rate or 1), [0] * geometry.B
        for (row, _, _), count in zip(found, counts, strict=True):
            rows += range(row * C + seen[row], row * C + seen[row] + count)
            seen[row] += count
        self.entries = torch.tensor(rows, dtype=torch.long).to(geometry.device)

    def of_entries(self, entries_BCK: Tensor | None) -> Tensor | None:
        """All documents' entries ``[X, 1, K]`` one after the other; None where there are none."""
        if entries_BCK is None or not len(self.entries):
            return None
        return entries_BCK.reshape(-1, 1, entries_BCK.shape[-1]).index_select(0, self.entries)

    @classmethod
    def of(cls, geometry: Geometry, rate: int | None) -> Documents:
        kept = geometry.__dict__.setdefault("_mla_documents", {})
        if rate not in kept:
            kept[rate] = cls(geometry, rate)
        return kept[rate]


class _Mla(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_MHK, kv_M1K, entries_BCK, sinks_H, index_M1S, documents, window, rate, scale):
        entries_X1K = documents.of_entries(entries_BCK)
        layout = {
            "cu_seqlens_q": documents.token_ends,
            "cu_seqlens_ori_kv": documents.token_ends,
            "cu_seqlens_cmp_kv": None if entries_X1K is None else documents.entry_ends,
            "cmp_residual_kv": None if entries_X1K is None else documents.rest,
            "cmp_ratio": rate or 1,
            "ori_mask_mode": 4,
            "cmp_mask_mode": 0 if entries_X1K is None else 3,
            "ori_win_left": window - 1,
            "ori_win_right": 0,
            "layout_q": "TND",
            "layout_kv": "TND",
        }
        sizes = {
            "ori_topk": 0,
            "cmp_topk": 0 if index_M1S is None else index_M1S.shape[-1],
            "has_ori_kv": True,
            "has_cmp_kv": entries_X1K is not None,
        }
        heads = q_MHK.shape[1], 1, q_MHK.shape[2]
        out, lse_1MH = _npu.call(
            FORWARD,
            q_MHK,
            ori_kv=kv_M1K,
            cmp_kv=entries_X1K,
            cmp_sparse_indices=index_M1S,
            sinks=sinks_H.to(full_dtype(sinks_H)),
            metadata=_npu.call(METADATA, *heads, **layout, **sizes),
            softmax_scale=scale,
            return_softmax_lse=True,
            **layout,
        )
        ctx.save_for_backward(q_MHK, kv_M1K, entries_BCK, sinks_H, index_M1S, out, lse_1MH)
        ctx.documents, ctx.layout, ctx.sizes, ctx.heads, ctx.scale = documents, layout, sizes, heads, scale
        ctx.mark_non_differentiable(lse_1MH)
        return out, lse_1MH

    @staticmethod
    def backward(ctx, grad, _):
        q_MHK, kv_M1K, entries_BCK, sinks_H, index_M1S, out, lse_1MH = ctx.saved_tensors
        entries_X1K = ctx.documents.of_entries(entries_BCK)
        d_q, d_kv, d_entries, d_sinks, *_ = _npu.call(
            BACKWARD,
            q_MHK,
            grad.contiguous(),
            out,
            lse_1MH,
            ori_kv=kv_M1K,
            cmp_kv=entries_X1K,
            cmp_sparse_indices=index_M1S,
            sinks=sinks_H.to(full_dtype(sinks_H)),
            metadata=_npu.call(GRADIENT_METADATA, *ctx.heads, **ctx.layout, **ctx.sizes),
            softmax_scale=ctx.scale,
            **ctx.layout,
        )
        d_entries_BCK = None if entries_BCK is None else torch.zeros_like(entries_BCK)
        if entries_X1K is not None:
            d_entries_BCK.flatten(0, 1).index_copy_(0, ctx.documents.entries, d_entries[:, 0])
        return d_q, d_kv, d_entries_BCK, d_sinks.to(sinks_H.dtype), None, None, None, None, None


def attention(
    q_BTHK: Tensor,
    kv_BTK: Tensor,
    entries_BCK: Tensor | None,
    sinks_H: Tensor,
    geometry: Geometry,
    window: int,
    rate: int | None,
    selected_BTS: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, T, H, K]`` of turned queries, and a largest score and sum of exponentials ``[B, T, H]`` (here the
    logarithm of the denominator, and one)."""
    (B, T, H, K), rate = q_BTHK.shape, rate if entries_BCK is not None else None
    documents, index = Documents.of(geometry, rate), None
    some = entries_BCK is not None and len(documents.entries) > 0
    if some and (selected_BTS is not None or rate != WHOLE):
        first, visible = (
            x[..., None] for x in (geometry.entries(rate).first_BT, geometry.entries(rate).visible_BT)
        )
        if selected_BTS is None:
            slots_C = torch.arange(entries_BCK.shape[1], device=q_BTHK.device)
            index = torch.where(slots_C < visible, slots_C, -1).to(torch.int32)
        else:
            index = torch.where(selected_BTS >= 0, selected_BTS - first, -1).to(torch.int32)
            index = index.sort(-1, descending=True).values
        size = next((size for size in SELECTIONS if size >= index.shape[-1]), index.shape[-1])
        index = F.pad(index, (0, size - index.shape[-1]), value=-1).view(B * T, 1, -1)
    out, lse_1MH = apply(
        _Mla,
        q_BTHK.reshape(B * T, H, K),
        kv_BTK.reshape(B * T, 1, K),
        entries_BCK,
        sinks_H,
        index,
        documents,
        window,
        rate if some else None,
        scale,
    )
    lse = lse_1MH[0].view(B, T, H)
    return out.view(B, T, H, K), lse, torch.ones_like(lse)
