"""Judges of answers: what rules and an endpoint say, position bias cancelled, nothing asked twice, bad lines named."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stepaudio_train.cli import main
from stepaudio_train.commands.judge import JudgeReport, PreferenceJudgeOptions, judge_preferences
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.preference_files import PreferenceFile

GROUP = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"


def line(id: str, *answers: str, **fields: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": "What is two and five?"}]
    given = [{"message": {"role": "assistant", "content": text}} for text in answers]
    return {"id": id, "messages": asked, "answers": given, **fields}


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., JudgeReport]:
    def run(*lines: Any, judge: str = "rules", **options: Any) -> JudgeReport:
        source = tmp_path / "answers.jsonl"
        source.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
        return judge_preferences(PreferenceJudgeOptions(source, tmp_path / "out.jsonl", judge, **options))

    return run


def ratings(tmp_path: Path) -> dict[str, list[float | None]]:
    found = PreferenceFile.read(tmp_path / "out.jsonl").preferences
    return {one.prompt.id: [one.mean_rating(index) for index in range(len(one.answers))] for one in found}


def test_rules_and_their_weights(judge, tmp_path):
    lines = [
        line("right", "Seven!", "Six.", "七", reference="seven"),
        line("long", "One.", "It is one two three.", "一二三四五"),
    ]
    report = judge(*lines, max_words=4, language="en", reference_weight=2.0)
    # Of weights 2, 1 and 1: all, then length and language, then length; without a reference 1 and 1.
    assert ratings(tmp_path) == {"right": [5, 3, 2], "long": [5, 3, 1]}
    assert (report.prompts, report.answers, report.mean_rating) == (2, 6, 19 / 6)
    judge(*lines, min_words=2, length_weight=1.0, reference_weight=0.0)
    assert ratings(tmp_path) == {"right": [1, 1, 1], "long": [1, 5, 5]}


def test_what_cannot_be_judged_is_named_and_the_rest_is_judged(judge, tmp_path):
    spoken = line("spoken", "x")
    spoken["answers"].append({"message": {"role": "assistant", "content": [{"type": "audio", "tokens": GROUP}]}})
    heard = line("heard", "six")
    part = {"type": "audio", "tokens": GROUP, "text": "Seven."}
    heard["answers"].append({"message": {"role": "assistant", "content": [part]}})
    lines = [line("a", "b", "c"), line("one", "b", reference="b"), {**spoken, "reference": "x"}, "{", heard]
    report = judge(*lines[:-1], {**lines[-1], "reference": "seven"})
    assert {refusal.name[-1]: refusal.reason for refusal in report.refused} == {
        "1": "no rule applies; give it a `reference`, or type --max-words or --language",
        "2": "has one answer; a preference needs two or more",
        "3": "answer 2: its recording needs its transcript in `text`, since judges read",
        "4": report.refused[0].reason,
    }
    assert ratings(tmp_path) == {"heard": [1, 5]}
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["prompts"] == 1
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match="nothing could be judged"):
        judge("{")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_agreement_with_pairs_that_are_there(judge):
    fields = {"messages": [{"role": "user", "content": "x"}], "reference": "seven"}
    chosen, rejected = ({"role": "assistant", "content": text} for text in ("seven", "six"))
    alike = {**fields, "chosen": chosen, "rejected": rejected}
    other = {**fields, "chosen": rejected, "rejected": chosen}
    rated = line("r", "six", "five", reference="seven")
    for answer, rating in zip(rated["answers"], (4, 2), strict=True):
        answer["rating"] = rating
    report = judge(alike, alike, other, rated)  # right, right, wrong, not told
    assert (report.num_pairs, report.agreement) == (4, 62.5)


class Server:
    """A model that likes "good", and otherwise what comes first."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.broken = 0

    def reply(self, content: dict[str, Any]) -> str:
        if "answer" in content:
            return f'I think {{so}}: {{"rating": {5 if "good" in content["answer"] else 2}}}'
        places = [place for place in ("first", "second") if "good" in content[place]]
        return json.dumps({"better": places[0] if len(places) == 1 else "first"})


@pytest.fixture
def server() -> Iterator[Server]:
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.loads(body["messages"][1]["content"])
            with lock:
                state.asked.append(content)
                text = "7 of 5" if len(state.asked) <= state.broken else state.reply(content)
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    yield state
    http.shutdown()
    http.server_close()


def test_an_endpoint_rates_each_answer_and_is_asked_once(judge, server, tmp_path):
    lines = [line("a", "good", "bad", reference="seven"), line("b", "bad", "worse")]
    options = {"judge": f"endpoint:{server.url}", "endpoint_model": "m", "endpoint_workers": 1}
    server.broken = 1  # a reply without a rating
    report = judge(*lines, **options)
    assert [(refusal.name[-1], "gives no rating" in refusal.reason) for refusal in report.refused] == [("1", True)]
    assert server.asked[0] == {
        "conversation": [{"role": "human", "text": "What is two and five?"}],
        "reference": "seven",
        "answer": "good",
    }
    judge(*lines, **options)
    # What could be read was kept.
    assert ratings(tmp_path) == {"a": [5, 2], "b": [2, 2]} and len(server.asked) == 1 + 2 + 2
    found = PreferenceFile.read(tmp_path / "out.jsonl").preferences[0]
    assert list(found.ratings[0]) == ["m"]


def test_comparisons_in_both_orders_cancel_the_favoured_place(judge, server, tmp_path):
    lines = [line("a", "bad", "good", "worse")]
    judge(*lines, judge=f"endpoint:{server.url}", endpoint_model="m", compare=True)
    # `good` wins all, the others draw with each other: each wins once where it stands first.
    assert ratings(tmp_path) == {"a": [2, 5, 2]}
    assert len(server.asked) == 6


def test_the_command_names_recordings_from_its_own_folder(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    spoken = line("a", "seven", "six", reference="seven")
    spoken["messages"] = [{"role": "user", "content": [{"type": "audio", "audio": "q.wav", "text": "x"}]}]
    (tmp_path / "in" / "answers.jsonl").write_text(json.dumps(spoken))
    names = [str(tmp_path / "in" / "answers.jsonl"), str(tmp_path / "out.jsonl")]
    assert main(["data", "judge", *names, "--judge", "rules"]) == 0
    assert "2 answers to 1 prompts rated 3.00" in capsys.readouterr().out
    (one,) = PreferenceFile.read(tmp_path / "out.jsonl").preferences
    assert one.prompt.audio_parts()[0].audio == "in/q.wav"
    options = ["--judge", "endpoint:localhost", "--endpoint-workers", "0", "--max-words", "0"]
    assert main(["data", "judge", *names, *options]) == 2
    told = capsys.readouterr().err
    assert all(f"--{name}" in told for name in ("judge endpoint:http", "endpoint-model NAME", "endpoint-workers 0"))
    assert "--max-words 0" in told
