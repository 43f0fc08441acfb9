"""`stepaudio evaluate answers`: a fine-tuned model on held-out conversations, and on exchanged recordings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stepaudio_train.config.compose import read_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.policy_runs import GrpoRunConfig, PpoRunConfig, PromptDataConfig
from stepaudio_train.config.preference_runs import DpoRunConfig
from stepaudio_train.config.preferences import PreferenceDataConfig
from stepaudio_train.config.sft import SftConfig, SftDataConfig
from stepaudio_train.data.conversation_files import (
    ConversationFile,
    EncodedConversations,
    Worker,
    encode_conversations,
)
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.evaluation.answers import (
    Answered,
    answer_all,
    answerable,
    is_spoken,
    score,
    spoken_line,
    with_exchanged_audio,
)
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import SpeechTextModel

_SHOWN_EXAMPLES = 8


@dataclass(frozen=True)
class AnswersOptions:
    """What `stepaudio evaluate answers` is asked for."""

    model: Path
    """Run directory of `stepaudio run sft`, whose configuration says how conversations are rendered."""
    file: Path
    """JSONL of held-out conversations, each with its answer."""
    output: Path
    """Folder for answers.jsonl, answers.json and truth.jsonl."""
    reference: Path | None = None
    """Conversations of the training: their spoken answers go to reference.jsonl, for `stepaudio evaluate control`."""
    max_new_tokens: int = 512
    temperature: float = 0.7
    """Of spoken answers, as the released programs draw them."""
    written_temperature: float = 0.0
    """Of written answers. 0 takes the most likely tokens; 1, with top_k 0, draws as PPO and GRPO do."""
    top_k: int = 50
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def evaluate_answers(options: AnswersOptions) -> dict[str, Any]:
    """Answer and score; returns what answers.json holds.

    Raises:
        UserError: no run of `sft`, or no conversation that can be used.
    """
    data = fine_tuning_data(options.model)
    files = [options.file, *([] if options.reference is None else [options.reference])]
    found = _encoded(files, data, options)
    model = SpeechTextModel.from_directory(options.model / "export", options.device)
    samples, refused = answerable(found[0], model.renderer, data.template, data.history)
    unanswered = [sample.record.id for sample in samples if sample.record.messages[-1].role != "assistant"]
    refused += [Refusal(id, "has no answer to compare with") for id in unanswered]
    samples = [sample for sample in samples if sample.record.messages[-1].role == "assistant"]
    if not samples:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in refused[:3])
        raise UserError(f"{options.file}: no conversation with an answer can be used ({reasons or 'it is empty'})")
    sampling = SamplingConfig(options.max_new_tokens, options.temperature, options.top_k)
    asked = (sampling, data.template, data.history, options.seed, options.written_temperature)
    answered = answer_all(model, samples, *asked)
    # Written answers alone: whether a spoken one is right, its text does not tell.
    exchanged = [one for one in with_exchanged_audio(samples) if not is_spoken(one)]
    exchanged_answers = answer_all(model, exchanged, *asked)
    vocabulary = model.renderer.vocabulary
    _write_lines(options.output / "answers.jsonl", (one.line(vocabulary) for one in answered))
    for name, conversations in zip(("truth", "reference"), found, strict=False):
        spoken = [sample for _, sample in conversations.samples if is_spoken(sample)]
        folder = conversations.path.resolve().parent
        _write_lines(options.output / f"{name}.jsonl", (spoken_line(sample, folder, vocabulary) for sample in spoken))
    result = {
        "scores": {task: asdict(scores) for task, scores in score(answered).items()},
        "scores_exchanged_audio": {task: asdict(scores) for task, scores in score(exchanged_answers).items()},
        "unended": sum(not one.answer.ended for one in answered),
        "num_refused": len(refused),
        "refused": [asdict(refusal) for refusal in refused],
        "examples": _examples(answered),
    }
    # Written last: a folder with answers.json is whole.
    write_atomically(options.output / "answers.json", json.dumps(result, indent=1, ensure_ascii=False).encode())
    return result


def fine_tuning_data(model: Path) -> SftDataConfig:
    """How the conversations of a fine-tuned model are rendered, and with which speech tokenizer.

    Raises:
        UserError: no run directory of `sft`, `dpo`, `ppo` or `grpo`.
    """
    file = model / "config.yaml"
    if not file.is_file():
        raise UserError(f"{model}: holds no config.yaml; type the run directory of a finished `stepaudio run sft`")
    data = _training_data(model, file)
    if isinstance(data, SftDataConfig):
        return data
    # A policy that learned from preferences or rewards is asked as those were rendered.
    return SftDataConfig(
        template=data.template, history=data.history, own_tags=data.own_tags, speech_tokenizer=data.speech_tokenizer
    )


def summary(result: dict[str, Any]) -> str:
    """For the terminal."""
    lines = [f"{'task':<10}{'answers':>8}{'WER, %':>9}{'exact, %':>10}   exchanged audio: WER, %  exact, %"]
    for task, scores in result["scores"].items():
        control = result["scores_exchanged_audio"].get(task)
        shown = f"{control['wer']:>26.1f}{control['exact']:>10.1f}" if control else ""
        lines.append(f"{task:<10}{scores['num']:>8}{scores['wer']:>9.1f}{scores['exact']:>10.1f}{shown}")
    lines.append(f"{result['unended']} answers did not end; {result['num_refused']} conversations refused")
    return "\n".join(lines) + "\n"


def _training_data(model: Path, file: Path) -> SftDataConfig | PreferenceDataConfig | PromptDataConfig:
    refusals: list[ConfigError] = []
    for kind in (SftConfig, DpoRunConfig, PpoRunConfig, GrpoRunConfig):
        try:
            return read_config(kind, file).data
        except ConfigError as error:
            refusals.append(error)
    # The recipe that misses least is what it was meant for.
    nearest = min(refusals, key=lambda error: len(error.problems))
    raise UserError(f"{model}: is no run directory of `stepaudio run sft`, dpo, ppo or grpo: {nearest}")


def _encoded(paths: Sequence[Path], data: SftDataConfig, options: AnswersOptions) -> list[EncodedConversations]:
    tags = TagVocabulary(data.own_tags)
    files = [ConversationFile.read(path, tags, data.speech_tokenizer is not None) for path in paths]
    tokenizer = None if data.speech_tokenizer is None else Path(data.speech_tokenizer)
    # The run's own folder: what was encoded for the training is found there.
    worker = Worker(device=options.device, progress_bar=True)
    return encode_conversations(files, tokenizer, options.model / "tokens", worker)


def _examples(answered: Sequence[Answered]) -> dict[str, list[dict[str, str]]]:
    """Some written answers of each task, wrong ones first, since they tell more."""
    shown: dict[str, list[dict[str, str]]] = {}
    for one in sorted(answered, key=lambda one: one.reference == one.answer.text):
        examples = shown.setdefault(one.task, [])
        if not is_spoken(one.sample) and len(examples) < _SHOWN_EXAMPLES:
            examples.append({"id": one.sample.record.id, "reference": one.reference, "answer": one.answer.text})
    return {task: examples for task, examples in shown.items() if examples}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
