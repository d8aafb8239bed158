"""Stand-ins for the commands of schedulers: scripts on a PATH of the test's own, which write down each call."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

BODY = """#!{python}
import json, sys
with open({calls!r}, "a") as stream:
    stream.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
words = sys.argv[1:]
answers = json.load(open({answers!r}))
"""
ANSWER = """
for start, (code, out, err) in answers.get({name!r}, []):
    if start in " ".join(words):
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(code)
sys.exit("no answer for " + " ".join(words))
"""


class Commands:
    """Commands that give the first answer whose key is part of how they are called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.calls_file, self.answers_file = folder / "calls.jsonl", folder / "answers.json"
        self.answers: dict[str, list] = {}
        self.answers_file.write_text("{}")
        (folder / "bin").mkdir()
        for name in names:
            script = folder / "bin" / name
            head = BODY.format(
                python=sys.executable, name=name, calls=str(self.calls_file), answers=str(self.answers_file)
            )
            script.write_text(head + ANSWER.format(name=name))
            script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def answer(self, name: str, part: str, out: str = "", code: int = 0, err: str = "") -> None:
        """What ``name`` says from now on when called with ``part``; the newest answer goes first."""
        self.answers.setdefault(name, []).insert(0, (part, (code, out, err)))
        self.answers_file.write_text(json.dumps(self.answers))

    def calls(self, name: str | None = None) -> list[list[str]]:
        if not self.calls_file.exists():
            return []
        found = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [call for call in found if name in (None, call[0])]
