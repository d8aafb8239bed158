"""The child process of one check: ``python -m lab_utils.ascend.child NAME``; see ``check``."""

from __future__ import annotations

import json
import os
import sys
import traceback

from lab_utils.ascend.check import CHECKS, MARK
from lab_utils.registry import load


def main(name: str) -> None:
    module = load(CHECKS, name)
    left = list(module.PROVES)
    try:
        for part, ok, found in module.run():
            _answer(part, ok, found)
            left.remove(part)
    except Exception as error:  # whatever a check meets is its finding
        traceback.print_exc()
        words = " ".join(str(error).split())
        for part in left[:1]:
            _answer(part, False, f"{type(error).__name__}: {words[:500]}")
        for part in left[1:]:
            _answer(part, False, f"not reached: {left[0]} failed before it")
    sys.stdout.flush()
    os._exit(0)  # torch_npu winds up a runtime that isn't there


def _answer(part: str, ok: bool, found: str) -> None:
    print(MARK + json.dumps([part, ok, found], ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
