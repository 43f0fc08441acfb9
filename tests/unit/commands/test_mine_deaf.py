"""Mining: deaf answers to clear prompts become rejected, those to others never, and the output is preferences."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from stepaudio_train.cli import build_parser, main
from stepaudio_train.commands.mine_deaf import MineDeafOptions, MineDeafReport, mine_deaf
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.preference_files import PreferenceFile

GROUP = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"
DEAF, OTHER_DEAF = "I'm sorry, I didn't catch that.", "Could you repeat that?"


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def spoken(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "audio", "tokens": GROUP, "text": text}]}


def prompt(id: str, condition: str | None = "clear", **fields: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": [{"type": "audio", "audio": "clips/q.wav", "text": f"prompt {id}"}]}]
    meta = {"meta": {"condition": condition}} if condition else {}
    return {"id": id, "messages": asked, **meta, "chosen": said("Seven."), "rejected": said("Six."), **fields}


def rated(id: str, *answers: tuple[str, float], **more: Any) -> dict[str, Any]:
    line = prompt(id, **more)
    del line["chosen"], line["rejected"]
    return line | {"answers": [{"message": said(text), "rating": rating} for text, rating in answers]}


def answer(id: str, text: str = DEAF, **fields: Any) -> dict[str, Any]:
    return {"id": id, "answer": text, **fields}


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., MineDeafReport]:
    def run(prompts: list[Any], answers: list[Any], **options: Any) -> MineDeafReport:
        paths = tmp_path / "in/answers.jsonl", tmp_path / "in/preferences.jsonl", tmp_path / "out/mined.jsonl"
        paths[0].parent.mkdir(exist_ok=True)
        for path, lines in zip(paths, (answers, prompts), strict=False):
            path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
        return mine_deaf(MineDeafOptions(*paths, **options))

    return run


def mined(tmp_path: Path) -> list[tuple[str, str, str]]:
    """(id, chosen, rejected) of what was written, as preferences are read."""
    file = PreferenceFile.read(tmp_path / "out/mined.jsonl")
    assert not file.refused
    texts = [
        ("".join(getattr(part, "text", "") or "" for part in message.content) for message in one.answers)
        for one in file.preferences
    ]
    return [(one.prompt.id, *found) for one, found in zip(file.preferences, texts, strict=True)]  # type: ignore[misc]


def test_deaf_answers_to_clear_prompts_become_rejected_and_no_others(mine, tmp_path):
    unclear = [prompt(c, c, chosen=said(DEAF)) for c in ("noisy", "cut", "silent")]
    prompts = [prompt("a"), prompt("b"), prompt("unknown", None), *unclear]
    answers = [answer("a"), answer("b", "Six."), *(answer(one["id"]) for one in unclear), answer("unknown")]
    report = mine(prompts, [*answers, answer("noisy", "Seven.")])
    assert mined(tmp_path) == [("a", "Seven.", DEAF)]
    assert (report.answers, report.mined) == (7, 1)
    assert (report.rates.deaf_rate_clear, report.rates.deaf_rate_unclear) == (50.0, 75.0)
    assert report.not_mined == {
        "deaf to recordings that are not clear, which is right": 3,
        "deaf to prompts without meta.condition (clear, noisy, cut, silent)": 1,
    }
    kept = json.loads((tmp_path / "out/mined.jsonl.report.json").read_text())
    assert kept["mined"] == 1 and kept["rates"]["counts"]["clear"] == {"answers": 2, "deaf": 1}
    found = PreferenceFile.read(tmp_path / "out/mined.jsonl").preferences[0]
    assert found.category == "clear" and found.prompt.meta == {"condition": "clear"}
    # The recording is named from where the new file lies.
    assert Path(found.prompt.audio_parts()[0].audio) == tmp_path / "in/clips/q.wav"


def test_duplicates_are_left_out(mine, tmp_path):
    prompts = [prompt("a"), prompt("b"), prompt("c", rejected=said(DEAF))]
    answers = [answer("a"), answer("a"), answer("a", OTHER_DEAF), answer("b"), answer("c")]
    report = mine(prompts, answers)
    assert mined(tmp_path) == [("a", "Seven.", DEAF), ("a", "Seven.", OTHER_DEAF), ("b", "Seven.", DEAF)]
    assert report.not_mined == {"mined already, or in the preferences": 2}
    # What was mined, put behind the preferences, is not mined again.
    again = mine([*prompts, (tmp_path / "out/mined.jsonl").read_text()], answers)
    assert again.mined == 0 and mined(tmp_path) == [] and not again.refused


def test_what_is_chosen(mine, tmp_path):
    prompts = [
        prompt("reference", reference="7"),
        rated("best", ("Six.", 2), ("Seven.", 4), ("It is seven.", 5)),
        rated("poor", ("Six.", 2), ("Five.", 3.5)),
        rated("poor but known", ("Six.", 2), ("Five.", 1), reference="7"),
        prompt("deaf reference", reference=OTHER_DEAF),
        prompt("deaf chosen", chosen=said(OTHER_DEAF)),
        prompt("twice", chosen=said(OTHER_DEAF)),
        prompt("twice", chosen=said("It is seven.")),
        prompt("written", reference="7"),
        prompt("spoken", chosen=spoken("Seven."), rejected=spoken("Six."), reference="7"),
    ]
    ids = list(dict.fromkeys(one["id"] for one in prompts))
    answers = [answer(id, **({"audio_tokens": GROUP} if id in ("written", "spoken") else {})) for id in ids]
    report = mine(prompts, answers)
    assert {id: chosen for id, chosen, _ in mined(tmp_path)} == {
        "reference": "7",
        "best": "It is seven.",
        "poor but known": "7",
        "deaf reference": "Seven.",
        "twice": "It is seven.",
        "spoken": "Seven.",
    }
    why = "without a reference, or an answer chosen or rated 4 or more, to stand beside"
    assert report.not_mined == {why: 3} and not report.refused
    found = {one.prompt.id: one.answers for one in PreferenceFile.read(tmp_path / "out/mined.jsonl").preferences}
    assert [part.tokens for message in found["spoken"] for part in message.content] == [GROUP, GROUP]


def test_what_cannot_be_used_is_named_and_the_rest_is_mined(mine, tmp_path):
    prompts = [prompt("a"), "{", prompt("odd", "loud"), prompt("a", messages=[{"role": "user", "content": "else"}])]
    answers = [
        answer("a"),
        {"id": "a"},
        "{",
        answer("x"),
        answer("a", "", audio_tokens=GROUP),
        {"id": "a", "text": OTHER_DEAF, "task": "chat", "ended": True},
        {"answer": "x"},
        answer("a", ""),
    ]
    report = mine(prompts, answers)
    assert mined(tmp_path) == [("a", "Seven.", DEAF), ("a", "Seven.", OTHER_DEAF)]
    reasons = {"/".join(Path(one.name).parts[-1:]): one.reason for one in report.refused}
    assert "JSON" in reasons["preferences.jsonl:2"] and "JSON" in reasons["answers.jsonl:3"]
    assert "clear, noisy, cut, silent, got 'loud'" in reasons["preferences.jsonl:3"]
    assert "'a' has another prompt at" in reasons["preferences.jsonl:4"]
    assert reasons["answers.jsonl:2"] == "answer: missing; `text` may hold it as well"
    assert reasons["answers.jsonl:4"] == "id: no prompt of the preferences is 'x'"
    assert "must hold the words" in reasons["answers.jsonl:5"] and reasons["answers.jsonl:7"].startswith("id:")
    assert len(report.refused) == 8 and report.answers == 3
    assert "left out: " in report.summary() and "3 answers" in report.summary()
    before = (tmp_path / "out/mined.jsonl").read_bytes()
    with pytest.raises(UserError, match="no answer to a prompt of .* can be used"):
        mine(prompts, [answer("x")])
    assert (tmp_path / "out/mined.jsonl").read_bytes() == before


class Served:
    """`ChatEndpoint.ask` of a model that calls answers deaf that hold the word whale."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, endpoint: Any, instruction: str, content: dict[str, str], read: Callable[[str], bool]) -> bool:
        self.asked.append(content["answer"])
        if content["answer"] == "odd":
            return read("who knows")
        return read(json.dumps({"deaf": "whale" in content["answer"]}))


