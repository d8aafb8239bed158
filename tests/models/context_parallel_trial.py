"""One forward and backward pass of ``tiny`` with every training signal, on rows cut over ranks: ``FOLDER SEED PHASE``.

By ``lab_utils.launchers._forked``. Rank 0 writes what the ranks found together; on one rank rows are whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lab_utils.models.context_parallel import ContextParallel
from lab_utils.models.load import load_model

B, T = 3, 512


def rows(g: torch.Generator, vocabulary: int) -> tuple[Tensor, ...]:
    """Ids, positions, documents and weights: many short documents, one as long as the row, and padding at the end."""
    ids = torch.randint(0, vocabulary, (B, T), generator=g)
    positions, documents = torch.zeros(2, B, T, dtype=torch.long)
    for row in range(B):
        start = document = 0
        while start < T:
            longest = T if row == 0 else 40 if row == 1 else 300
            length = min(int(torch.randint(1, longest + 1, (), generator=g)) if row else T, T - start)
            positions[row, start : start + length] = torch.arange(length)
            documents[row, start : start + length] = document
            start, document = start + length, document + 1
    documents[2, T - 130 :] = -1  # a whole run of a rank, and the end of another's
    weights = (torch.rand(B, T, generator=g) < 0.7) & (positions > 0) & (documents >= 0)
    return ids, positions, documents, weights.double()


def main(folder: Path, seed: int, phase: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    model = load_model(
        "preset:tiny",
        dtype="float32",
        seed=seed,
        indexer_loss=0.1,
        indexer_phase=phase,
        mtp_loss=0.3,
        balance_loss=0.1,
        balance_rate=0.01,
        checkpointing="full" if seed % 2 else "none",
    )
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # what starts at zero or all alike would hide an error
        parameter.data += torch.randn(parameter.shape, generator=g) * 0.02 * (parameter.abs().mean() + 0.5)
    model.train().double()
    ids, positions, documents, weights = rows(g, model.config.vocab_size)
    pull = torch.randn(B, T, model.config.hidden_size, generator=g, dtype=torch.float64)
    if ranks > 1:
        model.parts = ContextParallel.of(dist.group.WORLD)
    output = model(ids, positions, documents, weights)
    own_pull = pull if model.parts is None else model.parts.cut(pull)
    loss = (output.hidden_BTD * own_pull).sum()
    for auxiliary in output.auxiliary.values():
        loss = loss + auxiliary.weight * auxiliary.total
    loss.backward()
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"total of {name}": each.total.detach().double() for name, each in output.auxiliary.items()}
    found |= {
        f"count of {name}": torch.as_tensor(each.count).double() for name, each in output.auxiliary.items()
    }
    gates = [layer.mlp.gate for layer in model.model.layers if not layer.mlp.gate.hashed]
    found["load"] = torch.stack([gate.load_E for gate in gates]).double()
    for name in sorted(found):
        dist.all_reduce(found[name])
    hidden = output.hidden_BTD.detach()
    found["hidden"] = (
        hidden if model.parts is None else model.parts.gathered(hidden).transpose(0, 1).flatten(1, 2)
    )
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{ranks}-{seed}.pt")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
