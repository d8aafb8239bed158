"""What the twin's tests compare: steps of twins, and the same steps on ranks that are there.

``twin_trials.py twins FOLDER``: every case of FOLDER/cases.json in this one process. ``… 4 twin_trials.py FOLDER``, by
``lab_utils.launchers._forked``: FOLDER/recipe.json on real ranks, each writing what it held and sent.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lab_utils import collectives
from lab_utils.accelerators import get_accelerator
from lab_utils.engine import colossal
from lab_utils.engine.parts import Parts, model_of
from lab_utils.engine.traffic import counted
from lab_utils.engine.twin.collectives import to_json
from lab_utils.engine.twin.doors import patched
from lab_utils.engine.twin.follow import Following
from lab_utils.engine.twin.job import Job, Rows
from lab_utils.engine.twin.ledger import Ledger
from lab_utils.engine.twin.run import _name_moments, _name_state, _settle_before_backward, step_of
from lab_utils.errors import LabError
from lab_utils.models.deepseek_v4.moe import Router
from lab_utils.objectives.sft import Sft
from lab_utils.recipe import Recipe

CALLS = {
    "all_reduce": (dist, "all_reduce"),
    "all_to_all": (dist, "all_to_all_single"),
    "all_gather": (collectives, "all_gather"),
    "reduce_scatter": (collectives, "reduce_scatter"),
    "all_gather_object": (colossal, "gather_objects"),
}


class Present(Job):
    """The twin's job on ranks that are there, with weights that have values."""

    def __init__(self, recipe: Recipe) -> None:
        rank, ranks = colossal.start(get_accelerator("cpu"), 0)
        super().__init__(recipe, "cpu", ranks, rank)
        self._build = _parts


def _parts(
    recipe: Recipe, accelerator: Any, run_dir: Any, *, rank: int, world: int, device: Any, source: Any
) -> Parts:
    model = model_of(recipe, device=device, defer=True)
    rows = Rows(recipe.rows_per_step // world, recipe.data.row_tokens)
    return Parts(model=model, train=rows, objective=Sft(), write_config=lambda folder: None)


def evenly(router: Router, x_ND, context, given_Nk=None, *, real=Router.forward):
    """Every expert gets as many tokens as any other, as the twin takes it."""
    E, k = router.weight.shape[0], router.options["k"]
    given_Nk = (torch.arange(len(x_ND) * k) % E).view(-1, k)
    return real(router, x_ND, context, given_Nk)


def present(folder: Path) -> None:
    """This rank's step: bytes of its state, what it sent, how often it called, memory at the peak."""
    recipe = Recipe.parse(json.loads((folder / "recipe.json").read_text()))
    job, ledger, calls = Present(recipe), Ledger(), Counter()

    def counting(kind: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[kind] += 1
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        doors = [(owner, name, counting(kind, getattr(owner, name))) for kind, (owner, name) in CALLS.items()]
        stack.enter_context(patched([*doors, (Router, "forward", evenly)]))
        sent = stack.enter_context(counted())
        job.open()
        stack.enter_context(Following(ledger))
        job.fill()
        _name_state(job, ledger)
        _settle_before_backward(job, ledger)
        job.make_states()
        built = ledger.time
        calls.clear()
        sent.clear()
        job.step()
        _name_moments(job, ledger)
    told = {
        "rank": job.rank,
        "state": state_bytes(job),
        "sent": dict(sent),
        "calls": dict(calls),
        "peak": ledger.peak(built).bytes,
    }
    (folder / f"rank-{job.rank}.json").write_text(json.dumps(told))
    colossal.leave()


def state_bytes(job: Job) -> dict[str, int]:
    """Sizes of the real tensors, each storage once."""
    model, optimizer = job.parts.model, job.optimizer
    weights = [*model.parameters(), *model.buffers()]
    masters = [m for place in optimizer.places for m in place.masters]
    moments = [s for m in masters for s in optimizer.optim.state[m].values() if isinstance(s, torch.Tensor)]
    own = {t.untyped_storage().data_ptr() for t in weights}
    return {
        "weights": sum(t.nbytes for t in weights),
        "gradients": sum(bucket.gradients.nbytes for bucket in optimizer.buckets),
        "masters": sum(m.nbytes for m in masters if m.untyped_storage().data_ptr() not in own),
        "moments": sum(s.nbytes for s in moments),
    }


def saved_bytes(recipe: Recipe) -> int:
    """What autograd keeps of one micro-batch's forward pass, by its own account, on one rank: storages once, without
    the model's and the rows'."""
    model = model_of(recipe, device="cpu").train()
    rows = Rows(recipe.layout(1)[1], recipe.data.row_tokens).next_step()
    ours = {
        t.untyped_storage().data_ptr()
        for t in [*model.parameters(), *model.buffers(), *rows.tensors().values()]
    }
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        patched([(Router, "forward", evenly)]),
    ):
        output = model(rows.input_ids, rows.position_ids, rows.document_ids, rows.loss_weights)
        loss = Sft()(output.hidden_BTD, model.head_weight, rows).loss.total
        for auxiliary in output.auxiliary.values():
            loss = loss + auxiliary.total
        assert loss.requires_grad
    return sum(found.values())


def twins(folder: Path) -> None:
    """Each case's report, or the sentence that refused it."""
    cases, told = json.loads((folder / "cases.json").read_text()), {}
    for name, case in cases.items():
        recipe = Recipe.parse(case["recipe"])
        try:
            twin = step_of(
                recipe, case["ranks"], case["rank"], case["device"], replay=case.get("replay", True)
            )
        except LabError as error:
            told[name] = {"error": str(error)}
            continue
        told[name] = twin.as_dict() | {"state": twin.state, "peak": twin.peak.bytes, "kept": twin.kept}
        told[name] |= {"by_kind": twin.peak.by_kind, "order": to_json(twin.collectives)}
    told["saved"] = saved_bytes(Recipe.parse(cases["alone"]["recipe"]))
    (folder / "twins.json").write_text(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1] == "twins":
        twins(Path(sys.argv[2]))
    else:
        present(Path(sys.argv[1]))
