"""What an operator's ``cases.py`` gives: random inputs on which all its implementations must agree.

A ``cases.py`` has a function ``case(g, size, **variant) -> Case`` and, where the operator has modes that differ,
``VARIANTS``: the keyword arguments of each. ``size`` is SMALL (shapes drawn with the numbers, edges included) or
REALISTIC (fixed, a few ms to 0.3 s on a CPU; of the first variant).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.geometry import Geometry
from kernels.row_part import RowPart

SMALL, REALISTIC = "small", "realistic"
SAME_DTYPE = object()  # as an option: the dtype under test


class Rows(NamedTuple):
    """Position and document ids ``[B, T]`` of packed rows; as an option it reaches the operator as a Geometry.

    ``part``: arguments of ``RowPart``, where the operator sees a part of the rows.
    """

    position_ids: Tensor
    document_ids: Tensor
    part: tuple[int, int, int] | None = None

    def geometry(self, device: str = "cpu") -> Geometry:
        found = Geometry(self.position_ids.to(device), self.document_ids.to(device))
        return found if self.part is None else RowPart(found, *self.part)


@dataclass(frozen=True)
class Case:
    """One call of an operator. Numbers are drawn in fp64 on the CPU and reach the operator in the dtype under test.

    Attributes:
        inputs: keyword arguments that are tensors; those in fp64 take the dtype under test, others stay as they are.
        options: further keyword arguments; tensors in fp64 stay in at least fp32.
        differentiable: names of the inputs that get a gradient.
        wide: names of inputs that stay in at least fp32, as options do.
        exact: outputs must equal the reference's bit by bit, in the dtype under test.
        view: what is compared, from ``(outputs, arguments)``: for outputs that may rightly differ (order of a
            selection, slots that nobody sees). The arguments are the definition's: fp64, on the CPU.
        flops: of the products of forward and backward, as the definition asks for them, nothing made twice; None where
            an operator moves and rescales numbers and multiplies no matrices.
        low_on_devices: devices compute it in bf16 by design, whatever the input's dtype.
        shape: the sizes, for people.
    """

    inputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    exact: bool = False
    view: Callable[[tuple[Tensor, ...], Mapping[str, Any]], tuple[Tensor, ...]] = lambda outputs, _: outputs
    flops: float | None = None
    low_on_devices: bool = False
    shape: dict[str, int] = field(default_factory=dict)

    def arguments(self, dtype: torch.dtype, device: str = "cpu", widened: bool = False) -> dict[str, Any]:
        """All arguments, new tensors in ``dtype`` on ``device``; ``widened``: the very same numbers, in fp64."""
        full = torch.float64 if dtype == torch.float64 else torch.float32

        def place(x: Tensor, target: torch.dtype) -> Tensor:
            if x.dtype != torch.float64:
                return x.to(device)
            x = x.to(target)
            return (x.double() if widened else x).to(device, copy=True)

        given = {k: place(x, full if k in self.wide else dtype) for k, x in self.inputs.items()}
        for name in self.differentiable:
            given[name].requires_grad_()
        for name, value in self.options.items():
            if isinstance(value, Rows):
                value = value.geometry(device)
            elif isinstance(value, Tensor):
                value = place(value, full)
            given[name] = dtype if value is SAME_DTYPE else value
        return given


def variants(operator: str) -> list[dict[str, Any]]:
    """Keyword arguments of an operator's modes; one empty dictionary where there is a single mode."""
    return list(getattr(_cases_of(operator), "VARIANTS", ({},)))


def draw_case(operator: str, seed: int, size: str = SMALL, **variant: Any) -> Case:
    """The case of a seed.

    Raises:
        ValueError: the operator's folder has no ``cases.py``.
    """
    return _cases_of(operator).case(torch.Generator().manual_seed(seed), size, **variant)


def _cases_of(operator: str) -> Any:
    try:
        return importlib.import_module(f"kernels.{operator}.cases")
    except ModuleNotFoundError as error:
        raise ValueError(f"kernels: {operator} has no cases.py; add one beside its reference.py.") from error


# -- for the cases -------------------------------------------------------------------------------------------------


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def between(g: torch.Generator, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def packed(g: torch.Generator, rows: int, tokens: int, longest: int) -> Rows:
    """Rows of documents shorter than ``longest``, the last of each row turned to padding."""
    positions, documents = torch.zeros(2, rows, tokens, dtype=torch.long)
    for row in range(rows):
        start, document = 0, 0
        while start < tokens:
            length = min(int(torch.randint(1, longest, (1,), generator=g)), tokens - start)
            positions[row, start : start + length] = torch.arange(length)
            documents[row, start : start + length] = document
            start, document = start + length, document + 1
        documents[row, documents[row] == document - 1] = -1
    return Rows(positions, documents)


def whole(rows: int, tokens: int) -> Rows:
    """Rows that are one document each."""
    return Rows(torch.arange(tokens).repeat(rows, 1), torch.zeros(rows, tokens, dtype=torch.long))


def part_of(
    case: Case,
    g: torch.Generator,
    ranks: int,
    before: int,
    queries: tuple[str, ...],
    keys: tuple[str, ...] = (),
) -> Case:
    """A case on whole rows as one of ``ranks`` parts of them sees it.

    Args:
        queries: names of what is cut to the part's tokens; ``keys``: of what has the ``before`` tokens in front too.
    """
    rows, rank = case.options["geometry"], between(g, 0, ranks - 1)
    T = rows.position_ids.shape[1] // ranks
    start, front = rank * T, min(before, rank * T)

    def cut(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or name not in (*queries, *keys):
            return x
        if name in queries:
            return x[:, start : start + T].contiguous()
        found = x[:, start - front : start + T]
        return torch.cat([torch.zeros_like(found[:, :1]).expand(-1, before - front, -1), found], 1)

    inputs, options = ({k: cut(k, x) for k, x in each.items()} for each in (case.inputs, case.options))
    options["geometry"] = rows._replace(part=(rank, ranks, before))
    return replace(case, inputs=inputs, options=options, flops=None, shape={**case.shape, "parts": ranks})


def visible_entries(geometry: Geometry, rate: int) -> Tensor:
    """Which entries of its row each token may see, ``[B, T, C]`` bool."""
    entries = geometry.entries(rate)
    slots_C = torch.arange(entries.count)
    first, visible = entries.first_BT[..., None], entries.visible_BT[..., None]
    return (slots_C >= first) & (slots_C < first + visible)


def many_magnitudes(g: torch.Generator, rows: int, columns: int) -> Tensor:
    """Numbers for quantisers: magnitudes far apart, zeros of either sign, whole blocks of zeros."""
    x = normal(g, rows, columns) * torch.randint(-9, 9, (rows, columns), generator=g).exp2()
    x[torch.rand(x.shape, generator=g) < 0.1] = 0.0
    x[: rows // 2, : min(columns, 128)] *= -0.0
    return x * 2.0 ** between(g, -100, 99)
