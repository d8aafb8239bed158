"""DeepSeek-V4 for training: configuration and parameter names of transformers, memory linear in the row length.

Legend: B rows, T tokens, D model, V vocabulary, n streams, E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from kernels.geometry import Geometry
from kernels.row_part import RowPart
from lab_utils.errors import RecipeError
from lab_utils.models.base import AuxiliaryLoss, ModelOutput, RoutingRecord
from lab_utils.models.context_parallel import ContextParallel
from lab_utils.models.deepseek_v4.attention import CSA
from lab_utils.models.deepseek_v4.balance import settle_load
from lab_utils.models.deepseek_v4.block import Layer, Pass
from lab_utils.models.deepseek_v4.counting import reach, training_flops
from lab_utils.models.deepseek_v4.decoding import DeepseekV4Decoding
from lab_utils.models.deepseek_v4.hyper_connections import HyperHead
from lab_utils.models.deepseek_v4.layers import Context, Norm, linear, uninitialised
from lab_utils.models.deepseek_v4.mtp import MtpBlock, predict, predicted_weight
from lab_utils.models.deepseek_v4.rotary import Rotary
from lab_utils.telemetry.reductions import Mean, Metric


class Decoder(nn.Module):
    """Embedding, layers, the streams' collapse and the final norm."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.embed_tokens = uninitialised(nn.Embedding, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)


