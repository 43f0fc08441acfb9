"""Speech recognition by a server: OpenAI's `/v1/audio/transcriptions`, which many servers offer."""

from __future__ import annotations

import http.client
import io
import json
import socket
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field

import soundfile
from torch import Tensor

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.config.errors import UserError

_PATH = "/audio/transcriptions"
_HOPELESS = (401, 403, 404)
"""What is answered to every request alike: a wrong key, a wrong address, an unknown model."""


class JudgeError(UserError):
    """A judge could not judge one waveform; the message says why."""


@dataclass(frozen=True)
class EndpointRecogniser:
    """Sends each waveform as a 16-bit WAV file."""

    url: str
    """As `http://localhost:8000/v1`, with or without `/audio/transcriptions`."""
    model: str
    language: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        """Raises:
        UserError: the address is not one of the web.
        """
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{self.url}: is no address of a server; type one as endpoint:http://localhost:8000/v1")

    def transcribe(self, waveform: Tensor) -> str:
        """See `Recogniser`.

        Raises:
            JudgeError: not this waveform. UserError: the server is not there, or wants another key or model.
        """
        try:
            with urllib.request.urlopen(self._request(waveform), timeout=self.timeout_s) as reply:
                content = reply.read()
        except urllib.error.HTTPError as error:
            problem = f"{self.url}: {error}: {error.read(200).decode(errors='replace')}"
            if error.code in _HOPELESS:
                raise UserError(f"{problem}; see that address, --endpoint-model and the key are right") from None
            raise JudgeError(problem) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            hopeless = isinstance(reason, ConnectionError | socket.gaierror)
            raise (UserError if hopeless else JudgeError)(f"{self.url}: cannot be reached: {reason}") from None
        try:
            text = json.loads(content)["text"]
        except (ValueError, TypeError, LookupError):
            text = None
        if not isinstance(text, str):
            raise JudgeError(f"{self.url}: the reply is no transcription: {content[:80]!r}")
        return text

    def _request(self, waveform: Tensor) -> urllib.request.Request:
        recording = io.BytesIO()
        soundfile.write(recording, waveform.numpy(), SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
        fields = {"model": self.model, "response_format": "json"}
        if self.language:
            fields["language"] = self.language
        boundary = uuid.uuid4().hex
        body = _form(fields, recording.getvalue(), boundary)
        url = self.url.rstrip("/").removesuffix(_PATH) + _PATH
        request = urllib.request.Request(url, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        if self.api_key:
            # Never sent on to where a reply redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        return request


def _form(fields: dict[str, str], recording: bytes, boundary: str) -> bytes:
    """A multipart form (RFC 7578) of text fields and `file`."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    head = 'Content-Disposition: form-data; name="file"; filename="speech.wav"\r\nContent-Type: audio/wav'
    return f"{''.join(parts)}--{boundary}\r\n{head}\r\n\r\n".encode() + recording + f"\r\n--{boundary}--\r\n".encode()
