"""Handlers of widgets never raise: a notebook would lose the error."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from lab_utils.errors import LabError


def guarded(handler: Callable[..., None]) -> Callable[..., None]:
    """A method whose errors are said by its object: ``say(sentence, bad=True)``."""

    @wraps(handler)
    def safe(self: Any, *arguments: Any) -> None:
        try:
            handler(self, *arguments)
        except LabError as error:
            self.say(str(error), bad=True)
        except Exception as error:
            self.say(f"{type(error).__name__}: {error}", bad=True)

    return safe
