"""``python -m lab_utils.engine.twin RECIPE.yaml --ranks N --rank R [--rank S …]``: a rank's step, as JSON.

One rank prints its own report. Several are run one after the other and played against one another: ``twins`` (their
reports) and ``mismatches`` (sentences, none where all agree).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab_utils.engine.twin", description=__doc__)
    parser.add_argument("recipe", help="A recipe's file, or its name.")
    parser.add_argument("--ranks", type=int, required=True, help="Ranks of the job.")
    parser.add_argument(
        "--rank", type=int, action="append", required=True, help="Rank to run; may be repeated."
    )
    parser.add_argument("--device", default="cpu", help="cpu or npu.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="A change of the recipe."
    )
    parser.add_argument(
        "--tensors", type=int, default=0, metavar="N", help="The N largest blocks at the peak."
    )
    parser.add_argument("--order", action="store_true", help="Every collective in order.")
    parser.add_argument("--no-replay", action="store_true", help="Run every micro-batch in full.")
    options = parser.parse_args(arguments)

    from lab_utils.errors import LabError
    from lab_utils.recipe import Recipe, parse_changes

    try:
        recipe = Recipe.load(options.recipe).with_changes(parse_changes(options.set))
        found = _run(recipe, options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found))
    return 1 if found.get("mismatches") else 0


def _run(recipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    from lab_utils.engine.twin.collectives import check, to_json
    from lab_utils.engine.twin.run import step_of

    reports, orders = [], {}
    for rank in dict.fromkeys(options.rank):
        twin = step_of(recipe, options.ranks, rank, options.device, replay=not options.no_replay)
        report = twin.as_dict()
        if options.tensors:
            report["tensors"] = twin.largest(options.tensors)
        if options.order:
            report["order"] = to_json(twin.collectives)
        reports.append(report)
        orders[rank] = twin.collectives
        print(f"rank {rank}: {twin.peak_gib:.2f} GiB in {twin.seconds:.0f} s", file=sys.stderr, flush=True)
    if len(reports) == 1:
        return reports[0]
    return {"twins": reports, "mismatches": [found.sentence for found in check(orders)]}


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # ColossalAI's groups complain at an ordinary end
