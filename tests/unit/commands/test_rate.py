"""`stepaudio data rate`: what the page is served, every rating kept at once, going on, and nothing else served."""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from stepaudio_train.cli import build_parser
from stepaudio_train.commands.judge import PreferenceJudgeOptions
from stepaudio_train.commands.rate import RateOptions, RatingServer, rating_server
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.preference_files import PreferenceFile

CRITERIA = ("instruction following", "naturalness", "safety")


def prompt(id: str, *texts: str, **more: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": [{"type": "audio", "audio": "clips/q.wav", "text": "How many?"}]}]
    spoken = {"role": "assistant", "content": [{"type": "audio", "audio": "clips/a.wav"}]}
    answers = [{"message": {"role": "assistant", "content": text}} for text in texts]
    return {"id": id, "messages": asked, "answers": [*answers, {"message": spoken}], **more}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name, value in (("q", 0.0), ("a", 0.5)):
        soundfile.write(tmp_path / "clips" / f"{name}.wav", np.full(1600, value), 16000)
    (tmp_path / "secret.txt").write_text("secret")
    coded = prompt("coded")
    coded["answers"].append({"message": {"role": "assistant", "content": [{"type": "audio", "tokens": "<audio_0>"}]}})
    missing = prompt("missing", "x")
    missing["messages"][0]["content"][0]["audio"] = "clips/none.wav"
    listed = prompt("text", "x")
    listed["messages"][0]["content"][0]["audio"] = "secret.txt"
    lines = [prompt("p0", "seven", "<b>six</b>"), prompt("p1", "one", criteria=["overall"]), prompt("p2", "two")]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in [*lines, coded, missing, listed, prompt("single")]))
    return file


