"""A W&B server that somebody named: which one, whether it can be reached, and what it has of a run already."""

from __future__ import annotations

import json
import netrc
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lab_utils.errors import RunError
from lab_utils.telemetry.wandb import NOWHERE
from lab_utils.telemetry.wandb_reader import Piece

RECORD = "synced.json"


def server(named: str | None, recipe_url: str | None, run: str) -> str:
    """The server to send to: the one that is named, else the recipe's.

    Raises:
        RunError: neither says one, so nothing leaves this machine.
    """
    url = (named or recipe_url or "").rstrip("/")
    if not url or url == NOWHERE:
        raise RunError(
            f"{run} names no W&B server and nothing leaves this machine unasked: give --url, or set tracking.base_url."
        )
    if urlsplit(url).scheme not in ("http", "https"):
        raise RunError(f"{url} is no address of a W&B server: expected http://… or https://….")
    return url


def check(url: str) -> None:
    """That there is a key for the server and that it answers, before anything is started.

    Raises:
        RunError: no key, or no answer.
    """
    named = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if not named and not _in_netrc(urlsplit(url).netloc):  # where `wandb login` puts it
        raise RunError(f"There is no key for {url}: set WANDB_API_KEY, or run wandb login --host {url}.")
    try:
        urllib.request.urlopen(url, timeout=20).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RunError(
            f"{url} does not answer ({reason}): check the address, the network and the proxy."
        ) from None


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Record:
    """Which pieces a server has, by their size when they were sent."""

    def __init__(self, run_dir: Path, url: str):
        self.path, self.url = run_dir / "wandb" / RECORD, url
        self._lock = threading.Lock()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def has(self, piece: Piece) -> bool:
        return self._read().get(self.url, {}).get(piece.path.name, {}).get("size") == piece.size

    def add(self, piece: Piece, size: int) -> None:
        """``size``: of the log when the sending began."""
        from lab_utils.runs.directory import write_atomic

        with self._lock:
            known = self._read()
            known.setdefault(self.url, {})[piece.path.name] = {"size": size, "time": round(time.time(), 3)}
            write_atomic(self.path, json.dumps(known, indent=1))
