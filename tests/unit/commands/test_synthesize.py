"""`stepaudio synthesize` and `decode`: texts and tokens to sound files, with small models that speak at random."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.audio import read_audio
from stepaudio_train.audio.preprocessing import TTS_PROMPT
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.cli import main
from stepaudio_train.commands import synthesize
from stepaudio_train.commands.decode import DecodeOptions, run_decoding
from stepaudio_train.commands.resynthesize import ResynthesizeOptions, run_resynthesis
from stepaudio_train.commands.synthesize import SynthesizeOptions, run_synthesis
from stepaudio_train.config.compose import save_config
from stepaudio_train.config.decoder import FlowConfig, FlowSolverConfig
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import PretrainConfig, Step1Config
from stepaudio_train.config.sft import SftConfig, SftDataConfig
from stepaudio_train.config.speaker import SpeakerEncoderConfig
from stepaudio_train.config.vocoder import VocoderConfig
from stepaudio_train.data.prompts import RAP_PROMPT, SINGING_PROMPT, Voice, synthesis_record, voice_prompt
from stepaudio_train.data.records import AudioPart, Message, Record, TextPart, speech_record
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.models.decoder import speech_decoder
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.flow_files import save_flow
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import save_vocoder
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rollout.speech_text import SpeechTextModel
from stepaudio_train.rollout.synthesis import Synthesizer
from stepaudio_train.rollout.voices import VoiceReader
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.testing.token_data import TEXT_SIZE, write_text_tokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer
from stepaudio_train.tokenizers.vocabulary import Special

FLOW = FlowConfig(
    hidden_size=32, ffn_size=32, num_blocks=1, decoder_channels=32, decoder_head_size=16, decoder_mid_blocks=1
)
VOCODER = VocoderConfig(base_channels=16, f0_channels=16, resblock_kernels=(3,), num_harmonics=2)
GROUP_S = 0.12


def talker(end: Special) -> Step1ForCausalLM:
    """Says groups of tokens, any of eight in each place, and ends after one of them with a chance of about a fifth."""
    torch.manual_seed(0)
    config = Step1Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=TEXT_SIZE + 5120)
    model = Step1ForCausalLM(config).eval()
    places = [TEXT_SIZE, TEXT_SIZE + 100, TEXT_SIZE + 1024, TEXT_SIZE + 2000, TEXT_SIZE + 3000]
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        for layer in model.model.layers:  # what is far back counts little
            layer.self_attn.o_proj.weight *= 0.1
            layer.mlp.down_proj.weight *= 0.1
        embedding.normal_(0, 0.02)
        head.normal_(0, 0.05)
        head[:, :5] = -10
        embedding[:, 0] = 1  # after anything else comes the first place
        for place, first in enumerate(places):
            embedding[first : first + 8, :5] = torch.eye(5)[(place + 1) % 5]
            head[first : first + 8, place] = 10
        head[end, 0] = 8.5
        embedding[places[4] : places[4] + 8, 5] = 1
        head[end, 5] = 1.75
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned run, a pretrained one, decoders with and without a speaker encoder, and speakers."""
    root = tmp_path_factory.mktemp("synthesize")
    small_speech_tokenizer().save(root / "tokenizer")
    for name, end in (("sft", Special.EOT), ("pretrain", Special.AUDIO_END)):
        talker(end).save_pretrained(root / name / "export")
        write_text_tokenizer(root / name / "export" / "tokenizer.model")
    data = SftDataConfig(speech_tokenizer=str(root / "tokenizer"), own_tags=("whisper",))
    save_config(SftConfig(data=data), root / "sft" / "config.yaml")
    save_config(PretrainConfig(), root / "pretrain" / "config.yaml")
    torch.manual_seed(0)
    for name in ("flow", "music"):
        save_flow(FlowMatching(FLOW), root / name)
    save_vocoder(HiFTGenerator(VOCODER), root / "vocoder")
    SmallSpeakerEncoder(SpeakerEncoderConfig(channels=8)).save(root / "flow" / "speaker.safetensors")
    (root / "speakers").mkdir()
    says = {"Ann": "one two", "Ann哼唱": "(singing)three", "Bob": "four"}
    (root / "speakers" / "speakers_info.json").write_text(json.dumps(says, ensure_ascii=False), encoding="utf-8")
    for number, name in enumerate(says):
        path = root / "speakers" / f"{name}_prompt.wav"
        soundfile.write(path, speech_like(12000 + 2000 * number, number).numpy(), 16000)
    return root


