"""The shards of thousands of ranks add up to the model, cut by the engine's own plugin and policy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lab_utils.bench.layouts import shards_of
from lab_utils.errors import LayoutError

RELEASED = {"pro": (1_572_997_179_491, 25_840_145_595), "flash": (284_332_230_231, 6_610_048_635)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, ranks, ep, pp, virtual",
    [("pro", 2048, 64, 16, 1), ("pro", 1024, 32, 4, 3), ("flash", 256, 64, 4, 2)],
)
def test_every_parameter_is_held_once(name: str, ranks: int, ep: int, pp: int, virtual: int) -> None:
    command = [sys.executable, "-m", "lab_utils.cli", "verify", "shards", name, "--json", f"--ranks={ranks}"]
    command += [f"--ep={ep}", f"--pp={pp}", f"--virtual-stages={virtual}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    main, mtp = RELEASED[name]
    assert told["mtp"] == mtp
    assert told["parameters"] == main + mtp
    assert len(told["stages"]) == pp
    layers = sorted(
        layer for row in told["stages"] for start, stop in row["layers"] for layer in range(start, stop)
    )
    assert layers == list(range(len(layers))), "each layer on one stage"
    heaviest = max(row["dense"] + row["experts"] for row in told["stages"])
    assert heaviest < 2 * told["parameters"] / (ep * pp) + 4e9, "no rank holds a multiple of its share"


def test_degrees_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutError, match="don't divide 2048 ranks"):
        shards_of("preset:pro", 2048, {"ep": 48, "pp": 16, "virtual_stages": 1}, True)
