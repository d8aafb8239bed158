"""The equivalence matrix: the same training under every layout, beside one process that knows of none.

The losses of the steps are compared on the experts that the one process chose: a choice between two nearly equal scores
falls either way with the order of a sum, and from there two exact trainings part. Choosing for oneself is compared in
the gradients of one batch, in which most experts of some layers get no token. The lightning indexer is told apart: the
relu in its scores has a kink, so that the gradient of a score near zero jumps with the order of a sum, by a thousandth.
It feeds nothing but its own loss here, since every entry is attended.

A worker: ``torchrun … -m lab_utils.engine.verify options.json``, started by ``lab verify layouts``. All ranks run all
layouts one after the other in one job, since to import and to join takes longer than to train this model.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lab_utils.accelerators import get_accelerator
from lab_utils.engine import colossal
from lab_utils.engine.control import Stop
from lab_utils.engine.engine import Engine
from lab_utils.engine.reduce import gather_objects, over_ranks
from lab_utils.engine.trial import (
    TrialRows,
    Truth,
    build_trial,
    passes,
    plain_loop,
    trial_recipe,
    write_source,
)
from lab_utils.planner.layouts import layout_names
from lab_utils.runs.directory import RunDirectory
from lab_utils.telemetry.reductions import reduce_metrics

# Largest relative error of a loss at any step, of a parameter at the end (gradients: of one batch), and of the indexer.
TOLERANCES = {"float32": (2e-5, 1e-4, 4e-2), "bfloat16": (1e-2, None, None)}


def verify(options: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Rows of ``layout``, ``optimizer``, ``dtype``, ``max_loss_error``, ``max_parameter_error``,
    ``max_gradient_error``, ``max_indexer_error``, ``tensors``, ``changed``, ``ok``; the same on every rank."""
    accelerator = get_accelerator(options["accelerator"])
    colossal.start(accelerator, 0)
    source = folder / "source"
    if dist.get_rank() == 0:
        write_source(source)
    dist.barrier()
    known = layout_names(dist.get_world_size())
    chosen = {name: known[name] for name in options["layouts"]}
    rows = []
    for optimizer in options["optimizers"]:
        changes = {
            "optim.kind": optimizer,
            "model.dtype": options["dtype"],
            "schedule.steps": options["steps"],
            "cluster.accelerator": options["accelerator"],
            **options["changes"],
        }
        truth = shared_truth(str(source), changes, folder)
        for name, layout in chosen.items():
            few = passes(layout, dist.get_world_size())
            recipe = trial_recipe(str(source), {**changes, **layout, **few, **options["planted"]})
            found = _one(recipe, truth, folder / f"{optimizer}-{name}", accelerator)
            rows.append({"layout": name, "optimizer": optimizer, "dtype": options["dtype"], **found})
            if dist.get_rank() == 0:
                print(json.dumps(rows[-1]), flush=True)
    return rows


def shared_truth(source: str, changes: dict[str, Any], folder: Path) -> Truth:
    """The textbook loop, run by one rank and read by the others."""
    path = folder / f"truth-{changes['optim.kind']}.pt"
    if dist.get_rank() == 0:
        torch.save(vars(plain_loop(trial_recipe(source, changes))), path)
    dist.barrier()
    return Truth(**torch.load(path))


