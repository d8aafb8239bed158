"""60_plan: from chips and data to a recipe, as CI runs it."""

import json
from pathlib import Path

import pytest

from lab_utils.panels import notebooks

FEW = {"recipe_name": "v4_flash_sft", "chips": 256, "scaling_chips": [128, 256], "tokens": 1e9}


@pytest.mark.slow
def test_a_plan_ends_in_a_recipe_with_its_pictures(tmp_path):
    done = notebooks.execute("60_plan", FEW, root=tmp_path, progress=False)
    text = Path(done["notebook"]).read_text()
    printed = "".join(
        "".join(output.get("text", ""))
        for cell in json.loads(text)["cells"]
        for output in cell.get("outputs", [])
    )
    assert text.count('"image/png"') == 4
    assert "layouts fit; the best: dp" in printed and "chip-hours" in printed and "Longest row" in printed
    assert "nodes: 32" in printed and "LaunchForm v4_flash_sft" in text


@pytest.mark.slow
def test_chips_that_hold_no_layout_are_told_so_to_the_end(tmp_path):
    done = notebooks.execute(
        "60_plan", {"chips": 128, "scaling_chips": [64], "days": 1}, root=tmp_path, progress=False
    )
    text = Path(done["notebook"]).read_text()
    assert "Nothing fits 64 GiB" in text and "No layout fits: see above." in text
