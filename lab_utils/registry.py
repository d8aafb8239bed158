"""How a plug-in folder finds its members: one file added beside its siblings is enough.

``members(package)`` lists the public modules of a folder without importing them; ``load(package, name)`` imports one
and returns it. There is no central list to edit, and an unknown name is answered with the nearest known one.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType


def nearest(name: str, known: list[str]) -> str:
    """A short hint for an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"


def members(package: str) -> list[str]:
    """Names of the public modules and folders inside ``package``, sorted; nothing is imported but the folder."""
    folder = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """The module ``package.name``.

    Raises:
        KeyError: no such member; the message names the nearest one.
    """
    known = members(package)
    if name not in known:
        raise KeyError(f"'{name}' is no member of {package}: {nearest(name, known)}")
    return importlib.import_module(f"{package}.{name}")
