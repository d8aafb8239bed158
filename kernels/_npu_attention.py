"""Shared-KV attention from the attention operators of torch_npu, one for each kind of key, put together by hand.

The keys of a query are a window of tokens, compressed entries and a sink; each kind has its operator:

* the window: ``npu_fusion_attention`` on query blocks as wide as the window, each a batch of its own with the block
  before it as keys and a mask, so that documents never see one another and nothing depends on their number;
* all visible entries: ``npu_fusion_attention`` on whole rows with a mask ``[B, 1, T, C]``;
* selected entries: ``npu_sparse_flash_attention`` without a mask; it wants 64 channels for a rotation of its own, which
  are zero, since ours is in the 512 already;
* the sink: a number, no operator (torch_npu's sink arguments are not needed, and A2 and A3 lack it in the sparse one).

Each gives its output, the largest score and the sum of exponentials; those of the whole softmax follow. Backward, each
operator's own gradient is given the largest score and sum of the whole, with which its probabilities, and so all
gradients, are right: the way in which ring attention is differentiated. A query that sees no entry is shown the first
one, which then counts nothing.

Legend as in ``shared_kv_attention``; J blocks of W tokens, S selected entries, X keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _npu
from kernels._support import apply, full_dtype
from kernels.geometry import Geometry

OPERATORS = (
    "npu::npu_fusion_attention",
    "npu::npu_fusion_attention_grad",
    "npu::npu_sparse_flash_attention",
    "npu::npu_sparse_flash_attention_grad",
)
DENSE, DENSE_GRADIENT, SPARSE, SPARSE_GRADIENT = OPERATORS
SELECTED = 2048  # entries of a query that the sparse operator's gradient is written for
ROTATED = 64  # channels of its own rotation
NOTHING = 1e30  # as the largest score of a query without entries: exp(score - NOTHING) is zero


class Softmax(NamedTuple):
    """An attention output ``[B, T, H, K]`` and the largest score and sum of exponentials ``[B, T, H]`` behind it."""

    out: Tensor
    top: Tensor
    total: Tensor


class Window:
    """Tokens of the last ``window`` positions, in blocks of as many queries."""

    def __init__(self, geometry: Geometry, window: int, scale: float):
        self.plan, self.scale = geometry.plan(window, window, None, 1), scale
        self.front = window if geometry.before else 0  # keys in front of the first query
        mask_BJWS = self.plan.window_bias_BJWS != 0
        self.mask = mask_BJWS.flatten(0, 1)[:, None]

    def _blocks(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        return self.plan.blocked(x_BT, fill).flatten(0, 1)

    def _keys(self, kv_BXK: Tensor) -> Tensor:
        """``[B·J, 2W, 1, K]``: the block before and the own one of each block."""
        plan, W, front = self.plan, self.plan.block, self.front
        own = plan.blocked(kv_BXK[:, front:])
        # In front of a row there is nothing, in front of a part of it the part before.
        first = kv_BXK[:, None, :front] if front else torch.zeros_like(own[:, :1])
        before = torch.cat([first, own[:, :-1]], 1)
        return torch.cat([before, own], 2).view(-1, 2 * W, 1, kv_BXK.shape[-1])

    def _rows(self, x_JW: Tensor, like_BT: Tensor) -> Tensor:
        B, T = like_BT.shape[:2]
        return x_JW.reshape(B, -1, *x_JW.shape[2:])[:, :T]

    def forward(self, q_BTHK: Tensor, kv_BTK: Tensor) -> Softmax:
        out, top, total = _dense(self._blocks(q_BTHK), self._keys(kv_BTK), self.mask, self.scale)
        return Softmax(*(self._rows(x, q_BTHK) for x in (out, top, total)))

    def backward(self, q_BTHK: Tensor, kv_BTK: Tensor, grad: Tensor, whole: Softmax) -> tuple[Tensor, Tensor]:
        blocks = Softmax(self._blocks(whole.out), self._blocks(whole.top), self._blocks(whole.total, 1))
        d_q, d_keys = _dense_backward(
            self._blocks(q_BTHK), self._keys(kv_BTK), self._blocks(grad), blocks, self.mask, self.scale
        )
        B, W, front = kv_BTK.shape[0], self.plan.block, self.front
        before, own = d_keys.view(B, self.plan.blocks, 2 * W, -1).split(W, 2)
        own[:, :-1] += before[:, 1:]
        d_kv = own.flatten(1, 2)[:, : self.plan.geometry.T]
        return self._rows(d_q, q_BTHK), torch.cat([before[:, 0], d_kv], 1) if front else d_kv


class AllEntries:
    """Every entry that a query may see."""

    def __init__(self, geometry: Geometry, rate: int, scale: float):
        self.scale, entries = scale, geometry.entries(rate)
        slots_C = torch.arange(entries.count, device=geometry.device)
        first, self.visible_BT = entries.first_BT[..., None], entries.visible_BT
        hidden_BTC = (slots_C < first) | (slots_C >= first + self.visible_BT[..., None])
        hidden_BTC[..., 0] &= self.visible_BT > 0
        self.mask = hidden_BTC[:, None]

    def forward(self, q_BTHK: Tensor, entries_BCK: Tensor) -> Softmax:
        return _without(self.visible_BT, *_dense(q_BTHK, entries_BCK[:, :, None], self.mask, self.scale))

    def backward(self, q_BTHK, entries_BCK, grad: Tensor, whole: Softmax) -> tuple[Tensor, Tensor]:
        whole = _nothing(self.visible_BT, whole)
        return _dense_backward(q_BTHK, entries_BCK[:, :, None], grad, whole, self.mask, self.scale)


class SelectedEntries:
    """Of the entries that a query may see, the selected ones."""

    def __init__(self, geometry: Geometry, rate: int, selected_BTS: Tensor, scale: float):
        self.scale, entries = scale, geometry.entries(rate)
        first, visible = entries.first_BT[..., None], entries.visible_BT[..., None]
        seen = (selected_BTS >= first) & (selected_BTS < first + visible)
        index = torch.where(seen, selected_BTS, -1).to(torch.int32).sort(-1, descending=True).values
        self.seen_BT = seen.sum(-1)
        index[..., 0] = torch.where(self.seen_BT > 0, index[..., 0], 0)
        self.index_BT1S = F.pad(index, (0, max(0, SELECTED - index.shape[-1])), value=-1)[:, :, None]

    def _operands(self, q_BTHK: Tensor, entries_BCK: Tensor) -> tuple[Tensor, ...]:
        entries = entries_BCK[:, :, None]
        rotated = {"query_rope": q_BTHK, "key_rope": entries}
        return entries.contiguous(), {
            name: x.new_zeros(*x.shape[:-1], ROTATED) for name, x in rotated.items()
        }

    def forward(self, q_BTHK: Tensor, entries_BCK: Tensor) -> Softmax:
        entries, rotated = self._operands(q_BTHK, entries_BCK)
        out, top_B1TH, total_B1TH = _npu.call(
            SPARSE,
            q_BTHK,
            entries,
            entries,
            self.index_BT1S,
            self.scale,
            **rotated,
            sparse_mode=0,
            attention_mode=2,
            return_softmax_lse=True,
        )
        return _without(self.seen_BT, out, top_B1TH[:, 0], total_B1TH[:, 0])

    def backward(self, q_BTHK, entries_BCK, grad: Tensor, whole: Softmax) -> tuple[Tensor, Tensor]:
        entries, rotated = self._operands(q_BTHK, entries_BCK)
        out, top, total = _nothing(self.seen_BT, whole)
        stats = top[:, None].contiguous(), total[:, None].contiguous()
        d_q, d_key, d_value, _, _ = _npu.call(
            SPARSE_GRADIENT,
            q_BTHK,
            entries,
            entries,
            self.index_BT1S,
            grad,
            out.contiguous(),
            *stats,
            self.scale,
            1,
            **rotated,
            layout="BSND",
            sparse_mode=0,
            attention_mode=2,
        )
        return d_q, _sum(d_key, d_value)[:, :, 0]


def _dense(q_BTHK: Tensor, keys_BX1K: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    out, top_BHT8, total_BHT8, *_ = _npu.call(
        DENSE, q_BTHK, keys_BX1K, keys_BX1K, q_BTHK.shape[2], "BSND", atten_mask=mask, scale=scale
    )
    return out, top_BHT8[..., 0].transpose(1, 2), total_BHT8[..., 0].transpose(1, 2)


def _dense_backward(q_BTHK, keys_BX1K, grad, whole: Softmax, mask, scale) -> tuple[Tensor, Tensor]:
    stats = (x.transpose(1, 2)[..., None].expand(-1, -1, -1, 8).contiguous() for x in whole[1:])
    d_q, d_key, d_value, *_ = _npu.call(
        DENSE_GRADIENT,
        q_BTHK,
        keys_BX1K,
        keys_BX1K,
        grad,
        q_BTHK.shape[2],
        "BSND",
        atten_mask=mask,
        **dict(zip(("softmax_max", "softmax_sum"), stats, strict=True)),
        attention_in=whole.out.contiguous(),
        scale_value=scale,
    )
    return d_q, _sum(d_key, d_value)[:, :, 0]


def _sum(d_key: Tensor, d_value: Tensor) -> Tensor:
    return d_key.to(full_dtype(d_key)) + d_value


def _without(seen_BT: Tensor, out: Tensor, top: Tensor, total: Tensor) -> Softmax:
    """The softmax in which queries that see nothing have no exponentials."""
    none_BT1 = (seen_BT == 0)[..., None]
    return Softmax(out, top.masked_fill(none_BT1, float("-inf")), total.masked_fill(none_BT1, 0.0))


def _nothing(seen_BT: Tensor, whole: Softmax) -> Softmax:
    """The softmax by which queries that see nothing have probabilities of zero."""
    return Softmax(whole.out, whole.top.masked_fill((seen_BT == 0)[..., None], NOTHING), whole.total)


def merged(parts: list[Softmax], sinks_H: Tensor) -> Softmax:
    """The softmax over the keys of all parts and a sink without value."""
    top = torch.stack([*(part.top for part in parts), sinks_H.expand_as(parts[0].top)]).amax(0)
    sums = [part.total * (part.top - top).exp() for part in parts]
    total = sum(sums, (sinks_H - top).exp())
    shares = [(x / total)[..., None] for x in sums]
    out = sum(part.out.to(top.dtype) * share for part, share in zip(parts, shares, strict=True))
    return Softmax(out.to(parts[0].out.dtype), top, total)


class _Core(torch.autograd.Function):
    """Attention of turned queries; the parts hold what they need of the geometry and get no gradient."""

    @staticmethod
    def forward(ctx, q_BTHK, kv_BTK, entries_BCK, sinks_H, parts):
        keys = (kv_BTK, entries_BCK)
        whole = merged(
            [part.forward(q_BTHK, x) for part, x in zip(parts, keys)],
            sinks_H.to(full_dtype(sinks_H)),
        )
        ctx.save_for_backward(q_BTHK, kv_BTK, entries_BCK, sinks_H, *whole)
        ctx.parts = parts
        ctx.mark_non_differentiable(whole.top, whole.total)
        return tuple(whole)

    @staticmethod
    def backward(ctx, grad_BTHK, _top, _total):
        q_BTHK, kv_BTK, entries_BCK, sinks_H, *whole = ctx.saved_tensors
        whole, grad_BTHK = Softmax(*whole), grad_BTHK.contiguous()
        found = [
            part.backward(q_BTHK, x, grad_BTHK, whole) for part, x in zip(ctx.parts, (kv_BTK, entries_BCK))
        ]
        d_q = found[0][0] if len(found) == 1 else found[0][0] + found[1][0]
        # The sink has the probability of its score and no value.
        inner_BTH = (grad_BTHK * whole.out).sum(-1, dtype=whole.top.dtype)
        p_BTH = (sinks_H.to(whole.top.dtype) - whole.top).exp() / whole.total
        d_sinks = -(p_BTH * inner_BTH).sum((0, 1)).to(sinks_H.dtype)
        d_entries = found[1][1].to(entries_BCK.dtype) if len(found) > 1 else None
        return d_q, found[0][1].to(kv_BTK.dtype), d_entries, d_sinks, None


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
    """Output ``[B, T, H, K]`` of turned queries, and the largest score and sum of exponentials ``[B, T, H]``."""
    parts = [Window(geometry, window, scale)]
    if selected_BTS is not None:
        parts.append(SelectedEntries(geometry, rate, selected_BTS, scale))
    elif entries_BCK is not None:
        parts.append(AllEntries(geometry, rate, scale))
    return apply(_Core, q_BTHK, kv_BTK, entries_BCK, sinks_H, parts)
