"""Log-probabilities over the tokens that a sampler's top-p or top-k kept, and no others (V3.2's sampling mask).

A sampler that cuts the tail draws from the renormalised rest. Training on the whole vocabulary would compare other
distributions than the one that acted; here the same tokens make up the softmax as while sampling.

Shapes: B rows, T tokens, D model, V vocabulary, S kept tokens at most, N tokens with loss, U distinct tokens that any
of them kept, n tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.errors import DataError
from lab_utils.objectives._logps import token_logps

# Logits held at once, as in kernels/linear_logprob.
CPU_CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 27


def policy_logps(
    hidden_BTD: Tensor, head_VD: Tensor, rows: PackedRows, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``token_logps``, over the kept tokens alone where the rows say which those are (``rows.side["kept"]``).

    What is compared must be computed alike: policy, old policy, reference and teacher all come from here.

    Args:
        rows: ``side["kept"]``, if there, is int [B, T, S]: ids of the tokens that the sampler drew token t from, each
            once, -1 where there are fewer. The drawn token counts as kept whether or not it is named.

    Raises:
        DataError: a token with loss for which nothing was kept.
    """
    if "kept" not in rows.side:
        return token_logps(hidden_BTD, head_VD, rows, temperature)
    bears_BT = rows.loss_weights != 0
    bears_BT[:, 0] = False
    targets_N = rows.input_ids[bears_BT]
    hidden_ND = hidden_BTD[:, :-1][bears_BT[:, 1:]]
    if not targets_N.numel():
        return token_logps(hidden_BTD, head_VD, rows, temperature)
    if temperature != 1.0:
        hidden_ND = hidden_ND.float() / temperature
    kept_NS = rows.side["kept"][bears_BT]
    logps_N, correct_N, entropy_N = kept_logprob(hidden_ND, head_VD, targets_N, kept_NS)
    zeros_BT = logps_N.new_zeros(rows.input_ids.shape)
    return (
        zeros_BT.masked_scatter(bears_BT, logps_N),
        bears_BT.masked_scatter(bears_BT, correct_N),
        zeros_BT.masked_scatter(bears_BT, entropy_N),
    )


def kept_logprob(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, kept_NS: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logprob [N] fp32, correct [N] bool, entropy [N] fp32 detached)`` of targets among the kept tokens.

    The head's rows of all kept tokens are taken out once, and only their logits computed, ``chunk`` tokens at a time;
    gradients go to ``hidden_ND`` and to those rows of the head.

    Raises:
        DataError: a token for which nothing was kept.
    """
    named_NS = kept_NS >= 0
    if not bool(named_NS.any(1).all()):
        raise DataError(
            "The sampling mask of a token is empty (side tensor 'kept' holds -1 only): expected the ids of the tokens "
            "it was drawn from; set rollout.keep_sampling_mask=false, or correct what fills it."
        )
    # Column 0 is the drawn token; where it is named again, or nothing is named, the column is shut.
    column_N1 = targets_N[:, None]
    wanted_NS = torch.cat([column_N1, kept_NS.where(named_NS, column_N1).to(targets_N.dtype)], 1)
    open_NS = wanted_NS != column_N1
    open_NS[:, 0] = True
    ids_U, places_NS = torch.unique(wanted_NS, return_inverse=True)
    held = CPU_CHUNK if hidden_ND.device.type == "cpu" else DEVICE_CHUNK
    head_UD = head_VD.index_select(0, ids_U)
    return _KeptLogprob.apply(hidden_ND, head_UD, places_NS, open_NS, chunk or max(16, held // len(ids_U)))


class _KeptLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_UD, places_NS, open_NS, chunk):
        full = torch.promote_types(hidden_ND.dtype, torch.float32)
        head_DU = head_UD.to(full).T
        logprob = torch.empty(len(hidden_ND), dtype=full, device=hidden_ND.device)
        log_z, entropy = torch.empty_like(logprob), torch.empty_like(logprob)
        correct = torch.empty(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden_ND[part].to(full), head_DU, places_NS[part], open_NS[part])
            log_z[part] = logits.logsumexp(1)
            log_p = logits - log_z[part, None]
            logprob[part] = log_p[:, 0]
            correct[part] = logits[:, 0] >= logits.amax(1)
            entropy[part] = -(log_p.exp() * log_p.masked_fill(~open_NS[part], 0.0)).sum(1)
        ctx.save_for_backward(hidden_ND, head_UD, places_NS, open_NS, log_z)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(correct, entropy)
        return logprob, correct, entropy

    @staticmethod
    def backward(ctx, grad_N, _correct, _entropy):
        hidden_ND, head_UD, places_NS, open_NS, log_z = ctx.saved_tensors
        full = log_z.dtype
        head = head_UD.to(full)
        d_hidden = torch.empty_like(hidden_ND)
        d_head = torch.zeros_like(head)
        for start in range(0, len(hidden_ND), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden, grad = hidden_ND[part].to(full), grad_N[part, None].to(full)
            logits = _logits(hidden, head.T, places_NS[part], open_NS[part])
            # d logits = grad · (onehot - softmax); shut columns have probability 0 and add nothing where they point.
            d_kept = (logits - log_z[part, None]).exp_().mul_(-grad)
            d_kept[:, 0] += grad[:, 0]
            d_logits = hidden.new_zeros(len(hidden), len(head)).scatter_add_(1, places_NS[part], d_kept)
            d_hidden[part] = (d_logits @ head).to(d_hidden.dtype)
            d_head += d_logits.T @ hidden
        return d_hidden, d_head.to(head_UD.dtype), None, None, None


def _logits(hidden_nD: Tensor, head_DU: Tensor, places_nS: Tensor, open_nS: Tensor) -> Tensor:
    """Logits of the kept tokens ``[n, S]``, -inf in shut columns."""
    return (hidden_nD @ head_DU).gather(1, places_nS).masked_fill_(~open_nS, -torch.inf)
