"""The code that runs in the browser, run by node where there is one: it reads what Python has packed."""

import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from lab_utils.runs._chip_feed import ChipFeed
from lab_utils.runs.series import Buckets
from lab_utils.telemetry import chip_log, jsonl
from lab_utils.widgets._chart import Curves, panels_of
from lab_utils.widgets._static import script
from lab_utils.widgets._strip import ChipStrip

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(
    NODE is None, reason="node is not installed: the browser's code is not run here"
)


@pytest.fixture
def js(tmp_path):
    """Values of expressions over the exports of a module."""

    def run(module, expression, **values):
        (tmp_path / f"{module}.mjs").write_text(script(module))
        code = (
            f"import * as m from '{tmp_path}/{module}.mjs';"
            f"const given = {json.dumps(values)};"
            "const floats = (list) => new Float32Array(new Uint8Array(list).buffer);"
            "const view = (list) => new DataView(new Uint8Array(list).buffer);"
            f"console.log(JSON.stringify({expression}));"
        )
        done = subprocess.run(
            [NODE, "--input-type=module", "-e", code], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_pieces_of_a_curve_are_put_together_again(js):
    buckets = Buckets()
    for step in range(1, 101):
        some = {"eval/loss": -float(step)} if step % 10 == 0 else {}
        buckets.add(step, {"step": float(step), "train/loss": 1 / step, **some})
    curves = Curves()
    curves.update(buckets, 0, panels_of("sft"))
    pieces = [list(getattr(curves, f"piece{slot}")) for slot in range(len(curves.pieces))]
    given = {"pieces": curves.pieces, "data": pieces, "columns": curves.columns}
    call = "m.points(given.pieces, given.data.map(floats), 0, given.columns, '{}')"
    loss, held_out = (js("curves", call.format(key), **given) for key in ("train/loss", "eval/loss"))
    assert loss["x"] == list(range(1, 101)) and held_out["x"] == list(range(10, 101, 10))
    np.testing.assert_allclose(loss["y"], [1 / s for s in range(1, 101)], rtol=1e-6)
    assert held_out["low"] == held_out["high"] == [-s for s in range(10, 101, 10)]
    assert js("curves", call.format("absent"), **given)["x"] == []


def test_chips_are_read_as_they_were_packed(js, tmp_path):
    chip = {"util": 40.0, "used_mib": 1.0, "total_mib": 4.0, "temp": 61, "power": 300.4, "health": "OK"}
    rows = [{"index": 7, **chip}, {"index": 8, "health": "Warning"}]
    jsonl.append(chip_log.node_file(tmp_path, 5), {"time": 1.0, "chips": rows})
    feed = ChipFeed(tmp_path)
    feed.poll(math.inf)
    strip = ChipStrip()
    strip.update(feed, over=True)
    call = "m.decode(view(given.cells), given.nodes, given.healths)"
    (node,) = js("chips", call, cells=list(strip.cells), nodes=strip.nodes, healths=strip.healths)
    known = {"use": 40, "memory": 25, "temp": 61, "power": 300, "health": "OK", "index": 7, "bad": False}
    nothing = dict.fromkeys(("use", "memory", "temp", "power"))
    assert node["number"] == 5 and node["list"] == [
        known,
        {**nothing, "health": "Warning", "index": 8, "bad": True},
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0627, "0.0627"), (1234.5, "1235"), (64000, "64k"), (1.387e6, "1.387M"), (2.5e-7, "2.5e-7")],
)
def test_numbers_are_short(js, value, text):
    assert js("curves", "m.label(given.value)", value=value) == text


def test_ticks_are_round_and_enclose_the_range(js):
    assert js("curves", "m.ticks(0, 87, 4)") == [0, 50, 100]
    assert js("curves", "m.ticks(0.02, 0.31, 4)") == [0, 0.1, 0.2, 0.3, 0.4]
    assert len(js("curves", "m.ticks(5, 5, 4)")) > 1, "a metric that never changes"
    assert js("curves", "m.logTicks(0.02, 3)") == [0.1, 1] and len(js("curves", "m.logTicks(0.5, 2)")) > 2


def test_smoothing_keeps_a_constant_and_none_is_none(js):
    assert js("curves", "m.smoothed([3, 3, 3], 0.9)") == pytest.approx([3, 3, 3])
    assert js("curves", "m.smoothed([1, 5, 2], 0)") == [1, 5, 2]
    first, second = js("curves", "m.smoothed([0, 1], 0.5)")
    assert first == 0 and second == pytest.approx(2 / 3)


def test_colours_of_chips_go_from_idle_to_busy_and_nothing_is_nothing(js):
    idle, busy, full = (
        js("chips", f"m.{call}") for call in ("useColor(0)", "useColor(100)", "memoryColor(99)")
    )
    assert idle == full == "rgb(200 76 52)" and busy == "rgb(38 96 196)"
    assert js("chips", "[m.useColor(null), m.memoryColor(null)]") == ["none", "none"]
