"""The quick start's results: summary.json for programs, report.html for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepaudio_train.config.compose import read_config
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.evaluation.control_report import control_section
from stepaudio_train.evaluation.reward_report import RewardResults, reward_section
from stepaudio_train.evaluation.sound_report import sound_section
from stepaudio_train.training.page import (
    bar_chart,
    charts,
    details,
    environment,
    judged,
    line_chart,
    page,
    section,
    table,
)
from stepaudio_train.training.report import Metrics, conversation_tables, modality_keys, read_metrics, series, task_keys

STAGES = ("stage1", "stage2", "stage3")
_SHOWN_TRANSCRIPTS = 12
_SET_TITLES = {
    "test": "held-out recordings",
    "test_shuffled_audio": "control: the same, each with another one's audio",
    "heldout_speaker": "a speaker never heard in training",
}


_SPEED_CONTROL = (
    "speed_control_spearman",
    "speed_control_spearman_permuted_tags",
    "speed_control_spearman_truth",
)


@dataclass(frozen=True)
class FineTuningResults:
    """What the parts of the fine-tuning have written, read back."""

    metrics: Metrics
    data: dict[str, Any]
    """What was used of the conversations, and what was left out."""
    answers: dict[str, Any]
    """answers.json: scores of written answers."""
    control: dict[str, Any]
    """control.json: whether spoken answers do as their tags ask."""

    @classmethod
    def read(cls, run: Path) -> FineTuningResults:
        """Raises OSError or ValueError if a part's output is not there."""
        return cls(
            metrics=read_metrics(run / "sft" / "metrics.jsonl"),
            data=_read(run / "sft" / "data_report.json"),
            answers=_read(run / "answers" / "answers.json"),
            control=_read(run / "control" / "control.json"),
        )

    def summary(self) -> dict[str, Any]:
        """Percent, and a rank correlation from -1 to 1; each beside what a model that does not listen would get."""
        scores, exchanged = self.answers["scores"], self.answers["scores_exchanged_audio"]
        return {
            "sft_asr_wer": round(scores["asr"]["wer"], 2),
            "sft_asr_wer_shuffled_audio": round(exchanged["asr"]["wer"], 2),
            "aqta_exact": round(scores["aqta"]["exact"], 2),
            "aqta_exact_shuffled_audio": round(exchanged["aqta"]["exact"], 2),
            **{
                name: None if self.control.get(name) is None else round(self.control[name], 3)
                for name in _SPEED_CONTROL
            },
            "silent_answers": self.control["num_refused"],
            "sft_tokens": int(self.metrics[-1]["tokens"]),
            "sft_conversations": self.data["data"]["conversations"],
            "sft_refused": self.data["data"]["num_refused"],
        }


