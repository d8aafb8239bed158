"""Indexer loss in query blocks. Its gradient is closed (softmax - target), so it is made in the forward pass and only
scaled in the backward one: nothing of size ``[T, C]`` is kept. Legend as in ``indexer_select``."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype, working_dtype
from kernels.geometry import Geometry
from kernels.indexer_select.torch import BLOCK, chunk_keys, chunk_scores


class _IndexerKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHK, keys_BCK, weights_BTH, mass, geometry, rate, selected_BTS):
        work, full = working_dtype(q_BTHK), full_dtype(q_BTHK)
        plan, entries = geometry.plan(BLOCK, 0, rate, q_BTHK.shape[2]), geometry.entries(rate)
        counted_BT = (entries.visible_BT > 0) & geometry.real_BT
        d_q, d_weights = torch.zeros_like(q_BTHK), torch.zeros_like(weights_BTH)
        d_keys = torch.zeros(keys_BCK.shape, dtype=full, device=q_BTHK.device).view(-1, keys_BCK.shape[-1])
        total = torch.zeros((), dtype=full, device=q_BTHK.device)
        for chunk in plan.chunks:
            if not chunk.entries:
                continue
            slots, flat, keys = chunk_keys(plan, chunk, keys_BCK.to(work))
            q, weights = plan.take(q_BTHK, chunk).to(work), plan.take(weights_BTH, chunk).to(full)
            G, W, H, K = q.shape
            dots, scores = chunk_scores(q, keys, weights)
            seen, target = _target(plan, chunk, slots, mass, selected_BTS)
            counted = plan.take(counted_BT, chunk)[..., None]
            log_model = scores.masked_fill_(~seen, float("-inf")).log_softmax(-1)
            log_model = log_model.masked_fill_(~(seen & counted), 0.0)
            target = target.mul_(counted)
            total += torch.xlogy(target, target).sum() - (target * log_model).sum()
            d_scores = log_model.exp_().mul_(seen & counted).sub_(target).view(G * W, 1, -1)
            plan.put(d_weights, chunk, torch.bmm(dots, d_scores.transpose(1, 2)).view(G, W, H))
            # d dots = w ⊗ d_scores where the dot was positive
            d_dots = (dots > 0).to(full).mul_(d_scores).mul_(weights.reshape(G * W, H, 1))
            d_dots = d_dots.view(G, W * H, -1).to(work)
            plan.put(d_q, chunk, torch.bmm(d_dots, keys).view(q.shape))
            d_chunk = torch.bmm(d_dots.transpose(1, 2), q.view(G, -1, K))
            d_keys.index_add_(0, flat.view(-1), d_chunk.view(-1, K).to(full))
        ctx.save_for_backward(d_q, d_keys.view(keys_BCK.shape).to(keys_BCK.dtype), d_weights)
        count = counted_BT.sum().to(full)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx, grad, _):
        d_q, d_keys, d_weights = (d * grad.to(d.dtype) for d in ctx.saved_tensors)
        return d_q, d_keys, d_weights, None, None, None, None


def _target(plan, chunk, slots_GL, mass, selected_BTS) -> tuple[Tensor, Tensor]:
    """Which entries of its block's range a query compares ``[G, W, L]``, and the normalised target over them."""
    seen = plan.entry_seen(chunk, slots_GL)
    part = plan.take(mass, chunk)
    if selected_BTS is None:
        index = slots_GL.clamp(max=mass.shape[-1] - 1)[:, None].expand(-1, plan.block, -1)
        target = part.gather(2, index).mul_(seen)
    else:
        L, selected = chunk.entries, plan.take(selected_BTS, chunk, fill=-1)
        index = torch.where(selected >= 0, selected - slots_GL[:, :1, None], L)
        target = part.new_zeros(*seen.shape[:2], L + 1).scatter_(2, index, part)[..., :L]
        chosen = torch.zeros(*seen.shape[:2], L + 1, dtype=torch.bool, device=seen.device)
        seen = seen & chosen.scatter_(2, index, True)[..., :L]
    return seen, target / target.sum(-1, keepdim=True).clamp_(min=1e-30)


def indexer_kl(
    q_BTHK: Tensor,
    keys_BCK: Tensor,
    weights_BTH: Tensor,
    mass: Tensor,
    geometry: Geometry,
    *,
    rate: int,
    selected_BTS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.indexer_kl``."""
    return _IndexerKl.apply(q_BTHK, keys_BCK, weights_BTH, mass, geometry, rate, selected_BTS)
