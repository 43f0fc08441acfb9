"""Importers: each format's golden records, what is refused and by which line, and which format is guessed."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from stepaudio_train.config.errors import UserError
from stepaudio_train.data.importers.run import ImportOptions, ImportReport, guess_format, import_conversations
from stepaudio_train.data.prompts import (
    ASR_PROMPT,
    EDIT_PROMPT,
    Voice,
    clone_record,
    recognition_record,
    synthesis_record,
    voice_prompt,
)
from stepaudio_train.data.records import AudioPart, Message, Part, Record, TextPart, ToolCall, read_records

CODES = [65536 + 12, 65536 + 40, 65536 + 1030, 65536 + 2000, 65536 + 3001]
TOKENS = "<audio_12><audio_40><audio_1030><audio_2000><audio_3001>"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def wav(duration_s: float = 0.1, value: int = 0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(round(16000 * duration_s), value, np.int16), 16000, format="WAV")
    return file.getvalue()


def turn(role: Any, *parts: str | Part) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two recordings in clips/."""
    (tmp_path / "clips").mkdir()
    for name in ("a", "b"):
        (tmp_path / "clips" / f"{name}.wav").write_bytes(wav())
    return tmp_path


Convert = Callable[..., tuple[list[Record], ImportReport]]


@pytest.fixture
def convert(folder: Path) -> Convert:
    """Rows, as the lines of a file, or a path -> records of the output, which lies in the same folder; the report."""

    def convert(source: Any, **options: Any) -> tuple[list[Record], ImportReport]:
        if not isinstance(source, Path):
            rows, source = source, folder / "in.jsonl"
            source.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
        output = folder / "out.jsonl"
        report = import_conversations(ImportOptions(source, output, **options))
        records = list(read_records(output))
        assert sum(report.tasks.values()) == len(records)
        saved = json.loads((folder / "out.jsonl.report.json").read_text("utf-8"))
        assert saved["tasks"] == report.tasks and len(saved["refused"]) == len(report.refused)
        return records, report

    return convert


def reasons(report: ImportReport) -> dict[str, str]:
    """Name of the file and line -> why."""
    return {Path(refusal.name).name: refusal.reason for refusal in report.refused}


def test_sharegpt(convert: Convert):
    heard = {
        "system": "be brief",
        "conversations": [
            {"from": "human", "value": "<audio>\nwhat is it? <audio>"},
            {"from": "gpt", "value": "seven"},
        ],
        "audios": ["clips/a.wav", "clips/b.wav"],
        "label": False,
    }
    called = {
        "id": 7,
        "messages": [
            {"role": "user", "content": "<audio>"},
            {"role": "assistant", "content": "let me see "},
            {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
            {"role": "tool_call", "content": '{"name": "weather", "arguments": "{}"}'},
            {"role": "tool_response", "content": "rain"},
            {"role": "tool_response", "content": "sun"},
            {"role": "assistant", "content": "rain, sun"},
        ],
        "audio": "clips/a.wav",
        "tools": json.dumps([WEATHER]),
    }
    records, report = convert([heard, called])
    assert (report.format, report.guessed, report.tasks) == ("sharegpt", True, {"aqta": 1, "tool": 1})
    assert records[0] == Record(
        "in-000001",
        (
            turn("system", "be brief"),
            turn("human", AudioPart("clips/a.wav"), "what is it?", AudioPart("clips/b.wav")),
            turn("assistant", "seven"),
        ),
        {"label": False},
    )
    calls = (ToolCall("weather", {"city": "Bonn"}), ToolCall("weather"))
    assert records[1].messages == (
        turn("human", AudioPart("clips/a.wav")),
        turn("assistant", "let me see ", *calls),
        turn("tool", "rain"),
        turn("tool", "sun"),
        turn("assistant", "rain, sun"),
    )
    assert (records[1].id, records[1].tools) == ("7", (WEATHER,))


def test_a_list_of_rows_is_told_by_line(folder: Path, convert: Convert):
    good = {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]}
    bad = {"conversations": [{"from": "nobody", "value": "hi"}]}
    (folder / "list.json").write_text(
        f"\ufeff[\n{json.dumps(good)},\n\n  {json.dumps(bad)},\n{json.dumps(good)} }}", "utf-8"
    )
    records, report = convert(folder / "list.json")
    assert [record.id for record in records] == ["list-000001", "list-000003"]
    assert list(reasons(report)) == ["list.json:4", "list.json:5"]
    assert "'nobody'" in reasons(report)["list.json:4"] and "no JSON" in reasons(report)["list.json:5"]


