"""A small DeepSeek-V4, synthetic documents, and the textbook loop: what a layout is measured against.

The model has every kind of layer, hash routing, experts and multi-token prediction, in a few hundred thousand weights.
The loop knows nothing of ranks, micro-batches, ZeRO or ColossalAI: whole batches, one process, fp32 masters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab_utils.data.rows import PackedRows
from lab_utils.engine.parts import Parts, model_of, write_config_of
from lab_utils.models.load import save_pretrained
from lab_utils.objectives.sft import Sft
from lab_utils.optim.schedules import learning_rate
from lab_utils.optim.single_process import single_process
from lab_utils.recipe import Recipe

VOCABULARY = 97  # ids that occur
WINDOW, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "layer_types": [WINDOW, CSA, HCA, CSA, HCA, CSA, WINDOW, HCA],
    "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 6,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "sliding_window": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 16,  # every entry of these rows: among equal scores (relu gives many zeros) a layout would choose
}
TOKENS, DOCUMENTS, ROWS = 64, 2, 16  # of a row, in a row, in a step


def trial_recipe(source: str, changes: dict[str, Any]) -> Recipe:
    """Everything that the engine trains, at once: clipping bites, weights decay, all auxiliary losses are on."""
    tree = {
        "name": "trial",
        "seed": 3,
        "model": {
            "source": source,
            "indexer_loss": 0.3,
            "mtp_loss": 0.3,
            "balance_loss": 0.01,
            "balance_rate": 0.001,
        },
        "data": {"train": [{"manifest": "none"}], "row_tokens": TOKENS},
        "optim": {"lr": 3e-3, "weight_decay": 0.1, "clip_norm": 1.0, "eps": 1e-6},
        "schedule": {"steps": 20, "batch_tokens": ROWS * TOKENS, "warmup_steps": 2},
        "cluster": {"threads": 1},
        "tracking": {"wandb": "disabled"},
    }
    return Recipe.parse(tree).with_changes(changes)


def passes(layout: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The change of a recipe that gives a pipeline two micro-batches a stage: its schedule reaches the steady state,
    and no more is made of them, since calls cost most here."""
    pp, cp = layout.get("parallel.pp", 1), layout.get("parallel.cp", 1)
    return {"schedule.micro_rows": ROWS * pp * cp // ranks // (2 * pp)} if pp > 1 else {}


@torch.no_grad()
def write_source(folder: Path) -> None:
    """A checkpoint of such a model with random weights.

    Where fresh weights are all alike, a sum in another order decides: streams that are the same mix into rounding
    errors, scores of experts that are nearly equal fall either way. So biases of the hyper-connections, sinks and
    places start apart from zero, and the routers' scores apart from one another, as in any model that has been trained.
    """
    from transformers import DeepseekV4Config

    from lab_utils.models.deepseek_v4.initialize import initialize
    from lab_utils.models.deepseek_v4.model import DeepseekV4
    from lab_utils.models.presets import preset

    tree = preset("tiny").to_dict()
    for derived in ("rope_parameters", "compress_ratios"):
        tree.pop(derived, None)
    model = DeepseekV4(DeepseekV4Config(**{**tree, **SMALL}), mtp_loss=1.0)
    initialize(model, 5)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("base", "hc_base", "sinks", "position_bias"):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        elif leaf in ("scale", "hc_scale"):
            parameter.fill_(1.0)
        elif name.endswith("mlp.gate.weight"):
            parameter.mul_(50.0)
    save_pretrained(model, model.config, folder)


class TrialRows:
    """A loader of synthetic documents, the same for every layout; a step's rows are dealt out to the ranks.

    The documents of batch 0, which is for gradients alone, consist of three tokens: most experts of the hash layers get
    none of them. Muon makes rounding errors of such poor gradients as large as any other direction.
    """

    epoch = 0.0

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world, self.step = rank, world, 0
        self.routing: list[Tensor] = []  # experts to take in batches 1, 2, …

    def whole(self, step: int) -> PackedRows:
        """Global batch number ``step``, ``[ROWS, TOKENS]``."""
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY if step else 3, (ROWS, TOKENS), generator=g)
        follows = torch.rand(ROWS, TOKENS, generator=g) < 0.7
        for t in range(1, TOKENS):  # something to learn
            after = (ids[:, t - 1] * 7 + 1) % (VOCABULARY if step else 3)
            ids[:, t] = torch.where(follows[:, t], after, ids[:, t])
        longest = TOKENS // DOCUMENTS
        lengths = torch.randint(5, longest + 1, (ROWS, DOCUMENTS), generator=g)
        starts = lengths.cumsum(1) - lengths
        at = torch.arange(TOKENS).expand(ROWS, -1)
        owner = (at[:, :, None] >= starts[:, None]).sum(-1) - 1
        used = at < lengths.sum(1, keepdim=True)
        owner = torch.where(used, owner, -1)
        first = torch.where(used, starts.gather(1, owner.clamp(min=0)), lengths.sum(1, keepdim=True))
        weights = (torch.rand(ROWS, TOKENS, generator=g) < 0.6).float()
        weights = torch.where(used & (at > first), weights, 0.0)
        return PackedRows(ids, at - first, owner, weights)

    def next_step(self) -> PackedRows:
        self.step += 1
        rows = self.whole(self.step - 1)
        if self.routing and self.step > 1:
            rows = replace(rows, side={"routing": self.routing[self.step - 2]})
        return rows._map(lambda tensor: tensor[self.rank :: self.world])

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def build_trial(
    recipe: Recipe, accelerator: Any, run_dir: Any, *, rank: int, world: int, device: Any, source: str | None
) -> Parts:
    """Parts of an engine over these rows."""

    model = model_of(recipe, source, device=device, defer=True)
    write = partial(write_config_of, model)
    return Parts(model=model, train=TrialRows(rank, world), objective=Sft(), write_config=write)


