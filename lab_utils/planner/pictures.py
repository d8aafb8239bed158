"""Pictures of a plan, drawn with seaborn: memory of each stage, what a step is made of, speed from few chips to many.

Every function returns a matplotlib Figure, closed in pyplot, so that a notebook shows it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lab_utils.panels.figures import GRID, INK, MUTED, SERIES, _canvas, _plain_ticks
from lab_utils.planner.memory import TERMS
from lab_utils.planner.plan import Plan, plan
from lab_utils.planner.search import Candidate
from lab_utils.planner.timing import GROUPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# State in blues, what passes in warm tones, what the device itself takes in greys.
MEMORY_COLOURS = {
    "weights": "#17479e",
    "gradients": "#2f6fde",
    "masters": "#7ba6ee",
    "moments": "#b9d0f6",
    "activations": "#e4572e",
    "streams": "#f0936f",
    "exchange": "#c9a227",
    "temporary": "#ecd28b",
    "communicators": "#5c6b7a",
    "runtime": "#98a4b0",
    "slack": "#cbd2d9",
}
CHIPS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def memory_stack(made: Plan, candidate: Candidate | None = None) -> Figure:
    """GiB of a device of each pipeline stage by term, under the line of what it has."""
    chosen = candidate or made.best
    stages = chosen.stages if chosen else ()
    figure, axes = _canvas(1, 1, 8.5, 3.6)
    ax = axes[0, 0]
    if chosen is None:
        return _nothing(figure, ax, made)
    xs = range(len(stages))
    below = [0.0] * len(stages)
    for name in TERMS:
        values = [stage.terms[name] for stage in stages]
        if max(values) < 0.05:
            continue
        ax.bar(xs, values, bottom=below, width=0.86, color=MEMORY_COLOURS[name], label=name, linewidth=0)
        below = [a + b for a, b in zip(below, values, strict=True)]
    room = chosen.room_gib
    ax.axhline(room, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.text(
        len(stages) - 0.5, room, f"a device has {room:.0f} ", ha="right", va="bottom", fontsize=8, color=INK
    )
    ax.set(xlabel="pipeline stage", ylabel="GiB of a device", ylim=(0, 1.13 * max(room, *below)))
    ax.set_title(f"{made.recipe.name} on {made.chips:,} chips: {chosen.name}")
    step = max(1, len(stages) // 16)
    ax.set_xticks(list(xs)[::step])
    ax.grid(axis="x", visible=False)
    ax.margins(x=0.02)
    _finish(ax)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return figure


def step_waterfall(made: Plan, candidate: Candidate | None = None) -> Figure:
    """Seconds of a step: the model's FLOPs at the device's peak, then each thing that costs more, to the whole step."""
    chosen = candidate or made.best
    figure, axes = _canvas(1, 1, 8.5, 4.2)
    ax = axes[0, 0]
    if chosen is None:
        return _nothing(figure, ax, made)
    time = chosen.time
    ideal = time.mfu * time.seconds
    named = {GROUPS[name]: value for name, value in time.terms.items()}
    products = named.pop(GROUPS["products"])
    small = {name: value for name, value in named.items() if value < 0.012 * time.seconds}
    rows = [("the model's FLOPs at the peak", ideal, SERIES[2])]
    rows.append(("products below the peak, and uneven stages", products - ideal, SERIES[0]))
    rows += [
        (name, value, SERIES[1])
        for name, value in sorted(named.items(), key=lambda pair: -pair[1])
        if name not in small
    ]
    if sum(small.values()) > 0:
        rows.append((f"{len(small)} smaller ones", sum(small.values()), "#b8c2cc"))
    at = 0.0
    for i, (_, value, colour) in enumerate(rows):
        ax.barh(i, value, left=at, color=colour, height=0.68, linewidth=0)
        at += value
        ax.text(
            max(at, at - value) + 0.008 * time.seconds, i, f"{value:.1f}", va="center", fontsize=8, color=INK
        )
    ax.barh(len(rows), time.seconds, color=INK, height=0.68, linewidth=0)
    ax.text(1.008 * time.seconds, len(rows), f"{time.seconds:.1f}", va="center", fontsize=8, color=INK)
    ax.set_yticks(range(len(rows) + 1), [*(name for name, _, _ in rows), "the step"])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.invert_yaxis()
    ax.set(xlabel="seconds", xlim=(0, 1.09 * time.seconds))
    ax.set_title(
        f"{made.recipe.name} on {made.chips:,} chips: {time.seconds:.1f} s a step, {100 * time.mfu:.1f} % MFU "
        "(predicted)"
    )
    ax.grid(axis="y", visible=False)
    _finish(ax)
    return figure


def scaling(made: Plan, chips: Sequence[int] = CHIPS, *, grow_batch: bool = True) -> Figure:
    """Tokens/s and MFU of the best layout from few chips to many, with the range of the cluster's efficiencies; the
    optimizer stays on the device.

    Args:
        grow_batch: the batch grows with the chips from the plan's own; else it stays, and micro-batches run out.
    """
    figure, axes = _canvas(1, 2, 9.5, 3.5)
    left, right = axes[0]
    points = scaling_points(made, chips, grow_batch=grow_batch)
    fitting = [p for p in points if p["tokens_per_s"]]
    if not fitting:
        return _nothing(figure, left, made)
    xs, speeds = [p["chips"] for p in fitting], [p["tokens_per_s"] / 1e3 for p in fitting]
    even = [speeds[0] * x / xs[0] for x in xs]
    left.plot(
        xs, even, color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label=f"in proportion to {xs[0]:,} chips"
    )
    left.plot(xs, speeds, "o-", color=SERIES[0], linewidth=1.6, markersize=4, label="the best layout")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    left.set(
        ylabel="thousand tokens/s",
        title="Speed",
        yscale="log",
        ylim=(0.7 * min(speeds), 2 * max(*even, *speeds)),
    )
    _plain_ticks(left.yaxis)
    low, high = ([100 * p[end] for p in fitting] for end in ("low", "high"))
    right.fill_between(xs, low, high, color=SERIES[0], alpha=0.15, linewidth=0)
    right.plot(xs, [100 * p["mfu"] for p in fitting], "o-", color=SERIES[0], linewidth=1.6, markersize=4)
    right.set(
        ylabel="MFU, %", title="Utilisation, and the range of the efficiencies", ylim=(0, 1.12 * max(high))
    )
    for p in fitting:
        degrees = [part for part in p["layout"].split(" ") if part.startswith(("cp", "pp", "ep", "v"))]
        place = (p["chips"], 100 * p["mfu"])
        right.annotate(
            "\n".join(degrees),
            place,
            (0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=6.5,
        )
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(xs, [f"{x:,}" for x in xs], rotation=30 if len(xs) > 5 else 0)
        ax.minorticks_off()
        ax.set_xlabel("chips")
        ax.margins(x=0.08)
        _finish(ax)
    missing = [p["chips"] for p in points if not p["tokens_per_s"]]
    note = f"; none without offload on {', '.join(f'{m:,}' for m in missing)}" if missing else ""
    tokens = f"{made.recipe.schedule.batch_tokens / 1e6:.1f}M tokens a step"
    batch = f"{tokens} on {made.chips:,}, growing with the chips" if grow_batch else tokens
    figure.suptitle(
        f"{made.recipe.name} on {made.cluster.name}, {batch}{note} (predicted)",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def scaling_points(
    made: Plan, chips: Sequence[int] = CHIPS, *, grow_batch: bool = False
) -> list[dict[str, Any]]:
    """What ``scaling`` draws: ``chips``, ``layout``, ``tokens_per_s`` and ``mfu`` (None where nothing fits), and the
    MFU at both ends of the efficiencies."""
    found = []
    for count in chips:
        recipe = made.recipe
        if grow_batch:
            tokens = max(1, round(recipe.schedule.batch_tokens * count / made.chips / recipe.data.row_tokens))
            batch = {"batch_tokens": tokens * recipe.data.row_tokens}
            recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update=batch)})
        one = plan(recipe, made.cluster, count, assumed=made.assumed, offload=False)
        row: dict[str, Any] = {
            "chips": count,
            "layout": "",
            "tokens_per_s": None,
            "mfu": None,
            "low": None,
            "high": None,
        }
        if one.best:
            ends = one.range
            row |= {
                "layout": one.best.name,
                "tokens_per_s": one.best.time.tokens_per_s,
                "mfu": one.best.time.mfu,
                "low": ends["low"].time.mfu,
                "high": ends["high"].time.mfu,
            }
        found.append(row)
    return found


def front(made: Plan) -> Figure:
    """Every layout that fits by memory and step, and the line of those that nothing beats."""
    figure, axes = _canvas(1, 1, 6.5, 3.8)
    ax = axes[0, 0]
    if not made.candidates:
        return _nothing(figure, ax, made)
    ax.scatter(
        [c.peak_gib for c in made.candidates],
        [c.time.seconds for c in made.candidates],
        s=14,
        color=MUTED,
        alpha=0.5,
    )
    best = made.front()
    ax.plot([c.peak_gib for c in best], [c.time.seconds for c in best], "o-", color=SERIES[1], markersize=5)
    for i, each in enumerate(best):
        high = i % 2 == 0
        ax.annotate(
            each.name,
            (each.peak_gib, each.time.seconds),
            (0, 7 if high else -7),
            textcoords="offset points",
            ha="right" if each.peak_gib > 0.85 * each.room_gib else "left",
            va="bottom" if high else "top",
            fontsize=7,
        )
    ax.set(xlabel="GiB of a device", ylabel="seconds a step", yscale="log")
    _plain_ticks(ax.yaxis)
    ax.margins(y=0.1)
    ax.set_title(f"{len(made.candidates)} layouts of {made.recipe.name} fit {made.chips:,} chips")
    _finish(ax)
    return figure


def _finish(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)


def _nothing(figure: Figure, ax: Any, made: Plan) -> Figure:
    text = "\n".join(made.knobs()) or "nothing fits"
    ax.text(
        0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color=MUTED, wrap=True, fontsize=8
    )
    ax.set(xticks=[], yticks=[])
    return figure
