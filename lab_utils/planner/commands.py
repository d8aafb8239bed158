"""``lab plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from lab_utils.console import emit, table

if TYPE_CHECKING:
    from lab_utils.planner.plan import Plan
    from lab_utils.planner.search import Candidate


def plan(
    recipe: str = typer.Argument(None, help="A named recipe or a YAML file."),
    cluster: str = typer.Option("ascend-910c", "--cluster", help="A cluster by name, or its YAML file."),
    chips: int = typer.Option(
        None, "--chips", min=1, help="Chips (a 910C is two devices); absent: the recipe's."
    ),
    changes: list[str] = typer.Option(
        [], "--set", help="A change, as in --set schedule.batch_tokens=8388608."
    ),
    as_is: bool = typer.Option(
        False, "--as-is", help="Cost the recipe's own layout; refused if it doesn't fit."
    ),
    case: str = typer.Option("expected", help="Efficiencies of the cluster: low, expected or high."),
    kernels: str = typer.Option("fused", help="fused operators, or plain ones."),
    loss_share: float = typer.Option(1.0, min=0.01, max=1.0, help="Share of the tokens that bear loss."),
    imbalance: float = typer.Option(1.1, min=1.0, help="Rows of the fullest expert rank over the mean."),
    tokens: float = typer.Option(None, min=1, help="Tokens of a data set: time and energy."),
    days: float = typer.Option(
        None, min=0.01, help="With --tokens: the fewest chips that end in so many days."
    ),
    context: bool = typer.Option(False, "--context", help="The longest rows that fit."),
    reach: float = typer.Option(
        None, min=1, max=100, help="What would have to be true for so many per cent MFU."
    ),
    write: str = typer.Option(
        None, "--write", help="Write the recipe with the best layout to this YAML file."
    ),
    clusters: bool = typer.Option(False, "--clusters", help="List the clusters, their figures and sources."),
    calibration: bool = typer.Option(
        False, "--calibration", help="Predictions beside what is known, as Markdown."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """What a run will cost before a chip is asked for: the layouts that fit, their memory and step term by term, what
    binds, and what one change would give. Predicted from counts and the cluster's figures; nothing is run."""
    from lab_utils.errors import RecipeError

    if calibration:
        from lab_utils.planner.calibration import rows
        from lab_utils.planner.calibration_page import markdown

        emit(
            [row.as_dict() for row in rows()] if as_json else None, as_json, lambda: print(markdown(), end="")
        )
        return
    if clusters:
        _show_clusters(as_json)
        return
    if recipe is None:
        raise RecipeError("lab plan: name a recipe (lab recipe list) or a YAML file; or use --clusters.")
    from lab_utils.planner.assumptions import Assumptions
    from lab_utils.planner.plan import check
    from lab_utils.planner.plan import plan as make
    from lab_utils.recipe import Recipe, parse_changes

    for name, value, known in (
        ("--case", case, ("low", "expected", "high")),
        ("--kernels", kernels, ("fused", "plain")),
    ):
        if value not in known:
            raise RecipeError(f"{name} {value}: expected one of {', '.join(known)}.")
    assumed = Assumptions(
        case=case,  # type: ignore[arg-type]
        kernels=kernels,  # type: ignore[arg-type]
        loss_share=loss_share,
        imbalance=imbalance,
    )
    resolved = Recipe.load(recipe).with_changes(parse_changes(changes))
    if as_is:
        own = check(resolved, cluster, chips, assumed=assumed)
        emit(own.as_dict(), as_json, lambda: _show_candidate(own, "This layout"))
        return
    made = make(resolved, cluster, chips, assumed=assumed)
    extra = _questions(made, tokens, days, context, reach)
    if write:
        from pathlib import Path

        Path(write).write_text(made.to_recipe().to_yaml(), encoding="utf-8")
    emit({**made.as_dict(), **extra} if as_json else None, as_json, lambda: _show(made, extra))
    if not made.fits:
        raise typer.Exit(2)


def _questions(
    made: Plan, tokens: float | None, days: float | None, context: bool, reach: float | None
) -> dict[str, Any]:
    """Answers to what was asked beside the layout, by name; sentences under ``…``."""
    from dataclasses import asdict

    from lab_utils.planner import questions
    from lab_utils.planner.advice import reach as find_reach
    from lab_utils.planner.rollout import rollout_time

    found: dict[str, Any] = {}
    if made.best is not None:
        found["crossings"] = questions.crossings(made.best.placed, made.cluster)
        section = made.recipe.rollout
        if section is not None and section.source == "in_process":
            drawn = rollout_time(made.best.recipe, made.cluster, made.ranks, made.assumed)
            found["rollout"] = {**asdict(drawn), "seconds": drawn.seconds, "tokens_per_s": drawn.tokens_per_s}
    if tokens and made.best is not None:
        answer = questions.cost(made, tokens)
        found["data_set"] = {**asdict(answer), "sentence": answer.sentence()}
    if tokens and days:
        fewest = questions.chips_for(made.recipe, made.cluster, tokens, days, assumed=made.assumed)
        found["chips_for_deadline"] = fewest.chips if fewest else None
    if context:
        longest, at = questions.largest_context(made.recipe, made.cluster, made.chips, assumed=made.assumed)
        found["largest_context"] = {"tokens": longest, "layout": at.best.name if at and at.best else None}
    if reach:
        reached = find_reach(made.recipe, made.cluster, made.ranks, made.assumed, reach / 100)
        best = reached.candidate.as_dict() if reached.candidate else None
        conditions = list(reached.conditions)
        found["reach"] = {"reached": reached.reached, "conditions": conditions, "layout": best}
        found["reach"]["sentences"] = reached.sentences()
    return found


