"""JSON over HTTP to a server: straight, never through a proxy, tried again while the trouble may pass."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from lab_utils.errors import RunError

KEY_VARIABLE = "ASCENT_SERVER_KEY"  # of the environment: a recipe holds no secrets
PASSING = (408, 425, 429, 500, 502, 503, 504)
REFUSED = (400, 404, 422)


class Refused(RunError):
    """The server understood, and won't: another form of the request may do."""


@dataclass(frozen=True)
class Line:
    """How requests are made.

    Attributes:
        timeout: seconds without a byte until a request is given up.
        tries: of a request that fails in passing.
        backoff: seconds before the second try; doubled before each further one.
    """

    timeout: float
    tries: int
    backoff: float

    def json(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of a reply.

        Raises:
            Refused: the server says that the request is not one for it.
            RunError: any other error, or no connection after all tries.
        """
        problem = ""
        for number in range(self.tries):
            if number:
                time.sleep(self.backoff * 2 ** (number - 1))
            try:
                status, data = self._exchange(method, url, body)
            except (OSError, HTTPException) as error:
                problem = str(error) or type(error).__name__
                continue
            if status < 300:
                return _parsed(url, data)
            said = data.decode("utf-8", "replace").strip()[:300]
            if status in REFUSED:
                raise Refused(f"{url} answered {status}: {said}")
            if status not in PASSING:
                raise RunError(f"{url} answered {status}: {said or 'nothing'}; see the server's log.")
            problem = f"{status}: {said}"
        raise RunError(
            f"{url} can't be reached or keeps failing ({self.tries} tries, the last: {problem}): check that the server "
            "runs and has loaded its model, that rollout.server has its host and port, and that this machine may "
            "connect."
        )

    def _exchange(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        try:
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _parsed(url: str, data: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(data) if data.strip() else {}
    except ValueError:
        raise RunError(f"{url}: expected JSON, found {data[:80]!r}: check the address.") from None
    return reply if isinstance(reply, dict) else {"reply": reply}
