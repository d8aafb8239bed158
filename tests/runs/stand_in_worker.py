"""Stands in for the engine's worker in tests of runs and launchers: the same files and signals, no model.

``ASCENT_WORKER_MODULE=stand_in_worker`` puts it in the worker's place. What goes wrong is said in
``STAND_IN`` (JSON): ``seconds`` a step, ``fail``: {"rank", "step", "how"} with how = error, user_error, exit
or a signal's name.
"""

import json
import os
import signal
import sys
import time

from lab_utils.errors import DataError
from lab_utils.runs.directory import RunDirectory
from lab_utils.telemetry.jsonl import JsonlSink


def main(path: str) -> int:
    options = json.loads(os.environ.get("STAND_IN", "{}"))
    run, rank = RunDirectory(path), int(os.environ["RANK"])
    recipe = run.recipe
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append("checkpoint_and_stop"))
    complete = run.checkpoints()
    step = int(complete[-1].name.removeprefix("step-")) if complete else 0
    sink = JsonlSink()
    if rank == 0:
        sink.open(run.path, recipe, {})
        run.write_status(state="running", world_size=int(os.environ["WORLD_SIZE"]), step=step)
    print(f"rank {rank} starts at step {step}", flush=True)
    fail = options.get("fail")
    while step < recipe.schedule.steps:
        action = told[0] if told else run.control["action"]
        if action and not options.get("deaf"):
            if action == "checkpoint_and_stop" and rank == 0:
                save(run, step)
            if rank == 0:
                run.write_status(state="stopped", step=step)
            return 0
        time.sleep(options.get("seconds", 0.02))
        step += 1
        if fail and (rank, step) == (fail["rank"], fail["step"]):
            break_down(fail["how"], rank)
        if rank == 0:
            sink.log(step, {"train/loss": 1 / step, "perf/tokens_per_s": 1000.0})
            run.write_status(step=step)
            if step % 10 == 0:
                save(run, step)
    if rank == 0:
        save(run, step)
        sink.close("succeeded")
        run.write_status(state="succeeded")
    return 0


def break_down(how: str, rank: int) -> None:
    if how == "error":
        raise ValueError("the seventh seal is open")
    if how == "user_error":
        raise DataError("train.jsonl, line 7: 'messages' is missing; add it.")
    if how == "exit":
        print("Error: no more ideas", file=sys.stderr, flush=True)
        os._exit(9)
    os.kill(os.getpid(), getattr(signal, how))


def save(run: RunDirectory, step: int) -> None:
    folder = run.path / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMPLETE").touch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
