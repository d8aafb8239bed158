"""The calibration page is what the code says, and hides nothing."""

from pathlib import Path

import pytest

from lab_utils.planner.own import machines

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"


@pytest.mark.slow
def test_the_page_is_what_the_command_prints():
    from lab_utils.planner.calibration_page import markdown

    assert PAGE.read_text(encoding="utf-8") == markdown()


def test_every_published_run_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for run in (
        "1,024 × 910C",
        "6,144 × 910B",
        "10,240 × 910B",
        "V4-Pro, 256 × GB300",
        "V4-Flash, 128 × GB300",
        "2,048 × H800",
    ):
        assert run in text
    assert "| miss |" in text


def test_every_run_of_our_own_is_on_the_page_in_all_that_was_measured():
    text = PAGE.read_text(encoding="utf-8")
    assert machines()
    for machine in machines():
        assert text.count(f"`lab bench plan`, {machine['machine']} |") == 3 * len(machine["runs"]) > 30


def test_no_row_is_without_source_or_assumption():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.count(" | ") == 7]
    assert len(rows) > 12
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[-1] and cells[-2] and cells[2]