def _show(made: Plan, extra: dict[str, Any]) -> None:
    tree = made.as_dict()
    print(
        f"{made.recipe.name} on {made.chips:,} chips of {made.cluster.name}: {made.ranks:,} devices of "
        f"{made.cluster.device.memory_gib.value:.0f} GiB, {made.cluster.device.tflops.value:.3g} TFLOPS each"
    )
    print(
        f"{tree['parameters']:,} parameters, {tree['active_parameters'] / 1e9:.3g}B active, "
        f"{tree['flops_per_token'] / 1e9:.4g} GFLOP a token, {tree['tokens_per_step']:,} tokens a step"
    )
    if made.best is None:
        print("\n".join(made.knobs()))
        return
    _show_candidate(made.best, "The fastest layout that fits")
    ends = made.range
    print(
        f"At the low and the high end of the cluster's efficiencies: {ends['low'].time.seconds:.1f} s "
        f"({100 * ends['low'].time.mfu:.1f} %) and {ends['high'].time.seconds:.1f} s "
        f"({100 * ends['high'].time.mfu:.1f} %)."
    )
    columns = ["layout", "step s", "tokens/s", "MFU %", "GiB", "binding"]
    for title, chosen in (("The fastest", made.candidates[:8]), ("Nothing beats in both", made.front()[:8])):
        rows = [
            (
                each.name,
                f"{each.time.seconds:.2f}",
                f"{each.time.tokens_per_s:,.0f}",
                f"{100 * each.time.mfu:.1f}",
                f"{each.peak_gib:.1f}",
                each.time.binding,
            )
            for each in chosen
        ]
        table(title, columns, rows, right=columns[1:5])
    print("One change would give:")
    for text in tree["advice"]:
        print(f"- {text}")
    _show_extra(extra)
    print(f"Looked at {tree['tried']} layouts; predicted, nothing was run.")


def _show_extra(extra: dict[str, Any]) -> None:
    for text in extra.get("crossings", []):
        print(f"Crossing: {text}")
    if "rollout" in extra:
        drawn = extra["rollout"]
        print(
            f"A round of samples: {drawn['seconds']:.1f} s for {drawn['tokens']:,} tokens at most "
            f"({drawn['tokens_per_s']:,.0f} tokens/s); a decoding step reads {100 * drawn['coverage']:.0f} % of the "
            "experts."
        )
    if "data_set" in extra:
        print(extra["data_set"]["sentence"])
    if "chips_for_deadline" in extra:
        chips = extra["chips_for_deadline"]
        print(
            f"The deadline needs {chips:,} chips."
            if chips
            else "No number of chips up to 8,192 meets the deadline."
        )
    if "largest_context" in extra:
        found = extra["largest_context"]
        print(f"The longest rows that fit have {found['tokens']:,} tokens ({found['layout']}).")
    for text in extra.get("reach", {}).get("sentences", []):
        print(text)


def _show_candidate(own: Candidate, title: str) -> None:
    full, time = own.fullest, own.time
    print(
        f"{title}: {own.name}, {own.placed.passes} micro-batches of {own.placed.micro_tokens:,} tokens. "
        f"{time.seconds:.2f} s a step, {time.tokens_per_s:,.0f} tokens/s, MFU {100 * time.mfu:.1f} % of "
        f"{time.peak_tflops:.3g} TFLOPS a device; binding: {time.binding}."
    )
    from lab_utils.planner.timing import GROUPS

    memory = [(name, f"{value:.2f}") for name, value in full.terms.items() if value >= 0.005]
    memory.append(("all", f"{full.peak:.2f} of {own.room_gib:.0f}"))
    table(
        f"Memory of stage {full.index}, the fullest (in its {full.moment} pass)",
        ["", "GiB"],
        memory,
        right=["GiB"],
    )
    steps = [
        (GROUPS[name], f"{value:.2f}", f"{100 * value / time.seconds:.0f}")
        for name, value in time.terms.items()
        if value >= 0.005 * time.seconds
    ]
    steps.append(("all", f"{time.seconds:.2f}", "100"))
    table(f"A step, by the slowest stage ({time.slowest})", ["", "s", "%"], steps, right=["s", "%"])


def _show_clusters(as_json: bool) -> None:
    from lab_utils.planner.cluster import find, known

    found = [find(name) for name in known()]
    rows = [
        (
            each.name,
            each.about,
            f"{each.device.memory_gib.value:.0f}",
            f"{each.device.tflops.value:,.4g}",
            f"{each.device.bandwidth_tb_s.value:.2g}",
            ", ".join(
                f"{p.name} {p.gb_s.value:.0f} GB/s" + (f" ×{p.devices}" if p.devices else "")
                for p in each.planes
            ),
        )
        for each in found
    ]
    columns = ["cluster", "about", "GiB", "TFLOPS", "TB/s", "planes"]
    emit(
        [each.model_dump(mode="json") for each in found],
        as_json,
        lambda: table("Clusters, a device of each", columns, rows, right=["GiB", "TFLOPS", "TB/s"]),
    )