def test_a_model_behind_an_endpoint_tells(mine, tmp_path, monkeypatch):
    served = Served()
    monkeypatch.setattr("stepaudio_train.data.chat_endpoint.ChatEndpoint.ask", lambda *arguments: served(*arguments))
    endpoint = {"detector": "endpoint:http://localhost:1/v1", "endpoint_model": "m"}
    report = mine([prompt("a"), prompt("b")], [answer("a", "A whale?"), answer("b"), answer("b", "odd")], **endpoint)
    assert mined(tmp_path) == [("a", "Seven.", "A whale?")]
    assert sorted(served.asked) == sorted(["A whale?", "Seven.", DEAF, "odd"])
    assert [one.reason for one in report.refused] == [
        "the endpoint's reply does not say whether the answer is deaf: 'who knows'"
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"detector": "ear"}, "--detector ear: type --detector phrases"),
        ({"detector": "endpoint:http://x/v1"}, "type --endpoint-model NAME"),
        ({"endpoint_model": "m"}, "--endpoint-model goes with --detector endpoint:URL"),
        ({"endpoint_workers": 0}, "--endpoint-workers 0: must be at least 1"),
    ],
)
def test_options_that_do_not_go_together(mine, options, told):
    with pytest.raises(UserError, match=re.escape(told)):
        mine([prompt("a")], [answer("a")], **options)


def test_the_command(mine, tmp_path, capsys):
    mine([prompt("a")], [answer("a")])
    paths = [str(tmp_path / name) for name in ("in/answers.jsonl", "in/preferences.jsonl", "out/again.jsonl")]
    assert main(["data", "mine-deaf", *paths]) == 0
    assert "1 preferences mined from 1 answers\ndeaf in 1 of 1 answers to clear" in capsys.readouterr().out
    assert (tmp_path / "out/again.jsonl").read_bytes() == (tmp_path / "out/mined.jsonl").read_bytes()
    Path(paths[0]).write_text(json.dumps(answer("a")) + "\n{")
    assert main(["data", "mine-deaf", *paths]) == 1
    assert main(["data", "mine-deaf", paths[0], paths[1], paths[1]]) != 0
    assert "the output must be another file" in capsys.readouterr().err


def test_the_help_names_the_defaults_of_the_options():
    parser = build_parser()
    for word in ("data", "mine-deaf"):
        parser = next(a.choices[word] for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    known = {field.name: field.default for field in fields(MineDeafOptions)}
    assert actions.keys() == known.keys()
    for name, default in known.items():
        told = re.search(r"\(default ([^:;)]+)", actions[name].help or "")
        assert (told and told[1]) == (str(default) if default not in (None, MISSING) else None), name
        assert actions[name].required == (default is MISSING) and actions[name].default is argparse.SUPPRESS
