"""``docs/calibration.md``, made from the comparisons of ``calibration.py``."""

from __future__ import annotations

from lab_utils.planner.calibration import CASES, OWN, rows
from lab_utils.planner.cluster import Cluster, find
from lab_utils.planner.own import QUANTITIES


def table() -> str:
    """The comparisons as a Markdown table."""
    lines = ["| run | quantity | published | predicted | low to high | miss | taken for granted | source |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows():
        ends = sorted((row.low, row.high))
        span = "" if ends[0] == ends[1] else f"{_number(ends[0])} to {_number(ends[1])}"
        cells = (
            row.what,
            row.quantity,
            _number(row.published),
            _number(row.predicted),
            span,
            f"{100 * row.miss:+.0f} %",
            row.assumed,
            row.source,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def efficiencies(cluster: Cluster) -> str:
    """The efficiencies of a cluster and their sources, as a Markdown table."""
    found = cluster.efficiency
    lines = ["| share | low | expected | high | from |", "|---|---|---|---|---|"]
    curve = ", ".join(f"{size:.0f}: {share:.2f}" for size, share in found.products.points.items())
    lines.append(f"| products by edge ({curve}) | | | | {found.products.source} |")
    for name in ("sustained", "attention", "memory", "network"):
        figure = getattr(found, name)
        ends = " | ".join(f"{figure.of(case):.2f}" for case in CASES)
        lines.append(f"| {name} | {ends} | {figure.source} |")
    return "\n".join(lines)


def markdown() -> str:
    """``docs/calibration.md``, whole."""
    brackets = [row for row in rows() if row.brackets]
    outside = [row for row in rows() if not row.brackets and row.low != row.high]
    misses = "; ".join(f"{row.what} ({row.quantity}) by {100 * row.miss:+.0f} %" for row in outside)
    return HEAD.format(
        table=table(),
        clusters="\n\n".join(
            f"**{name}**\n\n{efficiencies(find(name))}"
            for name in ("ascend-910c", "ascend-910b", "h800", "gb300")
        ),
        inside=len(brackets),
        ranges=len(brackets) + len(outside),
        outside=f" Outside: {misses}." if misses else "",
        own=" ".join(_own(key, share) for key, share in WANTED.items()),
    )


# How near our own runs are wanted to be predicted.
WANTED = {"seconds": 0.15, "tensors_mib": 0.05, "peak_mib": 0.05}


def _own(key: str, share: float) -> str:
    """How many of our own runs are predicted as nearly as wanted, and the widest misses."""
    own = [row for row in rows() if row.source.startswith(OWN)]
    misses = sorted(row.miss for row in own if row.quantity == QUANTITIES[key])
    near = sum(abs(miss) <= share for miss in misses)
    return (
        f"{QUANTITIES[key]}: {near} of {len(misses)} within {100 * share:.0f} %, all from {100 * misses[0]:+.0f} to "
        f"{100 * misses[-1]:+.0f} %."
    )


HEAD = """# How far predictions can be trusted

Made by `lab plan --calibration`; a test compares this page with what the command prints. Every prediction of the
planner is computed from counts (`docs/planner.md`) and from the figures of a cluster's file. Products come from
measured square products, all-to-all from measured dispatch and combine; the other efficiencies are assumptions with a
low and a high end. No expected value was changed to meet a number of this table. But it is not blind: settled after a
first table had been seen were the high ends, which are now the best published single operators and were a tenth lower;
that published runs hide their messages and swap their optimizer; the cost of casts to fp8; the SMs that DeepSeek-V3
gives to messages; and Pangu's expert parallelism and overlap. What a comparison takes for granted stands in its row.

{table}

How to read it:

- Of the {ranges} comparisons that have a range, {inside} hold the published number between their ends.{outside}
- The V4-Pro run published neither batch nor denominator. 34.9 % in 27 s are 22.0M, 23.4M or 24.9M tokens a step by a
  package's 708, 752 or 800 TFLOPS. At 25.2M tokens, which an interleaved schedule divides, both lie within the range.
- Published runs differ from our engine in kernels, schedule and overlap: their rows take all messages hidden,
  the experts even and the optimizer swapped, as those systems describe themselves. Predictions for our engine as it is
  (`lab plan` without options) are lower.
- MFU counts the model proper: no multi-token prediction, the indexer forward only, no recomputation. The denominator is
  a device's dense bf16 peak: 376 TFLOPS for a die of a 910C (752 a package) and for a 910B.
- Our own runs: {own}
  A run is one of `lab bench plan`. It measures the machine's rates once; then each run takes turns with a step of
  `reference` and one of `tiny` under data parallelism, in one job, and these two say what share of the rates the
  machine sustains meanwhile: a shared one is half as fast again at one time as at another. Too low are the seconds of
  `tiny`, most of which goes through memory: one share stands for products and memory alike. Tensors are counted as
  they come and go; a process also holds what its heap doesn't give back, which no plan of a device has. An earlier form
  of the command, which knew one rate of memory for all sizes, warm messages and no turns, missed the seconds of 6 of
  15 runs by more than 15 % on two cores of an AMD EPYC (all from -26 to +18 %), and 7 of 15 processes by more than 5 %.
- Not compared, for want of a figure or of the machine: GB200 (Megatron-Bridge's 7,776 tokens/s a GPU on V4-Flash),
  layouts without published speed, and our engine on a GPU or an NPU.
- Memory at full size is checked against the engine itself by `lab twin`, which builds it without chips
  (`docs/twin.md`).

## Efficiencies, and where they are from

{clusters}

Every other figure stands with its source in `lab_utils/planner/clusters/*.yaml`, and in `lab plan --clusters --json`.
"""
