"""A whole model trained in one process: what every distributed layout is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lab_utils.optim.groups import MatrixView, matrices, parameter_groups
from lab_utils.optim.muon import Muon
from lab_utils.recipe import OptimSection
from lab_utils.registry import load as load_member


def single_process(model: nn.Module, section: OptimSection) -> torch.optim.Optimizer:
    """The optimizer of a section over the model's own parameters; ``step`` reads their ``.grad``.

    Raises:
        ValueError: Muon, and a parameter that is not fp32 (masters are the engine's).
    """
    groups = parameter_groups(model, section)
    if section.kind == "muon":
        return _OnWholeParameters(groups, section, getattr(model, "config", None))
    return load_member("lab_utils.optim", section.kind).build(groups, section)


class _OnWholeParameters(Muon):
    """``Muon`` whose matrices are views of the model's parameters; the state is one a matrix.

    The views stay right as long as parameters keep their memory: no ``model.to`` after this.
    """

    def __init__(self, groups: list[dict[str, Any]], section: OptimSection, config: Any) -> None:
        self._cut: list[tuple[nn.Parameter, list[tuple[MatrixView, Tensor]]]] = []
        for group in groups:
            if group["algorithm"] == "muon":
                named = list(zip(group["names"], group["params"], strict=True))
                group["params"], group["names"] = [], []
                for name, parameter in named:
                    pieces = _pieces(name, parameter, config)
                    self._cut.append((parameter, pieces))
                    group["params"] += [matrix for _, matrix in pieces]
                    group["names"] += [name] * len(pieces)
        super().__init__(
            groups,
            lr=section.lr,
            momentum=section.momentum,
            update_rms=section.update_rms,
            betas=section.betas,
            eps=section.eps,
        )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """See ``Muon.step``."""
        loss = closure() if closure is not None else None
        for parameter, pieces in self._cut:
            for view, matrix in pieces:
                matrix.grad = None if parameter.grad is None else _part(parameter.grad.reshape(-1), view)
        super().step()
        for _, pieces in self._cut:
            for _, matrix in pieces:
                matrix.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also of the parameters whose matrices are trained."""
        super().zero_grad(set_to_none)
        for parameter, _ in self._cut:
            parameter.grad = None


def _pieces(name: str, parameter: nn.Parameter, config: Any) -> list[tuple[MatrixView, Tensor]]:
    if parameter.dtype != torch.float32:
        raise ValueError(f"{name}: Muon in one process needs an fp32 model, found {parameter.dtype}.")
    views = matrices(name, tuple(parameter.shape), config) or []
    return [(view, _part(parameter.data.view(-1), view)) for view in views]


def _part(flat: Tensor, view: MatrixView) -> Tensor:
    return flat[view.start : view.start + view.size].view(view.rows, view.cols)
