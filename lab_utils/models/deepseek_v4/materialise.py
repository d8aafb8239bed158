"""Values for a DeepSeek-V4 that was made without memory: of a checkpoint, or fresh by seed.

A model on the meta device can be cut before it has values. What is left of it on a rank is filled here, tensor by
tensor, and of a tensor whose parameter is marked with ``rows`` only those: no byte of another rank's share is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from lab_utils.errors import CheckpointError
from lab_utils.models.deepseek_v4.formats.reader import CheckpointReader
from lab_utils.models.deepseek_v4.initialize import initialize, initialize_mtp, initialize_score
from lab_utils.models.deepseek_v4.model import DeepseekV4

_log = logging.getLogger(__name__)

SCORE = "score.weight"
FULL_PRECISION = "e_score_correction_bias"  # moves in steps of 0.001: never rounded to the working dtype


def without_memory(config: DeepseekV4Config, **options: Any) -> DeepseekV4:
    """A ``DeepseekV4`` on the meta device."""
    with torch.device("meta"):
        return DeepseekV4(config, **options)


def deferred(
    model: DeepseekV4, folder: Path | None, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> DeepseekV4:
    """The model, with its ``materialise`` set: from a checkpoint folder, or fresh where there is none."""
    put = partial(_put, model, dtype=dtype, device=device)
    fill = (
        partial(_from_checkpoint, model, folder, put, seed)
        if folder
        else partial(initialize, model, seed, put)
    )

    def materialise() -> None:
        fill()
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:  # counts that no checkpoint holds
                put(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        model.materialise = None

    model.materialise = materialise
    return model


def _put(model: nn.Module, name: str, value: Tensor, *, dtype: torch.dtype, device: Any) -> None:
    """Put a value where the model has a tensor of this name without memory, marks and all."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    wanted = dtype if value.is_floating_point() and leaf != FULL_PRECISION else None
    value = value.to(device=device, dtype=wanted)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        module._parameters[leaf] = new
    else:
        module._buffers[leaf] = value


def _from_checkpoint(model: DeepseekV4, folder: Path, put: Callable[[str, Tensor], None], seed: int) -> None:
    """Every tensor that the model holds, in any of DeepSeek-V4's formats.

    Raises:
        CheckpointError: a file missing or truncated, tensors that are not those of the configuration.
    """
    reader = CheckpointReader(folder)
    found = {name: reader.shape(name) for name in reader.names()}
    fresh = bool(len(model.mtp)) and not any(name.startswith("mtp.") for name in found)
    unscored = model.scored and SCORE not in found
    if unscored:
        _log.warning("%s has no %s: the reward model's head starts fresh, by seed.", folder, SCORE)
    if fresh:
        _log.warning(
            "%s has no tensors of multi-token prediction (mtp.*): they start fresh, by seed.", folder
        )
    for name, shape in model.whole_shapes.items():
        if (fresh and name.startswith("mtp.")) or (unscored and name == SCORE):
            continue
        if name not in found:
            raise CheckpointError(
                f"{folder}: tensor {name} is missing; the checkpoint doesn't fit its config.json."
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(found[name])}, config.json asks for {list(shape)}; use the "
                "config.json that belongs to these weights."
            )
    spare = ("mtp.", "lm_head.") if model.scored else ("mtp.",)
    unknown = sorted(name for name in set(found) - set(model.whole_shapes) if not name.startswith(spare))
    if unknown:
        raise CheckpointError(
            f"{folder}: tensor {unknown[0]} ({len(unknown)} in all) has no place in a DeepSeek-V4 model."
        )
    try:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if (fresh and name.startswith("mtp.")) or (unscored and name == SCORE):
                continue
            start = getattr(tensor, "rows", (0,))[0]
            rows = slice(start, start + len(tensor)) if tensor.ndim else None
            put(name, reader.read(name, rows))
    finally:
        reader.close()
    if fresh:
        initialize_mtp(model, seed, put)
    if unscored:
        initialize_score(model, seed, put)
