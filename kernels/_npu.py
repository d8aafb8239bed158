"""What the Ascend implementations (``npu.py``) share: calling fused operators, limits, and saying what fell back.

A fused operator has a name such as ``npu::npu_rms_norm`` (torch_npu) or ``cann_ops_transformer::mhc_post`` (CANN's
extension, looked for only where it is asked for). ``call`` runs it. Within ``replaced`` its documented formula runs
instead (``kernels._npu_formulas``): then every device and dtype will do and no limit of the hardware holds, which is
how the code around a fused call is tested without an NPU. Nothing here imports torch_npu: where there are npu tensors,
it is there already.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import registry
from kernels._support import any_device
from kernels.geometry import Geometry

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
# The start of a SoC's name -> the product of Ascend's operator documentation.
PRODUCTS = {"Ascend910B": "A2", "Ascend910_93": "A3", "Ascend950": "950"}

_log = logging.getLogger("kernels")
_said: set[tuple[str, str]] = set()
_formulas: Mapping[str, Callable] | None = None
_limited = True


def runs(
    operators: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    products: tuple[str, ...] = ("A2", "A3"),
) -> Callable[[str, torch.dtype], str | None]:
    """The ``unsupported`` of an implementation: which operators, dtypes and products it needs."""

    def unsupported(device_type: str, dtype: torch.dtype) -> str | None:
        if _formulas is not None:
            return any_device(device_type, dtype)
        if device_type != "npu":
            return "runs on npu only"
        if not hasattr(torch, "npu"):
            return "torch_npu is not imported"
        absent = [name for name in operators if not has(name)]
        if absent:
            return f"{absent[0]} is not installed"
        if product() not in products:
            return f"{operators[0]} is for {' and '.join(products)}, not for {product()}"
        return None if dtype in dtypes else f"{operators[0]} takes no {str(dtype).removeprefix('torch.')}"

    return unsupported


def has(operator: str) -> bool:
    """Whether this process has the fused operator."""
    if _formulas is not None:
        return operator in _formulas
    namespace, name = operator.split("::")
    return (namespace == "npu" or _extension(namespace)) and hasattr(getattr(torch.ops, namespace), name)


@cache
def _extension(module: str) -> bool:
    """Import an extension of CANN once; one that is there but fails to load is said, then done without."""
    if importlib.util.find_spec(module) is None:
        return False
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        fallen_back(module, f"it is installed but does not load: {error}")
        return False
    return True


@cache
def product() -> str:
    """``A2`` (910B), ``A3`` (910C) or ``950``; another SoC's own name."""
    soc = torch.npu.get_device_name()
    return next((name for start, name in PRODUCTS.items() if soc.startswith(start)), soc)


def call(operator: str, *args: Any, **kwargs: Any) -> Any:
    """Run a fused operator, or its formula within ``replaced``."""
    if _formulas is not None:
        return _formulas[operator](*args, **kwargs)
    namespace, name = operator.split("::")
    return getattr(getattr(torch.ops, namespace), name)(*args, **kwargs)


def takes(operator: str, argument: str) -> bool:
    """Whether the installed release of a fused operator has the argument."""
    if _formulas is not None:
        return True
    namespace, name = operator.split("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    return any(given.name == argument for given in schema.arguments)


def outside(operator: str, *limits: tuple[bool, str]) -> bool:
    """Whether one of ``(beyond, why)`` holds, so that this call of ``operator`` has to fall back; says so once."""
    for beyond, why in limits if _limited else ():
        if beyond:
            fallen_back(operator, why)
            return True
    return False


def fallen_back(operator: str, reason: str) -> None:
    """Say, once for each reason, that an operator runs without its fused kernel."""
    if (operator, reason) not in _said:
        _said.add((operator, reason))
        _log.warning("kernels: %s runs without its fused Ascend operator: %s.", operator, reason)


def undetermined(operator: str) -> tuple[bool, str]:
    """A limit of fused operators whose gradient adds in no fixed order; forcing npu for ``operator`` lifts it."""
    forced = {**registry._from_environment(), **registry._forced}.get(operator) == "npu"
    return torch.are_deterministic_algorithms_enabled() and not forced, (
        "its gradient adds in no fixed order, and deterministic algorithms are asked for "
        f"(ASCENT_KERNELS={operator}=npu takes it all the same)"
    )


@contextlib.contextmanager
def replaced(formulas: Mapping[str, Callable], limits: bool = False) -> Iterator[None]:
    """Within the block, run these formulas in place of the fused operators, on any device; with ``limits``, calls that
    the hardware would not take fall back all the same."""
    global _formulas
    before = _formulas
    with contextlib.nullcontext() if limits else unlimited():
        _formulas = formulas
        registry.refresh()
        try:
            yield
        finally:
            _formulas = before
            registry.refresh()


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Within the block, no limit of shape makes a call fall back: for shapes that only schemas and metas see."""
    global _limited
    before, _limited = _limited, False
    try:
        yield
    finally:
        _limited = before


def happens(flag: Tensor) -> bool:
    """Whether a rare case occurs, for which the host waits; tensors without numbers have no rare cases."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    if flag.is_meta or (fakes is not None and isinstance(flag, fakes.FakeTensor)):
        return False
    return bool(flag)


def documents(geometry: Geometry) -> list[tuple[int, int, int]]:
    """``(row, start, length)`` of every document, padding included; one copy to the host for each geometry."""
    if geometry.single:
        return [(row, 0, geometry.T) for row in range(geometry.B)]
    found = geometry.__dict__.get("_documents")
    if found is None:
        starts = geometry.start_BT.tolist()
        found = []
        for row, start_T in enumerate(starts):
            heads = sorted(set(start_T))
            found += [(row, a, b - a) for a, b in zip(heads, [*heads[1:], geometry.T], strict=True)]
        geometry.__dict__["_documents"] = found
    return found