@dataclass(frozen=True)
class QuickstartResults:
    """Everything the parts of a quick start have written, read back."""

    run: Path
    seconds: Mapping[str, float]
    """Part -> how long it took."""
    metrics: dict[str, Metrics]
    """Stage -> its metrics.jsonl, with `all_tokens` counted from the first stage on."""
    evaluation: dict[str, Any]
    transcripts: list[dict[str, str]]
    continuations: list[dict[str, Any]]
    speech: dict[str, Any]
    """speech.json: how well the speech decoder's sound is understood, and where it lies under samples/."""
    prepared: dict[str, Any]
    tokenizer: dict[str, Any]
    """The tokenizer recipe's own summary."""
    fine_tuning: FineTuningResults | None
    """None where recordings were given: it takes synthesised ones, whose tags are true."""
    rewards: RewardResults | None
    """None where recordings were given."""

    @classmethod
    def read(cls, run: Path, seconds: Mapping[str, float]) -> QuickstartResults:
        """Raises OSError or ValueError if a part's output is not there."""
        metrics = {stage: read_metrics(run / stage / "metrics.jsonl") for stage in STAGES}
        before = 0.0
        for stage in STAGES:
            for line in metrics[stage]:
                line["all_tokens"] = before + line["tokens"]
            before = metrics[stage][-1]["all_tokens"]
        tokenizer = run / "tokenizer" / "summary.json"
        return cls(
            run=run,
            seconds=dict(seconds),
            metrics=metrics,
            evaluation=_read(run / "evaluation" / "evaluation.json"),
            transcripts=_read_lines(run / "evaluation" / "transcripts.jsonl"),
            continuations=_read_lines(run / "evaluation" / "continuations.jsonl"),
            speech=_read(run / "samples" / "speech.json"),
            prepared=_read(run / "prepared" / "report.json"),
            tokenizer=_read(tokenizer) if tokenizer.is_file() else {},
            fine_tuning=FineTuningResults.read(run) if (run / "sft").is_dir() else None,
            rewards=RewardResults.read(run) if (run / "ppo").is_dir() else None,
        )

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: percent, nats per token, minutes."""
        asr, likelihood = self.evaluation["asr"], self.evaluation["likelihood"]
        heldout = asr.get("heldout_speaker")
        return {
            "minutes": round(sum(self.seconds.values()) / 60, 2),
            "asr_wer": round(asr["test"]["percent"], 2),
            "asr_words": asr["test"]["num_words"],
            "asr_wer_shuffled_audio": round(asr["test_shuffled_audio"]["percent"], 2),
            "asr_wer_heldout_speaker": round(heldout["percent"], 2) if heldout else None,
            "asr_wer_by_language": {
                language: round(errors["percent"], 2) for language, errors in self.evaluation["asr_by_language"].items()
            },
            **{f"nll_{name}": round(nats, 4) for name, nats in likelihood["model"].items()},
            **{f"unigram_nll_{name}": round(nats, 4) for name, nats in likelihood["unigram"].items()},
            **(self.fine_tuning.summary() if self.fine_tuning else {}),
            **(self.rewards.summary() if self.rewards else {}),
            **self.speech["summary"],
            "tokens": int(self.metrics[STAGES[-1]][-1]["all_tokens"]),
            "tokens_per_stage": {stage: int(lines[-1]["tokens"]) for stage, lines in self.metrics.items()},
            "tokens_per_s": {stage: round(_median(lines, "tokens_per_s")) for stage, lines in self.metrics.items()},
            "hours_of_audio": {split: round(hours, 4) for split, hours in self.prepared["hours"].items()},
            "minutes_per_part": {part: round(seconds / 60, 3) for part, seconds in self.seconds.items()},
            "environment": environment(),
        }

    def headline(self) -> str:
        """One line for the terminal."""
        found = self.summary()
        control = found["asr_wer_shuffled_audio"]
        line = f"WER {found['asr_wer']:.1f}% on held-out recordings ({control:.0f}% with shuffled audio)"
        if found["asr_wer_heldout_speaker"] is not None:
            line += f", {found['asr_wer_heldout_speaker']:.1f}% for the speaker left out"
        if self.fine_tuning is not None:
            line += (
                f"; fine-tuned: WER {found['sft_asr_wer']:.1f}%, spoken questions {found['aqta_exact']:.0f}% right "
                f"({found['aqta_exact_shuffled_audio']:.0f}% with shuffled audio)"
            )
            if found["speed_control_spearman"] is not None:
                line += f", speed as asked {found['speed_control_spearman']:.2f}"
        if self.rewards is not None:
            line += (
                f"; reward model right about {found['reward_accuracy']:.0f}% of held-out pairs, PPO: drawn answers "
                f"{found['ppo_score_before']:.1f}% right before and {found['ppo_score_after']:.1f}% after"
            )
        if found["tts_wer"] is not None:
            line += (
                f"; heard: WER {found['tts_wer']:.0f}% of speech made of text, {found['resynthesis_wer']:.0f}% of "
                f"recordings' tokens as sound, {found['reference_wer']:.0f}% of the recordings"
            )
        return f"{line}; {found['tokens']:,} tokens, {found['minutes']:.1f} minutes"


def write_quickstart_report(results: QuickstartResults) -> Path:
    """Write `run`/report.html; returns its path."""
    sections = [
        _recognition(results),
        _likelihoods(results),
        _curves(results),
        _continuations(results),
        *([] if results.fine_tuning is None else _fine_tuning(results.fine_tuning)),
        *([] if results.rewards is None else [reward_section(results.rewards)]),
        sound_section(results.run / "samples", results.speech),
        _data(results),
        _time(results),
        _what_ran(results),
    ]
    path = results.run / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page(f"Quick start: {results.run.name}", results.headline(), sections), encoding="utf-8")
    temporary.replace(path)
    return path


def _recognition(results: QuickstartResults) -> str:
    titled = {_SET_TITLES[name]: errors for name, errors in results.evaluation["asr"].items()}
    titled |= {f"held-out, {name} only": errors for name, errors in results.evaluation["asr_by_language"].items()}
    rows = [(t, e["percent"], e["num_words"], *(e[kind] for kind in _ERROR_KINDS)) for t, e in titled.items()]
    head = ("", "WER, %", "words", *_ERROR_KINDS)
    shown = _examples([line for line in results.transcripts if line["set"] == "test"])
    return section(
        "Speech recognition",
        table(head, rows),
        "<h3>Examples</h3>",
        table(("recording", "said", "heard"), shown),
        note="The model transcribes held-out recordings by greedy decoding. Mandarin is counted by characters. The "
        "control shows what the error rate would be if the model only knew which texts are likely.",
    )


_ERROR_KINDS = ("substitutions", "deletions", "insertions")


def _examples(lines: list[dict[str, str]]) -> list[tuple[object, ...]]:
    """Wrong ones first, since they tell more, but no more than half."""
    wrong = [line for line in lines if line["reference"] != line["hypothesis"]][: _SHOWN_TRANSCRIPTS // 2]
    right = [line for line in lines if line["reference"] == line["hypothesis"]][: _SHOWN_TRANSCRIPTS - len(wrong)]
    return [(x["id"], x["reference"], judged(x["reference"], x["hypothesis"])) for x in [*wrong, *right]]


def _likelihoods(results: QuickstartResults) -> str:
    found = results.evaluation["likelihood"]
    rows = [(n, found["model"][n], found["unigram"][n], found["num_tokens"][n]) for n in found["model"]]
    return section(
        "Held-out likelihood",
        table(("tokens", "model, nats/token", "unigram, nats/token", "counted"), rows),
        note="Text is predicted from the speech it transcribes, and in interleaved documents from what stands before "
        "it; speech tokens from what was said before, and from the text in synthesis. The unigram model knows how "
        "frequent each training token is.",
    )


def _curves(results: QuickstartResults) -> str:
    lines = [line for stage in STAGES for line in results.metrics[stage]]
    marks = {stage: results.metrics[stage][0]["all_tokens"] for stage in STAGES if results.metrics[stage]}
    unit = "nats/token"
    drawn = [
        ("Loss by modality", unit, modality_keys(lines)),
        ("Loss by task", unit, task_keys(lines)),
        ("Held-out loss by task", unit, task_keys(lines, "val/loss/")),
        ("Tokens per second", "tokens/s", ["tokens_per_s"]),
        ("Learning rate", "", ["learning_rate"]),
        ("Gradient norm", "L2, before clipping", ["grad_norm"]),
    ]
    svgs = [line_chart(t, "tokens", y, series(lines, keys, "all_tokens"), marks) for t, y, keys in drawn]
    rows = []
    for stage in STAGES:
        config = read_config(PretrainConfig, results.run / stage / "config.yaml")
        engine = config.engine
        layout = f"TP={engine.tensor_parallel} PP={engine.pipeline_parallel}, {engine.name}"
        last = results.metrics[stage][-1]
        rows.append(
            (stage, layout, int(last["step"]), int(last["tokens"]), _median(results.metrics[stage], "tokens_per_s"))
        )
    head = ("stage", "layout", "steps", "tokens", "tokens/s (median)")
    return section("Three stages of pretraining", table(head, rows), charts(*svgs))


def _continuations(results: QuickstartResults) -> str:
    rows = [
        (
            line["id"],
            line["reference"],
            line["prompt_heard"],
            line["heard"],
            line["continuation_s"],
            f"L {' '.join(map(str, line['linguistic'][:6]))} S {' '.join(map(str, line['semantic'][:9]))}",
        )
        for line in results.continuations
    ]
    if not rows:
        return ""
    head = (
        "recording",
        "says in full",
        "heard in the prompt",
        "heard in prompt + continuation",
        "continued, s",
        "codes",
    )
    seconds = results.continuations[0]["prompt_s"]
    return section(
        "Continuations",
        table(head, rows),
        note=f"The model heard the first {seconds:g} s of a held-out recording and went on in audio tokens. Here the "
        "model itself says what it hears in its own speech.",
    )


def _fine_tuning(found: FineTuningResults) -> list[str]:
    scores, exchanged = found.answers["scores"], found.answers["scores_exchanged_audio"]
    rows = [
        (
            task,
            one["num"],
            one["wer"],
            one["exact"],
            *(exchanged.get(task, {}).get(key, "-") for key in ("wer", "exact")),
        )
        for task, one in scores.items()
    ]
    head = ("task", "answers", "WER, %", "exact, %", "WER, shuffled audio", "exact, shuffled audio")
    shown = [
        (task, example["id"], example["reference"], judged(example["reference"], example["answer"]))
        for task, examples in found.answers["examples"].items()
        for example in examples
    ]
    losses = [
        ("Loss by task", task_keys(found.metrics)),
        ("Held-out loss by task", task_keys(found.metrics, "val/loss/")),
    ]
    curves = [
        line_chart(title, "tokens", "nats/token", series(found.metrics, keys, "tokens")) for title, keys in losses
    ]
    return [
        section(
            "Fine-tuning on conversations",
            table(head, rows),
            charts(*curves),
            "<h3>Written answers</h3>",
            table(("task", "conversation", "expected", "answered"), shown),
            conversation_tables(found.data["data"]),
            note="Shuffled audio: the same conversations, each with the recording of another one of its task. asr "
            "writes down what is said, aqta answers a spoken question.",
        ),
        control_section(found.control),
    ]


def _data(results: QuickstartResults) -> str:
    found = results.prepared
    rows = [
        (split, count, found["hours"][split] * 60, ", ".join(found["speakers"][split][:12]))
        for split, count in found["samples"].items()
    ]
    refused = table(("refused", "why"), [(r["name"], r["reason"]) for r in found["refused"][:20]])
    tokenizer = details("speech tokenizers", json.dumps(results.tokenizer, indent=1)) if results.tokenizer else ""
    parts = (table(("split", "records", "minutes", "speakers"), rows), refused if found["refused"] else "", tokenizer)
    note = f"{len(found['refused'])} recordings were refused. Training counts joined and sped-up copies of recordings."
    return section("Data", *parts, note=note)


def _time(results: QuickstartResults) -> str:
    minutes = {name.replace("_", " "): seconds / 60 for name, seconds in results.seconds.items()}
    return section(f"Time: {sum(minutes.values()):.1f} minutes", bar_chart("Minutes per part", "minutes", minutes))


def _what_ran(results: QuickstartResults) -> str:
    configs = [
        details(f"{stage}/config.yaml", (results.run / stage / "config.yaml").read_text(encoding="utf-8"))
        for stage in STAGES
    ]
    return section("What ran", table(("", ""), environment().items()), *configs)


def _median(lines: Metrics, key: str) -> float:
    return float(statistics.median(line[key] for line in lines if key in line))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
