"""Log-probabilities of the answers in packed rows: by token, and summed by document.

Shapes: B rows, T tokens, D model (in ``hidden``) or documents of a row (in sums), V vocabulary, N tokens with loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows


def token_logps(
    hidden_BTD: Tensor, head_VD: Tensor, rows: PackedRows, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model gives each token that bears loss; logits exist for one chunk of tokens at a time.

    Args:
        hidden_BTD: the model's states after its final norm.
        head_VD: the language-model head.
        rows: the rows that gave ``hidden_BTD``. A token bears loss where ``loss_weights`` is not 0, whatever the
            weight.
        temperature: what the logits are divided by.

    Returns:
        ``logps_BT`` fp32, log-probability of token t given those before it; ``correct_BT`` bool, whether it is the
        likeliest; ``entropy_BT`` fp32 (nat, detached), of the distribution it is drawn from. All 0 on tokens without
        loss. ``logps_BT`` has a gradient even if there is none with loss: a zero, so that every micro-batch can be
        backpropagated.
    """
    # The prediction of token t stands at t - 1; a row's first token is predicted by nothing.
    bears_BT = rows.loss_weights != 0
    bears_BT[:, 0] = False
    hidden_ND = hidden_BTD[:, :-1][bears_BT[:, 1:]]
    targets_N = rows.input_ids[bears_BT]
    if temperature != 1.0:
        hidden_ND = hidden_ND.float() / temperature  # in bf16, the quotient would be rounded
    if targets_N.numel():
        logps_N, correct_N, entropy_N = _operator(hidden_ND)(hidden_ND, head_VD, targets_N)
    else:
        logps_N = hidden_ND.float().sum(-1)  # empty, with a graph
        correct_N, entropy_N = logps_N.detach().bool(), logps_N.detach()
    zeros_BT = logps_N.new_zeros(rows.input_ids.shape)
    return (
        zeros_BT.masked_scatter(bears_BT, logps_N),
        bears_BT.masked_scatter(bears_BT, correct_N),
        zeros_BT.masked_scatter(bears_BT, entropy_N),
    )


def document_sums(x_BT: Tensor, rows: PackedRows) -> Tensor:
    """Sum over the tokens of each document, [B, D] in the dtype of ``x_BT`` (int64 of bool).

    D is the number of documents in the fullest of these rows; where a row has fewer, the rest of it is 0.
    """
    x_BT = x_BT if x_BT.is_floating_point() else x_BT.long()
    documents = int(rows.document_ids.max()) + 1
    # Padding (-1) goes into a bin of its own, which is cut off: with no document at all, the graph stays.
    bins_BT = rows.document_ids.where(rows.document_ids >= 0, documents)
    sums = x_BT.new_zeros(x_BT.shape[0], documents + 1).scatter_add(1, bins_BT, x_BT)
    return sums[:, :documents]


def document_roles(rows: PackedRows) -> Tensor:
    """``side["role"]`` of each document, int64 [B, D]; -1 where a row has fewer."""
    documents = int(rows.document_ids.max()) + 1
    roles_BD = torch.full((rows.rows, documents), -1, device=rows.input_ids.device)
    row_N, token_N = ((rows.position_ids == 0) & (rows.document_ids >= 0)).nonzero(as_tuple=True)
    roles_BD[row_N, rows.document_ids[row_N, token_N]] = rows.side["role"][row_N, token_N].long()
    return roles_BD


def _operator(hidden_ND: Tensor):
    from kernels.registry import get

    return get("linear_logprob", hidden_ND.device.type, hidden_ND.dtype)
