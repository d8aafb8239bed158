"""Clusters as the planner knows them: one YAML file each, every figure with its source.

    find("ascend-910c")            # of clusters/ here, of the site's folder, or of the user's own
    find("my-cluster.yaml")        # or any file
    known()                        # names

A *device* is what a rank drives: a die of a 910C, a GPU. A *chip* is what one buys and counts: a 910C is a package of
two devices. *Planes* are networks from the innermost outwards, each with how many devices it reaches; the last reaches
all. The user's files lie in ``ASCENT_CACHE/clusters`` (``lab doctor --measure`` writes ``local.yaml`` there), a site's
in the folder ``clusters`` beside the file that ``ASCENT_SITE`` names.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from lab_utils.errors import LayoutError, RecipeError
from lab_utils.recipe.base import Section
from lab_utils.registry import nearest

SHIPPED = Path(__file__).parent / "clusters"
USUAL = {"npu": "ascend-910c", "cuda": "h200"}  # of the clusters here, the one to begin with
Case = Literal["low", "expected", "high"]


class Figure(Section):
    """A number and where it is from; ``low`` and ``high`` where it is a range."""

    value: float = Field(ge=0)
    low: float | None = Field(None, ge=0)
    high: float | None = Field(None, ge=0)
    source: str = Field(min_length=3)

    @model_validator(mode="after")
    def _in_order(self) -> Figure:
        if not self.of("low") <= self.value <= self.of("high"):
            raise ValueError(f"low {self.low}, value {self.value}, high {self.high} must rise")
        return self

    def of(self, case: Case) -> float:
        """The value, or an end of its range."""
        end = {"low": self.low, "expected": None, "high": self.high}[case]
        return self.value if end is None else end


class Curve(Section):
    """Values by size, between which it is linear in the logarithm of the size."""

    points: dict[float, float] = Field(min_length=1)
    source: str = Field(min_length=3)

    @field_validator("points")
    @classmethod
    def _by_size(cls, points: dict[float, float]) -> dict[float, float]:
        if min(points) <= 0 or min(points.values()) <= 0:
            raise ValueError("sizes and values must be above 0")
        return dict(sorted(points.items()))

    @cached_property
    def _table(self) -> tuple[list[float], list[float]]:
        from math import log

        return [log(x) for x in self.points], list(self.points.values())

    def at(self, size: float) -> float:
        """Constant beyond the largest size; below the smallest it falls off in proportion to the size."""
        from bisect import bisect_right
        from math import log

        xs, ys = self._table
        first = next(iter(self.points))
        if size <= first:
            return ys[0] * size / first
        x = log(size)
        i = bisect_right(xs, x)
        if i == len(xs):
            return ys[-1]
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


class Device(Section):
    memory_gib: Figure
    tflops: Figure = Field(description="Dense bf16 products, the denominator of MFU.")
    tflops_fp32: Figure = Field(description="What fp32 products reach.")
    tflops_fp8: Figure | None = Field(None, description="Dense fp8 products, where the device has them.")
    bandwidth_tb_s: Figure = Field(description="Memory bandwidth.")


class Plane(Section):
    """A network: ``devices`` it reaches (absent: all), bandwidth of a device one way, what all-to-all reaches."""

    name: str
    devices: int | None = Field(None, ge=1)
    gb_s: Figure
    latency_us: Figure
    all_to_all_gb_s: Curve | None = Field(None, description="Measured, by devices in the group.")


class Host(Section):
    memory_gib: Figure = Field(description="Host memory of a device's share of its node.")
    gb_s: Figure = Field(description="Between a device and host memory, one way.")
    tflops: Figure = Field(description="fp32 products of a device's share of the node's cores.")
    storage_gb_s: Figure = Field(description="Shared file system, of a node.")


class Efficiency(Section):
    """Shares of the peak that are reached."""

    products: Curve = Field(description="By the edge of a cube of as many multiply-accumulates.")
    sustained: Figure = Field(
        description="Of that, in a long run: clocks, launches, shapes that aren't cubes."
    )
    attention: Figure = Field(description="Of the bf16 peak, by fused attention, forward and backward.")
    memory: Figure = Field(description="Of the memory bandwidth.")
    caches: Curve | None = Field(
        None,
        description="Times the memory bandwidth, by bytes of a tensor that is read or written: a CPU's caches.",
    )
    network: Figure = Field(description="Of a plane's bandwidth, by collectives that have no curve.")


class Cluster(Section):
    name: str
    about: str = ""
    kind: Literal["npu", "cuda", "cpu"]
    devices_per_chip: int = Field(1, ge=1)
    chips_per_node: int = Field(8, ge=1)
    device: Device
    planes: tuple[Plane, ...] = Field(min_length=1)
    host: Host
    efficiency: Efficiency
    watts_per_chip: Figure = Field(
        description="Under load, with the chip's share of node, network and cooling."
    )
    runtime_gib: Figure = Field(description="Driver, runtime and context, of a device.")
    communicator_mib: Figure | None = Field(
        None,
        description="Buffers of one communicator on a device; of NPUs the launch scripts decide (HCCL_BUFFSIZE).",
    )
    allocator_share: Figure = Field(
        description="What the allocator holds beyond the tensors, as a share of them."
    )
    host_wait_us: Figure = Field(description="A device idle while the host reads sizes and starts again.")
    layer_calls_us: Figure | None = Field(
        None,
        description="To call a layer's operators, forward and backward, where the host is the device (a CPU).",
    )
    data_tokens_s: Figure = Field(description="Packed rows that a rank's loader makes.")

    @model_validator(mode="after")
    def _planes_widen(self) -> Cluster:
        reach = [plane.devices for plane in self.planes]
        if (self.communicator_mib is None) != (self.kind == "npu"):
            do = (
                "leave it out: the launch scripts set HCCL_BUFFSIZE"
                if self.kind == "npu"
                else "give it a value"
            )
            raise ValueError(f"communicator_mib, of kind {self.kind}: {do}")
        inner = [d for d in reach[:-1] if d is not None]
        if reach[-1] is not None or len(inner) != len(reach) - 1 or inner != sorted(inner):
            raise ValueError(
                "planes: each must reach more devices than the one before, and the last all (no devices)"
            )
        return self

    @property
    def devices_per_node(self) -> int:
        return self.devices_per_chip * self.chips_per_node

    def devices(self, chips: int) -> int:
        """Ranks on so many chips.

        Raises:
            LayoutError: no whole number of nodes.
        """
        if chips < 1 or (chips > self.chips_per_node and chips % self.chips_per_node):
            below = max(1, chips // self.chips_per_node) * self.chips_per_node
            raise LayoutError(
                f"--chips {chips} is no whole number of nodes of {self.chips_per_node} chips ({self.name}): use "
                f"{below} or {below + self.chips_per_node}."
            )
        return chips * self.devices_per_chip

    def nodes(self, chips: int) -> tuple[int, int]:
        """Nodes, and ranks of each."""
        devices = self.devices(chips)
        return (
            (1, devices)
            if devices <= self.devices_per_node
            else (chips // self.chips_per_node, self.devices_per_node)
        )


def folders() -> list[Path]:
    """Where clusters are looked for, the user's own first."""
    from lab_utils.accelerators.cpu import cache_dir

    site = os.environ.get("ASCENT_SITE")
    return [cache_dir() / "clusters", *([Path(site).parent / "clusters"] if site else []), SHIPPED]


