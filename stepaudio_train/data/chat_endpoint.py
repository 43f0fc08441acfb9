"""A language model behind an OpenAI-compatible endpoint, whose replies are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from stepaudio_train.data.json_posts import JsonPosts, ReplyError

log = logging.getLogger(__name__)

_PATH = "/chat/completions"
_IF_REFUSED = (
    "see that this address and --endpoint-model are right, and that the environment variable which --endpoint-key-env "
    "names holds the key"
)
_IF_UNREACHABLE = "what it replied before is kept for the next run"

T = TypeVar("T")


class ReplyCache:
    """What was replied before, in a JSONL file to which each new reply is added at once."""

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
class ChatEndpoint:
    """Asks a model. Several threads may do so at once."""

    url: str
    """As `http://localhost:8000/v1`, with or without `/chat/completions`."""
    model: str
    cache: ReplyCache
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    """Of one request."""
    attempts: int = 5
    backoff_s: float = 1.0
    """Before the second attempt; doubled before each further one."""

    @classmethod
    def with_key_of(cls, variable: str, url: str, model: str, cache: ReplyCache) -> ChatEndpoint:
        """With the key that an environment variable holds; without one where it holds none."""
        return cls(url, model, cache, os.environ.get(variable, "").strip() or None)

    def ask(self, instruction: str, content: object, read: Callable[[str], T]) -> T:
        """What `read` makes of the model's reply. Only a reply that could be read is kept.

        Args:
            instruction: the system's turn.
            content: of the user's turn, as JSON.

        Raises:
            ReplyError: no reply could be had, or `read` raised it.
            UserError: none can be.
        """
        written = json.dumps(content, ensure_ascii=False)
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": written}]
        body = json.dumps({"model": self.model, "messages": messages}, ensure_ascii=False).encode()
        key = hashlib.sha256(body).hexdigest()
        known = self.cache.get(key)
        reply = _content_of(self._reply(body)) if known is None else known
        found = read(reply)
        if known is None:
            self.cache.add(key, reply)
        return found

    def _reply(self, body: bytes) -> bytes:
        """The endpoint's reply, asked for again where that may help."""
        url = self.url.rstrip("/").removesuffix(_PATH) + _PATH
        waits = (self.timeout_s, self.attempts, self.backoff_s)
        return JsonPosts(url, _IF_REFUSED, _IF_UNREACHABLE, self.api_key, *waits).send(body)


def _content_of(reply: bytes) -> str:
    """The text of a chat completion."""
    try:
        choice = json.loads(reply)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, TypeError, LookupError):
        raise ReplyError(f"the endpoint's reply is no chat completion: {reply[:80]!r}") from None
    if choice.get("finish_reason") == "length":
        raise ReplyError("the endpoint's answer was cut off; it allows too few tokens")
    # Models that think aloud close that with a tag.
    text = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    if not text:
        raise ReplyError("the endpoint's answer is empty")
    return text
