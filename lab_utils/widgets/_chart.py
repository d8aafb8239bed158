"""Curves of one run or of several, drawn in the browser; the kernel sends only what changed.

A metric is a few hundred points (``runs/series.py``), cut into pieces of ``CHUNK`` buckets. Each piece is a trait of
its own: a new step changes the last one. So whoever joins late, a page that is loaded again for instance, has it all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import anywidget
import traitlets as t

from lab_utils.panels.figures import _labels
from lab_utils.panels.layout import ALIGNMENT, OVERVIEW, PANELS, Panel
from lab_utils.runs.series import CAPACITY, STEP, Buckets
from lab_utils.widgets._static import script, style

CHUNK = 32
SLOTS = CAPACITY // CHUNK
# Always there, so that a reader knows what will come; others appear with their first value.
EXPECTED = ("Alignment loss", "Throughput", "Model FLOPs utilisation", "Step time")
# Opened when somebody wants to know.
REST = ("Stability", "MoE")

_Pieces = type(anywidget.AnyWidget)(
    "_Pieces",
    (anywidget.AnyWidget,),
    {f"piece{slot}": t.Bytes(b"").tag(sync=True) for slot in range(SLOTS)},
)


class Curves(_Pieces):
    """Panels of curves with a smoothing slider and values under the pointer.

    Attributes:
        panels: as ``panel_spec`` makes them.
        tables: whose curves: ``{"label": …}``.
        columns: metrics of every piece; the first is the step.
        pieces: ``[table, first bucket, buckets]`` of each slot that is in use.
        waiting: what a panel without a value says.
        smoothing: weight of the past, 0 to 1.
        watched: pages that show it; -1 before the first.
    """

    _esm = script("curves")
    _css = style("live")
    panels = t.List(t.Dict()).tag(sync=True)
    tables = t.List(t.Dict()).tag(sync=True)
    columns = t.List(t.Unicode()).tag(sync=True)
    pieces = t.List(t.List(t.Int())).tag(sync=True)
    waiting = t.Unicode("").tag(sync=True)
    smoothing = t.Float(0.6).tag(sync=True)
    watched = t.Int(-1).tag(sync=True)

    def update(self, buckets: Buckets, first: int, panels: Sequence[Panel]) -> None:
        """Bring the curves of one run up to date.

        Args:
            buckets: its metrics.
            first: the first bucket that is another one.
            panels: as ``panels_of`` orders them; the ones without a value are left out, but for ``EXPECTED``.
        """
        keys = [STEP, *dict.fromkeys(k for panel in panels for k in panel.keys if buckets.has(k))]
        pieces = [[0, at, min(CHUNK, buckets.size - at)] for at in range(0, buckets.size, CHUNK)]
        with self.hold_sync():
            if keys != self.columns or len(pieces) < len(self.pieces):
                first = 0
            self.columns, self.pieces, self.tables = keys, pieces, [{"label": ""}]
            for slot in range(first // CHUNK, len(pieces)):
                _, at, count = pieces[slot]
                setattr(self, f"piece{slot}", buckets.table(at, at + count, keys).tobytes())
            shown = [p for p in panels if p.title in EXPECTED or any(k in keys for k in p.keys)]
            self.panels = _specs(shown, keys, panels[: _main(panels)])

    def compare(self, runs: Iterable[tuple[str, Buckets]], panels: Sequence[Panel]) -> None:
        """Show the curves of several runs over one another; at most ``SLOTS`` of them."""
        runs = list(runs)[:SLOTS]
        there = [k for panel in panels for k in panel.keys if any(buckets.has(k) for _, buckets in runs)]
        keys = [STEP, *dict.fromkeys(there)]
        shown = [p for p in panels if p.kind != "area" and any(k in keys for k in p.keys)]
        with self.hold_sync():
            self.columns, self.tables = keys, [{"label": name} for name, _ in runs]
            self.pieces = [[slot, 0, buckets.size] for slot, (_, buckets) in enumerate(runs)]
            for slot, (_, buckets) in enumerate(runs):
                setattr(self, f"piece{slot}", buckets.table(0, buckets.size, keys).tobytes())
            self.panels = _specs(shown, keys, [p for p in shown if p.section not in REST])


def _specs(panels: Sequence[Panel], keys: Sequence[str], main: Sequence[Panel]) -> list[dict[str, Any]]:
    """Panels for the browser: the first is wide, those that are not ``main`` are folded away."""
    return [
        {**panel_spec(panel, [k for k in panel.keys if k in keys]), "wide": i == 0, "more": panel not in main}
        for i, panel in enumerate(panels)
    ]


def _main(panels: Sequence[Panel]) -> int:
    """How many of ``panels_of`` are not folded away: up to the step's time, and the chips' use."""
    titles = [panel.title for panel in panels]
    return titles.index("Step time") + 2 if "Step time" in titles else len(titles)


def panel_spec(panel: Panel, keys: Sequence[str]) -> dict[str, Any]:
    """A panel of ``panels/layout.py`` for the browser, with the metrics that there are."""
    lines = [
        {"key": key, "label": name, "dots": key.startswith("eval/")} for key, name in zip(keys, _labels(keys))
    ]
    told = {"title": panel.title, "unit": panel.unit, "kind": panel.kind, "scale": panel.scale}
    return told | {"lines": lines}


def panels_of(objective: str) -> list[Panel]:
    """What a run of this objective is watched by: its loss, what steers it, its speed and chips, then the rest."""
    by_title = {panel.title: panel for panel in PANELS}
    speed = ("Throughput", "Model FLOPs utilisation", "Step time", "Chip utilisation")
    steered = [title for title in ALIGNMENT.get(objective, ()) if title not in speed]
    if not steered:
        steered = [title for title in OVERVIEW if by_title[title].section not in REST and title not in speed]
    rest = [title for title in OVERVIEW if title not in speed]
    return [by_title[title] for title in dict.fromkeys(("Alignment loss", *steered, *speed, *rest))]
