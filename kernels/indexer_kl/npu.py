"""The indexer's loss: its three gradients by a fused operator, the loss itself from scores over the selection.

* ``sparse_lightning_indexer_kl_loss_grad`` of CANN's extension, where it is installed, takes our target as it is and
  returns the gradients and the softmax of the scores: all of the operator in one call. Packed rows need no parting:
  short tails give no entry, so that an entry a query may see is never later in its row than a causal mask over the
  whole row allows.
* ``npu_lightning_indexer_grad`` of torch_npu makes the gradients from that of the scores; the scores are made as in
  ``torch.py``. It is written for 2048 selected entries: what is missing is filled up with none.

torch_npu's ``npu_sparse_`` and ``npu_dense_lightning_indexer_grad_kl_loss`` are not used: they derive the target from
the main attention's queries and keys at one key a token, and have no notion of compressed entries; ours is given the
mass. Limits (CANN's documents): bf16 or fp16, 64 heads of 128 channels; neither gradient adds in a fixed order. Legend
as in ``reference``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import _npu
from kernels._support import full_dtype
from kernels.geometry import Geometry
from kernels.indexer_kl.torch import _target
from kernels.indexer_kl.torch import indexer_kl as by_torch
from kernels.indexer_select.torch import BLOCK, chunk_keys, chunk_scores

OPERATORS = ("npu::npu_lightning_indexer_grad",)
EXTENSION = (
    "cann_ops_transformer::sparse_lightning_indexer_kl_loss_grad",
    "cann_ops_transformer::sparse_lightning_indexer_kl_loss_grad_metadata",
)
unsupported = _npu.runs(OPERATORS, _npu.HALVES)
SELECTED = 2048  # of torch_npu's operator
SMALLEST = 1e-38  # a probability below it is one that fp32 has no number for


class _ByExtension(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHK, keys_BCK, weights_BTH, target_BTS, index_BTS, rate):
        (B, T, H, K), C, S = q_BTHK.shape, keys_BCK.shape[1], index_BTS.shape[-1]
        layout = {
            "cmp_residual_k": torch.full((B,), T % rate, dtype=torch.int32, device=q_BTHK.device),
            "layout_q": "BSND",
            "layout_k": "BSND",
            "mask_mode": 3,
            "cmp_ratio": rate,
        }
        metadata = _npu.call(
            EXTENSION[1], H, 1, K, batch_size=B, max_seqlen_q=T, max_seqlen_k=C, topk=S, **layout
        )
        d_q, d_keys, d_weights, p_BTS = _npu.call(
            EXTENSION[0],
            q_BTHK.contiguous(),
            keys_BCK[:, :, None].contiguous(),
            weights_BTH.to(target_BTS.dtype).contiguous(),
            index_BTS[:, :, None].contiguous(),
            target_BTS[:, :, None].contiguous(),
            metadata=metadata,
            **layout,
        )
        ctx.save_for_backward(d_q, d_keys.view_as(keys_BCK), d_weights.to(weights_BTH.dtype))
        log_p = p_BTS.view_as(target_BTS).clamp(min=SMALLEST).log()
        return torch.xlogy(target_BTS, target_BTS).sum() - (target_BTS * log_p).sum()

    @staticmethod
    def backward(ctx, grad):
        return *(d * grad.to(d.dtype) for d in ctx.saved_tensors), None, None, None


class _ByGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_BTHK, keys_BCK, weights_BTH, mass_BTS, selected_BTS, index_BTS, order_BTS, geometry, rate
    ):
        total, d_scores_BTS = _loss(q_BTHK, keys_BCK, weights_BTH, mass_BTS, selected_BTS, geometry, rate)
        d_scores_BTS = d_scores_BTS.gather(2, order_BTS)
        C, S, more = keys_BCK.shape[1], index_BTS.shape[-1], SELECTED
        d_q, d_keys, d_weights = _npu.call(
            OPERATORS[0],
            q_BTHK.contiguous(),
            F.pad(keys_BCK, (0, 0, 0, max(0, more - C)))[:, :, None],
            F.pad(d_scores_BTS.to(q_BTHK.dtype), (0, max(0, more - S)))[:, :, None],
            F.pad(index_BTS, (0, max(0, more - S)), value=-1)[:, :, None],
            weights_BTH.to(q_BTHK.dtype).contiguous(),
            layout="BSND",
            sparse_mode=0,
        )
        ctx.save_for_backward(d_q, d_keys[:, :C, 0], d_weights.to(weights_BTH.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(d * grad.to(d.dtype) for d in ctx.saved_tensors), None, None, None, None, None, None


def _loss(q_BTHK, keys_BCK, weights_BTH, mass, selected_BTS, geometry, rate) -> tuple[Tensor, Tensor]:
    """The summed KL and its gradient in the scores ``[B, T, S]``, in query blocks as in ``torch.py``."""
    full, plan = full_dtype(q_BTHK), geometry.plan(BLOCK, 0, rate, q_BTHK.shape[2])
    counted_BT = (geometry.entries(rate).visible_BT > 0) & geometry.real_BT
    d_scores = torch.zeros(mass.shape, dtype=full, device=mass.device)
    total = torch.zeros((), dtype=full, device=mass.device)
    for chunk in plan.chunks:
        if not chunk.entries:
            continue
        slots, _, keys = chunk_keys(plan, chunk, keys_BCK)
        seen, target = _target(plan, chunk, slots, mass, selected_BTS)
        seen = seen & plan.take(counted_BT, chunk)[..., None]
        _, scores = chunk_scores(plan.take(q_BTHK, chunk), keys, plan.take(weights_BTH, chunk).to(full))
        log_p = scores.masked_fill_(~seen, float("-inf")).log_softmax(-1).masked_fill_(~seen, 0.0)
        target = target.mul_(seen)
        total += torch.xlogy(target, target).sum() - (target * log_p).sum()
        found = F.pad(log_p.exp_().mul_(seen).sub_(target), (0, 1))  # the last column is for none
        if selected_BTS is None:
            place = slots[:, None].expand_as(seen)
            rows = found.new_zeros(*seen.shape[:2], mass.shape[-1] + chunk.entries)
            plan.put(d_scores, chunk, rows.scatter_(2, place, found[..., :-1])[..., : mass.shape[-1]])
        else:
            selected = plan.take(selected_BTS, chunk, fill=-1)
            place = torch.where(selected >= 0, selected - slots[:, :1, None], chunk.entries)
            plan.put(d_scores, chunk, found.gather(2, place))
    return total, d_scores


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
    H, K, S, C = *q_BTHK.shape[2:], mass.shape[-1], keys_BCK.shape[1]
    if not S or _npu.outside(
        "indexer_kl",
        (H != 64 or K != 128, f"its gradient's operators take 64 heads of 128 channels, not {H} of {K}"),
        (S > SELECTED, f"its gradient's operators take {SELECTED} compared entries, not {S}"),
        _npu.undetermined("indexer_kl"),
    ):
        return by_torch(q_BTHK, keys_BCK, weights_BTH, mass, geometry, rate=rate, selected_BTS=selected_BTS)
    entries, full = geometry.entries(rate), full_dtype(q_BTHK)
    counted_BT = (entries.visible_BT > 0) & geometry.real_BT
    if selected_BTS is None:
        slots_C = torch.arange(C, device=mass.device)
        first, visible = entries.first_BT[..., None], entries.visible_BT[..., None]
        index = torch.where((slots_C >= first) & (slots_C < first + visible), slots_C, -1)
    else:
        index = selected_BTS
    index_BTS, order = index.to(torch.int32).sort(-1, descending=True)  # entries first, what is none last
    if _npu.has(EXTENSION[0]) and not geometry.before:  # its causal mask is that of whole rows
        target = mass.to(full).gather(2, order) * (counted_BT[..., None] & (index_BTS >= 0))
        target = target / target.sum(-1, keepdim=True).clamp(min=1e-30)
        total = _ByExtension.apply(q_BTHK, keys_BCK, weights_BTH, target, index_BTS, rate)
    else:
        total = _ByGradient.apply(
            q_BTHK, keys_BCK, weights_BTH, mass, selected_BTS, index_BTS, order, geometry, rate
        )
    return total, counted_BT.sum().to(full)
