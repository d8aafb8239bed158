"""The NPU-Exporter of MindCluster: OpenMetrics text over HTTP, a label ``id`` for each chip.

A series that a product or release doesn't have is absent, and so is its value here. ``ASCENT_NPU_EXPORTER`` names the
address, or is ``off``; without it the exporter's own port on this machine is tried once, at the start.
"""

from __future__ import annotations

import math
import os
import re
import urllib.request
from collections.abc import Iterator

from lab_utils.telemetry.chips import ChipReading

LOCAL = "http://127.0.0.1:8082/metrics"
VARIABLE = "ASCENT_NPU_EXPORTER"
PREFIX = "npu_chip_info_"
TIMEOUT = 5.0
MB_PER_GB = 1000.0

_SERIES = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?\s*$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_HEALTH = {1.0: "OK", 0.0: "Unhealthy"}  # -1: unknown


def fetch(url: str, timeout: float = TIMEOUT) -> str:
    """The exporter's page; never through a proxy, which would know nothing of a node's port.

    Raises:
        OSError: nobody answers, or not with a page.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout) as answer:
        return answer.read().decode("utf-8", errors="replace")


def endpoint() -> str | None:
    """Address of the exporter to ask, or None where there is none."""
    named = os.environ.get(VARIABLE)
    if named:
        return None if named.lower() == "off" else named
    try:
        return LOCAL if PREFIX in fetch(LOCAL, timeout=1.0) else None
    except (OSError, ValueError):
        return None


def series(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every sample of an OpenMetrics page; comments and what is no sample are passed over."""
    for line in text.splitlines():
        match = None if line.startswith("#") else _SERIES.match(line.strip())
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if not math.isfinite(value):
            continue
        labels = {
            key: re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text)
            for key, text in _LABEL.findall(match[2] or "")
        }
        yield match[1], labels, value


def parse(text: str) -> list[ChipReading]:
    """Chips of an exporter's page, in the order of their ids."""
    chips: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for name, labels, value in series(text):
        if name.startswith(PREFIX) and "id" in labels:
            chips.setdefault(labels["id"], {})[name.removeprefix(PREFIX)] = value
            names[labels["id"]] = labels.get("model_name") or names.get(labels["id"], "")
    readings = []
    for chip in sorted(chips, key=lambda c: (not c.isdigit(), int(c) if c.isdigit() else 0, c)):
        found = chips[chip]
        more = {"chip": chip, "health": _HEALTH.get(found.get("health_status", -1.0))}
        if found.get("error_code"):
            more["error_code"] = f"0x{int(found['error_code']):X}"
        rates = {way: found.get(f"bandwidth_{way}") for way in ("tx", "rx")}
        readings.append(
            ChipReading(
                index=len(readings),
                name=names[chip],
                util=found.get("utilization"),
                used_mib=found.get("hbm_used_memory"),
                total_mib=found.get("hbm_total_memory"),
                power=found.get("power"),
                temp=found.get("temperature"),
                **{way: None if rate is None else rate / MB_PER_GB for way, rate in rates.items()},
                more=more,
            )
        )
    return readings


def read(url: str) -> list[ChipReading]:
    """The chips of the exporter at ``url``.

    Raises:
        OSError: it doesn't answer.
        RuntimeError: it answers with a page that has no chips.
    """
    readings = parse(fetch(url))
    if not readings:
        raise RuntimeError(
            f"the page of {url} has no {PREFIX}* series: set {VARIABLE} to an NPU-Exporter, or to off"
        )
    return readings
