"""What ``kernels/*/npu.py`` call is there, with the schema that it is called with, meta functions and gradients."""

from __future__ import annotations

from collections.abc import Iterator

ORDER = 30
PROVES = {
    "exist": "every fused operator that an npu.py names is in torch_npu, and what comes with CANN's own extension is "
    "named as such",
    "calls": "every npu.py's calls fit the operators' schemas and meta functions, and return the reference's shapes, "
    "dtypes and gradients, forward and backward, for every variant of its cases",
    "used": "no fused operator is named and never called",
}


def run() -> Iterator[tuple[str, bool, str]]:
    import torch
    import torch_npu  # noqa: F401

    from kernels import _npu_check

    named = operators()
    ours = {name for name in named if name.startswith("npu::")}
    absent = sorted(name for name in ours if not known(name))
    apart = sorted(named - ours)
    found = f"{len(ours)} of torch_npu" + (f", {len(apart)} of CANN's extension, not here" if apart else "")
    yield "exist", not absent, f"not in torch_npu: {', '.join(absent)}" if absent else found

    said: list[str] = []
    torch.use_deterministic_algorithms(False)
    rows = _npu_check.check(say=said.append)
    cases = sum(row["cases"] for row in rows)
    done = sorted({row["operator"] for row in rows if row["cases"]})
    found = f"{cases} calls of {len(done)} operators on fake npu tensors"
    first = {text.partition(" ")[0]: text for text in reversed(said)}  # one of each operator
    yield "calls", not said and bool(cases), "; ".join(sorted(first.values())) if said else found

    called = {name for row in rows for name in row["fused"]}
    idle = sorted(ours - called)
    fell = sorted({why for row in rows for why in row["fell_back"]})
    found = f"{len(called)} called" + (f"; fell back: {'; '.join(fell)[:300]}" if fell else "")
    yield "used", not idle, f"never called on their cases: {', '.join(idle)}" if idle else found


def operators() -> set[str]:
    """Names of the fused operators of all ``npu.py``, by their ``OPERATORS``."""
    import importlib

    from kernels import registry

    members = [name for name in registry.operators() if "npu" in registry.implementations(name)]
    return {name for member in members for name in importlib.import_module(f"kernels.{member}.npu").OPERATORS}


def known(operator: str) -> bool:
    import torch

    namespace, name = operator.split("::")
    return hasattr(getattr(torch.ops, namespace), name)
