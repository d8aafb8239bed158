"""Which implementation of an operator runs where, and why.

An operator is a folder of ``kernels``; each file in it is one implementation with a function named like the folder and
``unsupported(device_type, dtype) -> str | None``: why it does not run there, or None. ``get`` takes the first of
PREFERENCE that runs; ``force`` (or ``ASCENT_KERNELS="rope=reference,compressor=torch"``) overrules it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator

import torch

PREFERENCE = ("npu", "triton", "torch", "reference")
_forced: dict[str, str] = {}
_found: dict[
    tuple[str, str, torch.dtype], Callable
] = {}  # looked up before: a decoding step asks a hundred times


def operators() -> list[str]:
    """Names of all operators: the folders of this package that hold a reference."""
    package = importlib.import_module("kernels")
    folders = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg)
    return [name for name in folders if "reference" in implementations(name)]


def implementations(operator: str) -> list[str]:
    """Implementations of an operator, best first.

    Raises:
        ValueError: there is no such operator.
    """
    try:
        folder = importlib.import_module(f"kernels.{operator}")
    except ModuleNotFoundError:
        raise ValueError(
            f"kernels: there is no operator '{operator}'; known: {', '.join(operators())}."
        ) from None
    found = {m.name for m in pkgutil.iter_modules(folder.__path__)}
    return [name for name in PREFERENCE if name in found]


def get(operator: str, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable:
    """The function of ``operator`` for a device and a dtype of its main input.

    Raises:
        ValueError: no such operator, or a forced implementation that is missing or does not run there.
    """
    found = _found.get((operator, device_type, dtype))
    if found is None:
        name, _ = _choose(operator, device_type, dtype)
        found = getattr(importlib.import_module(f"kernels.{operator}.{name}"), operator)
        _found[operator, device_type, dtype] = found
    return found


def refresh() -> None:
    """Choose anew: after ASCENT_KERNELS has changed within the process."""
    _found.clear()


def explain(operator: str, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """What ``get`` would pick and why: ``{"operator", "implementation", "reason"}``."""
    name, reason = _choose(operator, device_type, dtype)
    return {"operator": operator, "implementation": name, "reason": reason}


@contextlib.contextmanager
def force(**choices: str) -> Iterator[None]:
    """Within the block, use these implementations: ``with force(rope="reference"): …``."""
    before = dict(_forced)
    _forced.update(choices)
    refresh()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        refresh()


def _choose(operator: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    known = implementations(operator)
    forced = _forced.get(operator) or _from_environment().get(operator)
    if forced:
        if forced not in known:
            raise ValueError(
                f"kernels: {operator} has no implementation '{forced}'; choose one of {', '.join(known)}."
            )
        why_not = _unsupported(operator, forced, device_type, dtype)
        if why_not:
            raise ValueError(f"kernels: {operator}/{forced} was forced but {why_not}; force another or none.")
        return forced, "forced"
    skipped = []
    for name in known:
        why_not = _unsupported(operator, name, device_type, dtype)
        if why_not is None:
            return name, "; ".join([*skipped, f"{name} is the first that runs on {device_type}"])
        skipped.append(f"{name}: {why_not}")
    raise ValueError(
        f"kernels: no implementation of {operator} runs on {device_type} in {dtype}: {'; '.join(skipped)}."
    )


def _unsupported(operator: str, name: str, device_type: str, dtype: torch.dtype) -> str | None:
    return importlib.import_module(f"kernels.{operator}.{name}").unsupported(device_type, dtype)


def _from_environment() -> dict[str, str]:
    pairs = (item.split("=", 1) for item in os.environ.get("ASCENT_KERNELS", "").split(",") if "=" in item)
    return {key.strip(): value.strip() for key, value in pairs}
