"""Questions about a recipe that the kernel itself must not work on: answered by an interpreter beside it.

What imports torch, reads whole data sets or starts jobs happens in ``python -m lab_utils.widgets._away``: the kernel
stays light and answers its buttons. The process reads a question a line, writes an answer a line, and ends by itself
when nothing has been asked for a while, or when the kernel has gone.

    away = Away()
    away.ask("plan", recipe)               # seconds the first time, then milliseconds
    away.ask("checks", recipe, root="runs")
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from lab_utils import errors
from lab_utils.errors import LabError, RunError
from lab_utils.recipe import Recipe

IDLE_SECONDS = 120.0


class Away:
    """The process beside the kernel; started when first asked. Threads may share one: it answers in turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._errors: Any = None

    def ask(self, question: str, recipe: Recipe, **arguments: Any) -> Any:
        """The answer of one of ``_questions.QUESTIONS``. Blocks: call it from a thread.

        Raises:
            LabError: as the question's function does; a process that ended without an answer is a ``RunError``.
        """
        tree = recipe.model_dump(mode="json")
        # The kernel may have changed its folder or variables since the process began.
        asked = {"question": question, "recipe": tree, "arguments": arguments}
        asked |= {"folder": os.getcwd(), "environment": dict(os.environ)}
        with self._lock:
            line = self._exchange(json.dumps(asked).encode() + b"\n")
        if not line:
            raise RunError(f"The process for '{question}' ended without an answer: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"], RunError)(answer["error"])
        return answer["answer"]

    def _exchange(self, line: bytes) -> bytes:
        """A question out and an answer in; a process that has ended for idleness is started again."""
        for _ in range(2):
            process = self._running()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                if answer := process.stdout.readline():
                    return answer
            except (OSError, ValueError):  # it ended in this moment, or ``end`` closed its pipes
                pass
            if process.wait() != 0:
                break  # it broke over the question: a second try would too
        return b""

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # an interrupt of the kernel is not meant for it
            )
        return self._process

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it was ended from outside; try again."

    def end(self) -> None:
        """End the process now, in the middle of an answer too; the next question starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def interrupt(self) -> None:
        """End an answer that is under way, and that nobody waits for any more."""
        if self._lock.locked():
            self.end()


class Latest:
    """One question at a time in a thread: a later one takes the place of an earlier one.

    Args:
        deliver: called in the thread, under the lock, with what the work returned, or with the error that it raised.
        lock: re-entrant, and the one that guards all that ``deliver`` touches: with two, threads could wait for each
            other.
    """

    def __init__(self, deliver: Callable[[Any], None], lock: Any):
        self._deliver, self._lock = deliver, lock
        self._current = threading.Event()

    def ask(self, work: Callable[[], Any], delay: float = 0.0) -> None:
        """Work after ``delay`` seconds, unless something else is asked for until then."""
        self.drop()
        self._current = threading.Event()
        threading.Thread(target=self._run, args=(work, delay, self._current), daemon=True).start()

    def drop(self) -> None:
        """Want no answer any more."""
        with self._lock:
            self._current.set()

    def _run(self, work: Callable[[], Any], delay: float, dropped: threading.Event) -> None:
        if dropped.wait(delay):
            return
        try:
            found = work()
        except Exception as error:  # whatever it is, it belongs on the page and not in a lost thread
            found = error
        with self._lock:
            if not dropped.is_set():
                self._deliver(found)


# -- in the other process ------------------------------------------------------------------------------------


def answer(line: bytes) -> dict[str, Any]:
    """The answer to one line, or the error as a sentence."""
    from lab_utils.widgets._questions import QUESTIONS

    asked = json.loads(line)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    try:
        return {"answer": QUESTIONS[asked["question"]](Recipe.parse(asked["recipe"]), **asked["arguments"])}
    except LabError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except Exception as error:  # the form shows a sentence, whatever it is
        return {"error": f"{type(error).__name__}: {error}", "kind": "RunError"}


def main() -> None:
    # Whatever a library prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while select.select([0], [], [], IDLE_SECONDS)[0]:
        if not (line := sys.stdin.buffer.readline()):
            return
        answers.write(json.dumps(answer(line)).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