def test_openai(folder: Path, convert: Convert):
    data = base64.b64encode(wav()).decode()
    inline = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    linked = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [inline, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "assistant", "content": None, "audio": {"id": "x", "data": data, "transcript": "rain"}},
            {"role": "user", "content": [linked]},
            {"role": "user", "content": [{"type": "audio", "audio": "clips/a.wav"}]},
            {"role": "assistant", "content": "seven"},
        ],
        "tools": [WEATHER],
    }
    records, report = convert([row])
    kept = f"out_audio/{hashlib.sha256(wav()).hexdigest()}.wav"
    assert (report.format, report.tasks) == ("openai", {"tool": 1})
    assert records[0].messages == (
        turn("system", "be brief"),
        turn("human", AudioPart(kept), "what is it?"),
        turn("assistant", ToolCall("weather", {"city": "Bonn"})),
        turn("tool", "rain"),
        turn("assistant", AudioPart(kept, text="rain")),
        turn("human", AudioPart(kept), AudioPart("clips/a.wav")),
        turn("assistant", "seven"),
    )
    assert (folder / kept).read_bytes() == wav()
    assert len(list((folder / "out_audio").iterdir())) == 1


def test_kimi(convert: Convert):
    row = {
        "task_type": "understanding",
        "conversation": [
            {"role": "user", "message_type": "text", "content": "Transcribe."},
            {"role": "user", "message_type": "audio", "content": "clips/a.wav", "audio_tokens": [1, 2]},
            {"role": "assistant", "message_type": "text", "content": "seven"},
            {"role": "user", "message_type": "audio-text", "content": ["clips/b.wav", "and now?"]},
            {"role": "assistant", "message_type": "audio", "content": "clips/a.wav"},
        ],
    }
    records, report = convert([row])
    turns = (
        turn("human", "Transcribe.", AudioPart("clips/a.wav")),
        turn("assistant", "seven"),
        turn("human", AudioPart("clips/b.wav", text="and now?")),
        turn("assistant", AudioPart("clips/a.wav")),
    )
    assert (report.format, report.tasks) == ("kimi", {"aqaa": 1})
    assert records == [Record("in-000001", turns, {"task_type": "understanding"})]


def test_a_task_that_is_asked_for_is_named_and_recognition_gets_its_prompt(convert: Convert):
    def row(answer: str) -> dict[str, Any]:
        heard = {"role": "user", "message_type": "audio", "content": "clips/a.wav"}
        kind = "audio" if answer.endswith(".wav") else "text"
        return {"conversation": [heard, {"role": "assistant", "message_type": kind, "content": answer}]}

    records, report = convert([row("seven"), row("clips/b.wav")], task="asr")
    assert [record.task for record in records] == ["asr"]
    assert records[0].messages[0] == turn("system", ASR_PROMPT)
    assert reasons(report) == {"in.jsonl:2": "task asr: the last turn of assistant must hold text"}


EDIT = {
    "source_audio": "elsewhere/a.wav",
    "source_text": "seven",
    "source_vq02vq06": CODES,
    "target_text": "[Laughter] seven",
    "target_vq02vq06": [*CODES, *CODES],
    "task_type": "edit",
    "edit_type": "emotion",
    "edit_info": "happy",
}


