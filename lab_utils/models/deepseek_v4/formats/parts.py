"""Where a checkpoint folder keeps each tensor, under DeepSeek's names whatever its layout, and whether all is there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from kernels.fp8_quantize.scales import BLOCK, GROUP
from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats import names
from lab_utils.models.deepseek_v4.formats.files import Entry, read_header

DENSE = ("BF16", "F32", "F16", "F64")
PACKED = ("I8", "U8")  # two E2M1 codes a byte
TABLES = ("I64", "I32")


@dataclass(frozen=True)
class Part:
    """An official tensor, wherever it is stored: a tensor of its own, or an expert's rows of a stacked one."""

    entry: Entry
    shape: tuple[int, ...]  # of the numbers, not of packed codes
    place: names.Place
    first: int = 0  # row of the entry that holds row 0
    scale: Entry | None = None

    @property
    def stored(self) -> str:
        """ "dense", "fp8", "mxfp4" or "table"."""
        if self.scale is not None:
            return "mxfp4" if self.entry.dtype in PACKED else "fp8"
        return "table" if self.place.kind == names.TABLE else "dense"


@dataclass
class Located:
    """What ``locate`` found.

    Attributes:
        parts: by official name.
        stacks: by transformers' name of a stacked tensor, for each expert its official matrices.
        skipped: names of an MTP module's copies of the embedding and the head.
        format: "transformers", "official" (dense), "fp8", "fp8+mxfp4" or "base".
    """

    parts: dict[str, Part] = field(default_factory=dict)
    stacks: dict[str, list[list[str]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    format: str = "transformers"


def locate(folder: Path) -> Located:
    """All tensors of a folder; reads headers only.

    Raises:
        CheckpointError: a file missing or truncated, a tensor that DeepSeek-V4 does not have, a quantised tensor
            without its scale, experts that are not complete.
    """
    found, stored = Located(), stored_entries(folder)
    for name in [name for name in stored if names.is_copy(name)]:
        found.skipped.append(name)
        del stored[name]
        stored.pop(name.removesuffix("weight") + "scale", None)
    if any(name.startswith("model.") or name == "lm_head.weight" for name in stored):
        for entry in stored.values():
            _place_transformers(found.parts, entry)
    else:
        for name, entry in stored.items():
            if not name.endswith(".scale"):
                _add(found.parts, name, entry, scale=stored.get(name.removesuffix("weight") + "scale"))
            elif name.removesuffix("scale") + "weight" not in stored:
                raise CheckpointError(
                    f"{entry.file}: scale {name} has no weight beside it; copy the file again."
                )
        found.format = _quantisation(found.parts)
    found.stacks = _find_stacks(found.parts, folder)
    return found


def stored_entries(folder: Path) -> dict[str, Entry]:
    """Tensors of a folder's safetensors under their own names; files are those of the index where there is one.

    Raises:
        CheckpointError: no weights, a file missing or truncated, a tensor that is there twice, or in the index only.
    """
    index = folder / "model.safetensors.index.json"
    placed: dict[str, str] = {}
    if index.exists():
        try:
            placed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{index}: not an index of safetensors; copy it again.") from None
        files = sorted({folder / file for file in placed.values()})
    else:
        files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))
    if not files:
        raise CheckpointError(f"{folder}: has no safetensors; give the folder with the weights.")
    stored: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in stored:
                raise CheckpointError(f"{file}: tensor {name} is there twice, also in {stored[name].file}.")
            stored[name] = entry
    for name, file in placed.items():
        if name not in stored:
            raise CheckpointError(
                f"{index}: puts tensor {name} into {file}, which has not got it; copy both again."
            )
    return stored


def _place_transformers(parts: dict[str, Part], entry: Entry) -> None:
    stacked = names.stack_names(entry.name, entry.shape[0] if entry.shape else 0)
    if stacked is None:
        try:
            official = names.official_name(entry.name)
        except CheckpointError as error:
            raise CheckpointError(f"{entry.file}: {error}") from None
        _add(parts, official, entry)
        return
    if len(entry.shape) != 3 or not stacked or entry.shape[1] % len(stacked[0]):
        raise _misshapen(entry, "[experts, rows, columns]")
    experts, height, width = entry.shape
    flat = Entry(entry.file, entry.name, entry.dtype, (experts * height, width), entry.start)
    rows = height // len(stacked[0])
    for i, official in enumerate(official for slots in stacked for official in slots):
        _add(parts, official, flat, (rows, width), i * rows)


def _add(
    parts: dict[str, Part],
    official: str,
    entry: Entry,
    shape: tuple[int, ...] | None = None,
    first: int = 0,
    scale: Entry | None = None,
) -> None:
    try:
        place = names.place(official)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.file}: {error}") from None
    if not entry.shape:
        raise _misshapen(entry, "at least one dimension")
    if shape is None:
        packed = scale is not None and entry.dtype in PACKED
        shape = (*entry.shape[:-1], entry.shape[-1] * 2) if packed else entry.shape
    part = Part(entry, shape, place, first, scale)
    if scale is not None:
        _check_scale(part)
    elif entry.dtype not in (TABLES if place.kind == names.TABLE else DENSE):
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is stored as {entry.dtype} without a scale beside it; copy the "
            "checkpoint again."
        )
    parts[official] = part


def _check_scale(part: Part) -> None:
    entry, scale = part.entry, part.scale
    quantised = part.place.kind in (names.LINEAR, names.EXPERT) and len(part.shape) == 2
    if not quantised or entry.dtype not in (*PACKED, "F8_E4M3"):
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} ({entry.dtype} {list(entry.shape)}) has a scale beside it, but is "
            "none that DeepSeek-V4 quantises; copy the checkpoint again."
        )
    rows, columns = part.shape
    if part.stored == "mxfp4":
        expected, dtypes = (rows, -(-columns // GROUP)), ("F8_E8M0", "U8")
    else:
        expected, dtypes = (-(-rows // BLOCK), -(-columns // BLOCK)), ("F8_E8M0", "U8", "F32")
    if scale.shape != expected or scale.dtype not in dtypes:
        raise CheckpointError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, its weight asks for "
            f"{' or '.join(dtypes)} {list(expected)}; copy the checkpoint again."
        )


def _find_stacks(parts: dict[str, Part], folder: Path) -> dict[str, list[list[str]]]:
    count: dict[str, int] = {}
    for part in parts.values():
        if part.place.expert is not None:
            count[part.place.ours] = max(count.get(part.place.ours, 0), part.place.expert + 1)
    stacks = {ours: names.stack_names(ours, experts) for ours, experts in count.items()}
    for stack in stacks.values():
        officials = [official for slots in stack for official in slots]
        missing = next((official for official in officials if official not in parts), None)
        if missing:
            raise CheckpointError(f"{folder}: tensor {missing} is missing; copy the checkpoint again.")
        first = parts[officials[0]]
        for official in officials:
            if parts[official].shape != first.shape:
                expected = f"the shape of {first.entry.name}, {list(first.shape)}"
                raise _misshapen(parts[official].entry, expected)
    return stacks


def _quantisation(parts: dict[str, Part]) -> str:
    if any(part.stored == "mxfp4" for part in parts.values()):
        return "fp8+mxfp4"
    scales = {part.scale.dtype for part in parts.values() if part.scale is not None}
    if not scales:
        return "official"
    return "base" if scales == {"F32"} else "fp8"


def _misshapen(entry: Entry, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, expected {expected}; copy the checkpoint "
        "again."
    )
