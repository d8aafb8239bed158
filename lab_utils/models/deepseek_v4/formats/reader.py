"""Any DeepSeek-V4 checkpoint folder, read as if it were in transformers' layout, a few rows at a time.

Nothing but the headers is read before it is asked for, and no byte besides what is asked for. The memory of a read is
its result and, for quantised tensors, the codes and a working copy of one matrix.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kernels.fp8_quantize.scales import BLOCK
from kernels.registry import get
from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats import names
from lab_utils.models.deepseek_v4.formats.files import DTYPES, ByteReader
from lab_utils.models.deepseek_v4.formats.parts import locate


class CheckpointReader:
    """Tensors of a checkpoint folder under transformers' names (and ``mtp.N.…`` for the MTP block), dequantised.

    Attributes:
        folder, config: the folder and its config.json as a tree.
        format: "transformers", "official" (dense), "fp8", "fp8+mxfp4" or "base".
        skipped: names of an MTP module's copies of the embedding and the head, which are not offered.
        parts: where the tensors are, under DeepSeek's names.

    Raises:
        CheckpointError: a file missing or truncated, a tensor that DeepSeek-V4 does not have, a quantised tensor
            without its scale, experts that are not complete.
    """

    def __init__(self, folder: Path | str):
        from lab_utils.models.load import read_config  # load.py reads checkpoints through this class

        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if self.config["model_type"] != "deepseek_v4":
            raise CheckpointError(
                f"{self.folder}: config.json says model_type {self.config['model_type']}; these formats are "
                "deepseek_v4's."
            )
        found = locate(self.folder)
        self.parts, self.skipped, self.format = found.parts, found.skipped, found.format
        self._stacks = found.stacks
        self._single = {p.place.ours: o for o, p in self.parts.items() if p.place.expert is None}
        self._bytes = ByteReader()

    def names(self) -> list[str]:
        """Names in transformers' layout, in the order of the model."""
        return list(dict.fromkeys(self.parts[o].place.ours for o in sorted(self.parts, key=names.order)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of ``names()``."""
        if name in self._stacks:
            experts = self._stacks[name]
            rows, columns = self.parts[experts[0][0]].shape
            return (len(experts), len(experts[0]) * rows, columns)
        return self.parts[self._official(name)].shape

    def matrices(self, name: str) -> list[str]:
        """Official names of what a tensor consists of, in the order of its bytes: one, or those of all experts."""
        if name in self._stacks:
            return [official for slots in self._stacks[name] for official in slots]
        return [self._official(name)]

    def read(self, name: str, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of the leading dimension of a tensor (all without ``rows``); of a stacked one these are its experts.

        Args:
            dtype: None gives the stored dtype, bfloat16 for quantised tensors. Tables are int64 in any case.

        Raises:
            CheckpointError: no such tensor, a NaN scale or code, a file that ends early.
            ValueError: rows with a step.
        """
        start, stop, step = (rows or slice(None)).indices(self.shape(name)[0])
        stop = max(start, stop)
        if step != 1:
            raise ValueError("rows of a tensor are read without a step")
        if name not in self._stacks:
            return self.part(self._official(name), start, stop, dtype)
        stacked = torch.empty(stop - start, *self.shape(name)[1:], dtype=dtype or self.dtype(name))
        for expert_GD, slots in zip(stacked, self._stacks[name][start:stop], strict=True):
            for matrix, official in zip(expert_GD.chunk(len(slots)), slots, strict=True):
                matrix.copy_(self.part(official, 0, len(matrix), stacked.dtype))
        return stacked

    def dtype(self, name: str) -> torch.dtype:
        """What ``read`` gives without a dtype."""
        part = self.parts[self.matrices(name)[0]]
        if part.stored == "table":
            return torch.int64
        return DTYPES[part.entry.dtype] if part.stored == "dense" else torch.bfloat16

    def part(self, official: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``[start, stop)`` of an official tensor; see ``read``."""
        part = self.parts[official]
        stored = self._bytes.rows(part.entry, part.first + start, part.first + stop)
        if part.stored == "table":
            return stored.to(torch.int64)
        if part.stored == "dense":
            return stored.to(dtype or stored.dtype)
        dtype, scale = dtype or torch.bfloat16, self.scale(official, start, stop)
        try:
            if part.stored == "mxfp4":
                return get("mxfp4_dequantize", "cpu", dtype)(stored, scale, dtype)
            return get("fp8_dequantize", "cpu", dtype)(stored, scale, dtype, start % BLOCK)
        except ValueError as error:
            raise CheckpointError(
                f"{part.entry.file}: tensor {official}: {error}; copy the file again."
            ) from None

    def scale(self, official: str, start: int, stop: int) -> Tensor | None:
        """Stored scales of those rows, E8M0 or fp32, a row for each block of rows; None for a dense tensor."""
        part = self.parts[official]
        if part.scale is None:
            return None
        if part.stored == "fp8":
            start, stop = start // BLOCK, -(-stop // BLOCK)
        scale = self._bytes.rows(part.scale, start, stop)
        return scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._bytes.bytes_read

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._bytes.close()

    def _official(self, name: str) -> str:
        if name not in self._single:
            raise CheckpointError(f"{self.folder}: has no tensor {name}; names() lists what there is.")
        return self._single[name]
