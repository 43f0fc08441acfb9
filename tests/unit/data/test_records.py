"""The record schema: what is read is what was written, and errors name file, line and field."""

from __future__ import annotations

import json

import pytest

from stepaudio_train.data.records import (
    AudioPart,
    Message,
    Record,
    RecordError,
    Span,
    TextPart,
    parse_record,
    read_records,
    record_to_json,
    speech_record,
    with_audio_parts,
)

DIALOGUE = Record(
    "d1",
    (
        Message("system", (TextPart("be brief"),)),
        Message("human", (TextPart("what is this?"), AudioPart("a.wav", text="seven", speaker="theo"))),
        Message("assistant", (AudioPart("b.wav", spans=(Span(0.0, 0.5, "a"), Span(0.5, 1.0, "digit"))),)),
    ),
    {"source": "test"},
)


def test_round_trip():
    assert parse_record(json.dumps(record_to_json(DIALOGUE)), "here") == DIALOGUE
    assert "spans" not in record_to_json(DIALOGUE)["messages"][1]["content"][1]


def test_audio_parts_are_found_and_replaced_in_order():
    assert [p.audio for p in DIALOGUE.audio_parts()] == ["a.wav", "b.wav"]
    changed = with_audio_parts(DIALOGUE, [AudioPart("0"), AudioPart("1")])
    assert [p.audio for p in changed.audio_parts()] == ["0", "1"]
    assert changed.messages[0] == DIALOGUE.messages[0]


def _with(part: dict) -> dict:
    return {"id": "x", "messages": [{"role": "human", "content": [part]}]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"id": "x"', "invalid JSON"),
        ({"id": "x"}, "messages: field required"),
        ({"id": " ", "messages": []}, "id: must not be empty; messages: must hold"),
        ({"id": "x", "messages": [{"role": "nobody", "content": []}]}, "messages.0.role"),
        (_with({"type": "audio", "audo": "x"}), "messages.0.content.0.audo: unknown field"),
        (_with({"type": "picture"}), "messages.0.content.0"),
        (_with({"type": "audio", "audio": "x", "duration_s": "long"}), "messages.0.content.0.duration_s"),
        (_with({"type": "audio", "audio": "x", "duration_s": -1.0}), "content.0.duration_s: must be over 0"),
        (
            _with({"type": "audio", "audio": "x", "spans": [{"start_s": 1.0, "end_s": 0.5, "text": "a"}]}),
            "content.0.spans.0: must start",
        ),
        (
            _with(
                {
                    "type": "audio",
                    "audio": "x",
                    "spans": [{"start_s": 0.0, "end_s": 1.0, "text": "a"}, {"start_s": 0.9, "end_s": 2.0, "text": "b"}],
                }
            ),
            "content.0.spans.1: must start",
        ),
    ],
)
def test_errors_name_the_field(content, expected):
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(RecordError) as caught:
        parse_record(text, "m.jsonl:7")
    assert str(caught.value).startswith("m.jsonl:7: ")
    assert expected in str(caught.value)


def test_other_ways_of_writing_are_taken():
    written = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a digit"}]}
    record = parse_record(json.dumps(written), "m.jsonl:7", default_id="7")
    human, assistant = Message("human", (TextPart("what?"),)), Message("assistant", (TextPart("a digit"),))
    assert record == Record("7", (human, assistant))
    with pytest.raises(RecordError, match="id: field required"):
        parse_record(json.dumps(written), "m.jsonl:7")
    with pytest.raises(RecordError, match=r"messages\.1\.role: .*got 'usr'"):
        wrong = [written["messages"][0], {"role": "usr", "content": "x"}]
        parse_record(json.dumps({"id": "x", "messages": wrong}), "m.jsonl:7")


def test_codes_stand_for_a_recording():
    record = parse_record(json.dumps(_with({"type": "audio", "tokens": "<audio_1>"})), "here")
    assert record.audio_parts() == [AudioPart(tokens="<audio_1>")]
    with pytest.raises(RecordError, match=r"content\.0\.audio: must name a file, or tokens"):
        parse_record(json.dumps(_with({"type": "audio", "text": "one"})), "here")


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "m.jsonl"
    good = json.dumps(record_to_json(speech_record("a", AudioPart("a.wav"))))
    path.write_text(f'{good}\n\n{{"id": 3}}\n', encoding="utf-8")
    records = read_records(path)
    assert next(records).id == "a"
    with pytest.raises(RecordError, match=r"m\.jsonl:3: .*id"):
        next(records)
