"""Models that are run and not trained: a reference, a teacher. Cut over the ranks as the trained one is.

A model of any size is then loaded on demand: each rank reads the bytes of its own share, and gives them back.
"""

from __future__ import annotations

import gc
from typing import Any

from lab_utils.engine.passes import Reader
from lab_utils.models.load import load_model


def frozen(source: str, recipe: Any, layout: Any, device: Any) -> Reader:
    """The weights of a source, in the recipe's precision, to be read under the layout.

    Raises:
        RecipeError, CheckpointError: as ``load_model``.
    """
    model = load_model(
        source,
        dtype=recipe.model.dtype,
        device=device,
        seed=recipe.seed,
        indexer_loss=0.0,
        defer=True,
    )
    wrapped, *_ = layout.configure(model)
    model.requires_grad_(False).eval()
    return Reader(model, wrapped, layout)


def release(reader: Reader) -> None:
    """Give a frozen model's memory back; the reader is of no more use."""
    reader.model = reader.raw = None
    gc.collect()