def test_editx(convert: Convert):
    prompt_only = {name: value for name, value in EDIT.items() if name != "target_vq02vq06"} | {"edit_type": "style"}
    sounds = EDIT | {"edit_type": "paralinguistic", "rejected_vq02vq06": CODES}
    clone = EDIT | {"task_type": "clone", "source_audio": "clips/a.wav"}
    records, report = convert([EDIT, prompt_only, sounds, clone, EDIT | {"edit_type": "denoise"}])
    source, target = AudioPart(tokens=TOKENS, text="seven"), AudioPart(tokens=TOKENS * 2, text="[Laughter] seven")
    assert (report.format, report.tasks) == ("editx", {"edit": 4, "tts": 1})
    asked = " Make the following audio more happy. The text corresponding to the audio is: seven\n\n"
    turns = (turn("system", EDIT_PROMPT), turn("human", asked, source, "\n"), turn("assistant", target))
    assert records[0] == Record("in-000001", turns, {"edit_type": "emotion", "edit_info": "happy"}, "edit")
    assert [message.role for message in records[1].messages] == ["system", "human"]
    assert "the new text is : [Laughter] seven\n" in records[2].messages[1].content[0].text
    assert records[2].meta["rejected_tokens"] == TOKENS
    assert "eliminate all noise" in records[4].messages[1].content[0].text
    name = records[3].messages[0].content[0].text.partition("speaker name: ")[2].partition("\n")[0]
    assert name.startswith("clone_") and len(name) == len("clone_") + 16
    voice = Voice("seven", AudioPart("clips/a.wav", TOKENS, "seven"), name)
    expected = clone_record("in-000004", "[Laughter] seven", voice, target)
    assert records[3].messages == expected.messages


def write_kaldi(folder: Path, **files: str) -> Path:
    data = folder / "kaldi"
    data.mkdir()
    for name, content in files.items():
        (data / name.replace("_", ".")).write_text(content, "utf-8")
    return data


def test_kaldi_recognition(folder: Path, convert: Convert):
    made = folder / "made_by_a_command"
    source = write_kaldi(
        folder,
        wav_scp=(
            f"u1 {folder}/clips/a.wav\nu2\t../clips/b.wav\nu3 touch {made} |\nu4 gone.wav\nu2 again.wav\n"
            f"u6 {folder}/clips/a.wav\n"
        ),
        text="u1 one  two\nu2 three\nu3 four\nu4 five\nu5 six\n",
        utt2spk="u1 theo\n",
    )
    records, report = convert(source)
    assert (report.format, report.tasks) == ("kaldi", {"asr": 2})
    assert records == [
        recognition_record("u1", AudioPart("clips/a.wav", text="one two", speaker="theo"), "one two"),
        recognition_record("u2", AudioPart("clips/b.wav", text="three"), "three"),
    ]
    why = reasons(report)
    assert sorted(why) == ["text:5", "wav.scp:3", "wav.scp:4", "wav.scp:5", "wav.scp:6"]
    assert "commands are not run" in why["wav.scp:3"] and "stands twice" in why["wav.scp:5"]
    assert not made.exists()


def test_kaldi_segments(folder: Path, convert: Convert):
    ramp = np.arange(16000, dtype=np.int16)
    soundfile.write(folder / "long.flac", ramp, 16000)
    source = write_kaldi(
        folder,
        wav_scp=f"r {folder}/long.flac\n",
        segments="u1 r 0.25 0.5\nu2 r 0.75 1.2\nu3 r 0.75 2\nu4 r 0.5 0.25\nu5 r 0.9 -1\nu6 q 0 1\n",
        text="".join(f"u{number} word\n" for number in range(1, 7)),
    )
    records, report = convert(source)
    assert [record.id for record in records] == ["u1", "u2", "u5"]
    cuts = [soundfile.read(folder / record.audio_parts()[0].audio, dtype="int16")[0] for record in records]
    np.testing.assert_array_equal(cuts[0], ramp[4000:8000])
    np.testing.assert_array_equal(cuts[1], ramp[12000:])
    np.testing.assert_array_equal(cuts[2], ramp[14400:])
    assert sorted(reasons(report)) == ["segments:3", "segments:4", "segments:6"]


