"""Spoken style from a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.rewriting import RewriteError, RuleRewriter

log = logging.getLogger(__name__)

_PROMPT = """Rewrite the answer as a person would say it aloud to whoever asked the question. Keep its language, its \
facts and its meaning. Use short, simple, colloquial sentences. Write numbers, symbols and abbreviations as they are \
spoken. Use no lists, headings, Markdown, code, links or emoji. Reply with the rewritten answer and nothing else."""
_PATH = "/chat/completions"
_HOPELESS = (401, 403, 404)
"""What is answered to every request alike: a wrong key, a wrong address, an unknown model."""
_MAX_WAIT_S = 60.0


class RewriteCache:
    """What was rewritten before, in a JSONL file to which each new answer is added at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["text"]
            except (ValueError, TypeError, KeyError):  # a line that a killed run left half written
                log.warning("%s: passed over a broken line", path)

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def add(self, key: str, text: str) -> None:
        """Keep it, in memory and on disk."""
        # The line's end comes first, so that it also ends what a killed run left.
        line = "\n" + json.dumps({"key": key, "text": text}, ensure_ascii=False)
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(line)
            self._known[key] = text


@dataclass(frozen=True)
class EndpointRewriter:
    """Asks a model for the spoken form of each answer; what it writes goes through the rules once more."""

    url: str
    """As `http://localhost:8000/v1`, with or without `/chat/completions`."""
    model: str
    cache: RewriteCache
    rules: RuleRewriter
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    """Of one request."""
    attempts: int = 5
    backoff_s: float = 1.0
    """Before the second attempt; doubled before each further one."""

    def rewrite(self, question: str, answer: str, language: str | None) -> str:
        """See `Rewriter`."""
        content = json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
        messages = [{"role": "system", "content": _PROMPT}, {"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages}, ensure_ascii=False).encode()
        key = hashlib.sha256(body).hexdigest()
        spoken = self.cache.get(key)
        if spoken is None:
            spoken = _content_of(self._reply(body))
            self.cache.add(key, spoken)
        return self.rules.rewrite(question, spoken, language)

    def _reply(self, body: bytes) -> bytes:
        """The endpoint's reply, asked for again where that may help."""
        problem: Exception | None = None
        for attempt in range(self.attempts):
            if problem is not None:
                time.sleep(min(_MAX_WAIT_S, max(self.backoff_s * 2 ** (attempt - 1), _asked_wait_s(problem))))
            try:
                with urllib.request.urlopen(self._request(body), timeout=self.timeout_s) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                if error.code in _HOPELESS:
                    raise UserError(
                        f"{error.url}: {error}; see that --endpoint and --endpoint-model are right, and that the "
                        "environment variable which --endpoint-key-env names holds the key"
                    ) from None
                if error.code != 429 and error.code < 500:
                    raise RewriteError(f"{error.url}: {error}: {error.read(200).decode(errors='replace')}") from None
                problem = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
        if isinstance(problem, urllib.error.URLError) and isinstance(problem.reason, ConnectionError | socket.gaierror):
            raise UserError(
                f"{self.url}: cannot be reached: {problem.reason}; what is rewritten is kept for the next run"
            )
        raise RewriteError(f"{self.url}: {problem or 'no attempt was made'}, after {self.attempts} attempts")

    def _request(self, body: bytes) -> urllib.request.Request:
        url = self.url.rstrip("/").removesuffix(_PATH) + _PATH
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        if self.api_key:
            # Never sent on to where a reply redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        return request


def _asked_wait_s(problem: Exception) -> float:
    """What a Retry-After says, in seconds; 0 where there is none, or a date."""
    asked = problem.headers.get("Retry-After", "") if isinstance(problem, urllib.error.HTTPError) else ""
    return float(asked) if asked.isdigit() else 0.0


def _content_of(reply: bytes) -> str:
    """The text of a chat completion."""
    try:
        choice = json.loads(reply)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, TypeError, LookupError):
        raise RewriteError(f"the endpoint's reply is no chat completion: {reply[:80]!r}") from None
    if choice.get("finish_reason") == "length":
        raise RewriteError("the endpoint's answer was cut off; it allows too few tokens")
    # Models that think aloud close that with a tag.
    spoken = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    if not spoken:
        raise RewriteError("the endpoint's answer is empty")
    return spoken
