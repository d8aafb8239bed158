"""Whether every implementation of an operator does what its reference defines.

``check`` compares values and gradients on the random inputs of ``kernels/<operator>/cases.py`` and returns rows of
plain values; ``compare`` does it for one case. How fast the implementations are: ``kernels.speed``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import _npu_cases, _support, registry
from kernels._cases import REALISTIC, SMALL, Case, draw_case, variants

# Largest error allowed, as a share of the largest number of the reference's output or gradient.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SMALLEST_SCALE = 1e-2  # the share is of at least this: what cancels to nothing has no scale of its own
CHECKED = (torch.float32, torch.bfloat16)


def check(
    operators: Sequence[str] | None = None,
    device: str = "cpu",
    seeds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Every implementation against its reference, the worst of all variants, seeds and sizes in a row.

    Args:
        operators: their names; None: all.
        device: where the implementations run; the reference runs on the CPU, in fp64 on the very same numbers.
        seeds: random shapes and numbers of each variant; the realistic size is checked once besides.
        say: is told why a row is not ok.

    Returns:
        Rows of ``operator``, ``implementation``, ``device``, ``dtype``, ``forward_error``, ``gradient_error`` and
        ``ok``. An error is a share of the reference's largest number, for bit-exact operators the share of outputs that
        differ; ``gradient_error`` is None for operators without a gradient. An implementation that raises, or whose
        error is not finite, has None and is not ok. One that doesn't support a device or dtype has no row.

    Raises:
        ValueError: no such operator, or one without cases.
    """
    rows = []
    for operator, name in others(operators):
        modes = variants(operator)
        drawn = [(SMALL, seed, mode) for mode in modes for seed in range(seeds)] + [(REALISTIC, 0, modes[0])]
        cases = [
            (f"{mode} {size} seed {seed}", draw_case(operator, seed, size, **mode))
            for size, seed, mode in drawn
        ]
        if name == "npu":
            cases += _npu_cases.fitting(operator)
        for dtype in CHECKED:
            if supported(operator, name, device, dtype):
                rows.append(_check(operator, name, cases, dtype, device, say))
    return rows


