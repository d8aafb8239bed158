"""Shared-KV attention in query blocks: memory linear in T, scores recomputed in the backward pass.

One block of W queries has one key buffer, [zero | window before | own block | its range of entries]: the zero row
carries the sink (its score is the sink, its value nothing), so that one softmax and two products do all of a block, and
the gradient of the sink is a column of the gradient of the scores. Normalising and rotating the queries happens on the
block while it is in cache. Legend: G blocks of a chunk, W tokens of a block, S = window + W, X = 1 + S + L keys;
others as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply, full_dtype, working_dtype
from kernels.geometry import BlockPlan, Chunk, Geometry
from kernels.rms_norm.torch import inverse_rms
from kernels.rope.torch import rotate_


class _Inputs:
    """What forward and backward both need of a chunk."""

    def __init__(self, plan: BlockPlan, kv_BTK, entries_BCK, sinks_H, cos_BTR, sin_BTR, selected_BTS, eps):
        self.plan, self.sinks_H, self.cos, self.sin, self.eps = plan, sinks_H, cos_BTR, sin_BTR, eps
        self.selected_BTS, self.work = selected_BTS, working_dtype(kv_BTK)
        B, W, J, K = kv_BTK.shape[0], plan.block, plan.blocks, kv_BTK.shape[-1]
        self.S = S = plan.window + W
        padded = kv_BTK.new_zeros(B, plan.window + J * W, K, dtype=self.work)
        # Of the keys before the first query, none beyond the window is seen.
        self.unseen = max(0, plan.geometry.before - plan.window)
        self.front = plan.window - plan.geometry.before + self.unseen
        padded[:, self.front : plan.window + plan.geometry.T] = kv_BTK[:, self.unseen :]
        self.windows_BJSK = padded.as_strided((B, J, S, K), (padded.stride(0), W * K, K, 1))
        self.entries = None if entries_BCK is None else entries_BCK.to(self.work).reshape(-1, K)
        self.entry_count = 0 if entries_BCK is None else entries_BCK.shape[1]

    def angles(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        return self.plan.take(self.cos, chunk)[:, :, None], self.plan.take(self.sin, chunk)[:, :, None]

    def slots(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Row-local entry slots of each block ``[G, L]`` and the same as rows of the flat entries."""
        slots_GL = self.plan.entry_slots(chunk)
        row_G = torch.arange(chunk.row_0, chunk.row_1, device=slots_GL.device)
        row_G = row_G.repeat_interleave(chunk.block_1 - chunk.block_0)[:, None]
        return slots_GL, row_G * self.entry_count + slots_GL.clamp(max=self.entry_count - 1)

    def keys(self, chunk: Chunk, flat_GL: Tensor | None) -> Tensor:
        """``[G, X, K]``: zero, the window before, the own block, the entries."""
        window = self.windows_BJSK[chunk.row_0 : chunk.row_1, chunk.block_0 : chunk.block_1]
        window = window.reshape(-1, *window.shape[2:])
        G, S, K = window.shape
        keys = window.new_empty(G, 1 + S + chunk.entries, K)
        keys[:, 0] = 0
        keys[:, 1 : 1 + S] = window
        if flat_GL is not None:
            keys[:, 1 + S :] = self.entries.index_select(0, flat_GL.reshape(-1)).view(G, -1, K)
        return keys

    def chosen(self, chunk: Chunk, slots_GL: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The chunk's selection as indices into the block's range ``[G, W, S]`` (L: none) and their validity."""
        if self.selected_BTS is None:
            return None, None
        selected = self.plan.take(self.selected_BTS, chunk, fill=-1)
        valid = selected >= 0
        return torch.where(valid, selected - slots_GL[:, :1, None], chunk.entries), valid

    def probabilities(self, chunk: Chunk, q_GWHK: Tensor, keys_GXK: Tensor, slots_GL, index_GWS) -> Tensor:
        """``[G, W, H, X]`` with the sink's probability in column 0, in at least fp32."""
        plan, (G, W, H, K) = self.plan, q_GWHK.shape
        scores = torch.bmm(q_GWHK.view(G, W * H, K), keys_GXK.transpose(1, 2)).view(G, W, H, -1)
        scores = scores.to(full_dtype(scores))
        part = (slice(chunk.row_0, chunk.row_1), slice(chunk.block_0, chunk.block_1))
        window_bias = plan.window_bias_BJWS[part].reshape(G, W, self.S)
        scores[..., 1 : 1 + self.S] += window_bias[:, :, None]
        if slots_GL is not None:
            seen_GWL = plan.entry_seen(chunk, slots_GL)
            if index_GWS is not None:
                chosen = torch.zeros(G, W, chunk.entries + 1, dtype=torch.bool, device=scores.device)
                seen_GWL = seen_GWL & chosen.scatter_(2, index_GWS, True)[..., :-1]
            entry_bias = torch.zeros(seen_GWL.shape, device=scores.device).masked_fill_(
                ~seen_GWL, float("-inf")
            )
            scores[..., 1 + self.S :] += entry_bias[:, :, None]
        scores[..., 0] = self.sinks_H
        return _softmax(scores)


def _softmax(scores: Tensor) -> Tensor:
    # On CPU the kernel may write over its input, row by row; elsewhere that is not promised.
    out = scores if scores.device.type == "cpu" else torch.empty_like(scores)
    return torch._softmax(scores, -1, False, out=out)


def _normed(inputs: _Inputs, chunk: Chunk, q_BTHK: Tensor, angles) -> tuple[Tensor, Tensor]:
    """Unit-RMS, rotated and 1/√K-scaled queries of a chunk ``[G, W, H, K]``, and the factor of each head's norm."""
    q = inputs.plan.take(q_BTHK, chunk).to(inputs.work)
    scale = inverse_rms(q.to(full_dtype(q)), inputs.eps).to(q.dtype)
    q = q * (scale * q.shape[-1] ** -0.5)
    return rotate_(q, *angles), scale


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHK, kv_BTK, entries_BCK, sinks_H, cos, sin, plan, selected_BTS, want_mass, eps):
        ctx.save_for_backward(q_BTHK, kv_BTK, entries_BCK, sinks_H, cos, sin, selected_BTS)
        ctx.plan, ctx.eps = plan, eps
        inputs = _Inputs(plan, kv_BTK, entries_BCK, sinks_H, cos, sin, selected_BTS, eps)
        out_BTHK, mass, W = torch.empty_like(q_BTHK), None, plan.block
        if want_mass:
            S = entries_BCK.shape[1] if selected_BTS is None else selected_BTS.shape[-1]
            mass = torch.zeros(*q_BTHK.shape[:2], S, dtype=full_dtype(kv_BTK), device=kv_BTK.device)
        for chunk in plan.chunks:
            angles = inputs.angles(chunk)
            slots, flat = inputs.slots(chunk) if chunk.entries else (None, None)
            index, valid = inputs.chosen(chunk, slots) if chunk.entries else (None, None)
            keys = inputs.keys(chunk, flat)
            q, _ = _normed(inputs, chunk, q_BTHK, angles)
            p = inputs.probabilities(chunk, q, keys, slots, index)
            G, _, _H, X = p.shape
            out = torch.bmm(p.view(G, -1, X).to(keys.dtype), keys).view(q.shape)
            plan.put(out_BTHK, chunk, rotate_(out, *angles, inverse=True))
            if want_mass and chunk.entries:
                on_entries = p[..., 1 + inputs.S :].sum(2)
                if index is not None:
                    on_entries = on_entries.gather(2, index.clamp(max=chunk.entries - 1)).mul_(valid)
                else:
                    # Slots past the row's last entry carry no probability: they may add to the last one.
                    all_entries = on_entries.new_zeros(G, W, S)
                    at = slots.clamp(max=S - 1)[:, None].expand_as(on_entries)
                    on_entries = all_entries.scatter_add_(2, at, on_entries)
                plan.put(mass, chunk, on_entries)
        if mass is not None:
            ctx.mark_non_differentiable(mass)
        return out_BTHK, mass

    @staticmethod
    def backward(ctx, grad_BTHK, _):
        q_BTHK, kv_BTK, entries_BCK, sinks_H, cos, sin, selected_BTS = ctx.saved_tensors
        plan, W, K = ctx.plan, ctx.plan.block, kv_BTK.shape[-1]
        inputs = _Inputs(plan, kv_BTK, entries_BCK, sinks_H, cos, sin, selected_BTS, ctx.eps)
        full, B, T, S = full_dtype(kv_BTK), *q_BTHK.shape[:2], inputs.S
        d_q = torch.empty_like(q_BTHK)
        d_sinks = torch.zeros(sinks_H.shape, dtype=full, device=sinks_H.device)
        d_kv = torch.zeros(B, plan.window + plan.blocks * W, K, dtype=full, device=kv_BTK.device)
        d_entries = (
            None
            if entries_BCK is None
            else torch.zeros(B * inputs.entry_count, K, dtype=full, device=d_kv.device)
        )
        for chunk in plan.chunks:
            angles = inputs.angles(chunk)
            slots, flat = inputs.slots(chunk) if chunk.entries else (None, None)
            index, _ = inputs.chosen(chunk, slots) if chunk.entries else (None, None)
            keys = inputs.keys(chunk, flat)
            q, scale = _normed(inputs, chunk, q_BTHK, angles)
            p = inputs.probabilities(chunk, q, keys, slots, index)
            G, _, H, X = p.shape
            grad = plan.take(grad_BTHK, chunk).to(inputs.work, copy=True)
            grad = rotate_(grad, *angles).view(G, W * H, K)
            d_p = torch.bmm(grad, keys.transpose(1, 2)).view(p.shape).to(p.dtype)
            d_s = _softmax_backward(d_p, p)
            d_sinks += d_s[..., 0].sum((0, 1))
            d_s, p = d_s.view(G, -1, X).to(keys.dtype), p.view(G, -1, X).to(keys.dtype)
            d_keys = torch.bmm(d_s.transpose(1, 2), q.view(G, -1, K)).baddbmm_(p.transpose(1, 2), grad)
            _scatter_window(d_kv, d_keys[:, 1 : 1 + S], chunk, W)
            if chunk.entries:
                d_entries.index_add_(0, flat.view(-1), d_keys[:, 1 + S :].reshape(-1, K).to(full))
            d_qn = rotate_(torch.bmm(d_s, keys).view(q.shape), *angles, inverse=True)
            plan.put(d_q, chunk, _norm_backward(d_qn, plan.take(q_BTHK, chunk).to(inputs.work), scale))
        d_kv = d_kv[:, inputs.front : plan.window + T].to(kv_BTK.dtype)
        d_kv = torch.nn.functional.pad(d_kv, (0, 0, inputs.unseen, 0)) if inputs.unseen else d_kv
        if d_entries is not None:
            d_entries = d_entries.view(entries_BCK.shape).to(entries_BCK.dtype)
        return d_q, d_kv, d_entries, d_sinks.to(sinks_H.dtype), None, None, None, None, None, None