@pytest.fixture(autouse=True)
def one_euler_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_decoder, "FlowSolverConfig", lambda: FlowSolverConfig(num_steps=1))


@pytest.fixture
def options(root: Path, tmp_path: Path) -> SynthesizeOptions:
    return SynthesizeOptions(
        root / "sft",
        root / "flow",
        tmp_path / "out",
        vocoder=root / "vocoder",
        speakers=root / "speakers",
        speaker="Ann",
        device="cpu",
    )


def rows(folder: Path, table: str = "synthesized") -> dict[str, dict]:
    lines = (folder / f"{table}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def written(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def prompts_of(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What will be put to language models."""
    seen: list[list[int]] = []
    generate = SpeechTextModel._generate

    def watched(self, prompts, *rest):
        seen.extend(prompts)
        return generate(self, prompts, *rest)

    monkeypatch.setattr(SpeechTextModel, "_generate", watched)
    return seen


# Texts


def test_texts_become_sound_of_their_tokens_length(options):
    assert run_synthesis(replace(options, texts=("one", "(fast 2) two three"))) == 0
    found = rows(options.output)
    assert list(found) == ["text_1", "text_2"]
    assert (found["text_2"]["text"], found["text_2"]["tags"]) == ("two three", ["fast 2"])
    assert [row["seed"] for row in found.values()] == [0, 1] and found["text_1"]["speaker"] == "Ann"
    for row in found.values():
        with soundfile.SoundFile(options.output / row["audio"]) as file:
            assert file.samplerate == 22050
            assert file.frames / 22050 == pytest.approx(row["duration_s"], abs=1e-3)
        assert row["ended"] and row["duration_s"] == pytest.approx(
            row["audio_tokens"].count("<") / 5 * GROUP_S, abs=0.02
        )


def test_24_khz_is_the_same_sound_at_another_rate(options, root, tmp_path):
    run_synthesis(replace(options, texts=("one",)))
    other = replace(options, texts=("one",), output=tmp_path / "24", sample_rate_hz=24000, format="flac")
    assert run_synthesis(other) == 0
    made, rate_hz = soundfile.read(options.output / "text_1.wav")
    resampled, other_hz = soundfile.read(other.output / "text_1.flac")
    assert (rate_hz, other_hz) == (22050, 24000) and len(resampled) == -(-len(made) * 160 // 147)
    # A slow sine of the same length in both: as much of it is in either.
    parts = [
        np.abs(samples @ np.exp(2j * np.pi * 500 * np.arange(len(samples)) / hz)) / hz
        for samples, hz in ((made, 22050), (resampled, 24000))
    ]
    assert parts[0] == pytest.approx(parts[1], rel=0.05)
    recording = root / "speakers" / "Bob_prompt.wav"
    again = ResynthesizeOptions((recording,), options.decoder, root / "tokenizer", tmp_path / "again", options.vocoder)
    assert run_resynthesis(replace(again, sample_rate_hz=24000, device="cpu")) == 0
    assert soundfile.info(tmp_path / "again" / "Bob_prompt.wav").samplerate == 24000


def test_the_prompt_is_the_released_one_of_two_rounds(options, root, tmp_path, monkeypatch):
    """System prompt, what the recording says, its trimmed and normalised tokens, the text with its tags as typed."""
    seen = prompts_of(monkeypatch)
    bob = {"voice": str(root / "speakers" / "Bob_prompt.wav"), "voice_text": "four"}
    # Ann has a recording of her singing, and none of her rapping.
    cases = [
        ({"id": "named", "text": "(fast 2) two"}, "Ann", "one two", "Ann", voice_prompt("Ann")),
        ({"id": "song", "text": "(singing)two"}, "Ann哼唱", "(singing)three", "Ann", SINGING_PROMPT),
        ({"id": "clone", "text": "two", **bob}, "Bob", "four", None, voice_prompt()),
        ({"id": "chanted", "text": "(RAP)two"}, "Ann", "one two", "Ann", RAP_PROMPT),
    ]
    assert run_synthesis(replace(options, records=written(tmp_path / "all.jsonl", [case[0] for case in cases]))) == 0
    tokenizer = SpeechTokenizer.from_directory(root / "tokenizer", "cpu")
    renderer = SpeechTextModel.from_directory(root / "sft" / "export", "cpu").renderer
    for prompt, (line, entry, says, speaker, system) in zip(seen, cases, strict=True):
        waveform = TTS_PROMPT.apply(read_audio(root / "speakers" / f"{entry}_prompt.wav"))
        (speech,) = tokenizer.encode([waveform], peak_norm=False)
        asked, _ = TagVocabulary().parse(line["text"])
        record = synthesis_record("r", line["text"], Voice(says, AudioPart("voice"), speaker), asked)
        assert record.messages[0].content[0].text == system
        assert renderer.render_chat_prompt(TokenSample(record, {"voice": speech}), "tts").tolist() == prompt


def test_how_a_model_is_asked_follows_from_its_run(options, root, tmp_path, monkeypatch):
    seen = prompts_of(monkeypatch)
    renderer = SpeechTextModel.from_directory(root / "sft" / "export", "cpu").renderer
    own = replace(options, texts=("two",), system="as {speaker}", output=tmp_path / "own")
    assert run_synthesis(own) == 0
    turns = (Message("system", (TextPart("as Ann"),)), Message("human", (TextPart("two"),)))
    assert seen.pop() == renderer.render_chat_prompt(TokenSample(Record("r", turns)), "tts").tolist()
    for model in (root / "pretrain", root / "pretrain" / "export"):
        assert run_synthesis(replace(options, texts=("two",), model=model, output=tmp_path / model.name)) == 0
        expected = renderer.render_prompt(TokenSample(speech_record("r", AudioPart("x", text="two"))), "tts").tolist()
        assert seen.pop() == expected and rows(tmp_path / model.name)["text_1"]["ended"]
    bare = tmp_path / "bare"
    shutil.copytree(root / "sft" / "export", bare)
    released = replace(options, texts=("two",), model=bare, output=tmp_path / "released")
    with pytest.raises(UserError, match="--speech-tokenizer DIR"):
        run_synthesis(released)
    assert run_synthesis(replace(released, speech_tokenizer=root / "tokenizer", template="tts_bos")) == 0
    assert seen.pop().count(Special.BOS) == 6  # one in front, and one behind each of five <|BOT|>


def test_music_has_its_own_decoder(options, root, tmp_path, monkeypatch):
    texts = ("(哼唱)one", "one")
    first, second = (replace(options, texts=texts, output=tmp_path / name) for name in ("plain", "music"))
    assert run_synthesis(first) == 0
    assert run_synthesis(replace(second, music_decoder=root / "music")) == 0
    assert rows(first.output)["text_1"]["audio_tokens"] == rows(second.output)["text_1"]["audio_tokens"]
    sung, spoken = (
        [soundfile.read(output / f"text_{number}.wav")[0] for output in (first.output, second.output)]
        for number in (1, 2)
    )
    assert np.allclose(*spoken, atol=1e-3) and not np.allclose(*sung, atol=1e-2)


def test_seeds_decide_and_neighbours_do_not(options, tmp_path, monkeypatch):
    texts = ("one", "two three four", "one", "five")
    together, again, alone, other = (
        replace(options, texts=texts, output=tmp_path / name) for name in ("together", "again", "alone", "other")
    )
    assert run_synthesis(together) == run_synthesis(again) == run_synthesis(replace(other, seed=5)) == 0
    monkeypatch.setattr(synthesize, "_BATCH_TEXTS", 1)
    assert run_synthesis(alone) == 0
    found = rows(together.output)
    assert found == rows(again.output)
    assert [row["audio_tokens"] for row in found.values()] == [r["audio_tokens"] for r in rows(alone.output).values()]
    assert (
        found["text_1"]["audio_tokens"]
        != found["text_3"]["audio_tokens"]
        != rows(other.output)["text_3"]["audio_tokens"]
    )
    for name in found:
        first, second, third = (soundfile.read(folder.output / f"{name}.wav")[0] for folder in (together, again, alone))
        assert np.array_equal(first, second)
        np.testing.assert_allclose(first, third, atol=1e-3)


def test_bad_lines_are_named_and_the_rest_goes_on(options, tmp_path, capfd):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "short.wav", np.full(1000, 0.1), 16000)
    lines = [
        {"id": "good", "text": "(whisper)one"},
        {"id": "tag", "text": "(fats 3)one"},
        {"id": "level", "text": "(fast 9)one"},
        {"id": "field", "text": "one", "voices": "x"},
        {"id": "a/b", "text": "one"},
        {"id": "good", "text": "two"},
        {"id": "speaker", "text": "one", "speaker": "Anna"},
        {"id": "gone", "text": "one", "voice": "gone.wav", "voice_text": "x"},
        {"id": "broken", "text": "one", "voice": "broken.wav", "voice_text": "x"},
        {"id": "short", "text": "one", "voice": "short.wav", "voice_text": "x"},
        {"id": "untold", "text": "one", "voice": "short.wav"},
        {"id": "empty", "text": "(RAP) "},
        {"id": "turn", "text": "one<|EOT|>"},
        {"id": "last", "text": "two", "speaker": "Bob"},
    ]
    file = written(tmp_path / "lines.jsonl", lines)
    assert run_synthesis(replace(options, records=file)) == 1
    assert list(rows(options.output)) == ["good", "last"] and rows(options.output)["last"]["seed"] == 13
    told = capfd.readouterr().err
    for number, reason in {
        2: "did you mean 'fast'",
        3: "levels from 1 to 5",
        4: "voices: unknown field",
        5: "'a/b' cannot name a file",
        6: "'good' names an earlier line already",
        7: "did you mean 'Ann'",
        8: "gone.wav: no such recording",
        9: "broken.wav: cannot be read as audio",
        10: "short.wav",
        11: "--voice FILE --voice-text TEXT",
        12: "holds no words",
        13: "<|EOT|>",
    }.items():
        (line,) = [line for line in told.splitlines() if f"left out: {file}:{number}: " in line]
        assert reason in line


def test_what_a_killed_command_finished_is_not_made_again(options, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "_BATCH_TEXTS", 2)
    texts = ("one", "two", "three", "four", "five")
    whole = replace(options, texts=texts, output=tmp_path / "whole")
    assert run_synthesis(whole) == 0
    killed = replace(options, texts=texts)
    speak, calls = Synthesizer.speak, []

    def speak_twice(self, utterances):
        calls.append([utterance.id for utterance in utterances])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return speak(self, utterances)

    monkeypatch.setattr(Synthesizer, "speak", speak_twice)
    with pytest.raises(KeyboardInterrupt):
        run_synthesis(killed)
    assert sorted(path.name for path in killed.output.iterdir()) == [
        "synthesized.jsonl.partial",
        "text_1.wav",
        "text_2.wav",
    ]
    with (killed.output / "synthesized.jsonl.partial").open("a") as file:
        file.write('{"id": "text_3", "aud')  # cut off while it was written
    assert run_synthesis(killed) == 0
    assert calls[2:] == [["text_3", "text_4"], ["text_5"]]
    assert (killed.output / "synthesized.jsonl").read_bytes() == (whole.output / "synthesized.jsonl").read_bytes()
    assert not (killed.output / "synthesized.jsonl.partial").exists()
    assert run_synthesis(killed) == 0 and len(calls) == 4  # nothing left to do
    (killed.output / "text_2.wav").unlink()
    assert run_synthesis(killed) == 0 and calls[4:] == [["text_2"]]
    with pytest.raises(UserError, match=r"holds text_1\.wav, which another command made"):
        run_synthesis(replace(killed, texts=("another",)))
    (killed.output / "synthesized.jsonl").write_text('{"id": "mine"}\n')
    with pytest.raises(UserError, match="is no table of sound files"):
        run_synthesis(killed)


def test_answers_that_do_not_end_or_do_not_speak_are_named(options, tmp_path, capfd):
    assert run_synthesis(replace(options, texts=("one",), max_new_tokens=5)) == 0
    assert rows(options.output)["text_1"]["ended"] is False
    assert "text_1: did not end within 5 tokens" in capfd.readouterr().err
    assert run_synthesis(replace(options, texts=("one",), max_new_tokens=4, output=tmp_path / "none")) == 1
    assert "text_1: the model's answer holds no speech" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ()}, "--records FILE.jsonl"),
        ({"records": Path("x.jsonl")}, "not both"),
        ({"voice": Path("x.wav")}, "--voice and --speakers"),
        ({"speakers": Path("nowhere")}, "speakers_info.json"),
        ({"decoder": Path("nowhere")}, "nowhere"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, changes, message):
    with pytest.raises(UserError, match=message):
        run_synthesis(replace(options, **{"texts": ("one",)} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speakers": None}, "speaks in the voice of a recording"),
        ({"speaker": None}, "names no speaker"),
        ({"speakers": None, "decoder": "music"}, "the released prompt begins with a recording"),
        ({"speakers": None, "decoder": "music", "speaker": None, "system": "as {speaker}"}, "type --speaker NAME"),
        ({"model": "pretrain", "texts": ("(fast 1)one",)}, "knows no instruction tags"),
    ],
)
def test_what_a_text_lacks_is_named(options, root, capfd, changes, message):
    changes = {name: root / value if name in ("model", "decoder") else value for name, value in changes.items()}
    assert run_synthesis(replace(options, **{"texts": ("one",)} | changes)) == 1
    assert message in capfd.readouterr().err


