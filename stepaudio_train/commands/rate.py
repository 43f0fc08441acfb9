"""`stepaudio data rate`: a page on this machine where people listen to answers and rate them (paper 5.2)."""

from __future__ import annotations

import json
import mimetypes
import re
import sys
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.rating_sheet import MAX_NAME, RatingSheet, SheetError

_PAGE = Path(__file__).with_name("rating_page.html")
_HOST = "127.0.0.1"
_LOCAL_NAMES = (_HOST, "localhost")
_MAX_BODY_BYTES = 65536
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; media-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_NAMED_REFUSALS = 10


@dataclass(frozen=True)
class RateOptions:
    """What `stepaudio data rate` is asked for."""

    file: Path
    """JSONL of prompts with answers (docs/preferences.md)."""
    output: Path
    """JSONL file to which ratings are added."""
    criteria: tuple[str, ...] = ("instruction following", "naturalness", "safety")
    """What is rated 1 to 5, where a line's `criteria` do not say it; the rating is their mean."""
    port: int = 8765
    """Of the page. 0: any that is free."""


def rate(options: RateOptions) -> int:
    """Serve the page until it is interrupted.

    Raises:
        UserError: nothing can be rated, or the port is taken.
    """
    server = rating_server(options)
    for refusal in server.sheet.refused[:_NAMED_REFUSALS]:
        sys.stderr.write(f"left out: {refusal.name}: {refusal.reason}\n")
    if len(server.sheet.refused) > _NAMED_REFUSALS:
        sys.stderr.write(f"left out: {len(server.sheet.refused)} in all\n")
    with server:
        sys.stdout.write(f"{len(server.sheet)} prompts at {server.url}; ratings go to {options.output}; Ctrl-C ends\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.stdout.write("\nevery rating is kept; the same command goes on\n")
    return 0


def rating_server(options: RateOptions) -> RatingServer:
    """The page's server, which does not serve yet.

    Raises:
        UserError: see `rate`.
    """
    problems = []
    if not options.file.is_file():
        problems.append(f"{options.file}: no such file")
    if options.output.suffix != ".jsonl" or options.output.resolve() == options.file.resolve():
        problems.append(f"--output {options.output}: must be another file, and its name must end with .jsonl")
    if not options.criteria or not all(name.strip() for name in options.criteria):
        problems.append("--criteria: type at least one name, as --criteria overall")
    if problems:
        raise UserError("\n".join(problems))
    sheet = RatingSheet(options.file, options.output, options.criteria)
    try:
        return RatingServer(sheet, options.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {options.port}: {error}; type --port 0 for any that is free") from None


class RatingServer(ThreadingHTTPServer):
    """Serves a sheet to this machine alone."""

    daemon_threads = True
    # The library's 5 lets the system reset connections where several come at once on a busy machine.
    request_queue_size = 128

    def __init__(self, sheet: RatingSheet, port: int) -> None:
        """Raises:
        OSError: the port is taken.
        """
        self.sheet = sheet
        super().__init__((_HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""

    def _answer(self, respond: Any) -> None:
        # A page of another site cannot ask under a name of its own that leads here.
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        try:
            if host not in _LOCAL_NAMES:
                self.close_connection = True
                self._error(HTTPStatus.FORBIDDEN, "only this machine is served")
            else:
                respond()
        except SheetError as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))
        except (BrokenPipeError, ConnectionResetError):  # a player that has heard enough
            self.close_connection = True

    def _get(self) -> None:
        asked = urlsplit(self.path)
        if asked.path == "/":
            self._send(HTTPStatus.OK, _PAGE.read_bytes(), "text/html; charset=utf-8")
        elif asked.path == "/prompt":
            query = {name: values[0] for name, values in parse_qs(asked.query).items()}
            self._prompt(_rater(query.get("rater")), query.get("number"))
        elif found := re.fullmatch(r"/audio/(\d{1,9})/(\d{1,9})", asked.path):
            self._recording(self.server.sheet.recording(int(found[1]), int(found[2])))
        else:
            self._error(HTTPStatus.NOT_FOUND, "there is no such page")

    def _prompt(self, rater: str, number: str | None) -> None:
        """The prompt of a number; without one, the first that is not done."""
        sheet = self.server.sheet
        if number is not None and not re.fullmatch(r"\d{1,9}", number):
            raise SheetError(f"there is no prompt {number!r}")
        wanted = sheet.next_number(rater) if number is None else int(number)
        self._json({"finished": len(sheet)} if wanted is None else sheet.prompt(wanted, rater))

    def _post(self) -> None:
        length = self.headers.get("Content-Length", "")
        # Browsers send JSON to another site only after that site has agreed.
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind != "application/json" or not length.isdigit() or int(length) > _MAX_BODY_BYTES:
            self.close_connection = True
            raise SheetError(f"must be JSON of at most {_MAX_BODY_BYTES} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
            rater, number = _rater(body["rater"]), body["number"]
            if self.path == "/skip":
                self.server.sheet.skip(number, rater)
            elif self.path == "/rating":
                self.server.sheet.rate(number, rater, body["answer"], body["criterion"], body["rating"])
            else:
                self._error(HTTPStatus.NOT_FOUND, "there is no such page")
                return
        except SheetError:
            raise
        except (ValueError, TypeError, LookupError):
            raise SheetError("must be a JSON object with rater, number, answer, criterion and rating") from None
        self._json({})

    def _recording(self, path: Path) -> None:
        """The file, or the one range of its bytes that players ask for when they seek (RFC 9110, 14.2)."""
        content = path.read_bytes()
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or asked[0] == "bytes=-":
            self._send(HTTPStatus.OK, content, kind, {"Accept-Ranges": "bytes"})
            return
        size, (first, last) = len(content), asked.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= end:
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", kind, {"Content-Range": f"bytes */{size}"})
            return
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{size}", "Accept-Ranges": "bytes"}
        self._send(HTTPStatus.PARTIAL_CONTENT, content[start:end], kind, headers)

    def _json(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(status, json.dumps(content, ensure_ascii=False).encode(), "application/json")

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._json({"error": message}, status)

    def _send(self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        named = {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _rater(name: Any) -> str:
    name = name.strip() if isinstance(name, str) else ""
    if not 0 < len(name) <= MAX_NAME:
        raise SheetError(f"type your name, of at most {MAX_NAME} characters")
    return name