def _one(recipe: Any, truth: Truth, folder: Path, accelerator: Any) -> dict[str, Any]:
    if dist.get_rank() == 0:
        folder.mkdir()
        RunDirectory(folder).write_status(state="created")
    dist.barrier()
    engine = Engine(recipe, accelerator, RunDirectory(folder), build_trial)
    engine.open()
    engine.forward_backward(engine.load(Stop.NO))
    # A gradient below a millionth of the norm is what larger numbers leave of one another: one process in fp32 has the
    # collapse of multi-token prediction's streams no better than to 8e-5.
    gradients = _worst(engine.optimizer.named_gradients(), truth.gradients, least=1e-6 * truth.norm)
    # The norm that clipping goes by, on every rank.
    norms = gather_objects(engine.optimizer.gradient_norm())
    gradients = max(gradients, *(abs(norm - truth.norm) / truth.norm for norm in norms))
    engine.optimizer.zero_grad()
    engine.parts.model.finish_step(engine.layout.sum_over_data, False)
    engine.parts.train.routing = truth.routing
    worst_loss = indexer = 0.0
    for step, expected in enumerate(truth.losses, 1):
        metrics = engine.forward_backward(engine.load(Stop.NO))
        reduced = over_ranks(metrics, engine.device)
        errors = {k: abs(reduced[k].value - v) / max(abs(v), 1e-12) for k, v in expected.items()}
        indexer = max(indexer, errors.pop("train/indexer_kl"))
        worst_loss = max(worst_loss, *errors.values())
        engine.update(metrics)
        if step == recipe.schedule.steps // 2:  # the steps that follow show that training goes on after it
            worst_loss = max(worst_loss, abs(_evaluated(engine) - truth.evaluated) / truth.evaluated)
    state = [(name, rows, tensors["master"]) for name, rows, tensors in engine.optimizer.named_state()]
    others = [part for part in state if ".indexer." not in part[0]]
    parameters = max(_worst(others, truth.final), _worst(_buffers(engine), truth.final))
    indexer = max(indexer, _worst([part for part in state if ".indexer." in part[0]], truth.final))
    changed = {n for n, rows, t in state if not torch.equal(t.cpu(), _part(truth.initial[n], rows))}
    changed = {name for part in gather_objects(sorted(changed)) for name in part}
    engine.layout.pg_mesh.destroy_mesh_process_groups()
    most_loss, most_parameters, most_indexer = TOLERANCES[recipe.model.dtype]
    exact = most_parameters is None or (
        max(parameters, gradients) <= most_parameters and indexer <= most_indexer
    )
    return {
        "max_loss_error": worst_loss,
        "max_parameter_error": parameters,
        "max_gradient_error": gradients,
        "max_indexer_error": indexer,
        "tensors": len(truth.initial),
        "changed": len(changed),
        "ok": bool(worst_loss <= most_loss and exact and len(changed) == len(truth.initial)),
    }


@torch.no_grad()
def _evaluated(engine: Engine) -> float:
    """The objective's loss on batch 0, as the engine evaluates."""
    rows = TrialRows(engine.layout.data_rank, engine.dp).next_step().to(engine.device)
    engine.model.eval()
    pieces = [rows.slice(i, i + engine.micro_rows) for i in range(0, rows.rows, engine.micro_rows)]
    found = engine.passes.look(pieces)
    engine.model.train()
    return over_ranks(reduce_metrics(found), engine.device)["train/loss"].value


def _worst(found: Any, expected: dict[str, Any], least: float = 0.0) -> float:
    """Largest relative error of any tensor, over all ranks: norm of the difference over the norm, or over ``least``."""
    errors = [0.0]
    for name, rows, tensor in found:
        wanted = _part(expected[name], rows).float() if name in expected else torch.zeros(tensor.shape)
        seen = _seen(name, wanted)
        size = max(float(seen.norm()), least)
        difference = float((_seen(name, tensor.cpu().float().view(wanted.shape)) - seen).norm())
        errors.append(difference / size if size else difference)
    return max(max(part) for part in gather_objects(errors))


def _seen(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What the model sees of a parameter.

    The residual rows of a hyper-connection's ``fn`` are the logits of a doubly-stochastic matrix: what is added to a
    whole row or column of it is normalised away. In those directions a gradient is rounding errors alone, which Muon
    makes as large as any other step. Before the first attention the streams are equal: no mixing of them shows, and
    their weighted sum is a multiple of the embedding, of which the norm takes the factor away; only the rows that say
    how the output is added are seen.
    """
    if not name.endswith("_hc.fn"):
        return tensor
    n = isqrt(len(tensor) + 1) - 1
    if name == "model.layers.0.attn_hc.fn":
        return tensor[n : 2 * n]
    mixing = tensor[2 * n :].view(n, n, -1)
    mixing = mixing - mixing.mean(0, keepdim=True)
    mixing = mixing - mixing.mean(1, keepdim=True)
    return torch.cat([tensor[: 2 * n], mixing.flatten(0, 1)])


def _part(whole: torch.Tensor, rows: Any) -> torch.Tensor:
    return whole if rows is None or rows.whole else whole[rows.start : rows.stop]


def _buffers(engine: Engine) -> list[tuple[str, None, torch.Tensor]]:
    return [(name, None, b) for name, b in engine.parts.model.named_buffers() if "bias" in name]


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    try:
        rows = verify(options, Path(options["folder"]))
    except Exception:  # the other ranks are elsewhere now: end them all instead of waiting for ever
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if dist.get_rank() == 0:
        with tempfile.NamedTemporaryFile("w", dir=options["folder"], delete=False) as file:
            json.dump(rows, file)
        Path(file.name).rename(Path(options["folder"]) / "rows.json")
    colossal.leave()


if __name__ == "__main__":
    main()
