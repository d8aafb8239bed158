"""Quantising a matrix so that numbers that came from a quantised checkpoint go back to the very codes they had.

A block's numbers don't tell its scale: codes up to 3 at scale 2 are codes up to 6 at scale 1. Where a checkpoint is at
hand that knows better (the source itself, or the one a model descends from), its scales are tried first, and kept in
every block whose numbers they represent exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_quantize.scales import BLOCK, GROUP, decode
from kernels.fp8_quantize.torch import grid_of_blocks
from kernels.registry import get
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader


@dataclass
class Quantised:
    """``scale`` is E8M0 or fp32 as asked for; ``kept`` of ``blocks`` scales are those of the hint."""

    codes: Tensor
    scale: Tensor
    blocks: int
    kept: int


def quantise(x: Tensor, kind: str, scale_dtype: torch.dtype, hint: Tensor | None = None) -> Quantised:
    """Codes and scales of ``x [out, in]``, bfloat16 or float32.

    Args:
        kind: "fp8" or "mxfp4".
        hint: fp32 scales to try first, one a block.

    Raises:
        ValueError: infinite or NaN numbers, an odd width for MXFP4.
    """
    run = get(f"{kind}_quantize", "cpu", x.dtype)
    if hint is None:
        codes, scale = run(x)
        return Quantised(codes, scale.to(scale_dtype), scale.numel(), 0)
    if scale_dtype != torch.float32:
        mantissa, _ = torch.frexp(hint)
        hint = torch.where(mantissa == 0.5, hint, 1.0)  # a scale that E8M0 can't hold is as good as any other
    codes, _ = run(x, hint)
    back = get(f"{kind}_dequantize", "cpu", x.dtype)(codes, hint, x.dtype)
    kept = hint.numel()
    if not torch.equal(x, back):
        exact = _whole_blocks_equal(x, back, kind)
        kept = int(exact.sum())
        hint = torch.where(exact, hint, decode(run(x)[1]))
        codes, _ = run(x, hint)
    return Quantised(codes, hint.to(scale_dtype), hint.numel(), kept)


def hinted_scales(
    reader: CheckpointReader, official: str, shape: tuple[int, ...], start: int, stop: int, kind: str
) -> Tensor | None:
    """Scales that a checkpoint suggests for rows ``[start, stop)`` of a matrix of this shape; None where it has none.

    From MXFP4 to FP8 a block gets its largest sub-scale / 2^6, which is without loss while the largest and the smallest
    differ by no more than 2^14 (6·64 = 384 fits E4M3, and 0.5·2^-14·64 = 2^-9 is its smallest number), as in DeepSeek's
    own conversion.
    """
    part = reader.parts.get(official)
    if part is None or part.scale is None or part.shape != shape:
        return None
    if part.stored != kind and kind == "mxfp4":
        return None
    scale = decode(reader.scale(official, start, stop))
    if part.stored == kind:
        return scale
    groups = BLOCK // GROUP
    padded = F.pad(scale, (0, -scale.shape[1] % groups, 0, -scale.shape[0] % BLOCK))
    return (padded.view(-1, BLOCK, padded.shape[1] // groups, groups).amax((1, 3)) / 64).clamp(min=2.0**-127)


def _whole_blocks_equal(x: Tensor, y: Tensor, kind: str) -> Tensor:
    differs = (x != y).to(torch.uint8)
    if kind == "fp8":
        return grid_of_blocks(differs).amax((-3, -1)) == 0
    return F.pad(differs, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)).amax(-1) == 0
