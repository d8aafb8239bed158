"""``lab``: the command line. Verbs live in their packages' ``commands.py``; this file only hangs them up.

Start-up imports neither torch nor colossalai, so ``lab --help`` answers in well under a second on a login node. A
command that fails prints one sentence on standard error and exits non-zero; ``lab --debug ...`` shows the traceback.
"""

from __future__ import annotations

import importlib
import sys

import typer

from lab_utils.errors import LabError

# verb -> (module, attribute): a typer app becomes a group, a function a plain verb.
VERBS = {
    "run": ("lab_utils.runs.commands", "run_command"),
    "runs": ("lab_utils.runs.commands", "app"),
    "render": ("lab_utils.launchers._commands", "render"),
    "card": ("lab_utils.runs.card_command", "card"),
    "recipe": ("lab_utils.recipes._commands", "app"),
    "plan": ("lab_utils.planner.commands", "plan"),
    "data": ("lab_utils.data.commands", "app"),
    "model": ("lab_utils.models.commands", "app"),
    "convert": ("lab_utils.models.convert_command", "convert"),
    "audit": ("lab_utils.engine.commands", "audit"),
    "export": ("lab_utils.engine.commands", "export"),
    "eval": ("lab_utils.evaluation.commands", "evaluate"),
    "bench": ("lab_utils.bench.commands", "app"),
    "verify": ("lab_utils.bench.verify_commands", "app"),
    "twin": ("lab_utils.planner.twin_commands", "twin"),
    "kernels": ("lab_utils.bench.kernels_commands", "app"),
    "notebook": ("lab_utils.panels.commands", "notebook"),
    "kernelspec": ("lab_utils.panels.kernelspec", "app"),
    "ascend": ("lab_utils.ascend.commands", "app"),
    "doctor": ("lab_utils.doctor.commands", "doctor"),
    "chips": ("lab_utils.telemetry.commands", "chips"),
    "wandb": ("lab_utils.telemetry.commands", "wandb"),
}

app = typer.Typer(
    help="Ascent: full-parameter post-training of DeepSeek-V4-class models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # help in plain text: rich would cost more than all the rest of the start
    context_settings={"max_content_width": 120},
)


@app.callback()
def _root(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    """Options that stand before the verb."""


def _mount() -> None:
    for verb, (module, attribute) in VERBS.items():
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=verb)
        else:
            # `lab notebook` passes -p key value pairs on as they are.
            settings = getattr(target, "context_settings", None)
            app.command(verb, context_settings=settings)(target)


def main() -> None:
    """The entry point of the console script."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    _mount()
    try:
        app()
    except LabError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        print(
            f"error: {type(error).__name__}: {error}; run again with --debug for the traceback.",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
