"""Evaluation of an exported model on held-out speech: word errors, likelihoods, continuations (paper 6).

    stepaudio run evaluate model_dir=RUN/export tokens=FOLDER output=RUN/evaluation

`tokens` is what `stepaudio tokenize` wrote. Writes evaluation.json, transcripts.jsonl and continuations.jsonl.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.evaluation import EvaluateConfig, evaluate_problems
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.token_shards import read_token_samples
from stepaudio_train.evaluation.asr import AsrResult, evaluate_asr, with_shuffled_audio
from stepaudio_train.evaluation.continuations import continue_recordings
from stepaudio_train.evaluation.nll import held_out_likelihood
from stepaudio_train.rollout.speech_text import SpeechTextModel

log = logging.getLogger("evaluate")


def main(config: EvaluateConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokens, output = Path(config.tokens), Path(config.output)
    test = _samples(tokens / "test", config.max_samples)
    if len(test) < 2:
        raise ConfigError([f"tokens={tokens}: its split test needs at least two transcribed recordings"])
    model = SpeechTextModel.from_directory(config.model_dir, config.device, config.speech_layout)

    results = {"test": evaluate_asr(model, test)}
    results["test_shuffled_audio"] = evaluate_asr(model, with_shuffled_audio(test))
    if (tokens / "heldout_speaker").is_dir():
        results["heldout_speaker"] = evaluate_asr(model, _samples(tokens / "heldout_speaker", config.max_samples))
    for name, result in results.items():
        log.info("%s: WER %.2f%% of %d words", name, result.errors.percent, result.errors.num_words)

    training = read_token_samples(tokens / "train")
    likelihood = held_out_likelihood(model.model, model.renderer, test, training, config.likelihood_tasks)
    for name, nats in likelihood.model.items():
        log.info("%s: %.3f nats/token, unigram %.3f", name, nats, likelihood.unigram[name])

    speaks = config.speech_layout == "interleaved"
    continuations = continue_recordings(model, test, config.continuations) if speaks else []
    _write_lines(output / "transcripts.jsonl", (line for name, r in results.items() for line in _lines(name, r)))
    _write_lines(output / "continuations.jsonl", (asdict(continuation) for continuation in continuations))
    summary = {
        "asr": {name: asdict(result.errors) for name, result in results.items()},
        "asr_by_language": {language: asdict(errors) for language, errors in results["test"].by_language.items()},
        "likelihood": asdict(likelihood),
    }
    # Written last: a folder with evaluation.json is whole.
    write_atomically(output / "evaluation.json", json.dumps(summary, indent=1).encode())


def _samples(folder: Path, at_most: int) -> list[TokenSample]:
    """The first transcribed recordings of a split."""
    transcribed = (s for s in read_token_samples(folder) if all(part.text for part in s.record.audio_parts()))
    return list(islice(transcribed, at_most))


def _lines(name: str, result: AsrResult) -> Iterable[dict[str, Any]]:
    return ({"set": name, **asdict(transcript)} for transcript in result.transcripts)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


if __name__ == "__main__":
    run_recipe(main, EvaluateConfig, "evaluate", evaluate_problems)
