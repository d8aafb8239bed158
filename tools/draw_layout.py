"""The drawing of docs/layouts.md: ``python tools/draw_layout.py docs/images/layout.png``."""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

EP, EXPERTS, STREAMS, SUM = "#f2e6d8", "#c2703d", "#3b6ea8", "#5f8f5a"


def main(path: str) -> None:
    figure, axes = plt.subplots(figsize=(11, 6.4), dpi=130)
    axes.set(xlim=(0, 11.6), ylim=(0.15, 6.5))
    axes.axis("off")
    for stage in range(2):
        y = 3.85 - 2.65 * stage
        for group in range(2):
            x = 1.55 + 4.5 * group
            axes.add_patch(
                FancyBboxPatch((x - 0.12, y - 0.42), 4.25, 1.92, boxstyle="round,pad=0.05", fc=EP, ec="none")
            )
            axes.text(x + 2.0, y + 1.34, f"ep group, replica {group}", ha="center", fontsize=9, color=EXPERTS)
            for member in range(2):
                left, rank = x + 2.15 * member, 4 * group + 2 * stage + member
                axes.add_patch(
                    FancyBboxPatch((left, y), 1.8, 1.15, boxstyle="round,pad=0.04", fc="white", ec="#444")
                )
                layers = "embedding, layers 0–29" if stage == 0 else "layers 30–60, head"
                axes.text(left + 0.9, y + 0.92, f"rank {rank}", ha="center", weight="bold", fontsize=10)
                axes.text(left + 0.9, y + 0.64, layers, ha="center", fontsize=8)
                axes.text(
                    left + 0.9,
                    y + 0.38,
                    f"experts {192 * member}–{192 * member + 191}",
                    ha="center",
                    fontsize=8,
                )
                axes.text(
                    left + 0.9,
                    y + 0.12,
                    f"rows {2 * group + member} mod 4",
                    ha="center",
                    fontsize=8,
                    color="#777",
                )
                if stage == 0:
                    arrow((left + 0.9, y - 0.42), (left + 0.9, y - 1.1), STREAMS, axes)
            arrow((x + 1.72, y - 0.16), (x + 2.23, y - 0.16), EXPERTS, axes)
            axes.text(
                x + 2.0,
                y - 0.25,
                "tokens: all-to-all, twice a layer",
                ha="center",
                va="top",
                fontsize=7.5,
                color=EXPERTS,
            )
        at = y + 1.74 if stage == 0 else y - 0.72
        arrow((1.5, at), (10.2, at), SUM, axes)
        text = (
            "gradients summed over dp; masters and optimizer state cut over dp (experts: over the replicas)"
        )
        axes.text(5.85, at + (0.1 if stage == 0 else -0.24), text, ha="center", fontsize=8.5, color=SUM)
        axes.text(0.2, y + 0.55, f"stage {stage}", fontsize=11, weight="bold")
    axes.text(3.55, 3.05, "streams\n[B, T, 4, D]", ha="center", va="center", fontsize=8, color=STREAMS)
    axes.text(8.05, 3.05, "gradients\nof streams", ha="center", va="center", fontsize=8, color=STREAMS)
    axes.text(
        5.5, 6.25, "8 ranks: dp 4, ep 2, pp 2 of a V4-Pro (61 layers, 384 experts)", ha="center", fontsize=12
    )
    axes.text(10.45, 1.75, "loss and multi-\ntoken prediction\nstand here", fontsize=8.5, color="#555")
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def arrow(start: tuple[float, float], end: tuple[float, float], color: str, axes: plt.Axes) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="<->", mutation_scale=12, color=color, lw=1.4))


if __name__ == "__main__":
    main(sys.argv[1])