def known() -> list[str]:
    """Names of all clusters."""
    return sorted({path.stem for folder in folders() for path in folder.glob("*.yaml")})


def usual(kind: str) -> str | None:
    """The cluster that chips of this kind most likely stand in: the first of the user's or the site's own, else one of
    those here. None for a CPU."""
    for folder in folders()[:-1]:
        for path in sorted(folder.glob("*.yaml")):
            try:
                if path.stem != "local" and read(path).kind == kind:
                    return path.stem
            except RecipeError:  # said where that cluster is asked for
                continue
    return USUAL.get(kind)


def find(name: str | Path | Cluster, asked: str = "--cluster") -> Cluster:
    """A cluster by name or file; ``asked``: what named it, for the message.

    Raises:
        RecipeError: there is none, or its file is not one; the message names the nearest.
    """
    if isinstance(name, Cluster):
        return name
    if Path(name).suffix in (".yaml", ".yml"):
        return read(Path(name))
    for folder in folders():
        path = folder / f"{name}.yaml"
        if path.exists():
            return read(path)
    if str(name) == "local":
        raise RecipeError(
            f"{asked} local: this machine hasn't been measured; run `lab doctor --measure` (two minutes), then again."
        )
    raise RecipeError(
        f"{asked} {name}: there is no such cluster, {nearest(str(name), known())} or give a .yaml file."
    )


def read(path: Path) -> Cluster:
    """The cluster of a file.

    Raises:
        RecipeError: missing, not YAML, or a key that is unknown or has a wrong value.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give the name or file of a cluster.") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise RecipeError(
            f"{path}: not valid YAML{f' at line {line + 1}' if line is not None else ''}."
        ) from None
    try:
        return Cluster.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first problem as a sentence; an unknown key before others, with the nearest known one."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    key = ".".join(place) or "the file"
    if first["type"] == "extra_forbidden":
        return f"'{key}' is no key of a cluster, {nearest(place[-1], _siblings(place[:-1]))}"
    if first["type"] == "missing":
        return f"'{key}' is missing: give it a value and its source."
    return f"{key}: {first['msg'].removeprefix('Value error, ')}."


def _siblings(above: list[str]) -> list[str]:
    """Known keys at a place in the file."""
    section: type[Section] = Cluster
    for part in above:
        if part.isdigit():
            continue
        annotation = str(section.model_fields[part].annotation)
        found = [s for s in (Device, Plane, Host, Efficiency, Figure, Curve) if s.__name__ in annotation]
        section = found[0] if found else section
    return list(section.model_fields)