@dataclass
class Truth:
    """What the textbook loop saw."""

    losses: list[dict[str, float]]  # of batches 1, 2, …, by metric
    gradients: dict[str, Tensor]  # of batch 0, on the initial weights
    initial: dict[str, Tensor]
    final: dict[str, Tensor]  # masters, fp32, and buffers
    routing: list[Tensor]  # the experts of each token in batches 1, 2, …, [B, T, L, k]
    norm: float = 0.0  # of the gradients of batch 0
    evaluated: float = 0.0  # the objective's loss on batch 0 after half of the steps


def plain_loop(recipe: Recipe, device: Any = "cpu") -> Truth:
    """The same training as a textbook writes it."""
    work = model_of(recipe, device=device).train()
    masters = model_of(recipe, device=device, dtype="float32")
    masters.load_state_dict(
        work.state_dict()
    )  # what the working precision makes of the weights is where both start
    optimizer = single_process(masters, recipe.optim)
    loader, objective, pairs = (
        TrialRows(),
        Sft(),
        list(zip(work.parameters(), masters.parameters(), strict=True)),
    )
    truth = Truth([], {}, _copies(masters), {}, [])
    for step in range(recipe.schedule.steps + 1):
        rows = loader.whole(step).to(torch.device(device))
        with work.record_routing() as record:
            output = work(rows.input_ids, rows.position_ids, rows.document_ids, rows.loss_weights)
        found = objective(output.hidden_BTD, work.head_weight, rows).loss
        parts = {"train/loss": found.total / found.count}
        loss = parts["train/loss"]
        for name, aux in output.auxiliary.items():
            parts[f"train/{name}"] = aux.total / torch.as_tensor(aux.count).clamp(min=1.0)
            loss = loss + aux.weight * parts[f"train/{name}"]
        loss.backward()
        for mine, master in pairs:
            master.grad = None if mine.grad is None else mine.grad.float()
            mine.grad = None
        if step == 0:
            truth.gradients = {
                name: p.grad.clone() for name, p in masters.named_parameters() if p.grad is not None
            }
            truth.norm = float(torch.stack([g.norm() for g in truth.gradients.values()]).norm())
            work.finish_step(lambda tensor: tensor, False)
            continue
        truth.routing.append(record.to_rows(ROWS).cpu())
        truth.losses.append({name: float(value) for name, value in parts.items()})
        if recipe.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(
                [p for _, p in pairs if p.grad is not None], recipe.optim.clip_norm
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, recipe.schedule, recipe.optim.lr)
        optimizer.step()
        optimizer.zero_grad()
        work.finish_step(lambda tensor: tensor, True)
        with torch.no_grad():
            for mine, master in pairs:
                mine.copy_(master)
            if step == recipe.schedule.steps // 2:
                rows = loader.whole(0).to(torch.device(device))
                output = work.eval()(rows.input_ids, rows.position_ids, rows.document_ids)
                truth.evaluated = objective(output.hidden_BTD, work.head_weight, rows).loss.value
                work.train()
    truth.final = _copies(masters) | {name: b.clone() for name, b in work.named_buffers() if "bias" in name}
    return truth


def _copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
