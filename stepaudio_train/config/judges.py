"""Typed, frozen configuration of who judges synthesised speech. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class JudgeOptions:
    """Who is to judge. `none` leaves a judge out."""

    __pydantic_config__ = _STRICT

    recogniser: str = "pocketsphinx"
    """pocketsphinx (English); whisper:FOLDER of a transformers model; endpoint:URL of an OpenAI-compatible server, as
    endpoint:http://localhost:8000/v1, behind which Paraformer may be."""
    speaker: str = "resemblyzer"
    """resemblyzer; campplus:FILE.onnx; eres2net:FILE.onnx."""
    quality: str = "dnsmos"
    words: tuple[str, ...] = ()
    """pocketsphinx hears these words alone, in any order; far better than all English where they are few."""
    language: str | None = None
    """Code, as `en`, that Whisper and endpoints are told; they guess if not given."""
    endpoint_model: str = "whisper-1"
    endpoint_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key."""
