"""Options of the commands about data and models: what is typed arrives, and the help holds."""

import argparse
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.cli import build_parser, main
from stepaudio_train.commands.data import DataOptions
from stepaudio_train.commands.decode import DecodeOptions
from stepaudio_train.commands.evaluate import AnswersOptions
from stepaudio_train.commands.generate import GenerateOptions
from stepaudio_train.commands.resynthesize import ResynthesizeOptions
from stepaudio_train.commands.synthesize import SynthesizeOptions
from stepaudio_train.config.compose import save_config
from stepaudio_train.config.schema import Step1Config
from stepaudio_train.config.sft import SftConfig, SftDataConfig
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.data.chat_processing import ProcessOptions
from stepaudio_train.data.importers.run import ImportOptions
from stepaudio_train.data.prepare import PrepareOptions
from stepaudio_train.data.records import Message, Record, TextPart
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.tokenize import TokenizeOptions
from stepaudio_train.evaluation.control import ControlOptions
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rollout.generate import generate as rollout
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import SpeechTextModel
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer
from stepaudio_train.tokenizers.text import train_text_tokenizer
from stepaudio_train.tokenizers.vocabulary import FIRST_BYTE_ID

TEXT_SIZE = 400


def options_of(command: str) -> dict[str, argparse.Action]:
    """The options of a command, such as `data show`, by the names that they are stored under."""
    parser = build_parser()
    for word in command.split():
        parser = next(a.choices[word] for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def stated_default(action: argparse.Action) -> str | None:
    """What the help says the default is; None if it does not, or says how it comes about."""
    found = re.search(r"\(default ([^:;)]+)", action.help or "")
    return found and found.group(1)


@pytest.mark.parametrize(
    ("commands", "options_type"),
    [
        (["prepare"], PrepareOptions),
        (["tokenize"], TokenizeOptions),
        (["generate"], GenerateOptions),
        (["data show", "data check"], DataOptions),
        (["data import"], ImportOptions),
        (["data process"], ProcessOptions),
        (["evaluate answers"], AnswersOptions),
        (["evaluate control"], ControlOptions),
        (["synthesize"], SynthesizeOptions),
        (["decode"], DecodeOptions),
        (["resynthesize"], ResynthesizeOptions),
    ],
)
def test_options_are_the_dataclass_and_so_are_their_defaults_and_choices(commands: list[str], options_type: type):
    known = {field.name: field for field in fields(options_type)}
    types = get_type_hints(options_type)
    assert {name for command in commands for name in options_of(command)} == known.keys()
    for name, action in ((name, action) for command in commands for name, action in options_of(command).items()):
        assert action.default is argparse.SUPPRESS
        default = known[name].default
        assert action.required == (default is MISSING), name
        # None, False, an empty tuple and 0 may go without saying.
        told = [str(default)] if default and default is not MISSING else [None, str(default)]
        assert stated_default(action) in told, name
        for literal in (one for one in (types[name], *get_args(types[name])) if get_origin(one) is Literal):
            assert tuple(action.choices) == get_args(literal), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of noise with transcripts, a text tokenizer, an untrained speech tokenizer and language model."""
    root = tmp_path_factory.mktemp("generate")
    noise = np.random.default_rng(0)
    (root / "audio").mkdir()
    for number, word in enumerate(["one", "two", "three", "four"] * 5):
        samples = noise.normal(0, 0.1, 8000 + 400 * number)
        soundfile.write(root / "audio" / f"{word}_{number}.wav", samples, 16000)
    (root / "audio" / "one_broken.wav").write_bytes(b"RIFF no audio")
    train_text_tokenizer(["one two", "three four"], TEXT_SIZE, root / "text.model")
    SpeechTokenizer(LinguisticTokenizer(LinguisticConfig()), SemanticTokenizer(SemanticConfig())).save(root / "speech")
    torch.manual_seed(0)
    config = Step1Config(hidden_size=32, intermediate_size=48, vocab_size=TEXT_SIZE + 1024 + 4096 + 8)
    Step1ForCausalLM(config).save_pretrained(root / "run" / "export")
    (root / "run" / "export" / "tokenizer.model").write_bytes((root / "text.model").read_bytes())
    return root


def test_recordings_become_tokens(folders: Path, capsys: pytest.CaptureFixture[str]):
    prepared, tokens = folders / "prepared", folders / "tokens"
    assert main(["prepare", str(folders / "audio"), str(prepared), "--num-workers", "1", "--speed-copies", "0.9"]) == 0
    output = capsys.readouterr().out
    assert "1 refused" in output and "one_broken.wav" in output
    tokenizers = ["--text-tokenizer", str(folders / "text.model"), "--speech-tokenizer", str(folders / "speech")]
    assert main(["tokenize", str(prepared), str(tokens), *tokenizers]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    report = json.loads((prepared / "report.json").read_text())
    assert counts == {split: count for split, count in report["samples"].items() if count}
    assert sum(counts.values()) > 20  # with the slower copies


def generate(folders: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["generate", str(folders / "run"), "--max-new-tokens", "8", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_generation_from_recordings_texts_and_records(folders: Path, capsys: pytest.CaptureFixture[str]):
    speech = ("--speech-tokenizer", str(folders / "speech"))
    recordings = [str(folders / "audio" / name) for name in ("one_0.wav", "two_1.wav")]
    heard = generate(folders, capsys, "--task", "asr", *speech, "--audio", *recordings)
    assert [(line["id"], line["task"], type(line["text"])) for line in heard] == [
        ("one_0", "asr", str),
        ("two_1", "asr", str),
    ]
    part = {"type": "audio", "audio": "audio/one_0.wav"}
    record = {"id": "r", "messages": [{"role": "human", "content": [part]}]}
    (folders / "records.jsonl").write_text(json.dumps(record))
    again = generate(folders, capsys, "--task", "asr", *speech, "--records", str(folders / "records.jsonl"))
    assert again[0]["text"] == heard[0]["text"]
    spoken = generate(folders, capsys, "--task", "tts", "--text", "one", "two", "--temperature", "1")
    assert [line["id"] for line in spoken] == ["text 1", "text 2"] and "audio_tokens" in spoken[0]
    # Few of the vocabulary's ids are text, so it takes many for a text.
    drawn = ("--task", "text", "--text", "one", "--temperature", "1", "--max-new-tokens", "200", "--seed")
    first, again, other = (generate(folders, capsys, *drawn, seed)[0]["text"] for seed in "334")
    assert first == again != other


def test_a_fine_tuned_model_answers_conversations(folders: Path, capsys: pytest.CaptureFixture[str]):
    data = SftDataConfig(template="chat", speech_tokenizer=str(folders / "speech"))
    save_config(SftConfig(data=data), folders / "run" / "config.yaml")
    part = {"type": "audio", "audio": "audio/one_0.wav", "text": "one"}
    asked = [{"id": "c1", "messages": [{"role": "system", "content": "two"}, {"role": "human", "content": [part]}]}]
    asked.append({"id": "c2", "messages": [{"role": "human", "content": "one two"}]})
    asked.append({"id": "c3", "messages": [{"role": "system", "content": "two"}]})
    file = folders / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)))
    assert main(["generate", str(folders / "run"), "--task", "chat", "--records", str(file)]) == 1  # one is left out
    told = capsys.readouterr()
    assert [json.loads(line)["id"] for line in told.out.splitlines()] == ["c1", "c2"]
    assert f"{file}:3: has no turn to answer" in told.err
    heard = generate(folders, capsys, "--task", "chat", "--audio", str(folders / "audio" / "one_0.wav"))
    assert heard[0]["id"] == "one_0" and {"text", "ended"} <= heard[0].keys()
    # What is asked is what was trained on: the same prompt by the renderer gives the same answer.
    model = SpeechTextModel.from_directory(folders / "run" / "export", "cpu")
    record = Record("c2", (Message("human", (TextPart("one two"),)),))
    prompt = model.renderer.render_chat_prompt(TokenSample(record), "chat").tolist()
    (expected,) = rollout(model.model, [prompt], SamplingConfig(max_new_tokens=8, stop_ids=(3, 2)))
    written = generate(folders, capsys, "--task", "chat", "--text", "one two")[0]
    text = [i for i in expected.ids if FIRST_BYTE_ID <= i < TEXT_SIZE]
    assert written["text"] == model.renderer.text_tokenizer.decode(text).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "asr", "--audio", "x.wav"], "--speech-tokenizer DIR"),
        (["--task", "asr", "--speech-tokenizer", "nosuch", "--text", "hi"], "text 1: asr takes a recording"),
        (["--task", "tts"], "nothing to go on from"),
        (["--task", "tts", "--text", "hi", "--top-p", "2"], "top_p=2.0"),
        (["--task", "asr", "--audio", "missing.wav", "--speech-tokenizer", "{speech}"], "missing.wav"),
        (["--task", "asr", "--audio", "missing.wav", "--speech-tokenizer", "nosuch"], "nosuch"),
    ],
)
def test_what_cannot_be_done_is_said(folders: Path, capsys, arguments: list[str], message: str):
    arguments = [argument.format(speech=folders / "speech") for argument in arguments]
    assert main(["generate", str(folders / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", str(tmp_path), "--task", "tts", "--text", "hi"]) == 2
    assert "config.json" in capsys.readouterr().err
