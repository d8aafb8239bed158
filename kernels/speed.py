"""How fast every implementation of an operator is beside its reference, at one realistic size.

The inputs come from ``kernels/<operator>/cases.py``, whether the results are right from ``kernels.conformance``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import _support
from kernels._cases import REALISTIC, Case, draw_case, variants
from kernels.conformance import function, others, short, supported, tensors

ROUNDS, SECONDS = (3, 11), 0.6  # a timing takes at least and at most so many rounds, about so long


def bench(
    operators: Sequence[str] | None = None,
    device: str = "cpu",
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Forward and backward of every implementation at its realistic size, in fp32 on a CPU and bf16 elsewhere.

    Returns:
        Rows of ``operator``, ``implementation``, ``device``, ``dtype``, ``shape``, ``ms`` and ``reference_ms`` (medians
        of runs made in turn), ``ratio`` (reference_ms / ms: above 1 is faster), ``gflops`` (10⁹ FLOP/s of the
        products that the definition asks for), ``gbps`` (10⁹ bytes/s of inputs, outputs and their gradients, each once
        a pass) and ``peak_mib`` (most memory held beyond the inputs). None where it has no meaning: ``gflops`` of what
        multiplies no matrices, ``reference_ms`` where the reference does not run on the device.

    Raises:
        ValueError: no such operator, or one without cases.
    """
    rows = []
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for operator, name in others(operators):
        if not supported(operator, name, device, dtype):
            continue
        case = draw_case(operator, 0, REALISTIC, **variants(operator)[0])
        call, moved = _pass(operator, name, case, dtype, device)
        peak = _peak_bytes(call, device)
        try:
            reference, _ = _pass(operator, "reference", case, dtype, device)
        except RuntimeError:
            reference = None  # a definition in terms of the CPU, or too large for the device
        ms, reference_ms = _time([call, reference], device)
        rows.append(
            {
                "operator": operator,
                "implementation": name,
                "device": device,
                "dtype": short(dtype),
                "shape": " ".join(f"{letter}={size}" for letter, size in case.shape.items()),
                "ms": ms,
                "reference_ms": reference_ms,
                "ratio": reference_ms and reference_ms / ms,
                "gflops": case.flops and case.flops / ms / 1e6,
                "gbps": moved / ms / 1e6,
                "peak_mib": peak / 2**20,
            }
        )
        on_row(rows[-1])
    return rows


def _pass(
    operator: str, name: str, case: Case, dtype: torch.dtype, device: str
) -> tuple[Callable[[], None], int]:
    """One forward and backward as a call, and the bytes that it must move at the least."""
    run, given = function(operator, name, device, dtype), case.arguments(dtype, device)
    leaves = [given[key] for key in case.differentiable]
    inputs = [x for x in given.values() if isinstance(x, Tensor)]
    first = tensors(run(**given))
    weights = [torch.randn_like(x) if x.requires_grad else None for x in first]
    own = {x.data_ptr() for x in inputs}
    written = sum(x.nbytes for x in first if x.data_ptr() not in own)  # streams handed on are not written
    moved = sum(x.nbytes for x in inputs) + written
    if leaves:
        moved += sum(x.nbytes for x in (*inputs, *leaves)) + sum(w.nbytes for w in weights if w is not None)
    del first

    def call() -> None:
        outputs = tensors(run(**given))
        if leaves:
            torch.autograd.backward(*zip(*((x, w) for x, w in zip(outputs, weights) if w is not None)))
            for leaf in leaves:
                leaf.grad = None

    return call, moved


def _time(calls: list[Callable[[], None] | None], device: str) -> list[float | None]:
    """Median milliseconds of each call; they take turns, so that a busy moment of the machine meets them all."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        if call is not None:
            call()
    end = time.perf_counter() + SECONDS
    while len(taken[0]) < ROUNDS[0] or (len(taken[0]) < ROUNDS[1] and time.perf_counter() < end):
        for times, call in zip(taken, calls):
            if call is not None:
                _wait(device)
                start = time.perf_counter()
                call()
                _wait(device)
                times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) if times else None for times in taken]


def _peak_bytes(call: Callable[[], None], device: str) -> int:
    """Most bytes that a call holds at once beyond what was held before."""
    if device != "cpu":
        module = getattr(torch, device)
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        call()
        return module.max_memory_allocated() - before
    _support._buffers.__dict__.clear()  # scratch memory that an earlier call left counts too
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _wait(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()
