"""What the model says after the beginning of a held-out recording, and what it hears in its own speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepaudio_train.config.evaluation import ContinuationConfig
from stepaudio_train.data.render import GROUP_S, TokenSample
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import SpeechTextModel, as_sample
from stepaudio_train.tokenizers.dual import LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP, TOKENS_PER_GROUP, num_groups
from stepaudio_train.tokenizers.speech import SpeechTokens


@dataclass(frozen=True)
class Continuation:
    """One prompt and what followed. Audio is told by its codes: making sound of them takes a vocoder."""

    id: str
    reference: str | None
    """What the whole recording says."""
    prompt_heard: str
    """The model's own transcript of the prompt."""
    heard: str
    """The model's own transcript of prompt and continuation together."""
    prompt_s: float
    continuation_s: float
    linguistic: list[int]
    """Codes of the continuation, 16.7 a second."""
    semantic: list[int]
    """Codes of the continuation, 25 a second."""


def continue_recordings(
    model: SpeechTextModel, samples: Sequence[TokenSample], config: ContinuationConfig
) -> list[Continuation]:
    """Continue the first `config.num_prompts` of the samples that are longer than the prompt."""
    prompt_groups = max(1, round(config.prompt_s / GROUP_S))
    chosen = [sample for sample in samples if _groups(_speech(sample)) > prompt_groups][: config.num_prompts]
    prompts = [_cut(_speech(sample), prompt_groups) for sample in chosen]
    sampling = SamplingConfig(
        max_new_tokens=max(1, round(config.max_new_s / GROUP_S)) * TOKENS_PER_GROUP,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    seeds = [config.seed + index for index in range(len(prompts))]
    made = model.continue_speech(prompts, sampling, seeds)
    whole = [_joined(prompt, continuation) for prompt, continuation in zip(prompts, made, strict=True)]
    heard = model.transcribe([as_sample(speech) for speech in [*prompts, *whole]])
    return [
        Continuation(
            id=sample.record.id,
            reference=sample.record.audio_parts()[0].text,
            prompt_heard=heard[index],
            heard=heard[index + len(prompts)],
            prompt_s=round(prompt_groups * GROUP_S, 2),
            continuation_s=round(_groups(made[index]) * GROUP_S, 2),
            linguistic=made[index].linguistic.tolist(),
            semantic=made[index].semantic.tolist(),
        )
        for index, sample in enumerate(chosen)
    ]


def _speech(sample: TokenSample) -> SpeechTokens:
    return sample.speech[sample.record.audio_parts()[0].audio]


def _groups(speech: SpeechTokens) -> int:
    return num_groups(len(speech.linguistic), len(speech.semantic))


def _cut(speech: SpeechTokens, groups: int) -> SpeechTokens:
    return SpeechTokens(
        speech.linguistic[: groups * LINGUISTIC_PER_GROUP], speech.semantic[: groups * SEMANTIC_PER_GROUP]
    )


def _joined(first: SpeechTokens, second: SpeechTokens) -> SpeechTokens:
    return SpeechTokens(
        np.concatenate([first.linguistic, second.linguistic]), np.concatenate([first.semantic, second.semantic])
    )
