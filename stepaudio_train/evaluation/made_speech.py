"""Speech that is made of held-out recordings' tokens, and of their texts: to be heard, and to be judged (paper 6).

What a score means, the same score of the recordings and of shuffled tokens say: they stand beside it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.audio.reading import read_audio
from stepaudio_train.data.shards import list_shards, read_shard
from stepaudio_train.data.token_shards import decode_token_sample
from stepaudio_train.models.decoder.flow import FlowPrompt
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.tokenizers.dual import LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP, num_groups
from stepaudio_train.tokenizers.speech import SpeechTokens

_SILENCE_S = 0.12


@dataclass(frozen=True)
class HeldOutSpeech:
    """A recording that nothing was learned from, with its tokens."""

    id: str
    text: str
    waveform: Tensor
    """[samples] float32 at 16 kHz."""
    speech: SpeechTokens


@dataclass(frozen=True)
class TaggedAnswer:
    """A model's spoken answer to an instruction tag, and the recording of what was asked for."""

    tags: str
    """As they stand before the text; '' for none."""
    text: str
    speech: SpeechTokens
    recording: Tensor
    """[samples] float32 at 16 kHz."""


def held_out_speech(corpus: Path, tokens: Path) -> Iterator[HeldOutSpeech]:
    """The transcribed recordings of a split of `stepaudio prepare` that `stepaudio tokenize` made tokens of.

    Raises:
        ShardError, TokenSampleError, RecordError, AudioError: a split is missing or damaged.
    """
    coded = {stored.key: stored.members for shard in list_shards(tokens) for stored in read_shard(shard)}
    for shard in list_shards(corpus):
        for stored in read_shard(shard):
            if stored.key not in coded:
                continue
            where = f"{shard}: {stored.key}"
            sample = decode_token_sample(coded[stored.key], where)
            parts = sample.record.audio_parts()
            if len(parts) == 1 and parts[0].text:
                audio = next(content for ending, content in stored.members.items() if ending.endswith("flac"))
                waveform = read_audio(io.BytesIO(audio), SAMPLE_RATE_HZ, where)
                yield HeldOutSpeech(sample.record.id, parts[0].text, waveform, sample.speech[parts[0].audio])


def shuffled(speech: SpeechTokens, seed: int) -> SpeechTokens:
    """The same groups of codes in another order: what a decoder makes that does not need to be told what is said."""
    groups = num_groups(len(speech.linguistic), len(speech.semantic))
    order = np.random.default_rng(seed).permutation(groups)
    linguistic = speech.linguistic[: groups * LINGUISTIC_PER_GROUP].reshape(groups, LINGUISTIC_PER_GROUP)
    semantic = speech.semantic[: groups * SEMANTIC_PER_GROUP].reshape(groups, SEMANTIC_PER_GROUP)
    return SpeechTokens(linguistic[order].reshape(-1), semantic[order].reshape(-1))


def decode_all(
    decoder: SpeechDecoder, codes: Sequence[SpeechTokens], voices: Sequence[FlowPrompt]
) -> tuple[list[Tensor], int]:
    """Waveforms [samples], and how many of them are silence since there was no whole group of codes."""
    spoken = [i for i, one in enumerate(codes) if num_groups(len(one.linguistic), len(one.semantic))]
    silence = torch.zeros(round(_SILENCE_S * decoder.sample_rate_hz))
    found = dict(zip(spoken, decoder.decode([codes[i] for i in spoken], [voices[i] for i in spoken]), strict=True))
    return [found.get(i, silence) for i in range(len(codes))], len(codes) - len(spoken)


def spoken_answers(folder: Path) -> Iterator[tuple[HeldOutSpeech, SpeechTokens]]:
    """Where a model was asked to speak, the recording that was expected and what the model said, of what `stepaudio
    evaluate answers` wrote.

    Raises:
        OSError, ValueError: answers.jsonl or truth.jsonl is missing or damaged. AudioError: a recording is.
    """
    expected = {line["id"]: line for line in _lines(folder / "truth.jsonl") if line.get("audio_tokens")}
    for line in _lines(folder / "answers.jsonl"):
        truth = expected.get(line["id"])
        if line["task"] == "tts" and line.get("audio_tokens") and truth is not None and "audio" in truth:
            recording = read_audio(truth["audio"], SAMPLE_RATE_HZ)
            own, said = (SpeechTokens.from_text(one["audio_tokens"]) for one in (truth, line))
            yield HeldOutSpeech(line["id"], truth["text"], recording, own), said


def tagged_answers(folder: Path) -> list[TaggedAnswer]:
    """The first spoken answer to each instruction tag in what `stepaudio evaluate answers` wrote.

    Raises:
        OSError, ValueError: answers.jsonl or truth.jsonl is missing or damaged. AudioError: a recording is.
    """
    truth = {line["id"]: line for line in _lines(folder / "truth.jsonl")}
    chosen: dict[str, TaggedAnswer] = {}
    for line in _lines(folder / "answers.jsonl"):
        tags, asked = ", ".join(line.get("tags", ())), truth.get(line["id"], {})
        if line["task"] != "tts" or tags in chosen or "audio" not in asked or not line.get("audio_tokens"):
            continue
        speech, recording = SpeechTokens.from_text(line["audio_tokens"]), read_audio(asked["audio"], SAMPLE_RATE_HZ)
        chosen[tags] = TaggedAnswer(tags, line["text"], speech, recording)
    return [chosen[tags] for tags in sorted(chosen)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