# Voices


def test_a_decoder_is_told_of_tokens_and_mel_of_one_stretch_and_of_the_whole_voice(root):
    decoder = SpeechDecoder.from_directory(root / "flow", root / "vocoder", device="cpu")
    path = root / "padded.wav"
    padded = torch.cat([torch.zeros(20000), speech_like(16000), torch.zeros(20000)])
    soundfile.write(path, padded.numpy(), 16000, subtype="FLOAT")
    prompt = VoiceReader(SpeechTokenizer.from_directory(root / "tokenizer", "cpu")).flow_prompt(path, decoder)
    assert torch.equal(prompt.speaker, decoder.prompt(padded).speaker)
    assert len(prompt.mel) == FLOW.num_frames(len(prompt.tokens))
    assert 1.0 <= len(prompt.tokens) / 5 * GROUP_S < 1.5  # 3.5 s, less the silence
    assert not len(VoiceReader(None).flow_prompt(path, decoder).tokens)


# Tokens


def test_generated_tokens_become_sound(options, root, tmp_path, capfd):
    generated = tmp_path / "spoken.jsonl"
    arguments = ["generate", str(root / "pretrain"), "--task", "tts", "--temperature", "1", "--output", str(generated)]
    assert main([*arguments, "--text", "one", "two"]) == 0
    (tmp_path / "voice.wav").write_bytes((root / "speakers" / "Bob_prompt.wav").read_bytes())
    lines = [json.loads(line) for line in generated.read_text().splitlines()]
    group = "<audio_1><audio_2><audio_1030><audio_1031><audio_5119>"
    bad = {
        "said": "hello",
        "mixed": f"{group}hello",
        "beyond": group.replace("5119", "5120"),
        "order": group.replace("1030", "7"),
        "odd": f"{group}<audio_1>",
        "none": "",
    }
    lines += [{"id": name, "audio_tokens": tokens} for name, tokens in bad.items()]
    lines += [
        {"id": "text", "text": "no tokens"},
        {"id": "good", "audio_tokens": group, "voice": "voice.wav", "tags": []},
    ]
    file = written(tmp_path / "all.jsonl", lines)
    options = DecodeOptions(
        file, root / "flow", tmp_path / "out", root / "vocoder", root / "speakers" / "Ann_prompt.wav", device="cpu"
    )
    assert run_decoding(options) == 1
    found = rows(options.output, "decoded")
    assert list(found) == ["text 1", "text 2", "good"]
    assert found["good"] | {"request": ""} == {**lines[-1], "audio": "good.wav", "duration_s": 0.116, "request": ""}
    assert soundfile.info(options.output / "text 1.wav").duration == pytest.approx(
        found["text 1"]["duration_s"], abs=1e-3
    )
    told = capfd.readouterr().err
    for number, reason in {
        3: "expected nothing but <audio_k> tokens",
        4: "found 'hello'",
        5: "<audio_5120> is no audio token",
        6: "should be semantic",
        7: "6 tokens are no whole number of groups",
        8: "0 tokens",
        9: "audio_tokens",
    }.items():
        (line,) = [line for line in told.splitlines() if f"left out: {file}:{number}: " in line]
        assert reason in line
    # The voice's tokens make another sound; without a voice there is none.
    going_on = replace(options, output=tmp_path / "on", speech_tokenizer=root / "tokenizer")
    assert run_decoding(going_on) == 1
    first, second = (soundfile.read(one.output / "text 1.wav")[0] for one in (options, going_on))
    assert first.shape == second.shape and not np.allclose(first, second, atol=1e-3)
    capfd.readouterr()
    assert run_decoding(replace(options, voice=None, output=tmp_path / "voiceless")) == 1
    assert list(rows(tmp_path / "voiceless", "decoded")) == ["good"]
    assert f"{file}:1: {root / 'flow'}: speaks in the voice of a recording" in capfd.readouterr().err


# The command line


def test_the_command_line_arrives(root, tmp_path):
    folders = [("--decoder", "flow"), ("--vocoder", "vocoder"), ("--voice", "speakers/Bob_prompt.wav")]
    typed = [word for option, name in folders for word in (option, str(root / name))]
    output = ["--voice-text", "four", "--output", str(tmp_path), "--device", "cpu", "--sample-rate", "24000"]
    assert main(["synthesize", str(root / "sft"), "(sad 1)one", "two", *typed, *output]) == 0
    assert [row["tags"] for row in rows(tmp_path).values()] == [["sad 1"], []]
