"""The description of this site that run cards quote: cabinets, fabric."""

from __future__ import annotations

from lab_utils.doctor._machine import Machine, Row
from lab_utils.errors import RecipeError
from lab_utils.runs.site import read

ORDER = 72


def check(machine: Machine) -> list[Row]:
    path = machine.environ.get("ASCENT_SITE")
    if not path:
        advice = (
            'Run cards say "not recorded" for cabinets and fabric: describe them in a file (docs/card.md).'
        )
        return [Row("site", None, "ASCENT_SITE is not set", advice)]
    try:
        site = read(path)
    except RecipeError as error:
        return [Row("site", False, f"ASCENT_SITE={path}", str(error))]
    told = [key for key, value in site.model_dump().items() if value]
    return [Row("site", True, f"{path}: {', '.join(told) or 'empty'}")]
