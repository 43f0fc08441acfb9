"""Evaluation of the speech decoder on held-out speech: tokens of recordings as sound, texts spoken, judged (paper 6).

    stepaudio run evaluate_decoder corpus=corpora/prepared tokens=corpora/tokens decoder=runs/flow \\
        vocoder=runs/vocoder output=runs/heard
    stepaudio run evaluate_decoder ... model_dir=runs/stage3/export     # a pretrained model speaks the texts
    stepaudio run evaluate_decoder answers=runs/answers decoder=runs/flow vocoder=runs/vocoder output=runs/heard

The last one lets a fine-tuned model's spoken answers be heard, and the recordings that were expected of it.

Beside the recordings themselves (`reference`) it makes `resynthesis`, with a language model `synthesis`, and of both
the same with shuffled tokens. Writes speech.json, every score; report.html, with players; and the sounds as
KIND/NAME.wav (docs/speech_decoder.md).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.commands.evaluate_speech import judge_pairs
from stepaudio_train.commands.sound_files import write_sound
from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.decoder_evaluation import DecoderEvaluationConfig, decoder_evaluation_problems
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.judges import JudgeOptions
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.shards import sample_key
from stepaudio_train.evaluation.made_speech import (
    HeldOutSpeech,
    decode_all,
    held_out_speech,
    shuffled,
    spoken_answers,
    tagged_answers,
)
from stepaudio_train.evaluation.sound_report import sound_section, speech_summary
from stepaudio_train.evaluation.speech_judges import hearable
from stepaudio_train.evaluation.speech_quality import SpeechPair, add_up
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import SpeechTextModel
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.training.page import page

log = logging.getLogger("evaluate_decoder")

REFERENCE = "reference"


def main(config: DecoderEvaluationConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = Path(config.output)
    if config.answers is None:
        found = list(held_out_speech(Path(config.corpus) / config.split, Path(config.tokens) / config.split))
        said: dict[str, SpeechTokens] = {}
    else:
        answers = list(spoken_answers(Path(config.answers)))
        found = [recording for recording, _ in answers]
        said = {recording.id: speech for recording, speech in answers}
    recordings, options = _judged(found, config)
    log.info("%d held-out recordings, of which %d are judged", len(found), len(recordings))
    decoder = SpeechDecoder.from_directory(
        Path(config.decoder), None if config.vocoder is None else Path(config.vocoder), device=config.device
    )
    voices = [decoder.prompt(recording.waveform) for recording in recordings]
    codes = {"resynthesis": [recording.speech for recording in recordings]}
    if config.answers is not None:
        codes["synthesis"] = [said[recording.id] for recording in recordings]
    elif config.model_dir is not None:
        codes["synthesis"] = _spoken(recordings, config)
    codes |= {f"{kind}_shuffled_tokens": _shuffled(made, config.seed) for kind, made in codes.items()}
    names = [sample_key(recording.id) for recording in recordings]
    sounds = {REFERENCE: _written(output / REFERENCE, names, [r.waveform for r in recordings], SAMPLE_RATE_HZ)}
    silent = {}
    for kind, made in codes.items():
        waveforms, silent[kind] = decode_all(decoder, made, voices)
        sounds[kind] = _written(output / kind, names, waveforms, decoder.sample_rate_hz)
    kinds = _scores(recordings, sounds, options)
    for kind, scores in kinds.items():
        log.info("%s: %s", kind, f"WER {scores['wer']:.1f}%" if "wer" in scores else "words not judged")
    result = {
        "kinds": kinds,
        "num_silent": silent,
        "words": list(options.words),
        "recogniser": options.recogniser,
        "sounds": {
            kind: {one.id: str(path.relative_to(output)) for one, path in zip(recordings, paths, strict=True)}
            for kind, paths in sounds.items()
        },
        "tagged": _tagged(Path(config.answers), decoder, output) if config.answers is not None else [],
    }
    result["summary"] = speech_summary(result)
    html = page("Speech decoder", config.decoder, [sound_section(output, result)])
    write_atomically(output / "report.html", html.encode())
    # Written last: a folder with speech.json is whole.
    write_atomically(output / "speech.json", json.dumps(result, indent=1, ensure_ascii=False).encode())


def _judged(
    found: Sequence[HeldOutSpeech], config: DecoderEvaluationConfig
) -> tuple[list[HeldOutSpeech], JudgeOptions]:
    """Recordings from all over the split whose words the recogniser knows, and the judges, told those words."""
    options = config.judges
    if options.recogniser == "pocketsphinx" and not options.words:
        heard, words = hearable([recording.text for recording in found])
        options = replace(options, words=words) if words else replace(options, recogniser="none")
        found = [one for one, known in zip(found, heard, strict=True) if known] if words else found
    if not found:
        where = f"{config.corpus}: its split {config.split}" if config.answers is None else config.answers
        raise UserError(f"{where}: holds no transcribed recording with tokens")
    step = max(1, len(found) // config.num_recordings)
    return list(found[::step][: config.num_recordings]), options


def _scores(
    recordings: Sequence[HeldOutSpeech], sounds: Mapping[str, Sequence[Path]], options: JudgeOptions
) -> dict[str, dict[str, Any]]:
    """As `score_speech`, of every kind of sound."""
    pairs = [
        SpeechPair(recording.id, recording.text, path, reference)
        for paths in sounds.values()
        for recording, path, reference in zip(recordings, paths, sounds[REFERENCE], strict=True)
    ]
    outcomes, count = judge_pairs(pairs, options), len(recordings)
    return {kind: add_up(outcomes[n * count : (n + 1) * count]) for n, kind in enumerate(sounds)}


def _spoken(recordings: Sequence[HeldOutSpeech], config: DecoderEvaluationConfig) -> list[SpeechTokens]:
    assert config.model_dir is not None
    model = SpeechTextModel.from_directory(config.model_dir, config.device)
    sampling = SamplingConfig(config.max_new_tokens, config.temperature)
    seeds = range(config.seed, config.seed + len(recordings))
    return model.speak([recording.text for recording in recordings], sampling, seeds)


def _shuffled(codes: Sequence[SpeechTokens], seed: int) -> list[SpeechTokens]:
    return [shuffled(one, seed + number) for number, one in enumerate(codes)]


def _written(folder: Path, names: Sequence[str], waveforms: Sequence[Tensor], sample_rate_hz: int) -> list[Path]:
    paths = [folder / f"{name}.wav" for name in names]
    for path, waveform in zip(paths, waveforms, strict=True):
        write_sound(path, waveform, sample_rate_hz)
    return paths


def _tagged(answers: Path, decoder: SpeechDecoder, output: Path) -> list[dict[str, Any]]:
    """Answers to instruction tags as sound, beside the recordings of what was asked for."""
    found = tagged_answers(answers)
    voices = [decoder.prompt(one.recording) for one in found]
    waveforms, _ = decode_all(decoder, [one.speech for one in found], voices)
    names = [sample_key(one.tags or "untagged") for one in found]
    asked = _written(output / "tagged_reference", names, [one.recording for one in found], SAMPLE_RATE_HZ)
    made = _written(output / "tagged", names, waveforms, decoder.sample_rate_hz)
    return [
        {
            "tags": one.tags,
            "text": one.text,
            "sound": str(sound.relative_to(output)),
            "reference": str(reference.relative_to(output)),
        }
        for one, sound, reference in zip(found, made, asked, strict=True)
    ]


if __name__ == "__main__":
    run_recipe(main, DecoderEvaluationConfig, "evaluate_decoder", decoder_evaluation_problems)
