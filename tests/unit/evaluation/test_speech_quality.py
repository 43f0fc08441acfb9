"""Judging synthesised speech: what is added up, who can judge, and what is said where a judge is missing."""

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from stepaudio_train.audio import read_audio
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.judges import JudgeOptions
from stepaudio_train.evaluation.endpoint_recogniser import EndpointRecogniser, JudgeError
from stepaudio_train.evaluation.speech_judges import (
    Dnsmos,
    Judges,
    PocketSphinx,
    Resemblyzer,
    Whisper,
    build_judges,
    hearable,
)
from stepaudio_train.evaluation.speech_quality import SpeechPair, compare_prosody, score_speech
from stepaudio_train.evaluation.word_errors import character_error_rate
from stepaudio_train.models.decoder.speaker import SpeakerError

FSDD = Path(__file__).resolve().parents[4] / "shared" / "data" / "fsdd"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
needs_fsdd = pytest.mark.skipif(not FSDD.is_dir(), reason="needs ../shared/data/fsdd, real recordings of digits")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")


def voice(f0_hz: float, duration_s: float, quiet_s: float = 0.0) -> Tensor:
    """Ten harmonics, after some silence."""
    time_s = torch.arange(round(duration_s * 16000)) / 16000
    sound = sum(torch.sin(2 * torch.pi * f0_hz * number * time_s) / number for number in range(1, 11))
    return torch.cat([torch.zeros(round(quiet_s * 16000)), 0.1 * sound])


def write(path: Path, waveform: Tensor) -> Path:
    soundfile.write(path, waveform.numpy(), 16000)
    return path


