"""`stepaudio evaluate deafness`: how often a policy says that it did not hear, with the weights of each checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from stepaudio_train.audio.conditions import CONDITIONS, Condition
from stepaudio_train.commands.evaluate import fine_tuning_data
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.paths import complete_checkpoints, result_checkpoint
from stepaudio_train.config.sft import SftDataConfig
from stepaudio_train.convert.sources import LazyWeights, Source, open_source
from stepaudio_train.data.conversation_files import ConversationFile, Worker, encode_conversations
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.evaluation.answers import Answered, answerable, is_spoken
from stepaudio_train.evaluation.deafness import DeafRates, PhraseClassifier, condition_of, deaf_rates
from stepaudio_train.evaluation.word_errors import normalise
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.rollout.speech_text import SpeechTextModel

ANSWERS_FILE, RATES_FILE = "answers.jsonl", "deafness.json"


@dataclass(frozen=True)
class DeafnessOptions:
    """What `stepaudio evaluate deafness` is asked for."""

    model: Path
    """Run directory of `stepaudio run sft`, dpo, ppo or grpo."""
    file: Path
    """JSONL of conversations with `meta.condition` and a written answer, as data_tools.make_hearing_corpus writes
    them."""
    output: Path
    """Folder for answers.jsonl and deafness.json."""
    checkpoints: bool = False
    """Measure every checkpoint that the run has kept, not the exported weights alone."""
    conditions: list[Condition] | None = None
    """Ask about these alone; None: about all."""
    max_new_tokens: int = 128
    temperature: float = 1.0
    """1 draws as a policy does while it learns; 0 takes the most likely tokens."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Deafness:
    """What a policy is like with some weights."""

    step: int | None
    """How long it had learned; None: exported weights without a checkpoint."""
    rates: DeafRates
    right_clear: float | None
    """Percent of the answers to clear recordings that are the file's answer word for word; None: there are none."""

    def line(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"step": self.step, **asdict(self.rates), "right_clear": self.right_clear}


def evaluate_deafness(options: DeafnessOptions) -> list[Deafness]:
    """Answer with each checkpoint's weights, oldest first, and then with the exported ones; write the measures, and the
    last answers as `stepaudio data mine-deaf` takes them. All weights draw with the same seeds.

    Raises:
        UserError: no finished run, or no conversation that can be used.
        WeightError: a checkpoint cannot be read.
    """
    data, export = fine_tuning_data(options.model), options.model / "export"
    if not (export / "config.json").is_file():
        raise UserError(f"{options.model}: holds no export/; let the run end, with training.export_hf=true")
    model = SpeechTextModel.from_directory(export, options.device)
    samples = _samples(options, data, model)
    sampling = SamplingConfig(options.max_new_tokens, options.temperature)
    seeds = [options.seed + index for index in range(len(samples))]
    exported = result_checkpoint(options.model / "checkpoints")
    others = complete_checkpoints(options.model / "checkpoints") if options.checkpoints else []
    found: list[Deafness] = []
    measured = [*(one for one in others if one != exported), export]
    for weights in tqdm(measured, desc="deafness", unit="checkpoint", dynamic_ncols=True):
        _take_over(model, open_source(weights))
        answers = model.answer(samples, sampling, data.template, data.history, seeds)
        answered = [Answered(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        checkpoint = exported if weights == export else weights
        step = None if checkpoint is None else int(checkpoint.name.removeprefix("step_"))
        found.append(_measured(step, answered))
    lines = [json.dumps(one.line(model.renderer.vocabulary), ensure_ascii=False) + "\n" for one in answered]
    write_atomically(options.output / ANSWERS_FILE, "".join(lines).encode())
    # Written last: a folder with it is whole.
    content = json.dumps([one.line() for one in found], indent=1)
    write_atomically(options.output / RATES_FILE, content.encode())
    return found


def deafness_summary(found: Sequence[Deafness]) -> str:
    """For the terminal."""
    lines = [f"{'weights':<14}{'deaf to clear, %':>18}{'to unclear, %':>15}{'right to clear, %':>19}"]
    for one in found:
        name = "of export/" if one.step is None else f"step {one.step}"
        figures = (one.rates.deaf_rate_clear, one.rates.deaf_rate_unclear, one.right_clear)
        shown = ("-" if figure is None else f"{figure:.1f}" for figure in figures)
        lines.append("{:<14}{:>18}{:>15}{:>19}".format(name, *shown))
    return "\n".join(lines) + "\n"


def _samples(options: DeafnessOptions, data: SftDataConfig, model: SpeechTextModel) -> list[TokenSample]:
    file = ConversationFile.read(options.file, TagVocabulary(data.own_tags), data.speech_tokenizer is not None)
    tokenizer = None if data.speech_tokenizer is None else Path(data.speech_tokenizer)
    worker = Worker(device=options.device, progress_bar=True)
    # The run's own folder: what was encoded for the training is found there.
    (found,) = encode_conversations([file], tokenizer, options.model / "tokens", worker)
    usable, refused = answerable(found, model.renderer, data.template, data.history)
    conditions = options.conditions or CONDITIONS
    asked = [sample for sample in usable if _is_asked(sample, conditions)]
    if not asked:
        reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3]) or "none is refused"
        raise UserError(
            f"{options.file}: no conversation has a written answer and meta.condition {' or '.join(conditions)} "
            f"({reasons}); type python -m data_tools.make_hearing_corpus to make such a file"
        )
    return asked


def _is_asked(sample: TokenSample, conditions: Sequence[Condition]) -> bool:
    answered = sample.record.messages[-1].role == "assistant" and not is_spoken(sample)
    return answered and condition_of(sample.record.meta) in conditions


def _take_over(model: SpeechTextModel, source: Source) -> None:
    weights = LazyWeights(source.reader, replace(source.model, value_head=False))
    with torch.no_grad():
        for name, parameter in model.model.state_dict().items():
            parameter.copy_(weights[name])


def _measured(step: int | None, answered: Sequence[Answered]) -> Deafness:
    classifier = PhraseClassifier()
    judged: list[tuple[Condition, bool]] = []
    right: list[bool] = []
    for one in answered:
        condition = condition_of(one.sample.record.meta)
        assert condition is not None, "others are not asked"
        judged.append((condition, classifier.is_deaf(one.answer.text)))
        if condition == "clear":
            right.append(normalise(one.answer.text) == normalise(one.reference))
    return Deafness(step, deaf_rates(judged), 100 * sum(right) / len(right) if right else None)
