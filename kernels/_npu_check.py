"""Whether every ``npu.py`` agrees with the schemas, meta functions and gradients of the torch_npu that is imported.

Each implementation runs forward and backward on fake tensors of device npu, on the inputs of its ``cases.py``: what it
returns, and the gradient of each differentiable input, must have the reference's shape and dtype, and on the way every
fused operator checks its arguments against its own schema. Nothing is computed, so that a stand-in for CANN will do;
what this can't show is numbers and speed. Geometries, which are read on the host, are made of real numbers first.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from kernels import _npu, registry
from kernels._cases import SMALL, Case, draw_case, variants
from kernels.conformance import short, tensors
from kernels.geometry import Geometry


def check(
    operators: Sequence[str] | None = None, seeds: int = 1, say: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """One row an operator and dtype: ``operator``, ``dtype``, ``cases``, ``fused`` (the operators that were called),
    ``fell_back`` (why it did on its cases) and ``ok``; ``say`` is told why a row is not.

    Raises:
        RuntimeError: torch_npu is not imported.
    """
    if not hasattr(torch, "npu"):
        raise RuntimeError("kernels: the check on npu needs torch_npu, which this process has not imported.")
    rows = []
    for operator in operators or [o for o in registry.operators() if "npu" in registry.implementations(o)]:
        module = importlib.import_module(f"kernels.{operator}.npu")
        for dtype in _npu.FLOATS:
            if (why := module.unsupported("npu", dtype)) is None:
                rows.append(_row(operator, getattr(module, operator), dtype, seeds, say))
            elif dtype == _npu.FLOATS[0]:
                rows.append(_empty(operator, dtype) | {"fell_back": [why]})
    return rows


def _empty(operator: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "operator": operator,
        "dtype": short(dtype),
        "cases": 0,
        "fused": [],
        "fell_back": [],
        "ok": True,
    }


def _row(
    operator: str, run: Callable, dtype: torch.dtype, seeds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    row = _empty(operator, dtype)
    with watched() as (fused, reasons), _npu.unlimited():
        for mode in variants(operator):
            for seed in range(seeds):
                row["cases"] += 1
                case = draw_case(operator, seed, SMALL, **mode)
                for why in problems(operator, run, case, dtype):
                    row["ok"] = False
                    say(f"{operator}/npu in {short(dtype)}, {mode} seed {seed}: {why}")
    return row | {"fused": sorted(fused), "fell_back": sorted(reasons)}


@contextmanager
def watched() -> Iterator[tuple[set[str], set[str]]]:
    """Within the block: the fused operators that are called, and the reasons for which calls fall back."""
    fused, reasons = set(), set()
    call, fallen_back = _npu.call, _npu.fallen_back

    def counting(operator: str, *args: Any, **kwargs: Any) -> Any:
        fused.add(operator)
        return call(operator, *args, **kwargs)

    def noting(operator: str, reason: str) -> None:
        reasons.add(reason)
        fallen_back(operator, reason)

    _npu.call, _npu.fallen_back = counting, noting
    try:
        yield fused, reasons
    finally:
        _npu.call, _npu.fallen_back = call, fallen_back


def problems(operator: str, run: Callable, case: Case, dtype: torch.dtype) -> list[str]:
    """What is wrong with one call on fake tensors of device npu; empty where nothing is."""
    given = case.arguments(dtype)
    reference = getattr(importlib.import_module(f"kernels.{operator}.reference"), operator)
    with torch.no_grad():
        expected = [(x.shape, x.dtype) for x in tensors(reference(**given))]
    real = case.arguments(dtype)  # a geometry is read on the host while it is made
    with FakeTensorMode(allow_non_fake_inputs=True):
        placed = {name: on_npu(value) for name, value in real.items()}
        for name in case.differentiable:
            placed[name] = placed[name].detach().requires_grad_()
        try:
            found = tensors(run(**placed))
            _backward(found)
        except Exception as error:
            # Whatever a schema or a meta function refuses is a finding, not a failure of the check.
            return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    wrong = [
        f"output {place} is {short(x.dtype)} {list(x.shape)}, not {short(b)} {list(a)}"
        for place, (x, (a, b)) in enumerate(zip(found, expected))
        if (x.shape, x.dtype) != (a, b)
    ]
    if len(found) != len(expected):
        wrong.append(f"{len(found)} outputs, not {len(expected)}")
    wrong += [f"output {i} is on {x.device}" for i, x in enumerate(found) if x.device.type != "npu"]
    for name in case.differentiable:
        x, grad = placed[name], placed[name].grad
        if grad is None:
            wrong += [f"{name} has no gradient"] if x.numel() else []
        elif (grad.shape, grad.dtype) != (x.shape, x.dtype):
            wrong.append(f"the gradient of {name} is {short(grad.dtype)} {list(grad.shape)}")
    return wrong


def _backward(outputs: list[Tensor]) -> None:
    parts = [x.float().sum() for x in outputs if x.requires_grad and x.numel()]
    if parts:
        torch.stack(parts).sum().backward()


def on_npu(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """Tensors as fake ones of device npu, also within a geometry and containers; all else as it is."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="npu")
    if isinstance(value, Geometry):
        return _PlacedGeometry(value)
    if isinstance(value, Mapping):
        return {key: on_npu(x) for key, x in value.items()}
    return value


class _PlacedGeometry(Geometry):
    """A geometry on device npu whose tables are first made of real numbers on the CPU."""

    def __init__(self, real: Geometry):
        self._real = real
        self._take(real)
        self.device = torch.device("npu")
        with unset_fake_temporarily():
            self.__dict__["_documents"] = _npu.documents(real)
        self._entries, self._plans = {}, {}

    def _take(self, real: Any) -> None:
        self.__dict__.update({k: on_npu(v) if isinstance(v, Tensor) else v for k, v in real.__dict__.items()})

    def entries(self, rate: int) -> Any:
        if rate not in self._entries:
            with unset_fake_temporarily():
                real = self._real.entries(rate)
            self._entries[rate] = _placed(real)
        return self._entries[rate]

    def plan(self, block: int, window: int, rate: int | None, heads: int) -> Any:
        key = (block, window, rate, heads)
        if key not in self._plans:
            with unset_fake_temporarily():
                real = self._real.plan(*key)
            plan = _placed(real)
            plan.geometry, plan.entries = self, self.entries(rate) if rate else None
            self._plans[key] = plan
        return self._plans[key]


def _placed(holder: Any) -> Any:
    """A copy of an object with its tensors on npu."""
    out = copy.copy(holder)
    out.__dict__.update({k: on_npu(v) for k, v in holder.__dict__.items() if isinstance(v, Tensor)})
    return out