def _softmax_backward(d_p: Tensor, p: Tensor) -> Tensor:
    if p.device.type != "cpu":
        return torch._softmax_backward_data(d_p, p, -1, p.dtype)
    return torch._softmax_backward_data(d_p, p, -1, p.dtype, grad_input=d_p)


def _scatter_window(d_kv_BXK: Tensor, d_window_GSK: Tensor, chunk: Chunk, W: int) -> None:
    """Add the gradient of each block's [window before | own block] to the tokens (shifted by the window)."""
    rows, blocks = chunk.row_1 - chunk.row_0, chunk.block_1 - chunk.block_0
    d_window = d_window_GSK.unflatten(0, (rows, blocks))
    S = d_window.shape[2]
    for start in range(0, S, W):
        # Pieces of at most W tokens of neighbouring blocks don't overlap.
        piece = d_window[:, :, start : start + W]
        at = chunk.block_0 * W + start
        rows_part = d_kv_BXK[chunk.row_0 : chunk.row_1]
        size = (rows, blocks, piece.shape[2], piece.shape[3])
        stride = (rows_part.stride(0), W * rows_part.stride(1), rows_part.stride(1), 1)
        rows_part.as_strided(size, stride, rows_part.storage_offset() + at * rows_part.stride(1)).add_(piece)


def _norm_backward(d_qn: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Gradient through ``q · scale · K^-½`` where scale is q's inverse RMS (the rotation is already undone)."""
    K = q.shape[-1]
    inner = (d_qn * q).sum(-1, keepdim=True).mul_(scale * scale / K)
    return d_qn.addcmul_(q, inner, value=-1).mul_(scale * K**-0.5)


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
    # Half a window of queries against one and a half of keys: the fewest masked scores that still fill a product.
    block = window // 2 if window >= 64 and window % 2 == 0 else window
    plan = geometry.plan(block, window, rate if entries_BCK is not None else None, q_BTHK.shape[2])
    want_mass = want_mass and entries_BCK is not None
    return apply(
        _Attention,
        q_BTHK.contiguous(),
        kv_BTK,
        entries_BCK,
        sinks_H,
        cos_BTR,
        sin_BTR,
        plan,
        selected_BTS,
        want_mass,
        eps,
    )
