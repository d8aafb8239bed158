"""Processes that ``lab ascend selftest`` starts: each reads a file of options and leaves a file of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(main: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """What a worker does as a program: its first rank writes what ``main`` makes of the options; never returns."""
    given = json.loads(Path(sys.argv[1]).read_text())
    found = main(given)
    import torch.distributed as dist

    from lab_utils.engine import colossal

    if dist.get_rank() == 0:
        Path(given["out"]).write_text(json.dumps(found))
    colossal.leave()
