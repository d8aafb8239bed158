"""Whether the answer's Python passes the row's tests, in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lab_utils.rollouts.rewards import SILENT, Answer, Row
from lab_utils.rollouts.sandbox import Job, Limits, Sandbox

_FENCE = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)```", re.DOTALL)


class Code:
    """1 for code that passes all tests of ``row["tests"]``, else 0; rows without tests are passed over.

    Tests are Python statements, each a text that raises where it fails (``assert f(2) == 4``), or cases
    ``{"input": text, "output": text}`` for a program that reads standard input.

    Args:
        partial: score the share of tests passed instead.
        seconds: wall time of one answer, and of one case.
        memory_mib: address space.
        workers: answers run at a time.
    """

    def __init__(
        self, partial: bool = False, seconds: float = 10.0, memory_mib: int = 512, workers: int = 4
    ) -> None:
        self.partial = partial
        self.sandbox = Sandbox(Limits(seconds=seconds, cpu_seconds=seconds, memory_mib=memory_mib), workers)

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        scores = [SILENT] * len(rows)
        tested = [i for i, row in enumerate(rows) if row.get("tests")]
        jobs = [Job(program(answers[i].text), rows[i]["tests"]) for i in tested]
        for i, verdict in zip(tested, self.sandbox.run(jobs), strict=True):
            share = verdict.passed / verdict.total
            scores[i] = share if self.partial else float(verdict.status == "passed")
        return scores


def program(text: str) -> str:
    """The Python in an answer: its last fenced block, or all of it where there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


REWARD = Code
