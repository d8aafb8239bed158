"""Matrix products on CPU by the faster of its two libraries.

torch gives fp32 products to BLAS. Where that is MKL on a processor of another maker, it leaves half of AVX-512 unused,
and oneDNN, which torch carries too, is twice as fast (measured on AMD's Zen 5: 210 and 430 GFLOP/s on two cores). The
choice is a rule and not a measurement, so that the same machine always computes the same bits; ``ASCENT_CPU_PRODUCTS``
(``blas`` or ``onednn``) overrules it. On other devices and dtypes these are torch's own products.

Legend: M, K, N edges of a product, E groups of rows.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._support import full_dtype

SMALLEST = 1 << 20  # multiply-accumulates below which the start of a oneDNN product costs more than it saves
# oneDNN compiles a product for every shape, in milliseconds. Numbers of tokens differ from call to call, so of them
# it gets a multiple of this, and BLAS the rest.
STEP = 32


@cache
def onednn_first() -> bool:
    """Whether fp32 products of this CPU go to oneDNN.

    Raises:
        ValueError: ``ASCENT_CPU_PRODUCTS`` is something else than blas or onednn.
    """
    wanted = os.environ.get("ASCENT_CPU_PRODUCTS")
    if wanted:
        if wanted not in ("blas", "onednn"):
            raise ValueError(
                f"ASCENT_CPU_PRODUCTS={wanted}: expected blas or onednn; leave it out for the default."
            )
        return wanted == "onednn"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _to_onednn(a: Tensor, macs: int) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and macs >= SMALLEST and onednn_first()


def mm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """``a · b``; transposed views are taken as they are. It may or may not stand in ``out``: use what is returned."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    if not _to_onednn(a_MK, M * K * N):
        return torch.mm(a_MK, b_KN) if out is None else torch.mm(a_MK, b_KN, out=out)
    if M % STEP:
        out = a_MK.new_empty(M, N) if out is None else out
        whole = M - M % STEP
        out[:whole] = mm(a_MK[:whole], b_KN)
        torch.mm(a_MK[whole:], b_KN, out=out[whole:])
        return out
    if K % STEP:
        whole = K - K % STEP
        return mm(a_MK[:, :whole], b_KN[:whole]).addmm_(a_MK[:, whole:], b_KN[whole:])
    return torch.ops.mkldnn._linear_pointwise(_dense(a_MK), _dense(b_KN.T), None, "none", [], "")


def operands(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As ``full_mm`` takes them: in fp32 (fp64 stays), but for bf16 on a device, whose products are exact in fp32."""
    if x.dtype == y.dtype == torch.bfloat16 and x.device.type != "cpu":
        return x, y
    full = full_dtype(x)
    return x.to(full), y.to(full)


def full_mm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """``a · b`` in fp32 of what ``operands`` made, or of another factor in their dtype.

    bf16 with fp32 sums is four to ten times as fast as fp32 on the chips this is for, and the logits are the same.
    Their gradients are rounded to bf16 for it; so are those that come of them, where operands are bf16.
    """
    if a_MK.dtype != torch.bfloat16:
        return mm(a_MK, b_KN, out=out)
    if a_MK.device.type == "cpu":  # no such product there; the same numbers
        return mm(a_MK.float(), b_KN.float(), out=out)
    return torch.mm(a_MK, b_KN, out_dtype=torch.float32)


def add_mm(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``sum + a · b`` by the rules of ``full_mm``, the sum in fp32: use what is returned; ``sum`` may be written over.

    One pass over the sum on a device, where a product of its own would be three.
    """
    if a_MK.dtype != torch.bfloat16 or a_MK.device.type == "cpu":
        return sum_MN.add_(full_mm(a_MK, b_KN))
    return torch.addmm(sum_MN, a_MK, b_KN, out_dtype=torch.float32)


def _dense(x: Tensor) -> Tensor:
    """The operand, copied where it is the transpose of a part of something wider: oneDNN has no fast code for those."""
    return x.contiguous() if x.stride(0) == 1 and x.stride(1) != x.shape[0] else x


def grouped_mm(a_MK: Tensor, b_EKN: Tensor, ends_E: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """Rows ``[ends[e-1], ends[e])`` of a times ``b[e]``: ``[M, N]``, which may or may not stand in ``out``."""
    if not _to_onednn(a_MK, len(a_MK) * b_EKN[0].numel() // len(b_EKN)):
        return F.grouped_mm(a_MK, b_EKN, offs=ends_E)
    # On CPU torch's own grouped product is this loop, with BLAS inside.
    out_MN = a_MK.new_empty(len(a_MK), b_EKN.shape[2]) if out_MN is None else out_MN
    for b_KN, (start, stop) in zip(b_EKN.unbind(), _ranges(ends_E), strict=True):
        if start < stop:
            out = out_MN[start:stop]
            found = mm(a_MK[start:stop], b_KN, out=out)
            if found is not out:
                out.copy_(found)
    return out_MN


def grouped_outer(a_MK: Tensor, b_MN: Tensor, ends_E: Tensor) -> Tensor:
    """``aᵀ · b`` over the rows of each group: ``[E, K, N]``, zero where a group has no row."""
    E = len(ends_E)
    if not _to_onednn(a_MK, a_MK.numel() * b_MN.shape[1] // E):
        return F.grouped_mm(a_MK.T, b_MN, offs=ends_E)
    out_EKN = a_MK.new_empty(E, a_MK.shape[1], b_MN.shape[1])
    for out_KN, (start, stop) in zip(out_EKN.unbind(), _ranges(ends_E), strict=True):
        if start < stop:
            found = mm(a_MK[start:stop].T, b_MN[start:stop], out=out_KN)
            if found is not out_KN:
                out_KN.copy_(found)
        else:
            out_KN.zero_()
    return out_EKN


def _ranges(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