def _check(
    operator: str,
    name: str,
    cases: list[tuple[str, Case]],
    dtype: torch.dtype,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    forward, gradient, ok = 0.0, None, True
    for label, case in cases:
        why = "differs from the reference"
        try:
            of_values, of_gradients = compare(operator, name, case, dtype, device)
        except Exception as error:
            # Whatever an implementation raises is a finding about it, not a failure of the check.
            why = f"{type(error).__name__}: {error}"
            of_values, of_gradients = math.inf, math.inf if case.differentiable else None
        forward = max(forward, of_values)
        gradient = gradient if of_gradients is None else max(gradient or 0.0, of_gradients)
        if max(of_values, of_gradients or 0.0) > tolerance(case, dtype, device):
            ok = False
            say(f"{operator}/{name} in {short(dtype)}, {label}: {why}")
    return {
        "operator": operator,
        "implementation": name,
        "device": device,
        "dtype": short(dtype),
        "forward_error": _finite(forward),
        "gradient_error": _finite(gradient),
        "ok": ok,
    }


def tolerance(case: Case, dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest error allowed; an exact operator may make none."""
    if case.exact:
        return 0.0
    return TOLERANCE[torch.bfloat16 if case.low_on_devices and device != "cpu" else dtype]


def compare(
    operator: str, implementation: str, case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[float, float | None]:
    """``(forward error, gradient error)`` of an implementation in ``dtype`` on ``device``.

    The forward error is the worse of two runs, with and without gradients: those may take different ways.
    Infinite where a shape, a dtype or the presence of a gradient is not the reference's, or a number is not finite.
    """
    given = case.arguments(dtype)
    with torch.no_grad():
        pattern = tensors(function(operator, "reference", "cpu", dtype)(**given))
    run = function(operator, implementation, device, dtype)
    if case.exact:
        with _poisoned(device):
            found = tensors(run(**case.arguments(dtype, device)))
        return _differing(found, pattern), None
    judge = case.arguments(dtype, widened=True)
    reference = function(operator, "reference", "cpu", torch.float64)
    expected, expected_gradients = _run(reference, judge, case, judge)[1:]
    with _poisoned(device):
        raw, found, gradients = _run(run, case.arguments(dtype, device), case, judge)
        with torch.no_grad():
            bare, seen, _ = _run(run, case.arguments(dtype, device), case, judge)
    shapes = [(x.shape, x.dtype) for x in pattern]
    alike = all([(x.shape, x.dtype) for x in one] == shapes for one in (raw, bare))
    pairs = [*zip(found, expected), *zip(seen, expected)]
    forward = max((_error(a, b) for a, b in pairs), default=0.0) if alike else math.inf
    pairs = [(gradients[name], expected_gradients[name]) for name in case.differentiable]
    return forward, max((_error(a, b) for a, b in pairs), default=0.0) if case.differentiable else None


def _run(
    run: Callable, given: dict[str, Any], case: Case, judge: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor | None]]:
    """Outputs as they came, what is compared of them, and the gradients of a random weighted sum of that."""
    raw = tensors(run(**given))
    seen = [x.to("cpu", torch.float64) if x.is_floating_point() else x.to("cpu") for x in raw]
    seen = list(case.view(tuple(seen), judge))
    generator, loss = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64)
    for x in seen:
        # Weights that bf16 holds: the gradient that arrives is then the same in every dtype.
        weight = torch.randn(x.shape, generator=generator).bfloat16().double()
        if x.requires_grad and x.numel():
            loss = loss + (x * weight).sum()
    if loss.requires_grad:
        loss.backward()
    return raw, [x.detach() for x in seen], {name: given[name].grad for name in case.differentiable}


@contextmanager
def _poisoned(device: str) -> Iterator[None]:
    """On a CPU, memory that nobody has written is NaN within the block: what reads it shows, on every run alike."""
    if device != "cpu":
        yield
        return
    strict = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _support._buffers.__dict__.clear()  # scratch memory that an earlier call left is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _error(found: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference as a share of the largest number expected."""
    if found is None or expected is None:
        # No gradient is right where there is nothing to have one.
        there = expected if found is None else found
        return math.inf if there is not None and there.numel() else 0.0
    if found.shape != expected.shape:
        return math.inf
    a, b = found.to("cpu", torch.float64), expected.double()
    if not a.numel():
        return 0.0
    if not bool(a.isfinite().all() & b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max() / b.abs().max().clamp(min=SMALLEST_SCALE))


def _differing(found: list[Tensor], expected: list[Tensor]) -> float:
    """Share of numbers that are stored as other bits; infinite where shapes or dtypes differ."""
    if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in expected]:
        return math.inf
    different = sum(int((_bits(a.cpu()) != _bits(b)).sum()) for a, b in zip(found, expected))
    return different / max(1, sum(x.numel() for x in expected))


def _bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def others(operators: Sequence[str] | None) -> list[tuple[str, str]]:
    """``(operator, implementation)`` of all implementations but the references."""
    chosen = registry.operators() if operators is None else operators
    return [(o, name) for o in chosen for name in registry.implementations(o) if name != "reference"]


def supported(operator: str, name: str, device: str, dtype: torch.dtype) -> bool:
    return importlib.import_module(f"kernels.{operator}.{name}").unsupported(device, dtype) is None


def function(operator: str, name: str, device: str, dtype: torch.dtype) -> Callable:
    """The function of one implementation."""
    with registry.force(**{operator: name}):
        return registry.get(operator, device, dtype)


def tensors(outputs: Any) -> list[Tensor]:
    """What an operator returned, as a list without the outputs that are None."""
    return [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None
