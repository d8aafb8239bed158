"""Routed experts: clamped SwiGLU, weighted and summed (TR §2.1, §4.2.3). Definition: every expert on every token.

Legend: N tokens, D model, E experts, F expert width, k experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype


def grouped_swiglu(
    x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, limit: float
) -> Tensor:
    """``Σ_j weight_j · w2_e( silu(min(w1_e x, limit)) · clamp(w3_e x, ±limit) )`` with e = experts[:, j]; ``[N, D]``.

    ``gate_up_EGD`` stacks w1 over w3 (G = 2F).
    """
    full = full_dtype(x_ND)
    hidden_NEG = torch.einsum("nd,egd->neg", x_ND.to(full), gate_up_EGD.to(full))
    gate, up = hidden_NEG.chunk(2, -1)
    act_NEF = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    share_NE = torch.zeros(act_NEF.shape[:2], dtype=full, device=x_ND.device)
    share_NE = share_NE.scatter_add(1, experts_Nk, weights_Nk.to(full))
    return torch.einsum("nef,edf,ne->nd", act_NEF, down_EDF.to(full), share_NE).to(x_ND.dtype)
