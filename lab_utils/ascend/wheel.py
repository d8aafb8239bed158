"""The torch_npu wheel that the checks load, kept apart from site-packages.

torch_npu registers itself with ``torch.backends``: beside torch, and without CANN, it breaks every ``import torch``. So
``make setup`` puts it into a folder of its own (``<environment>/ascend``), which only child processes with the stand-in
see.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lab_utils.errors import LabError

VERSION = "2.13.0"  # of requirements-ascend.lock; the torch of the same version is in requirements.lock
INSTALL = "make setup, or pip install --no-deps --target {folder} torch_npu==" + VERSION


class NotPossibleHere(LabError):
    """The stand-in can't be built or loaded on this machine; the message says what is missing."""


def folder() -> Path:
    """Where the wheel is unpacked: ``ASCENT_ASCEND_WHEEL``, else ``ascend`` beside this environment's ``lib``."""
    return Path(os.environ.get("ASCENT_ASCEND_WHEEL") or Path(sys.prefix) / "ascend")


def location() -> Path | None:
    """The folder that holds torch_npu ``VERSION``; None where it isn't installed, or is another version."""
    place = folder()
    return place if (place / "torch_npu").is_dir() and version(place) == VERSION else None


def required() -> Path:
    """``location``, or why there is none.

    Raises:
        NotPossibleHere: the wheel isn't there, or is another version.
    """
    place = folder()
    if found := location():
        return found
    has = version(place)
    state = f"holds torch_npu {has}" if has else "holds no torch_npu"
    raise NotPossibleHere(
        f"{place} {state}, but the check is written for {VERSION}: {INSTALL.format(folder=place)}."
    )


def version(place: Path) -> str | None:
    """Version of the torch_npu below a folder, by its metadata; None without one."""
    found = sorted(place.glob("torch_npu-*.dist-info"))
    return found[-1].name.removeprefix("torch_npu-").removesuffix(".dist-info") if found else None


def libraries(place: Path) -> list[Path]:
    """The shared objects that ``import torch_npu`` loads; those of its graph compiler come later and need more."""
    package = place / "torch_npu"
    return [*sorted((package / "lib").glob("lib*.so")), *sorted(package.glob("_C.*.so"))]
