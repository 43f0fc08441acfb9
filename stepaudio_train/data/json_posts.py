"""JSON sent to a server over HTTP, again where that may help."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from stepaudio_train.config.errors import UserError

_HOPELESS = (401, 403, 404)
"""What is answered to every request alike: a wrong key, a wrong address, an unknown model."""
_MAX_WAIT_S = 60.0


class ReplyError(ValueError):
    """One reply that could not be had, or not be read. The message says why."""


@dataclass(frozen=True)
class JsonPosts:
    """Posts to one address. Several threads may do so at once."""

    url: str
    if_refused: str
    """What to see to when every request would be refused; ends the message."""
    if_unreachable: str
    """What to see to, or know, when the server cannot be reached; ends the message."""
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    """Of one request."""
    attempts: int = 5
    backoff_s: float = 1.0
    """Before the second attempt; doubled before each further one."""

    def send(self, body: bytes) -> bytes:
        """The server's reply.

        Raises:
            ReplyError: not to this request.
            UserError: to none.
        """
        problem: Exception | None = None
        for attempt in range(self.attempts):
            if problem is not None:
                time.sleep(min(_MAX_WAIT_S, max(self.backoff_s * 2 ** (attempt - 1), _asked_wait_s(problem))))
            try:
                with urllib.request.urlopen(self._request(body), timeout=self.timeout_s) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                if error.code in _HOPELESS:
                    raise UserError(f"{error.url}: {error}; {self.if_refused}") from None
                if error.code != 429 and error.code < 500:
                    raise ReplyError(f"{error.url}: {error}: {error.read(200).decode(errors='replace')}") from None
                problem = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
        if isinstance(problem, urllib.error.URLError) and isinstance(problem.reason, ConnectionError | socket.gaierror):
            raise UserError(f"{self.url}: cannot be reached: {problem.reason}; {self.if_unreachable}")
        raise ReplyError(f"{self.url}: {problem or 'no attempt was made'}, after {self.attempts} attempts")

    def _request(self, body: bytes) -> urllib.request.Request:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        if self.api_key:
            # Never sent on to where a reply redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        return request


def _asked_wait_s(problem: Exception) -> float:
    """What a Retry-After says, in seconds; 0 where there is none, or a date."""
    asked = problem.headers.get("Retry-After", "") if isinstance(problem, urllib.error.HTTPError) else ""
    return float(asked) if asked.isdigit() else 0.0
