"""mHC, the way out: the block's output enters the streams, the streams mix (TR §2.2). Legend as in the way in."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._support import any_device as unsupported  # noqa: F401
from kernels._support import full_dtype


def hyper_connection_post(h_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, comb_Njk: Tensor) -> Tensor:
    """``h'_k = post_k · y + Σ_j comb[j, k] · h_j``, summed in fp32, dtype of h; ``[N, n, D]``."""
    full = full_dtype(h_NnD)
    mixed = torch.einsum("njk,njd->nkd", comb_Njk.to(full), h_NnD.to(full))
    return (mixed + post_Nn.to(full)[..., None] * y_ND.to(full)[:, None]).to(h_NnD.dtype)
