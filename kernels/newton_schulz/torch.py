"""Newton-Schulz with three products a step into memory that is taken once, in bf16 on devices.

Legend: B matrices of one shape, N rows, M columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype
from kernels.newton_schulz.reference import coefficients, unit_norm


def product_dtype(g_BNM: Tensor) -> torch.dtype:
    """fp32 on CPU, where bf16 products are the slower ones; elsewhere bf16, in which the iteration is stable
    (TR §3.4.1). fp64 stays.
    """
    exact = g_BNM.device.type == "cpu" or g_BNM.dtype == torch.float64
    return full_dtype(g_BNM) if exact else torch.bfloat16


@torch.no_grad()
def newton_schulz(g_BNM: Tensor, *, steps: int = 10) -> Tensor:
    """See ``reference.newton_schulz``; not differentiable.

    Needs, besides its input in fp32, two of its shape and two squares of its shorter side in ``product_dtype``.
    """
    tall = g_BNM.shape[-2] > g_BNM.shape[-1]
    x = unit_norm(g_BNM.mT if tall else g_BNM).to(product_dtype(g_BNM)).contiguous()
    following = torch.empty_like(x)
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    polynomial = torch.empty_like(gram)
    for a, b, c in coefficients(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=following)
        x, following = following, x
    return (x.mT if tall else x).to(g_BNM.dtype)
