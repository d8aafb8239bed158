"""What a conversion will write: every tensor, its dtype, its place in a file, before the first byte is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.fp8_quantize.scales import BLOCK, GROUP
from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats import names
from lab_utils.models.deepseek_v4.formats.files import DTYPES, Slot
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader


@dataclass(frozen=True)
class Target:
    """A format to write: ``linear`` and ``expert`` are "fp8", "mxfp4" or None for dense in ``dense``."""

    official: bool
    linear: str | None = None
    expert: str | None = None
    dense: str = "BF16"
    scale: str = "F8_E8M0"


TARGETS = {
    "bf16": Target(official=False),
    "fp32": Target(official=False, dense="F32"),
    "fp8": Target(official=True, linear="fp8", expert="fp8"),
    "fp8+mxfp4": Target(official=True, linear="fp8", expert="mxfp4"),
    "base": Target(official=True, linear="fp8", expert="fp8", scale="F32"),
}


@dataclass(frozen=True)
class Unit:
    """An output tensor and its scale, made of official matrices of the source one after the other."""

    slots: tuple[Slot, ...]  # weight, then scale where it is quantised
    matrices: tuple[str, ...]
    quantised: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


@dataclass(frozen=True)
class Shard:
    """A file of the output."""

    file: str
    units: tuple[Unit, ...]

    @property
    def slots(self) -> list[Slot]:
        """In the order of the file: the wider dtypes first, so that every offset is a multiple of its item size."""
        slots = [slot for unit in self.units for slot in unit.slots]
        return sorted(slots, key=lambda slot: -DTYPES[slot.dtype].itemsize)

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)


def plan(reader: CheckpointReader, target: Target, shard_bytes: int) -> list[Shard]:
    """Files of at most ``shard_bytes``, but for a single tensor that is larger.

    Raises:
        CheckpointError: an expert of odd width, which MXFP4 can't pack.
    """
    if target.official:
        units = [_official_unit(reader, name, target) for name in sorted(reader.parts, key=names.order)]
    else:
        units = [_dense_unit(reader, name, target) for name in reader.names()]
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if groups[-1] and size + unit.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    count = len(groups)
    return [
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)
    ]


def _dtype(kind: str, target: Target) -> str:
    return {names.FULL: "F32", names.TABLE: "I64"}.get(kind, target.dense)


def _dense_unit(reader: CheckpointReader, name: str, target: Target) -> Unit:
    matrices = tuple(reader.matrices(name))
    dtype = _dtype(reader.parts[matrices[0]].place.kind, target)
    return Unit((Slot(name, dtype, reader.shape(name)),), matrices)


def _official_unit(reader: CheckpointReader, official: str, target: Target) -> Unit:
    part = reader.parts[official]
    quantised = {names.LINEAR: target.linear, names.EXPERT: target.expert}.get(part.place.kind)
    if quantised is None:
        return Unit((Slot(official, _dtype(part.place.kind, target), part.shape),), (official,))
    rows, columns = part.shape
    scale = official.removesuffix("weight") + "scale"
    if quantised == "fp8":
        weight = Slot(official, "F8_E4M3", part.shape)
        grid = (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
        return Unit((weight, Slot(scale, target.scale, grid)), (official,), quantised)
    if columns % 2:
        raise CheckpointError(
            f"{part.entry.file}: tensor {official} has {columns} columns, MXFP4 packs two a byte; choose --to fp8."
        )
    weight = Slot(official, "I8", (rows, columns // 2))
    return Unit((weight, Slot(scale, "F8_E8M0", (rows, math.ceil(columns / GROUP)))), (official,), quantised)