def test_kaldi_synthesis_takes_the_voice_from_the_speakers_recording_before(folder: Path, convert: Convert):
    source = write_kaldi(
        folder,
        wav_scp="".join(f"u{number} {folder}/clips/{name}.wav\n" for number, name in enumerate("abab")),
        text="u0 zero\nu1 one\nu2 two\nu3 three\n",
        utt2spk="u0 theo\nu1 ann\nu2 theo\n",
    )
    records, report = convert(source, task="tts")
    first, second = (AudioPart("clips/a.wav", text=text, speaker="theo") for text in ("zero", "two"))
    assert records == [
        synthesis_record("u0", "zero", Voice("two", second), answer=first),
        synthesis_record("u2", "two", Voice("zero", first), answer=second),
    ]
    assert records[0].messages[0] == turn("system", voice_prompt()) and report.tasks == {"tts": 2}
    assert "only recording of ann" in reasons(report)["wav.scp:2"] and "no speaker" in reasons(report)["wav.scp:4"]


def test_tables_of_recordings(folder: Path, convert: Convert):
    datasets = pytest.importorskip("datasets")
    audio = [{"bytes": content, "path": None} for content in (wav(), wav(0.2), b"noise")]
    columns = {"audio": audio, "text": ["seven", " two  one ", "three"], "speaker": ["theo", None, "ann"]}
    table = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(16000))
    table.to_parquet(str(folder / "table.parquet"))
    records, report = convert(folder / "table.parquet")
    first, second = (f"out_audio/{hashlib.sha256(wav(duration_s)).hexdigest()}.wav" for duration_s in (0.1, 0.2))
    assert (report.format, report.guessed, report.tasks) == ("hf", True, {"asr": 2})
    assert records == [
        recognition_record("table-0", AudioPart(first, text="seven", speaker="theo"), "seven"),
        recognition_record("table-1", AudioPart(second, text="two one"), "two one"),
    ]
    assert (folder / second).read_bytes() == wav(0.2)
    assert reasons(report) == {"table.parquet: row 2": "its 5 bytes of audio cannot be read as audio"}


def test_tables_of_conversations(folder: Path, convert: Convert):
    datasets = pytest.importorskip("datasets")
    asked = [{"role": "user", "content": "<audio>what?"}, {"role": "assistant", "content": "seven"}]
    written = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    asked[0]["content"] += "<audio>"
    audios = [{"bytes": wav(), "path": None}, {"bytes": None, "path": str(folder / "clips" / "b.wav")}]
    columns = {"messages": [asked, written], "audios": [audios, None], "split": ["x", None]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "saved"))
    records, report = convert(folder / "saved")
    kept = f"out_audio/{hashlib.sha256(wav()).hexdigest()}.wav"
    heard = turn("human", AudioPart(kept), "what?", AudioPart("clips/b.wav"))
    assert (report.format, report.tasks) == ("hf", {"aqta": 1, "tqta": 1})
    assert records[0].messages == (heard, turn("assistant", "seven"))
    assert (records[0].meta, records[1].meta) == ({"split": "x"}, {})


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (folder / "table.parquet").touch()
    with pytest.raises(UserError, match=r"pip install 'stepaudio-train\[datasets\]'"):
        import_conversations(ImportOptions(folder / "table.parquet", folder / "out.jsonl"))


