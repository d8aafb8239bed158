"""What every part of a recipe is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One part of a recipe: frozen, typed, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
