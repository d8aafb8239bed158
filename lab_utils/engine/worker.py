"""One rank of a job: ``python -m lab_utils.engine.worker RUN_PATH``, started by torchrun.

Ends with 0 when the run succeeded or was stopped. A run that fails leaves one sentence in ``status.json`` and on
standard error; a traceback goes to the log only for what is no error of the user's, or with ``--debug``.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any

from lab_utils.accelerators import get_accelerator
from lab_utils.errors import LabError
from lab_utils.recipe import Recipe

# Weights up to this size are audited as their run ends; larger ones by `lab audit`, when somebody has the time.
AUDIT_BYTES = 4 * 2**30
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "recvBytes",
    "Broken pipe",
    "HCCL",
    "NCCL",
)


def main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    path = next((a for a in arguments if not a.startswith("-")), None)
    if path is None:
        print("usage: python -m lab_utils.engine.worker RUN_PATH [--debug]", file=sys.stderr)
        return 2
    from lab_utils.runs.directory import RunDirectory

    run_dir = RunDirectory(path)
    engine = None
    try:
        recipe: Recipe = run_dir.recipe
        accelerator = get_accelerator(recipe.cluster.accelerator)
        # ColossalAI takes seconds to import: not before the recipe is read.
        from lab_utils.engine.engine import Engine

        engine = Engine(recipe, accelerator, run_dir)
        state = engine.fit()
    except KeyboardInterrupt:
        _record(run_dir, engine, "interrupted from the keyboard")
        return 130
    except LabError as error:
        if debug:
            traceback.print_exc()
        _record(run_dir, engine, str(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if any(sign in str(error) for sign in LOST_PEER) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _record(run_dir, engine, _lost_peer(), primary=False)
        else:
            text = " ".join(str(error).split())[:300]
            _record(
                run_dir,
                engine,
                f"{_where(engine)}: {type(error).__name__}: {text} (traceback in the rank's log).",
            )
        return 1
    if engine.rank == 0:
        _card(run_dir, audited=state == "succeeded")
    return 0


def _where(engine: Any) -> str:
    rank = os.environ.get("RANK", "0")
    return (
        f"Rank {rank}, after step {engine.progress.step}" if engine else f"Rank {rank}, before the first step"
    )


def _lost_peer() -> str:
    return (
        f"Rank {os.environ.get('RANK', '0')} lost its connection to another rank, which died or was killed: "
        f"see the end of the other ranks' logs, then resume from the last checkpoint."
    )


def _record(run_dir: Any, engine: Any, sentence: str, primary: bool = True) -> None:
    """Leave the sentence. A rank that only saw another one vanish waits, and doesn't overwrite that one's own words."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    if not primary:
        time.sleep(1.0)
        if (run_dir.status or {}).get("state") == "failed":
            return
    run_dir.write_status(state="failed", error=sentence)
    if engine is not None:
        engine.fail(sentence)


def _card(run_dir: Any, audited: bool) -> None:
    """What the run was and did, for people; whatever happens here, the run is what it was.

    Args:
        audited: with an audit, where weights are few. A run that had to stop may have no time for one.
    """
    from lab_utils.runs import card

    card.refresh(run_dir)
    try:
        found = run_dir.checkpoints()
        size = (
            sum(file.stat().st_size for file in (found[-1] / "model").glob("*.safetensors")) if found else 0
        )
        if audited and 0 < size <= AUDIT_BYTES:
            from lab_utils.engine.audit import audit

            audit(run_dir)
    except (Exception, KeyboardInterrupt) as error:
        print(f"warning: not audited ({error}): lab audit {run_dir.name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # A process group with a dead member would wait for it in its destructor.
    os._exit(code)