def ask(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}], **fields}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("sharegpt", ask("<audio>", audios=["clips/a.wav", "clips/b.wav"]), "audios: 2 recordings for 1 <audio>"),
        ("sharegpt", ask("<audio>", audios=["gone.wav"]), "gone.wav: no such recording"),
        ("sharegpt", ask("<audio>", audios=["https://a.example/b.wav"]), "nothing is downloaded"),
        ("sharegpt", ask("hi", images=["a.png"]), "images: there is no place"),
        ("sharegpt", ask("hi", tools="{"), "tools: no JSON"),
        ("sharegpt", ask([{"type": "text"}]), "turn 1: must hold text"),
        ("sharegpt", {"conversations": "hi"}, "conversations: must be a list of turns"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "hi"}]}, "turn 1 is assistant"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[1]"}]}, "a call of a tool must be"),
        ("sharegpt", {"conversations": [{"from": "human", "value": ""}]}, "turn 1 (human) is empty"),
        ("openai", ask("hi", audios=["clips/a.wav"]), "type --from sharegpt"),
        ("openai", ask([{"type": "image_url"}]), "content must be text, input_audio or audio_url"),
        ("openai", ask([{"type": "input_audio", "input_audio": {"data": "%"}}]), "is no base64"),
        ("openai", ask([{"type": "input_audio", "input_audio": {"data": "AAAA"}}]), "cannot be read as audio"),
        ("openai", ask([{"type": "audio_url", "audio_url": {"url": "http://a/b.wav"}}]), "nothing is downloaded"),
        ("openai", {"messages": [{"role": "human", "content": "hi"}]}, "its role must be one of user"),
        ("kimi", {"conversation": [{"role": "user", "message_type": "audio-text", "content": "a"}]}, "[path, text]"),
        ("editx", EDIT | {"edit_type": "louder"}, "edit_type: must be one of emotion"),
        ("editx", EDIT | {"source_vq02vq06": [12, 40]}, "source_vq02vq06: id 12 at position 0 should be linguistic"),
        ("editx", EDIT | {"source_vq02vq06": None}, "elsewhere/a.wav: no such recording"),
        ("kimi", [1], "must be an object"),
        ("kimi", "{", "no JSON"),
    ],
)
def test_refused_by_line(convert: Convert, format: str, row: Any, expected: str):
    good = {
        "sharegpt": ask("hi"),
        "openai": ask("hi"),
        "editx": EDIT,
        "kimi": {"conversation": [{"role": "user", "message_type": "text", "content": "hi"}]},
    }
    records, report = convert(["", good[format], row], format=format)
    assert len(records) == 1
    assert list(reasons(report)) == ["in.jsonl:3"]
    assert expected in report.refused[0].reason
    assert "in.jsonl:3: " in report.summary()


def test_what_fits_two_formats_must_be_told(folder: Path, convert: Convert):
    with pytest.raises(UserError, match=r"may be openai or sharegpt; type --from openai\|sharegpt"):
        convert([ask("hi")])
    # A later row tells.
    assert convert([ask("hi"), ask("<audio>", audios=["clips/a.wav"])])[1].format == "sharegpt"
    assert convert([ask("hi"), ask([{"type": "text", "text": "hi"}])])[1].format == "openai"
    with pytest.raises(UserError, match=r"type --from sharegpt\|openai\|kimi\|editx\|kaldi\|hf"):
        convert([{"question": "hi"}])
    (folder / "wav.scp").touch()
    (folder / "x.parquet").touch()
    with pytest.raises(UserError, match="may be hf or kaldi"):
        guess_format(folder)


def test_nothing_is_written_when_nothing_can_be_used(folder: Path, convert: Convert):
    with pytest.raises(UserError, match=r"nothing in it can be used as kimi \(.*in.jsonl:1: must be an object"):
        convert(["1", "[]"], format="kimi")
    assert not (folder / "out.jsonl").exists() and not (folder / "out.jsonl.report.json").exists()


def test_sources_and_outputs_that_make_no_sense(folder: Path):
    source = folder / "in.jsonl"
    with pytest.raises(UserError, match="no such file or folder"):
        import_conversations(ImportOptions(source, folder / "out.jsonl"))
    source.write_text("{}")
    with pytest.raises(UserError, match="must be another file"):
        import_conversations(ImportOptions(source, source))
    with pytest.raises(UserError, match="name must end with .jsonl"):
        import_conversations(ImportOptions(source, folder / "out.json"))
    with pytest.raises(UserError, match="read from a file"):
        import_conversations(ImportOptions(folder, folder / "out.jsonl", "kimi"))
    with pytest.raises(UserError, match="is no Kaldi data directory"):
        import_conversations(ImportOptions(folder, folder / "out.jsonl", "kaldi"))
    with pytest.raises(UserError, match="type --task asr or --task tts"):
        import_conversations(ImportOptions(write_kaldi(folder, wav_scp="", text=""), folder / "out.jsonl", task="aqaa"))


def test_recordings_outside_the_outputs_folder_are_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "new").mkdir()
    (folder / "in.jsonl").write_text(json.dumps(ask("<audio>", audios=["clips/a.wav"])))
    monkeypatch.chdir(folder)
    import_conversations(ImportOptions(Path("in.jsonl"), Path("new/out.jsonl")))
    (record,) = read_records(folder / "new" / "out.jsonl")
    assert record.audio_parts()[0].audio == os.path.abspath("clips/a.wav")
