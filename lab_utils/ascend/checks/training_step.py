"""The real engine's whole step of ``tiny`` on device npu: AdamW with the experts cut over ranks, and Muon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

ORDER = 40
_STEP = "ColossalAI's NPU accelerator, ours, plugin, ZeRO, model, operators and optimizer go through a whole step on "
PROVES = {
    "adamw": _STEP + "device npu: AdamW, two ranks of experts, accumulation",
    "muon": _STEP + "device npu: Muon and AdamW, one rank of experts",
    "gradients": "every parameter of both is reached by a gradient and stepped, and stays on the NPU with its state",
    "coverage": "every operator that these steps dispatch has an NPU kernel, or a reason why it needs none",
}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"cluster.nproc": 4, "parallel.ep": 2, "schedule.micro_rows": 2},
    "muon": {"cluster.nproc": 2, "optim.kind": "muon", "schedule.micro_rows": 8},
}
_FILLED = "makes memory and fills it", ("aten::empty.memory_format", "aten::fill_.Scalar")
# Operators without an NPU kernel of their own that may be dispatched all the same: why, and what runs in their place,
# whose kernels must be there.
ALLOWED: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("aten::new_empty", "aten::new_full", "aten::new_ones", "aten::new_zeros"), _FILLED),
    **dict.fromkeys(("aten::zeros_like", "aten::scalar_tensor"), _FILLED),
    "aten::lift_fresh": ("marks a tensor as new; nothing runs", ()),
    "aten::_unsafe_view": ("a view", ()),
    "aten::masked_fill.Scalar": ("a copy, filled", ("aten::masked_fill_.Scalar", "aten::copy_")),
    "aten::slice_backward": ("zeros, and a copy into a view of them", ("aten::fill_.Scalar", "aten::copy_")),
    "aten::cummax": ("by its helper", ("aten::_cummax_helper",)),
    "aten::argmax": ("by its out= form", ("aten::argmax.out",)),
    "aten::bitwise_or_.Tensor": ("by its out= form", ("aten::bitwise_or.Tensor_out",)),
    "aten::index_add_": ("by its out= form", ("aten::index_add.out",)),
    "aten::softplus_backward": ("by its out= form", ("aten::softplus_backward.grad_input",)),
}
# Never: they would run as something slow, and a fused operator takes their place.
FORBIDDEN = {"aten::_grouped_mm": "runs as a loop on an NPU; npu_grouped_matmul takes its place"}


def run() -> Iterator[tuple[str, bool, str]]:
    import torch_npu  # noqa: F401

    from lab_utils.ascend import step

    seen: Counter[str] = Counter()
    lost: list[str] = []
    for part, changes in RECIPES.items():
        engine = step.steps(step.recipe(**changes), seen=_on_npu(seen))
        places, loss = engine.optimizer.places, engine.progress
        lost += [f"{part}: {name} has no gradient" for name in step.without_gradient(engine)]
        lost += [f"{part}: {name} is not on the NPU" for name in step.on_device(engine)]
        ok = loss.step == 1 and loss.skipped == 0 and _accelerator() == "NpuAccelerator"
        yield part, ok, f"{len(places)} parameters, {engine.accumulation} micro-batches, by {_accelerator()}"
    yield "gradients", not lost, "; ".join(lost[:3]) if lost else "all of them"
    bad, found = audit(seen)
    yield "coverage", not bad, "; ".join(bad[:4]) if bad else found


def _accelerator() -> str:
    from lab_utils.engine.library import colossalai

    return type(colossalai.accelerator.get_accelerator()).__name__


def _on_npu(seen: Counter[str]) -> Any:
    """Counts operators that have a tensor of the device among their arguments, or make one there."""
    import torch
    from torch.utils._pytree import tree_leaves

    def told(func: Any, args: tuple, kwargs: dict) -> None:
        places = [
            x if isinstance(x, torch.device) else x.device for x in tree_leaves((args, kwargs)) if _placed(x)
        ]
        if any(place.type == "npu" for place in places):
            seen[func.name()] += 1

    def _placed(x: Any) -> bool:
        return isinstance(x, torch.Tensor | torch.device)

    return told


def audit(seen: Counter[str]) -> tuple[list[str], str]:
    """What is wrong with the operators that were dispatched, and what they came to."""
    bad = [f"{name} is dispatched: it {why}" for name, why in FORBIDDEN.items() if name in seen]
    kinds: Counter[str] = Counter()
    for name, count in sorted(seen.items()):
        kind = kernel(name)
        kinds[kind] += 1
        if kind in ("npu", "view") or name in FORBIDDEN:
            continue
        if name not in ALLOWED:
            bad.append(f"{name} ({count} times) has no NPU kernel ({kind}), and no reason to need none")
            continue
        absent = [other for other in ALLOWED[name][1] if kernel(other) != "npu"]
        bad += [f"{name} runs as {other}, which has no NPU kernel" for other in absent]
    words = {
        "npu": "with an NPU kernel",
        "view": "views",
        "composite": "composites of a known kind",
        "none": "allowed",
    }
    return bad, ", ".join(f"{kinds[k]} {words[k]}" for k in words if kinds[k])


def kernel(name: str) -> str:
    """How an operator runs on an NPU: ``npu``: its own kernel; ``view``: no kernel at all; ``composite``: others in its
    place; ``none``: it falls back to the CPU."""
    import torch

    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)

    namespace, _, rest = name.partition("::")
    if namespace in ("prim", "profiler"):
        return "view"  # asks a tensor, or marks a place in a trace: nothing runs on a device
    if has("PrivateUse1"):
        return "npu"
    packet, _, overload = rest.partition(".")
    if namespace in ("c10d", "_c10d_functional"):
        return "npu"  # a collective: hccl's, or the fake group's here
    if getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default").is_view:
        return "view"
    composite = (
        "CompositeExplicitAutograd",
        "CompositeImplicitAutograd",
        "CompositeExplicitAutogradNonFunctional",
    )
    return "composite" if any(has(key) for key in composite) else "none"
