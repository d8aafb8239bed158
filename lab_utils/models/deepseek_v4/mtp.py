"""Multi-token prediction: one more block predicts the token after the next (V3 report §2.2; V4 has one depth, ratio 0).

At token t, ``x = e_proj(rmsnorm(embed(id_{t+1}))) + h_proj(rmsnorm(h_t))``, the first term added to each of the
streams, where h_t are the main model's streams before their last collapse; then a block, its own collapse and norm, and
the shared head. Depth j takes id_{t+1+j} and predicts id_{t+2+j}, from the streams of depth j-1.

Legend: B rows, T tokens, N = B·T, n streams, D model, V vocabulary, M predicted tokens that carry weight, k experts of
a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from kernels.geometry import Geometry
from lab_utils.models.deepseek_v4.block import BlockOutput, Layer
from lab_utils.models.deepseek_v4.hyper_connections import HyperHead
from lab_utils.models.deepseek_v4.layers import Context, Norm, linear, operator


class MtpBlock(Layer):
    """Parameters named as in the checkpoint's ``mtp.{depth}``; embedding and head are the main model's."""

    def __init__(self, config: DeepseekV4Config, depth: int):
        super().__init__(config, config.num_hidden_layers + depth)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.depth = depth
        self.enorm, self.hnorm, self.norm = Norm(D, eps), Norm(D, eps), Norm(D, eps)
        self.e_proj, self.h_proj = linear(D, D), linear(D, D)
        self.hc_head = HyperHead(config)

    def forward(
        self,
        h_BTnD: Tensor,
        next_BTD: Tensor,
        context: Context,
        given_Nk: Tensor | None = None,
        again: str = "none",
    ) -> BlockOutput:
        """The streams of this depth, from those of the depth before and the embeddings of the tokens to come."""
        x_BTnD = self.e_proj(self.enorm(next_BTD))[:, :, None] + self.h_proj(self.hnorm(h_BTnD))
        return super().forward(x_BTnD, context, given_Nk, again)

    def tokens(self, context: Context) -> tuple[Tensor, Context]:
        """Ids ``[B, T]`` of the tokens to embed, and the context in which those without one don't count.

        A document's last tokens get ids that are not its own; nothing of theirs reaches a loss or another token.
        """
        ahead = self.depth + 1
        return context.ids_ahead(ahead), replace(context, tail=ahead)


@dataclass(frozen=True)
class Prediction:
    """Sums over the tokens of weight that one depth predicts."""

    loss: Tensor  # Σ w·nll, fp32, with its gradient
    weight: Tensor  # Σ w
    correct: Tensor  # top-1 hits
    tokens: Tensor


def predict(
    block: MtpBlock, h_BTnD: Tensor, head_VD: Tensor, context: Context, loss_weights_BT: Tensor
) -> Prediction:
    """Cross-entropy of id_{t+2+depth} from the block's streams, inside documents, in chunks of tokens.

    ``loss_weights_BT[b, t]``, of the whole rows, weighs the prediction of token t, as in the objective.
    """
    ahead = block.depth + 2
    weights_BT = context.ahead(loss_weights_BT, ahead) * inside(context.geometry, ahead)
    keep_BT = weights_BT != 0
    hidden_MD = block.norm(block.hc_head(h_BTnD))[keep_BT]
    targets_M, weights_M = context.ids_ahead(ahead)[keep_BT], weights_BT[keep_BT]
    if targets_M.numel() == 0:
        none = torch.zeros((), device=h_BTnD.device)
        # The empty sum keeps the graph: other ranks wait for this one's part in the backward pass of the experts.
        return Prediction(hidden_MD.float().sum(), none, none, none)
    logprob_M, correct_M, _ = operator("linear_logprob", hidden_MD)(hidden_MD, head_VD, targets_M)
    tokens = torch.tensor(float(targets_M.numel()), device=h_BTnD.device)
    return Prediction(-(weights_M * logprob_M).sum(), weights_M.sum(), correct_M.sum().float(), tokens)


def inside(geometry: Geometry, ahead: int) -> Tensor:
    """Whether the token ``ahead`` places on is of the same document, ``[B, T]``; never for padding."""
    return geometry.real_BT & (geometry.local_BT + ahead < geometry.length_BT)


def predicted_weight(position_ids: Tensor, document_ids: Tensor, loss_weights: Tensor, depth: int) -> Tensor:
    """``Prediction.weight`` of packed rows before the forward pass: tokens with enough of their document behind."""
    return (loss_weights * ((document_ids >= 0) & (position_ids >= depth + 2))).sum()
