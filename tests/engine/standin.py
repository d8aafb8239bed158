"""A small model and loader for trials of the engine: odd shapes, packed documents, an fp32 island, an
auxiliary loss.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lab_utils.data.rows import PackedRows
from lab_utils.engine.parts import Parts, Telemetry
from lab_utils.objectives.sft import Sft
from lab_utils.telemetry.jsonl import JsonlSink
from lab_utils.telemetry.sinks import MultiSink

VOCAB, WIDTH, INNER = 37, 10, 23


class TinyModel(nn.Module):
    """Each token sees the decayed sum of the earlier ones of its document; shapes that two ranks can't split
    evenly.
    """

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, checkpointing: str = "none") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(*shape, generator=generator) * 0.3).to(dtype))

        self.embed, self.up, self.down, self.head = (
            weight(VOCAB, WIDTH),
            weight(INNER, WIDTH),
            weight(WIDTH, INNER),
            weight(VOCAB, WIDTH),
        )
        self.decay = nn.Parameter(torch.tensor(0.5))  # fp32 in a bf16 model, and of no dimension
        self.bias = nn.Parameter(torch.zeros(INNER, dtype=dtype))
        self.indexer = weight(3, WIDTH)  # trained by the auxiliary loss alone
        self.unused = weight(2, 3)  # gets no gradient at all
        self.register_buffer("router_bias", torch.linspace(0, 1e-3, 5, dtype=torch.float32))
        self.checkpointing = checkpointing
        self.poison = False
        self.config = SimpleNamespace(vocab_size=VOCAB)

    @property
    def head_weight(self) -> Tensor:
        return self.head

    def flops_per_token(self, document_lengths: list[int]) -> float:
        return 6.0 * sum(p.numel() for p in self.parameters())

    def mix(self, x_BTD: Tensor, position_ids: Tensor) -> Tensor:
        """Decayed sum over earlier tokens of the same document, in fp32, then a small MLP."""
        state, out = torch.zeros_like(x_BTD[:, 0].float()), []
        for t in range(x_BTD.shape[1]):
            keep = (position_ids[:, t] > 0).unsqueeze(-1)
            state = (
                torch.where(keep, state * torch.sigmoid(self.decay), torch.zeros_like(state))
                + x_BTD[:, t].float()
            )
            out.append(state)
        mixed = torch.stack(out, 1).to(x_BTD.dtype)
        return mixed + torch.tanh(mixed @ self.up.T + self.bias) @ self.down.T

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        loss_weights: Tensor | None = None,
    ) -> Any:
        x = self.embed[input_ids]
        if self.checkpointing == "full":
            hidden = checkpoint(self.mix, x, position_ids, use_reentrant=False)
        else:
            hidden = self.mix(x, position_ids)
        if self.poison and self.training:
            hidden = hidden * float("nan")
        real = counted(position_ids, document_ids)
        kl = ((hidden.detach().float() @ self.indexer.float().T).square().sum(-1) * real).sum()
        aux = SimpleNamespace(total=kl, count=real.sum(), weight=0.01)
        return SimpleNamespace(hidden_BTD=hidden, auxiliary={"indexer_kl": aux}, metrics={})

    def auxiliary_counts(
        self, position_ids: Tensor, document_ids: Tensor, loss_weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"indexer_kl": counted(position_ids, document_ids).sum()}


def counted(position_ids: Tensor, document_ids: Tensor) -> Tensor:
    """Tokens of the auxiliary loss: not in proportion to all tokens, as the indexer's are not."""
    return ((document_ids >= 0) & (position_ids >= 4)).float()


def dense_logprob(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden_ND.float() @ weight_VD.float().T
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    return logp.gather(-1, targets_N[:, None]).squeeze(-1), logits.argmax(-1) == targets_N, entropy


def make_rows(rows: int, tokens: int, seed: int) -> PackedRows:
    """Rows of random documents with loss on random tokens, and some padding at the end of every row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, tokens), generator=g)
    for t in range(1, tokens):  # two tokens in three follow a rule, so that there is something to learn
        rule = torch.rand(rows, generator=g) < 0.67
        ids[:, t] = torch.where(rule, (ids[:, t - 1] * 5 + 3) % VOCAB, ids[:, t])
    positions, documents = torch.zeros_like(ids), torch.full_like(ids, -1)
    for b in range(rows):
        t = d = 0
        end = tokens - int(torch.randint(0, 5, (1,), generator=g))
        while t < end:
            length = min(int(torch.randint(3, 9, (1,), generator=g)), end - t)
            positions[b, t : t + length], documents[b, t : t + length] = torch.arange(length), d
            t, d = t + length, d + 1
    weights = (torch.rand(rows, tokens, generator=g) < 0.5).float() * (positions > 0) * (documents >= 0)
    return PackedRows(ids, positions, documents, weights)


class RowLoader:
    """Global rows are a function of the step alone; rank r takes rows r::world."""

    def __init__(self, rows_per_step: int, tokens: int, seed: int, rank: int, world: int) -> None:
        self.rows_per_step, self.tokens, self.seed, self.rank, self.world = (
            rows_per_step,
            tokens,
            seed,
            rank,
            world,
        )
        self.step = 0

    def global_rows(self, step: int) -> PackedRows:
        return make_rows(self.rows_per_step, self.tokens, self.seed * 1000 + step)

    def next_step(self) -> PackedRows:
        self.step += 1
        return take(self.global_rows(self.step - 1), slice(self.rank, None, self.world))

    def batches(self, micro_rows: int) -> list[PackedRows]:
        rows = take(self.global_rows(0), slice(self.rank, None, self.world))
        return [rows.slice(i, i + micro_rows) for i in range(0, rows.rows, micro_rows)]

    @property
    def epoch(self) -> float:
        return self.step / 10

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def take(rows: PackedRows, which: slice) -> PackedRows:
    return PackedRows(
        rows.input_ids[which], rows.position_ids[which], rows.document_ids[which], rows.loss_weights[which]
    )


def make_parts(
    recipe: Any, accelerator: Any, run_dir: Any, *, rank: int, world: int, device: Any, source: str | None
) -> Parts:
    """The builder that stands in for ``build_parts``."""
    model = TinyModel(recipe.seed, getattr(torch, recipe.model.dtype), recipe.model.checkpointing)
    if source:
        model.load_state_dict(load_file(Path(source) / "model.safetensors"))

    def write_config(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    loader = RowLoader(recipe.rows_per_step, recipe.data.row_tokens, recipe.seed, rank, world)
    held_out = RowLoader(4, recipe.data.row_tokens, 99, rank, world)
    sinks = Telemetry(MultiSink([JsonlSink()] if rank == 0 else []))
    return Parts(model, loader, Sft(dense_logprob), write_config, held_out, sinks)
