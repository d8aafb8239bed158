"""Chips as a heat strip, and the end of the log with answers of the model: what the browser draws beside the curves."""

from __future__ import annotations

import struct
import time
from typing import Any

import anywidget
import traitlets as t

from lab_utils.runs._chip_feed import ChipFeed, Node
from lab_utils.runs.follow import Follower
from lab_utils.telemetry.chips import unhealthy
from lab_utils.widgets._static import script, style

NONE = 255
TREND = 24
_CHIP = struct.Struct("<BBBBHH")
CUT = 2000  # characters of a prompt or an answer that are shown


class ChipStrip(anywidget.AnyWidget):
    """Use and memory of every chip, a row a node, the worst first.

    Attributes:
        nodes: number, chips, age of the reading in seconds, whether it is silent, which healths are bad.
        healths: words of the chips; the first says nothing.
        cells: eight bytes a chip; see ``chips.js``.
        trends: the last ``TREND`` mean uses of each node, a byte each.
        product: what the chips are called.
        waiting: what is said as long as there are none.
    """

    _esm = script("chips")
    _css = style("live")
    nodes = t.List(t.Dict()).tag(sync=True)
    healths = t.List(t.Unicode()).tag(sync=True)
    cells = t.Bytes(b"").tag(sync=True)
    trends = t.Bytes(b"").tag(sync=True)
    product = t.Unicode("").tag(sync=True)
    waiting = t.Unicode("").tag(sync=True)

    def update(self, feed: ChipFeed, over: bool = False) -> None:
        """Bring it up to date; of a run that is over, chips are shown as they were at its end."""
        now = max((node.time for node in feed.nodes.values()), default=0.0) if over else time.time()
        nodes = feed.worst_first(now)
        healths: dict[str, int] = {"": 0}
        cells, told = bytearray(), []
        for node in nodes:
            bad = set()
            for chip in node.chips:
                word = str(chip.get("health") or "")
                place = healths.setdefault(word, len(healths)) if len(healths) < NONE else 0
                if unhealthy(chip):
                    bad.add(place)
                cells += _packed(chip, place)
            told.append(
                {
                    "number": node.number,
                    "chips": len(node.chips),
                    "age": round(max(now - node.time, 0.0), 1),
                    "silent": node.silent(now),
                    "bad": sorted(bad),
                }
            )
        with self.hold_sync():
            self.nodes, self.healths, self.cells = told, list(healths), bytes(cells)
            self.trends = b"".join(map(_trend, nodes))
            self.product = next((str(c["name"]) for n in nodes for c in n.chips[:1] if _is_product(c)), "")


def _is_product(chip: dict[str, Any]) -> bool:
    name = str(chip.get("name") or "")
    return bool(name) and not name.startswith("rank ")


def _packed(chip: dict[str, Any], health: int) -> bytes:
    used, total = _number(chip.get("used_mib")), _number(chip.get("total_mib"))
    memory = 100 * used / total if used is not None and total else None
    power = _number(chip.get("power"))
    index = _number(chip.get("index")) or 0
    return _CHIP.pack(
        _byte(_number(chip.get("util"))),
        _byte(memory),
        _byte(_number(chip.get("temp")), 254),
        health,
        65535 if power is None else int(min(max(power, 0), 65534)),
        int(min(max(index, 0), 65535)),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None


def _byte(value: float | None, most: int = 100) -> int:
    return NONE if value is None else round(min(max(value, 0.0), most))


def _trend(node: Node) -> bytes:
    means = [_byte(mean) for _, mean, _ in list(node.history)[-TREND:]]
    return bytes([NONE] * (TREND - len(means)) + means)


class Journal(anywidget.AnyWidget):
    """The end of a log, and the newest samples.

    Attributes:
        tail: name and lines of a log.
        samples: head, prompt, completion; the newest first.
        waiting: what an empty log says.
    """

    _esm = script("journal")
    _css = style("live")
    tail = t.Dict().tag(sync=True)
    samples = t.List(t.Dict()).tag(sync=True)
    waiting = t.Unicode("").tag(sync=True)

    def update(self, follower: Follower) -> None:
        """Bring it up to date; only what is another is sent."""
        lines = follower.logs.lines
        self.tail = {"name": follower.logs.shown, "lines": lines} if lines else {}
        self.samples = sample_rows(follower)


def sample_rows(follower: Follower) -> list[dict[str, str]]:
    """The newest samples, readable."""
    found = []
    for row in reversed(follower.samples):
        known = {key: row[key] for key in ("step", "reward", "mode") if row.get(key) is not None}
        head = " · ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in known.items()
        )
        prompt, answer = (str(row.get(key) or "")[:CUT] for key in ("prompt", "completion"))
        found.append({"head": head, "prompt": prompt, "completion": answer or "(nothing)"})
    return found