class Scripted:
    """Hears, by the length of a recording in ms, what it was told to."""

    def __init__(self, **heard: str) -> None:
        self._heard = {int(name.removeprefix("ms")): text for name, text in heard.items()}

    def transcribe(self, waveform: Tensor) -> str:
        text = self._heard[len(waveform) // 16]
        if text == "?":
            raise JudgeError("the judge passes")
        return text


class Loudness:
    def embed(self, waveform: Tensor) -> Tensor:
        if len(waveform) < 1600:
            raise SpeakerError("too short")
        return torch.tensor([1.0, float(waveform.abs().max() > 0.5)])

    def rate(self, waveform: Tensor) -> dict[str, float]:
        return {"peak": float(waveform.abs().max())}


def test_errors_are_added_up_over_all_clips(tmp_path: Path):
    loud, quiet = torch.full((3200,), 0.75), torch.full((4800,), 0.25)
    short = torch.full((800,), 0.25)
    loud_file, quiet_file, short_file = (write(tmp_path / f"{len(w)}.wav", w) for w in (loud, quiet, short))
    pairs = [
        SpeechPair("a", "seven stop go", loud_file, voice=quiet_file),
        SpeechPair("b", "go", quiet_file, voice=quiet_file),
        SpeechPair("c", "six", short_file, voice=quiet_file),
    ]
    judge = Loudness()
    found = score_speech(pairs, Judges(Scripted(ms200="seven stop", ms300="no go", ms50=""), judge, judge))
    assert (found["num_deletions"], found["num_insertions"], found["num_substitutions"]) == (2, 1, 0)
    assert found["num_words"] == 5
    assert found["wer"] == pytest.approx(60)
    assert found["cer"] == pytest.approx(100 * (2 + 2 + 3) / 16)
    # Too short to have a voice: not among the similarities, but its words are missing.
    assert found["num_speaker_similarity"] == 2
    assert found["speaker_similarity"] == pytest.approx((np.sqrt(0.5) + 1) / 2)
    assert (found["num_peak"], found["peak"]) == (3, pytest.approx((0.75 + 0.25 + 0.25) / 3, abs=1e-3))
    assert [line["heard"] for line in found["utterances"]] == ["seven stop", "no go", ""]
    assert "pitch_rmse_cents" not in found
    json.dumps(found)


def test_what_cannot_be_judged_is_named_and_the_rest_goes_on(tmp_path: Path):
    good, bad = write(tmp_path / "good.wav", voice(200, 0.2)), tmp_path / "bad.wav"
    bad.write_text("not audio")
    odd = write(tmp_path / "odd.wav", voice(200, 0.3))
    pairs = [
        SpeechPair("missing", "one", tmp_path / "none.wav"),
        SpeechPair("broken reference", "one", good, bad),
        SpeechPair("no words", "...", good),
        SpeechPair("passed over", "one", odd),
        SpeechPair("good", "one", good),
    ]
    found = score_speech(pairs, Judges(Scripted(ms200="one", ms300="?")))
    assert (found["num_scored"], found["num_refused"], found["wer"]) == (1, 4, 0)
    reasons = {line["name"]: line["reason"] for line in found["refused"]}
    assert "none.wav" in reasons["missing"]
    assert "bad.wav" in reasons["broken reference"]
    assert "has no words" in reasons["no words"]
    assert reasons["passed over"] == "the judge passes"
    assert score_speech([], Judges()) == {
        "num_scored": 0, "num_refused": 0, "refused": [], "utterances": []
    }  # fmt: skip


def test_pitch_is_compared_in_cents_and_pace_by_the_reference(tmp_path: Path):
    reference, speech = voice(200, 1.0, quiet_s=0.5), voice(200 * 2 ** (50 / 1200), 1.2)
    files = [write(tmp_path / f"{name}.wav", sound) for name, sound in (("a", speech), ("b", reference))]
    found = score_speech([SpeechPair("a", "x", *files)], Judges())
    assert found["pitch_rmse_cents"] == pytest.approx(50, abs=3)
    assert found["duration_error_percent"] == pytest.approx(20, abs=3)
    assert found["voicing_error_percent"] < 5
    assert found["num_prosody"] == 1


def test_frames_with_a_voice_in_one_alone_are_voicing_errors():
    noise = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    half = torch.cat([voice(200, 0.5), noise])
    found = compare_prosody(half, voice(200, 1.0))
    assert found.num_frames == pytest.approx(100, abs=2)
    assert found.num_voicing_errors == pytest.approx(50, abs=4)
    assert found.num_voiced == pytest.approx(50, abs=4)
    assert compare_prosody(torch.zeros(16000), voice(200, 1.0)) is None


def test_letters_are_counted_without_spaces():
    assert character_error_rate(["seven two"], ["seven too"]).percent == pytest.approx(100 / 8)
    assert character_error_rate(["Go, Ann!"], ["g oann"]).percent == 0


@contextmanager
def server(status: int, reply: bytes) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Answers every request alike. Yields its address and what it was asked: path, key, body."""
    asked: list[tuple[str, str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers.get("Authorization", ""), body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1", asked
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def test_an_endpoint_gets_a_wav_and_its_text_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KEY", "secret")
    with server(200, b'{"text": " Five. "}') as (url, asked):
        options = JudgeOptions(f"endpoint:{url}", "none", "none", (), "en", "large", "KEY")
        assert build_judges(options).recogniser.transcribe(voice(200, 0.5)) == " Five. "
    ((path, key, body),) = asked
    assert (path, key) == ("/v1/audio/transcriptions", "Bearer secret")
    assert b'name="model"\r\n\r\nlarge\r\n' in body
    assert b'name="language"\r\n\r\nen\r\n' in body
    start = body.index(b"RIFF")
    assert int.from_bytes(body[start + 4 : start + 8], "little") + 8 == 44 + 2 * 8000
    assert body[start:].endswith(b"--\r\n")


@pytest.mark.parametrize(
    ("status", "reply", "error", "message"),
    [
        (500, b"busy", JudgeError, "500.*busy"),
        (200, b"<html>", JudgeError, "no transcription"),
        (200, b'{"text": null}', JudgeError, "no transcription"),
        (401, b"", UserError, "401.*--endpoint-model and the key"),
    ],
)
def test_an_endpoints_trouble_is_told(status: int, reply: bytes, error: type[Exception], message: str):
    with server(status, reply) as (url, _), pytest.raises(error, match=message) as caught:
        EndpointRecogniser(url, "large").transcribe(voice(200, 0.1))
    assert type(caught.value) is error


def test_no_server_stops_the_whole_evaluation(tmp_path: Path):
    with server(200, b"") as (url, _):
        pass
    pair = SpeechPair("a", "one", write(tmp_path / "a.wav", voice(200, 0.2)))
    with pytest.raises(UserError, match="cannot be reached"):
        score_speech([pair], Judges(EndpointRecogniser(url, "large")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            JudgeOptions("sphinx", "none", "none"),
            "--recogniser sphinx: .*type one of pocketsphinx, whisper:FOLDER, endpoint:URL, none",
        ),
        (JudgeOptions("none", "campplus", "none"), "--speaker campplus: .*resemblyzer, campplus:FILE.onnx"),
        (JudgeOptions("none", "none", "dnsmos:5"), "--quality dnsmos:5: .*type one of dnsmos, none"),
        (JudgeOptions("endpoint:localhost", "none", "none"), "localhost: is no address"),
        (JudgeOptions("whisper:no/such", "none", "none"), "no/such: no such folder"),
        (JudgeOptions("none", "eres2net:none.onnx", "none"), "none.onnx: cannot be loaded"),
    ],
)
def test_judges_that_cannot_be_had_are_refused(options: JudgeOptions, message: str):
    with pytest.raises(UserError, match=message):
        build_judges(options)


def test_missing_packages_are_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(UserError, match=r"pip install 'stepaudio-train\[judges\]', or --recogniser none"):
        PocketSphinx()
    with pytest.raises(UserError, match=r"pip install 'stepaudio-train\[judges\]', or --quality none"):
        Dnsmos()
    with pytest.raises(UserError, match="pip install --no-deps resemblyzer, or --speaker none"):
        Resemblyzer()
    assert build_judges(JudgeOptions("none", "none", "none")) == Judges()


def test_whisper_runs_from_a_folder(tmp_path: Path):
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: index for index, token in enumerate([*letters, *marks])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    WhisperTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=16).save_pretrained(tmp_path)
    end, start = (vocabulary[mark] for mark in marks[:2])
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        num_mel_bins=16,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_target_positions=300,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    # Whatever is said, it ends at once.
    decoder = model.model.decoder
    decoder.embed_tokens.weight.data.zero_()[end] = 1
    decoder.layer_norm.weight.data.zero_()
    decoder.layer_norm.bias.data.fill_(1)
    model.save_pretrained(tmp_path)
    assert Whisper(tmp_path).transcribe(voice(200, 0.5)) == ""
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a recogniser"):
        Whisper(tmp_path)


@needs("pocketsphinx")
def test_pocketsphinx_hears_the_words_of_its_list():
    with pytest.raises(UserError, match="no pronunciation of blorgish"):
        PocketSphinx(["seven", "blorgish"])
    assert PocketSphinx(DIGITS).transcribe(torch.zeros(1600)) in ("", *DIGITS)


@needs("pocketsphinx")
def test_texts_whose_every_word_is_known_can_be_heard():
    texts = ["Seven, stop!", "go blorgish", "一 二", "...", "", "It's seven o'clock."]
    heard, words = hearable(texts)
    assert heard == [True, False, False, False, False, True]
    # Not `go`, which no text that can be heard has; and the recogniser takes them.
    assert words == ("seven", "stop", "it's", "o'clock")
    assert PocketSphinx(words).transcribe(torch.zeros(1600)) in ("", *words)
    assert hearable(["一"]) == ([False], ())


@needs("pocketsphinx")
@needs_fsdd
def test_pocketsphinx_hears_recorded_digits():
    judge = PocketSphinx(DIGITS)
    files = sorted(FSDD.glob("*_jackson_1?.wav"))[:40]
    pairs = [SpeechPair(file.stem, DIGITS[int(file.name[0])], file) for file in files]
    found = score_speech(pairs, Judges(judge))
    assert found["wer"] < 40
    # Nothing that it heard before changes what it hears.
    assert judge.transcribe(read_audio(files[0])) == found["utterances"][0]["heard"]


@needs("resemblyzer")
@needs_fsdd
def test_resemblyzer_finds_a_voice_more_like_itself():
    judge = Resemblyzer()
    names = ("jackson", "lucas", "nicolas")
    first, second = (
        torch.stack([judge.embed(read_audio(next(FSDD.glob(f"{digit}_{name}_1.wav")))) for name in names])
        for digit in (3, 7)
    )
    alike = first @ second.T
    assert float(alike.diagonal().mean()) > float(alike.mean()) + 0.05
    assert first.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    # A recording that is longer than a window.
    assert judge.embed(voice(200, 4.0)).shape == (256,)


@needs("speechmos")
@needs_fsdd
def test_dnsmos_likes_speech_better_than_noise():
    judge = Dnsmos()
    speech = read_audio(next(FSDD.glob("7_jackson_1.wav")))
    noise = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    good, bad = judge.rate(speech), judge.rate(noise)
    assert set(good) == {"dnsmos_signal", "dnsmos_background", "dnsmos_overall"}
    assert good["dnsmos_overall"] > bad["dnsmos_overall"] + 0.5
