"""A run's newest checkpoint as a folder that transformers loads and generates with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lab_utils.engine import checkpoint
from lab_utils.errors import CheckpointError


def export(run_dir: Any, out_dir: str | Path) -> dict[str, Any]:
    """Write safetensors, config, generation config and tokenizer, and check that transformers takes them.

    Everything is written beside ``out_dir`` and renamed once it has been loaded back.

    Returns:
        ``path``, ``checkpoint``, ``files``, ``bytes``.

    Raises:
        CheckpointError: no whole checkpoint, ``out_dir`` holds something, or what was written does not load.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists and is not an empty folder: give another folder; nothing is overwritten."
        )
    found, _ = checkpoint.newest(Path(run_dir.path) / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run_dir.path} has no checkpoint to export: let the run save one first.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(found / "model", partial)
        _write_generation_config(partial)
        _check_loads(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out}: the export could not be written ({error}); the run is untouched."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(p for p in out.iterdir() if p.is_file())
    sizes = sum(p.stat().st_size for p in files)
    return {"path": str(out), "checkpoint": found.name, "files": [p.name for p in files], "bytes": sizes}


def _write_generation_config(folder: Path) -> None:
    """Greedy, ending at the tokenizer's end token: without it ``generate`` would run to its length limit."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id).save_pretrained(
        folder
    )


def _check_loads(folder: Path) -> None:
    """Load it as a user would, and see that no tensor is missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    try:
        _, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}: transformers does not load the exported model ({reason})."
        ) from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if odd := sorted(str(key) for key in info.get(kind, ())):
            raise CheckpointError(
                f"{folder}: transformers finds {kind.replace('_', ' ')} in the export: {odd[0]}."
            )