class DeepseekV4(nn.Module):
    """A ``TrainableModel``; ``state_dict`` has the names and shapes of transformers' ``DeepseekV4ForCausalLM``, and
    ``mtp.0.…`` where the block of multi-token prediction is built.

    Args:
        config: transformers' configuration.
        indexer_loss: weight of the lightning indexer's KL loss; 0 leaves it out (and the indexer untrained).
        indexer_phase: "sparse", or "warmup": every visible entry is attended, and nothing but the indexer learns.
        mtp_loss: weight of multi-token prediction; 0 builds no block for it.
        balance_loss: weight of the sequence-wise balance loss in each layer that learns to route.
        balance_rate: step of the routers' correction biases in ``finish_step``; 0 leaves them as they are.
        checkpointing: what of each block is made again in the backward pass: "none", "mhc", "attention" or "full"
            (``block.py`` says what each of them keeps).

        scored: a reward model: a head ``score`` of one number in place of the language model's.

    Raises:
        RecipeError: multi-token prediction is wanted of a configuration without such blocks, or of a reward model.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        *,
        indexer_loss: float = 0.01,
        indexer_phase: str = "sparse",
        mtp_loss: float = 0.0,
        balance_loss: float = 0.0,
        balance_rate: float = 0.0,
        checkpointing: str = "none",
        scored: bool = False,
    ):
        super().__init__()
        if scored and mtp_loss:
            raise RecipeError(
                "model.mtp_loss predicts tokens, and a reward model has no head for them: set it to 0."
            )
        if mtp_loss and not config.num_nextn_predict_layers:
            raise RecipeError(
                f"model.mtp_loss={mtp_loss}, but the model's config.json has num_nextn_predict_layers=0: set it to 1 "
                "for a fresh block, or model.mtp_loss=0."
            )
        self.config, self.checkpointing = config, checkpointing
        self.indexer_loss, self.warmup = indexer_loss, indexer_phase == "warmup"
        self.mtp_loss, self.balance_loss, self.balance_rate = mtp_loss, balance_loss, balance_rate
        self.model = Decoder(config)
        self.scored = scored
        if scored:
            self.score = linear(config.hidden_size, 1)
        else:
            self.lm_head = linear(config.hidden_size, config.vocab_size)
        depths = config.num_nextn_predict_layers if mtp_loss else 0
        self.mtp = nn.ModuleList(MtpBlock(config, depth) for depth in range(depths))
        self.rotary = Rotary(config)
        self._record: RoutingRecord | None = None
        # Who has the other tokens of the rows; set by the engine where a row is cut over ranks.
        self.parts: ContextParallel | None = None
        # Shapes before any cut, in an order that fresh weights are drawn in.
        self.whole_shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        # Set by who makes the model without memory: gives this rank's part its values, once it has been cut.
        self.materialise: Callable[[], None] | None = None
        if self.warmup:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".indexer." in name)

    @property
    def head(self) -> nn.Module:
        """What multiplies the last hidden states: of the language model, or of a reward model."""
        return self.score if self.scored else self.lm_head

    @property
    def head_weight(self) -> Tensor:
        return self.head.weight

    @property
    def trained_mtp(self) -> list[MtpBlock]:
        """Blocks of multi-token prediction that run; in the indexer's warm-up they only wait."""
        return [] if self.warmup else list(self.mtp)

    @property
    def learned_layers(self) -> int:
        """Layers whose routing is learned, those of multi-token prediction among them."""
        return (
            len(self.config.mlp_layer_types)
            - self.config.mlp_layer_types.count("hash_moe")
            + len(self.trained_mtp)
        )

    def flops_per_token(self, document_lengths: list[int]) -> float:
        return training_flops(
            self.config,
            document_lengths,
            indexer_trained=self.indexer_loss > 0,
            mtp=bool(self.trained_mtp),
            indexer_warmup=self.warmup,
        )

    def auxiliary_counts(
        self, position_ids: Tensor, document_ids: Tensor, loss_weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the auxiliary losses of these rows will be means over, known before the forward pass.

        - ``indexer_kl``: tokens that see a whole compressed entry of their document, in every CSA layer;
        - ``aux_loss``, the balance of experts: documents, in every layer that learns to route;
        - ``mtp_loss``: the weight of the tokens that are predicted, over all depths.

        Raises:
            ValueError: there is multi-token prediction and no ``loss_weights``.
        """
        real_BT, counts = document_ids >= 0, {}
        if self.indexer_loss:
            sees_BT = real_BT & (position_ids >= self.config.compress_rates[CSA] - 1)
            counts["indexer_kl"] = sees_BT.sum() * self.config.layer_types.count(CSA)
        if self.balance_loss and not self.warmup:
            counts["aux_loss"] = (real_BT & (position_ids == 0)).sum() * self.learned_layers
        if self.trained_mtp:
            _require(loss_weights)
            rows = position_ids, document_ids, loss_weights
            counts["mtp_loss"] = sum(predicted_weight(*rows, block.depth) for block in self.trained_mtp)
        return counts

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        loss_weights: Tensor | None = None,
        routing: RoutingRecord | None = None,
    ) -> ModelOutput:
        """Packed rows ``[B, T]`` to final hidden states; see ``ModelOutput``.

        Under context parallelism (``parts``) every rank of the group is given the whole rows, and gets the states,
        losses and metrics of its own run of their tokens.

        Args:
            loss_weights: as in ``PackedRows``; with them multi-token prediction has its loss, without it doesn't run.
            routing: experts to take, from ``record_routing``; the weights still come from the current scores. MTP
                blocks choose for themselves where the record ends before them.

        Raises:
            ValueError: multi-token prediction is to be trained and there are no ``loss_weights``; or the record
                doesn't fit these rows and layers.
        """
        if self.trained_mtp and self.training and torch.is_grad_enabled():
            _require(loss_weights)
        at = self.begin(input_ids, position_ids, document_ids, routing)
        h_BTnD = self.embed(at.context.input_ids)
        for number, layer in enumerate(self.model.layers):
            h_BTnD = at.run(layer, number, h_BTnD)
        return self.finish(at, h_BTnD, loss_weights)

    # The steps of ``forward``, for whoever runs a part of the layers.

    def begin(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        routing: RoutingRecord | None = None,
    ) -> Pass:
        """A pass over these rows, before its first layer."""
        learns = torch.is_grad_enabled()
        if self._record is not None and self._record.experts:
            raise ValueError("record_routing holds one forward pass: open another for the next.")
        geometry, parts = Geometry(position_ids, document_ids), self.parts
        context = Context(
            input_ids if parts is None else parts.cut(input_ids),
            geometry if parts is None else RowPart(geometry, parts.rank, parts.ranks, reach(self.config)),
            self.rotary,
            parts=parts,
            whole_ids=None if parts is None else input_ids,
            indexer_loss=self.indexer_loss > 0 and learns,
            dense=self.warmup,
            balance=self.balance_loss > 0 and learns and not self.warmup,
        )
        return Pass(
            context,
            # In the warm-up the graph holds nothing but the indexer: to make layers again for it would only cost.
            again=self.checkpointing if learns and not self.warmup else "none",
            count=self.training and learns,
            given=self._checked(routing, input_ids.shape),
            record=self._record,
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """The streams ``[B, T, n, D]`` before the first layer: copies of the embedding."""
        embedded_BTD = self.model.embed_tokens(input_ids)
        return embedded_BTD[:, :, None].expand(-1, -1, self.config.hc_mult, -1).contiguous()

    def finish(self, at: Pass, h_BTnD: Tensor, loss_weights: Tensor | None) -> ModelOutput:
        """What follows the last layer: the streams' collapse, multi-token prediction, the losses of the blocks run."""
        output = ModelOutput(self.model.norm(self.model.hc_head(h_BTnD)))
        if loss_weights is not None and self.trained_mtp:
            output.auxiliary["mtp_loss"], accuracy = self.predict_further(at, h_BTnD, loss_weights)
            output.metrics["mtp_token_accuracy"] = accuracy
        output.auxiliary |= self.losses(at)
        return output

    def predict_further(self, at: Pass, h_BTnD: Tensor, loss_weights: Tensor) -> tuple[AuxiliaryLoss, Mean]:
        """Multi-token prediction from the streams after the last layer, depth after depth: its loss, its accuracy."""
        found = []
        for number, block in enumerate(self.trained_mtp, len(self.model.layers)):
            ids_BT, counted = block.tokens(at.context)
            h_BTnD = at.run(block, number, h_BTnD, self.model.embed_tokens(ids_BT), context=counted)
            found.append(predict(block, h_BTnD, self.head_weight, at.context, loss_weights))
        loss, weight, correct, tokens = (
            sum(getattr(each, name) for each in found) for name in ("loss", "weight", "correct", "tokens")
        )
        return AuxiliaryLoss(loss, weight, self.mtp_loss), Mean(correct, tokens)

    def losses(self, at: Pass) -> dict[str, AuxiliaryLoss]:
        """The auxiliary losses of the blocks that have run."""
        found = {}
        if at.indexer_kl:
            total, count = (torch.stack(column).sum() for column in zip(*at.indexer_kl, strict=True))
            found["indexer_kl"] = AuxiliaryLoss(total, count, self.indexer_loss)
        if at.balance:
            geometry = at.context.geometry
            documents = (geometry.real_BT & (geometry.local_BT == 0)).sum().float()
            # A mean over documents and layers to read; V3 adds the layers up, so the weight counts them all.
            found["aux_loss"] = AuxiliaryLoss(
                torch.stack(at.balance).sum(),
                documents * len(at.balance),
                self.balance_loss * self.learned_layers,
            )
        return found

    def start_decoding(self) -> DeepseekV4Decoding:
        """Texts to go on with, none yet; they are in a key-value cache."""
        return DeepseekV4Decoding(self)

    # Once a step.

    def finish_step(self, all_reduce: Callable[[Tensor], Tensor], applied: bool) -> dict[str, Metric]:
        """To be called once after each optimizer step: metrics of the experts' load, and the correction biases' move.

        Args:
            all_reduce: sums an int64 tensor ``[L, E]`` over all ranks that share the batch, and returns it; called
                exactly once if any layer learns to route.
            applied: whether the step was; after a skipped one the biases stay where they are.

        Returns:
            ``moe/…`` of the global batch since the last call, the same on every rank.
        """
        gates = [block.mlp.gate for block in [*self.model.layers, *self.trained_mtp]]
        # A stage of a pipeline has given up the buffers of the other stages' layers.
        routers = [gate for gate in gates if not gate.hashed and gate.load_E is not None]
        rate = self.balance_rate if applied and not self.warmup else 0.0
        return settle_load(routers, all_reduce, rate=rate)

    @contextmanager
    def record_routing(self) -> Iterator[RoutingRecord]:
        """The experts that the forward pass inside gives to each token, for ``forward(…, routing=record)``."""
        self._record = RoutingRecord()
        try:
            yield self._record
        finally:
            self._record = None

    def _checked(self, routing: RoutingRecord | None, rows: torch.Size) -> list[Tensor]:
        """The tensors of a record, one for each layer or none at all; of this rank's tokens."""
        if routing is None:
            return []
        wanted = (rows.numel(), self.config.num_experts_per_tok)
        least, most = len(self.model.layers), len(self.model.layers) + len(self.mtp)
        shapes = {tuple(experts_Nk.shape) for experts_Nk in routing.experts}
        if not least <= len(routing.experts) <= most or shapes != {wanted}:
            raise ValueError(
                f"routing: {len(routing.experts)} layers of {sorted(shapes)} don't fit {least} layers and rows that "
                f"need {list(wanted)}: give the record of the same rows."
            )
        if self.parts is None:
            return routing.experts
        whole = (experts_Nk.unflatten(0, rows) for experts_Nk in routing.experts)
        return [self.parts.cut(experts_BTk).flatten(0, 1) for experts_BTk in whole]


def _require(loss_weights: Tensor | None) -> None:
    if loss_weights is None:
        raise ValueError(
            "model.mtp_loss is set: give the rows' loss_weights, which weigh its predictions too."
        )
