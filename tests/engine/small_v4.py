"""A DeepSeek-V4 of a few thousand weights with every layer type, and documents that can be packed in two
ways.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lab_utils.data.rows import PackedRows
from lab_utils.engine.parts import Parts, Telemetry, write_config_of
from lab_utils.models.load import load_model, save_pretrained
from lab_utils.objectives.sft import Sft
from lab_utils.telemetry.jsonl import JsonlSink
from lab_utils.telemetry.sinks import MultiSink

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "num_attention_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "sliding_window": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 8,  # all entries: equal scores (relu gives many zeros) would be chosen among by layout
}


def small_config(**changes: Any) -> Any:
    from lab_utils.models.presets import preset

    tree = preset("tiny").to_dict()
    for derived in ("rope_parameters", "compress_ratios"):
        tree.pop(derived, None)
    from transformers import DeepseekV4Config

    return DeepseekV4Config(**{**tree, **SMALL, **changes})


def write_source(folder: Any, **changes: Any) -> str:
    """A checkpoint folder of such a model with random weights, as ``model.source`` takes it."""
    from lab_utils.models.deepseek_v4.initialize import initialize
    from lab_utils.models.deepseek_v4.model import DeepseekV4

    model = DeepseekV4(small_config(**changes))
    initialize(model, 5)
    part_streams(model)
    save_pretrained(model, model.config, folder)
    return str(folder)


@torch.no_grad()
def part_streams(model: torch.nn.Module) -> None:
    """Biases of the hyper-connections, sinks and places apart from zero.

    At zero the four streams are the same and mixing them changes nothing: the gradients of mixing are rounding errors,
    which Adam makes as large as any other, and no two sums of them agree.
    """
    g = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("base", "hc_base", "sinks", "position_bias"):
            parameter.add_(torch.randn(parameter.shape, generator=g))
        elif leaf in ("scale", "hc_scale"):
            parameter.fill_(1.0)


def documents(step: int, number: int, vocab: int, longest: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and loss weights of the documents of a step."""
    g = torch.Generator().manual_seed(step)
    found = []
    for _ in range(number):
        length = int(torch.randint(5, longest + 1, (1,), generator=g))
        ids = torch.randint(0, vocab, (length,), generator=g)
        for t in range(1, length):  # something to learn
            if torch.rand(1, generator=g) < 0.7:
                ids[t] = (ids[t - 1] * 7 + 1) % vocab
        weights = (torch.rand(length, generator=g) < 0.6).float()
        weights[0] = 0
        found.append((ids, weights))
    return found


class DocumentRows:
    """The same documents every time, ``per_row`` of them in a row of ``per_row · longest`` tokens."""

    def __init__(self, number: int, per_row: int, longest: int, vocab: int, rank: int, world: int) -> None:
        self.number, self.per_row, self.longest, self.vocab = number, per_row, longest, vocab
        self.rank, self.world, self.step = rank, world, 0

    def global_rows(self, step: int) -> PackedRows:
        found = documents(step, self.number, self.vocab, self.longest)
        B, T = self.number // self.per_row, self.per_row * self.longest
        ids, positions = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
        owner, weights = torch.full((B, T), -1), torch.zeros(B, T)
        for b in range(B):
            at = 0
            for d, (tokens, w) in enumerate(found[b * self.per_row : (b + 1) * self.per_row]):
                stop = at + len(tokens)
                ids[b, at:stop], weights[b, at:stop] = tokens, w
                positions[b, at:stop], owner[b, at:stop] = torch.arange(len(tokens)), d
                at = stop
            positions[b, at:] = torch.arange(T - at)
        return PackedRows(ids, positions, owner, weights)

    def next_step(self) -> PackedRows:
        self.step += 1
        rows = self.global_rows(self.step - 1)
        return rows._map(lambda tensor: tensor[self.rank :: self.world])

    epoch = 0.0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def builder(number: int, per_row: int, longest: int) -> Any:
    """A builder of engine parts over these documents and the recipe's own model."""

    def build(
        recipe: Any, accelerator: Any, run_dir: Any, *, rank: int, world: int, device: Any, source: str | None
    ) -> Parts:
        section = recipe.model
        model = load_model(
            source or section.source,
            dtype=section.dtype,
            seed=recipe.seed,
            checkpointing=section.checkpointing,
        )
        return Parts(
            model=model,
            train=DocumentRows(number, per_row, longest, 97, rank, world),
            objective=Sft(),
            write_config=partial(write_config_of, model),
            telemetry=Telemetry(MultiSink([JsonlSink()] if rank == 0 else [])),
        )

    return build
