"""Speech made of held-out tokens: paired with its recordings, beside shuffled tokens, judged, shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import recipes.evaluate_decoder as recipe
from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.decoder import FlowConfig, FlowSolverConfig
from stepaudio_train.config.decoder_evaluation import DecoderEvaluationConfig, decoder_evaluation_problems
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.judges import JudgeOptions
from stepaudio_train.config.vocoder import VocoderConfig
from stepaudio_train.evaluation.made_speech import (
    decode_all,
    held_out_speech,
    shuffled,
    spoken_answers,
    tagged_answers,
)
from stepaudio_train.evaluation.sound_report import speech_summary
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.flow_files import NoSpeaker, save_flow
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import save_vocoder
from stepaudio_train.testing.paired_data import PairedCorpus, write_paired_corpus
from stepaudio_train.tokenizers.dual import GROUP_SAMPLES
from stepaudio_train.tokenizers.speech import SpeechTokens

FLOW = FlowConfig(
    hidden_size=32, ffn_size=32, num_blocks=1, decoder_channels=32, decoder_head_size=16, decoder_mid_blocks=1
)
VOCODER = VocoderConfig(base_channels=16, f0_channels=16, resblock_kernels=(3,), num_harmonics=2)
NOBODY = JudgeOptions("none", "none", "none")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> PairedCorpus:
    return write_paired_corpus(tmp_path_factory.mktemp("paired"), num_clips=12)


def codes(groups: int) -> SpeechTokens:
    count = np.arange(groups, dtype=np.int32)
    return SpeechTokens(np.repeat(count, 2), np.repeat(count, 3))


def test_recordings_come_with_their_own_tokens(corpus):
    found = list(held_out_speech(corpus.prepared / "validation", corpus.tokens / "validation"))
    assert len(found) > 2
    for one in found:
        original, _ = soundfile.read(corpus.recordings / f"{one.id}.wav", dtype="float32")
        np.testing.assert_allclose(one.waveform.numpy(), original, atol=1e-4)
        assert abs(len(one.speech.linguistic) / 2 - len(original) / GROUP_SAMPLES) <= 1


def test_shuffled_tokens_are_the_same_groups_in_another_order():
    speech = shuffled(codes(20), seed=1)
    order = speech.linguistic[::2]
    assert sorted(order) == list(range(20)) != list(order)
    np.testing.assert_array_equal(speech.linguistic, np.repeat(order, 2))
    np.testing.assert_array_equal(speech.semantic, np.repeat(order, 3))
    np.testing.assert_array_equal(shuffled(codes(20), seed=1).semantic, speech.semantic)
    assert not len(shuffled(codes(0), seed=1).linguistic), "a model may say nothing"


def test_clips_without_tokens_are_silent_and_counted():
    decoder = SpeechDecoder(
        FlowMatching(FLOW), HiFTGenerator(VOCODER), NoSpeaker(192), FlowSolverConfig(num_steps=1), "cpu"
    )
    voice = decoder.prompt(speech_like(16000))
    (spoken, silent), count = decode_all(decoder, [codes(4), codes(0)], [voice, voice])
    assert count == 1 and not silent.any() and spoken.any()


def test_spoken_answers_come_with_the_recordings_that_were_expected(tmp_path):
    soundfile.write(tmp_path / "asked.wav", speech_like(8000).numpy(), SAMPLE_RATE_HZ)
    own, said = "<audio_1><audio_2><audio_1024><audio_1025><audio_1026>", "<audio_3><audio_4>" + "<audio_1030>" * 3
    truth = [{"id": id, "text": "go", "audio": str(tmp_path / "asked.wav"), "audio_tokens": own} for id in "abc"]
    lines = [{"id": id, "task": "tts", "audio_tokens": said} for id in "abd"]
    lines[1]["audio_tokens"] = ""
    lines.append({"id": "c", "task": "edit", "audio_tokens": said})
    for name, rows in {"truth": truth, "answers": lines}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ((recording, speech),) = spoken_answers(tmp_path)
    assert (recording.id, recording.text, len(recording.waveform)) == ("a", "go", 8000)
    np.testing.assert_array_equal(recording.speech.linguistic, [1, 2])
    np.testing.assert_array_equal(speech.linguistic, [3, 4])


def test_one_answer_of_each_tag_with_the_recording_of_what_was_asked(tmp_path):
    soundfile.write(tmp_path / "asked.wav", speech_like(8000).numpy(), SAMPLE_RATE_HZ)
    tokens = "<audio_1><audio_2><audio_1024><audio_1025><audio_1026>"
    line = {"task": "tts", "text": "go left", "audio_tokens": tokens}
    asked = [("a", ["slow 5"]), ("b", ["slow 5"]), ("c", []), ("d", ["fast 1"])]
    answers = [line | {"id": id, "tags": tags} for id, tags in asked]
    answers += [line | {"id": "e", "task": "edit", "tags": ["fast 2"]}, line | {"id": "f", "tags": ["x"]}]
    answers[3]["audio_tokens"] = ""
    truth = [{"id": id, "audio": str(tmp_path / "asked.wav")} for id in "abcde"]
    for name, lines in (("answers", answers), ("truth", truth)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = tagged_answers(tmp_path)
    assert [(one.tags, one.text) for one in found] == [("", "go left"), ("slow 5", "go left")]
    np.testing.assert_array_equal(found[1].speech.linguistic, [1, 2])
    np.testing.assert_array_equal(found[1].speech.semantic, [0, 1, 2])
    assert len(found[1].recording) == 8000


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("decoder")
    save_flow(FlowMatching(FLOW), folder)
    save_vocoder(HiFTGenerator(VOCODER), folder)
    return folder


def test_the_recipe_leaves_sounds_and_scores_that_can_be_shown(corpus, decoder_folder, tmp_path):
    config = DecoderEvaluationConfig(
        corpus=str(corpus.prepared),
        tokens=str(corpus.tokens),
        split="validation",
        decoder=str(decoder_folder),
        output=str(tmp_path),
        num_recordings=2,
        judges=NOBODY,
    )
    recipe.main(config)
    found = json.loads((tmp_path / "speech.json").read_text())
    assert list(found["kinds"]) == ["reference", "resynthesis", "resynthesis_shuffled_tokens"]
    for paths in found["sounds"].values():
        assert len(paths) == 2
        for path in paths.values():
            samples, _ = soundfile.read(tmp_path / path)
            assert samples.any()
    assert found["summary"]["resynthesis_wer"] is None
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 6 and page.count("data:image/png") == 6
    assert "http" not in page


def test_word_errors_of_each_kind_have_their_names():
    kinds = {"reference": {"wer": 20.0}, "resynthesis": {"wer": 30.004}, "synthesis_shuffled_tokens": {"wer": 99.0}}
    assert speech_summary({"kinds": kinds}) == {
        "reference_wer": 20.0,
        "resynthesis_wer": 30.0,
        "resynthesis_wer_shuffled_tokens": None,
        "tts_wer": None,
        "tts_wer_shuffled_tokens": 99.0,
    }


def test_settings_that_cannot_be_are_all_named():
    wrong = ["corpus=no_such_folder", "num_recordings=0", "temperature=-1"]
    with pytest.raises(ConfigError) as told:
        load_config("evaluate_decoder", DecoderEvaluationConfig, wrong, decoder_evaluation_problems)
    for name in ("corpus=no_such_folder", "tokens=", "output: required", "num_recordings=0", "temperature=-1"):
        assert name in str(told.value)
    wrong = ["answers=nowhere", "model_dir=nowhere"]
    with pytest.raises(ConfigError, match="answers=nowhere: holds no answers.jsonl") as told:
        load_config("evaluate_decoder", DecoderEvaluationConfig, wrong, decoder_evaluation_problems)
    assert "leave one of them out" in str(told.value) and "corpus" not in str(told.value)