@pytest.fixture
def serve(source: Path, tmp_path: Path) -> Iterator[Callable[..., RatingServer]]:
    servers = []

    def start() -> RatingServer:
        server = rating_server(RateOptions(source, tmp_path / "out" / "ratings.jsonl", port=0))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(
    server: RatingServer, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers of one request; a body makes it a POST of JSON."""
    with closing(http.client.HTTPConnection(*server.server_address, timeout=30)) as connection:
        kind = {} if body is None else {"Content-Type": "application/json"}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, {**kind, **(headers or {})})
        reply = connection.getresponse()
        return reply.status, reply.read(), dict(reply.getheaders())


def shown(server: RatingServer, rater: str, number: int | None = None) -> dict[str, Any]:
    status, content, _ = ask(server, f"/prompt?rater={rater}" + ("" if number is None else f"&number={number}"))
    assert status == 200
    return json.loads(content)


def rate(server: RatingServer, rater: str, number: int, answer: int, criterion: str, rating: int) -> None:
    body = {"rater": rater, "number": number, "answer": answer, "criterion": criterion, "rating": rating}
    assert ask(server, "/rating", body)[0] == 200


def test_what_cannot_be_rated_is_named(serve):
    server = serve()
    reasons = {refusal.name[-1]: refusal.reason for refusal in server.sheet.refused}
    assert len(server.sheet) == 3 and list(reasons) == ["4", "5", "6", "7"]
    assert "by its codes alone" in reasons["4"] and "has one answer" in reasons["7"]
    assert "cannot be read as audio" in reasons["5"] and "cannot be read as audio" in reasons["6"]


def test_ratings_are_preferences_at_once_and_the_page_goes_on(serve, tmp_path):
    server, output = serve(), tmp_path / "out" / "ratings.jsonl"
    assert shown(server, "ann")["number"] == 0
    for answer, ratings in enumerate([(5, 4, 5), (1, 2, 5), (3, 3, 3)]):
        for criterion, rating in zip(CRITERIA, ratings, strict=True):
            rate(server, "ann", 0, answer, criterion, rating)
            (kept,) = PreferenceFile.read(output).preferences
            assert kept.ratings[answer]["ann"].by_criterion[criterion] == rating
    means = [kept.mean_rating(answer) for answer in range(3)]
    assert means == pytest.approx([14 / 3, 8 / 3, 3])
    assert [pair[:2] for pair in kept.ordered(1)] == [(0, 1), (0, 2)]
    assert kept.prompt.audio_parts()[0].audio == str(tmp_path / "clips" / "q.wav")
    rate(server, "bob", 0, 1, "safety", 1)  # not yet a rating: two more criteria
    rate(server, "ann", 0, 1, "naturalness", 5)  # she thinks again
    assert ask(server, "/skip", {"rater": "ann", "number": 1})[0] == 200
    with output.open("a") as lines:
        lines.write('{"id": "half')  # as a killed run leaves it
    again = serve()
    now = shown(again, "ann")
    assert (now["number"], now["done"], now["total"]) == (2, 2, 3)
    back = {one["index"]: one["given"] for one in shown(again, "ann", 0)["answers"]}
    assert back[1] == {"instruction following": 1, "naturalness": 5, "safety": 5}
    bobs = shown(again, "bob")
    assert bobs["number"] == 0 and [one["given"] for one in bobs["answers"] if one["given"]] == [{"safety": 1}]
    for answer in range(2):
        for criterion in CRITERIA:
            rate(again, "ann", 2, answer, criterion, 4)
    assert shown(again, "ann") == {"finished": 3}
    assert [one.prompt.id for one in PreferenceFile.read(output).preferences] == ["p0", "p2"]
    assert PreferenceFile.read(output).preferences[0].mean_rating(1) == pytest.approx(11 / 3)


def test_a_line_may_ask_for_one_rating_and_a_person_may_go_back(serve, tmp_path):
    server = serve()
    assert shown(server, "ann", 1)["criteria"] == ["overall"] and shown(server, "ann", 0)["criteria"] == [*CRITERIA]
    rate(server, "ann", 1, 0, "overall", 5)
    rate(server, "ann", 1, 1, "overall", 2)
    (kept,) = PreferenceFile.read(tmp_path / "out" / "ratings.jsonl").preferences
    assert [kept.mean_rating(0), kept.mean_rating(1)] == [5, 2]


def test_no_place_is_favoured_and_a_rater_keeps_their_order(serve):
    server = serve()
    raters = [f"r{i}" for i in range(120)]
    orders = {rater: [one["index"] for one in server.sheet.prompt(0, rater)["answers"]] for rater in raters}
    first = Counter(order[0] for order in orders.values())
    assert set(first) == {0, 1, 2} and min(first.values()) > 20
    assert shown(server, "r7", 0)["answers"][0]["index"] == orders["r7"][0]


def test_recordings_are_served_whole_and_in_ranges(serve, tmp_path):
    server = serve()
    page = shown(server, "ann", 0)
    question = page["messages"][0]["parts"][0]
    (answer,) = [part for one in page["answers"] for part in one["parts"] if "audio" in part]
    assert question == {"audio": "/audio/0/0", "text": "How many?"}
    for url, name in ((question["audio"], "q"), (answer["audio"], "a")):
        content = (tmp_path / "clips" / f"{name}.wav").read_bytes()
        status, whole, headers = ask(server, url)
        assert (status, whole, headers["Accept-Ranges"]) == (200, content, "bytes")
        assert headers["Content-Type"].startswith("audio/")
    size = len(content)
    ranges = {
        "bytes=0-9": (content[:10], f"bytes 0-9/{size}"),
        "bytes=3000-": (content[3000:], f"bytes 3000-{size - 1}/{size}"),
        "bytes=-5": (content[-5:], f"bytes {size - 5}-{size - 1}/{size}"),
        "bytes=3240-99999": (content[3240:], f"bytes 3240-{size - 1}/{size}"),
    }
    for asked, (expected, told) in ranges.items():
        status, found, headers = ask(server, url, headers={"Range": asked})
        assert (status, found, headers["Content-Range"]) == (206, expected, told)
    assert ask(server, url, headers={"Range": f"bytes={size}-"})[0] == 416


ABSENT = (
    *("/secret.txt", "/../secret.txt", "/audio/../../secret.txt", "/audio/0/..%2f..%2fsecret.txt"),
    *("/audio/0/9", "/audio/9/0", "/audio/-1/0", "/audio/0/0/../../../secret.txt", "//etc/passwd", "/answers.jsonl"),
    *("/prompt?rater=", "/prompt?rater=ann&number=99", "/prompt?rater=ann&number=-1", f"/prompt?rater={'x' * 61}"),
)


def test_nothing_else_is_served(serve):
    server = serve()
    for path in ABSENT:
        status, content, _ = ask(server, path)
        assert status in (400, 404) and b"secret" not in content and set(json.loads(content)) == {"error"}, path


GOOD = {"rater": "ann", "number": 0, "answer": 0, "criterion": "safety", "rating": 3}
BAD = (
    *({**GOOD, "rating": rating} for rating in (0, 6, 3.5, True, "3", None)),
    *({**GOOD, "answer": answer} for answer in (-1, 3, True, "0")),
    *({**GOOD, "number": number} for number in (-1, 3, True, "0")),
    *({**GOOD, "rater": rater} for rater in ("", "  ", 7, "x" * 61)),
    *({**GOOD, "criterion": criterion} for criterion in ("overall", None, [])),
    *({}, [], 7, b"{", b"\xff"),
)


def test_what_is_no_rating_is_refused_and_not_kept(serve, tmp_path):
    server = serve()
    for body in BAD:
        status, content, _ = ask(server, "/rating", body)
        assert status == 400 and json.loads(content)["error"], body
    assert not (tmp_path / "out").exists()


def test_other_sites_are_refused(serve, tmp_path):
    server = serve()
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/", headers={"Host": "evil.example"})[0] == 403
    assert ask(server, "/rating", GOOD, {"Host": "evil.example:80"})[0] == 403
    # A form of another site can be sent without asking, JSON cannot.
    assert ask(server, "/rating", json.dumps(GOOD).encode(), {"Content-Type": "text/plain"})[0] == 400
    assert not (tmp_path / "out").exists()
    status, page, headers = ask(server, "/", headers={"Host": "localhost:1234"})
    assert status == 200 and b"<!doctype html>" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"http://" not in page and b"https://" not in page and b"innerHTML" not in page


def test_ratings_at_the_same_time_are_all_kept(serve, tmp_path):
    server = serve()
    jobs = [(f"r{i}", answer, criterion) for i in range(5) for answer in range(3) for criterion in CRITERIA]
    threads = [threading.Thread(target=rate, args=(server, r, 0, answer, c, 4)) for r, answer, c in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = PreferenceFile.read(tmp_path / "out" / "ratings.jsonl")
    (kept,) = found.preferences
    assert not found.refused
    assert all(one.rating == 4 for ratings in kept.ratings for one in ratings.values())
    assert [len(ratings) for ratings in kept.ratings] == [5, 5, 5]


def test_a_wrong_start_is_told(serve, source, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        rating_server(RateOptions(tmp_path / "none.jsonl", tmp_path / "out.jsonl"))
    with pytest.raises(UserError, match="must be another file"):
        rating_server(RateOptions(source, source))
    taken = serve().server_address[1]
    with pytest.raises(UserError, match="type --port 0"):
        rating_server(RateOptions(source, tmp_path / "out.jsonl", port=taken))
    other = json.dumps({**prompt("p0", "seven"), "messages": [{"role": "user", "content": "another"}]})
    (tmp_path / "out.jsonl").write_text(other)
    with pytest.raises(UserError, match="another prompt than"):
        rating_server(RateOptions(source, tmp_path / "out.jsonl", port=0))


@pytest.mark.parametrize(("name", "options"), [("judge", PreferenceJudgeOptions), ("rate", RateOptions)])
def test_options_are_the_dataclass_and_so_are_their_defaults(name: str, options: type):
    data = next(a.choices for a in build_parser()._actions if a.metavar == "COMMAND")["data"]
    parser = next(a.choices for a in data._actions if a.metavar == "ACTION")[name]
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    known = {field.name: field for field in fields(options)}
    assert actions.keys() == known.keys()
    for dest, action in actions.items():
        assert action.default is argparse.SUPPRESS
        if "(default " in (action.help or ""):
            assert action.help.split("(default ")[1].rstrip(")") == str(known[dest].default), dest
        assert action.required == (known[dest].default is MISSING)


def browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript. The page's own policy forbids playwright's way of doing so."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def test_a_person_rates_in_a_browser(serve, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if browser_path() is None:
        pytest.skip("needs chromium or Chrome on the PATH")
    server, output = serve(), tmp_path / "out" / "ratings.jsonl"
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(server.url)
        page.fill("#name", "ann")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer")
        assert page.locator(".answer").count() == 3 and page.locator("audio").count() == 2
        assert "<b>six</b>" in page.inner_text("#answers")  # shown, not rendered
        until(page, "[...document.querySelectorAll('audio')].every((a) => a.duration > 0.09)")
        page.keyboard.type("123451234")  # faster than they are kept
        page.locator(".row").nth(8).locator("button").nth(4).click()
        pressed = "[...document.querySelectorAll('.row [aria-pressed=true]')].map((b) => b.textContent)"
        until(page, f"{pressed}.join('') === '123451235'")
        assert page.locator("#next").is_enabled()
        page.keyboard.press("q")
        until(page, "document.querySelector('#prompt audio').played.length > 0")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#place').textContent.startsWith('Prompt 2')")
        page.keyboard.press("s")
        until(page, "document.querySelector('#place').textContent.startsWith('Prompt 3')")
        page.reload()
        until(page, "document.querySelector('#place').textContent.startsWith('Prompt 3')")
        page.keyboard.type("bb")
        until(page, "document.querySelector('#place').textContent.startsWith('Prompt 1')")
        assert page.evaluate(pressed) == [*"123451235"]
        page.click("#leave")
        page.fill("#name", "bob")
        page.click("#who button")
        until(page, "document.querySelector('#rater').textContent === 'bob'")
        assert page.evaluate(pressed) == []
        assert problems == []
        page.context.set_offline(True)
        page.keyboard.press("3")
        until(page, "document.querySelector('#problem').textContent.includes('not kept')")
        assert page.evaluate(pressed) == []
        browser.close()
    (kept,) = PreferenceFile.read(output).preferences
    order = [one["index"] for one in server.sheet.prompt(0, "ann")["answers"]]
    assert [kept.mean_rating(index) for index in range(3)] == pytest.approx(
        [{0: 2.0, 1: 10 / 3, 2: 10 / 3}[order.index(index)] for index in range(3)]
    )
