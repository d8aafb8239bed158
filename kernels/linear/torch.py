"""Linear maps by the CPU's faster products; on other devices torch's own.

Legend as in ``reference``; N rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._products import mm, onednn_first
from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import apply


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NX, weight_GOI):
        ctx.save_for_backward(x_NX, weight_GOI)
        parts = zip(x_NX.chunk(len(weight_GOI), 1), weight_GOI.unbind(), strict=True)
        found = [mm(x_NI, weight_OI.T) for x_NI, weight_OI in parts]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    @staticmethod
    def backward(ctx, grad_NY):
        x_NX, weight_GOI = ctx.saved_tensors
        G = len(weight_GOI)
        grads, d_x, d_weight = grad_NY.chunk(G, 1), None, None
        if ctx.needs_input_grad[0]:
            found = [
                mm(grad_NO, weight_OI) for grad_NO, weight_OI in zip(grads, weight_GOI.unbind(), strict=True)
            ]
            d_x = found[0] if G == 1 else torch.cat(found, 1)
        if ctx.needs_input_grad[1]:
            found = [mm(grad_NO.T, x_NI) for grad_NO, x_NI in zip(grads, x_NX.chunk(G, 1), strict=True)]
            d_weight = found[0][None] if G == 1 else torch.stack(found)
        return d_x, d_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See ``reference.linear``."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and onednn_first():
        grouped = weight if weight.ndim == 3 else weight[None]
        y_NY = apply(_Linear, x.reshape(-1, x.shape[-1]), grouped)
        return y_NY.view(*x.shape[:-1], -1)
    if weight.ndim == 2:
        return F.linear(x, weight)
    x_GNI = x.reshape(-1, len(weight), weight.shape[2]).transpose(0, 1)
    y_GNO = torch.bmm(x_GNI, weight.transpose(1, 2))
    return y_GNO.transpose(0, 1).reshape(*x.shape[:-1], -1)
