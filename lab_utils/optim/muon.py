"""Muon as DeepSeek-V4 has it (TR §2.4, algorithm 1), and AdamW beside it for what Muon does not train.

For every matrix W ``[n, m]`` with gradient G, momentum M, momentum factor μ and update RMS γ::

    M ← μ·M + G
    X = newton_schulz(μ·M + G)
    W ← W·(1 - lr·weight_decay) - lr·γ·√max(n, m)·X

X has min(n, m) singular values of 1, so the RMS of its elements is 1/√max(n, m) and that of the update is lr·γ: AdamW's
learning rate and weight decay can be used again. Legend: B matrices of one shape, N rows, M columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kernels import registry
from lab_utils.recipe import OptimSection

STACK_BYTES = (
    256 * 2**20
)  # fp32 bytes of the matrices that are orthogonalised together; a larger one goes alone


def build(groups: list[dict[str, Any]], section: OptimSection) -> torch.optim.Optimizer:
    """The optimizer of ``optim.kind: muon`` over groups from ``parameter_groups``, their Muon parameters cut."""
    return Muon(
        groups,
        lr=section.lr,
        momentum=section.momentum,
        update_rms=section.update_rms,
        betas=section.betas,
        eps=section.eps,
    )


class Muon(torch.optim.Optimizer):
    """Muon or AdamW, as each group's ``algorithm`` says.

    In a group of ``"muon"`` every parameter is one fp32 matrix when ``step`` is called; its state is
    ``momentum_buffer`` (fp32, same shape: 4 bytes a parameter). In a group of ``"adamw"`` everything is torch's fused
    AdamW, bit by bit, with its states ``exp_avg``, ``exp_avg_sq`` (8 bytes a parameter) and ``step``. A parameter
    without gradient is left as it is.

    Args:
        params: groups with ``algorithm`` and ``weight_decay``.
        lr: of both algorithms.
        momentum: Muon's μ.
        update_rms: Muon's γ.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        update_rms: float = 0.18,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        # "fused" makes load_state_dict put AdamW's step on the device of its parameter, as torch's own does.
        defaults = {"lr": lr, "weight_decay": weight_decay, "algorithm": "muon", "fused": True}
        super().__init__(
            params,
            {**defaults, "momentum": momentum, "update_rms": update_rms, "betas": betas, "eps": eps},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: a Muon group holds something else than fp32 matrices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained:
                (self._muon if group["algorithm"] == "muon" else self._adamw)(group, trained)
        return loss

    def _muon(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        alike: dict[tuple, list[Tensor]] = {}
        for matrix in matrices:
            if matrix.ndim != 2 or matrix.dtype != torch.float32:
                raise ValueError(
                    f"Muon trains fp32 matrices, found {matrix.dtype} of shape {list(matrix.shape)}: cut parameters by "
                    "lab_utils.optim.groups.matrices and give their fp32 masters."
                )
            alike.setdefault((matrix.shape, matrix.device), []).append(matrix)
        for (shape, _), found in alike.items():
            batch = max(1, STACK_BYTES // (4 * max(1, shape.numel())))
            for first in range(0, len(found), batch):
                self._update(group, found[first : first + batch])

    def _update(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        """The lines of algorithm 1 on matrices of one shape at once."""
        lr, momentum, gradients = group["lr"], group["momentum"], [matrix.grad for matrix in matrices]
        buffers = [self._buffer(matrix) for matrix in matrices]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        nesterov_BNM = torch.stack(buffers).mul_(momentum)
        torch._foreach_add_(nesterov_BNM.unbind(), gradients)
        orthogonalise = registry.get("newton_schulz", nesterov_BNM.device.type, nesterov_BNM.dtype)
        x_BNM = orthogonalise(nesterov_BNM)
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1.0 - lr * group["weight_decay"])
        scale = group["update_rms"] * math.sqrt(max(x_BNM.shape[1:]))
        torch._foreach_add_(matrices, x_BNM.unbind(), alpha=-lr * scale)

    def _buffer(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
