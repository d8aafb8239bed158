"""Ascend NPU: the text of npu-smi, read by its structure and never by columns, or an NPU-Exporter.

Two forms are understood. The table of ``npu-smi info`` has two rows a die and changes width between releases
(96 dashes up to 25.x, 114 in 26.x), so rows are split at ``|``; on the 910C the second die's power is ``-``,
because the first reports for the package. The key-value forms (``-t common``, ``-t usages``) name the chip
before or after its values; they stand in where the table does not parse.

Where an NPU-Exporter answers on this node, or ``ASCENT_NPU_EXPORTER`` names one, it is asked instead: it costs a
request, where npu-smi takes seconds.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

from lab_utils.telemetry.chips import ChipReading
from lab_utils.telemetry.probes import _exporter

# A full report over eight chips takes about 5 s.
TIMEOUT = 30.0
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_BUS = re.compile(r"^[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]$")
_PAIR = re.compile(r"([\d.]+|-|NA)\s*/\s*([\d.]+|-|NA)")
_VALUES = {"HBM Usage Rate(%)", "Aicore Usage Rate(%)", "NPU Real-time Power(W)", "Temperature(C)"}
_KEY_VALUE = re.compile(r"^\s*(\S.*?)\s*:\s*(.*?)\s*$")


def number(text: str | None) -> float | None:
    """A value as npu-smi prints it; ``-``, ``NA``, ``Failed`` and nothing at all are unknown, not 0."""
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def parse_table(text: str) -> list[ChipReading]:
    """Chips of ``npu-smi info``, in the order printed, which is that of the device indices.

    Warnings before the table and the table of processes after it are passed over.
    """
    readings: list[ChipReading] = []
    first: list[str] | None = None
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3:
            continue
        if not _BUS.match(cells[1]):
            first = cells
            continue
        if first is None:
            continue
        head, tail = first[0].split(), first[2].split()
        where, usage = cells[0].split(), cells[2]
        # The last pair is HBM; the one before, DDR, is 0 / 0 on training chips, the only one on others.
        pairs = [(number(used), number(total)) for used, total in _PAIR.findall(usage)]
        used, total = next(((u, t) for u, t in reversed(pairs) if t), (None, None))
        readings.append(
            ChipReading(
                index=len(readings),
                name=" ".join(head[1:]),
                util=number(usage.split()[0]) if usage else None,
                used_mib=used,
                total_mib=total,
                power=number(tail[0]) if tail else None,
                temp=number(tail[1]) if len(tail) > 1 else None,
                more={
                    "npu": int(head[0]) if head and head[0].isdigit() else head[:1],
                    "chip": int(where[0]) if where and where[0].isdigit() else None,
                    "health": first[1],
                    "bus": cells[1],
                },
            )
        )
        first = None
    return readings


def parse_key_values(text: str) -> list[ChipReading]:
    """Chips of ``npu-smi info -t common -i N`` or ``-t usages -i N`` (one NPU, one block a chip).

    ``usages`` closes a block with its Chip ID, ``common`` opens one with it; with ``-c C`` there is none, and
    the whole text is one chip. The block of the management controller (``Chip Name: mcu``) is no chip.
    """
    blocks: list[dict[str, str]] = [{}]
    leading: bool | None = None
    npu = None
    for line in text.splitlines():
        match = _KEY_VALUE.match(line)
        if match is None:
            continue
        key, value = match.groups()
        if key == "NPU ID":
            npu = value
        elif key == "Chip Count":
            continue
        elif key == "Chip ID":
            # Values seen before the first Chip ID tell that it comes last.
            leading = not blocks[-1] if leading is None else leading
            if leading:
                blocks.append({key: value})
            else:
                blocks[-1][key] = value
                blocks.append({})
        elif key == "Chip Name":
            blocks.append({key: value})
        else:
            blocks[-1].setdefault(key, value)
    readings = []
    for block in blocks:
        if block.get("Chip Name") == "mcu" or not _VALUES & set(block):
            continue
        capacity, percent = number(block.get("HBM Capacity(MB)")), number(block.get("HBM Usage Rate(%)"))
        if capacity is None and percent is not None:
            capacity = 100.0  # `common` has no capacity: the share alone, as used / 100
        readings.append(
            ChipReading(
                index=len(readings),
                util=number(block.get("Aicore Usage Rate(%)")),
                used_mib=capacity * percent / 100 if capacity is not None and percent is not None else None,
                total_mib=capacity,
                power=number(block.get("NPU Real-time Power(W)")),
                temp=number(block.get("Temperature(C)") or block.get("NPU Temperature (C)")),
                more={"npu": npu, "chip": block.get("Chip ID")},
            )
        )
    return readings


def parse_ids(text: str) -> list[int]:
    """NPU numbers of ``npu-smi info -l``."""
    return [int(n) for n in re.findall(r"^\s*NPU ID\s*:\s*(\d+)\s*$", text, re.MULTILINE)]


def visible(total: int, value: str | None) -> list[int]:
    """Devices that ASCEND_RT_VISIBLE_DEVICES leaves, in its order: ``0,2`` and ``4-7`` are both valid."""
    if not value:
        return list(range(total))
    chosen: list[int] = []
    for part in value.split(","):
        low, _, high = part.strip().partition("-")
        if low.isdigit():
            chosen += range(int(low), int(high if high.isdigit() else low) + 1)
    return [device for device in chosen if device < total]


def npu_smi(*arguments: str) -> str:
    """Output of npu-smi; raises OSError or subprocess.SubprocessError where it is missing, hangs or fails."""
    return subprocess.run(
        ["npu-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=True
    ).stdout


def count() -> int:
    """Devices (dies) of this machine that are visible; 0 without driver. Costs no call of npu-smi."""
    if shutil.which("npu-smi") is None and not os.path.exists("/dev/davinci_manager"):
        return 0
    total = len([d for d in glob.glob("/dev/davinci*") if d.removeprefix("/dev/davinci").isdigit()])
    return len(visible(total, os.environ.get(VISIBLE)))


class NpuProbe:
    """Args:
    chips: how many of the visible devices the run uses; None = all.
    run: stands in for ``npu_smi`` in tests.
    exporter: address of an NPU-Exporter, which is asked instead of npu-smi.
    """

    def __init__(
        self, chips: int | None, run: Callable[..., str] = npu_smi, exporter: str | None = None
    ) -> None:
        self.chips, self.run, self.exporter = chips, run, exporter
        self.min_interval = 1.0 if exporter else 10.0
        self._capacity: dict[int, dict[int, float | None]] = {}

    def read(self) -> list[ChipReading]:
        readings = _exporter.read(self.exporter) if self.exporter else self._table() or self._key_values()
        chosen = visible(len(readings), os.environ.get(VISIBLE))[: self.chips]
        return [readings[device] for device in chosen]

    def _table(self) -> list[ChipReading]:
        return parse_table(self.run("info"))

    def _key_values(self) -> list[ChipReading]:
        """Products whose table has another form: one or two calls an NPU."""
        readings: list[ChipReading] = []
        for npu in parse_ids(self.run("info", "-l")):
            found = parse_key_values(self.run("info", "-t", "common", "-i", str(npu)))
            if npu not in self._capacity:  # it never changes, and `common` doesn't have it
                usages = parse_key_values(self.run("info", "-t", "usages", "-i", str(npu)))
                self._capacity[npu] = dict(enumerate(reading.total_mib for reading in usages))
            for chip, reading in enumerate(found):
                capacity = self._capacity[npu].get(chip)
                if capacity and reading.used_mib is not None and reading.total_mib:
                    share = reading.used_mib / reading.total_mib
                    reading = replace(reading, used_mib=share * capacity, total_mib=capacity)
                readings.append(replace(reading, index=len(readings)))
        if not readings:
            raise RuntimeError("npu-smi info printed no table that is understood")
        return readings


def make(chips: int | None) -> NpuProbe:
    return NpuProbe(chips, exporter=_exporter.endpoint())
