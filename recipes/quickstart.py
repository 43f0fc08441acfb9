"""Recordings in, a speech-text model, pretrained, fine-tuned and heard, and a report out, on two processes.

    make quickstart                                                     # an espeak-ng corpus
    make quickstart CORPUS=folder RUN=name                              # recordings of yours
    stepaudio run quickstart corpus=folder run_dir=runs/name heldout_speaker=theo

It aims at 28 minutes on two cores. Every part is a command that can be typed by itself (parts/*.json in the run
directory hold them), and what stopped half-way goes on from there. Writes report.html and summary.json. Fine-tuning
takes conversations whose instruction tags are true, and a reward model and PPO take spoken questions. Both are made
together with the espeak-ng corpus.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch

from stepaudio_train.commands.parts import Parts, exclusive
from stepaudio_train.config.compose import load_config, quoted, run_recipe, to_mapping
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.policy_runs import PpoRunConfig
from stepaudio_train.config.preference_runs import RewardConfig
from stepaudio_train.config.quickstart import QuickstartConfig, quickstart_problems
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.config.sft import SftConfig
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.records import Record
from stepaudio_train.data.sources import find_recordings
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats
from stepaudio_train.evaluation.report import QuickstartResults, write_quickstart_report
from stepaudio_train.training.report import read_metrics

HOME = "runs/quickstart"
"""Where the stages' configurations look for data, and for each other."""
STAGES = ("stage1", "stage2", "stage3")
NUM_PROCESSES = 2
ROW_TOKENS = (256, 512, 1024, 2048)
"""Row lengths to choose from. What is longer than a row is not trained on."""
TOKENS_PER_STEP = 2048
RESERVE_S = 390.0
"""Kept for what does not learn, starts and evaluations, when it is decided how long the rest may learn."""
LEAST_SHARE = 0.25
"""Of the steps that are asked for, on the slowest machine."""
SFT_TOKENS = 840_000
"""Of the conversations at scale 1, rows filled up and recordings' encoding counted in."""
DECODER_STEP_TOKENS = {"flow_encoder_steps": 1300, "flow_steps": 4300, "vocoder_steps": 1000}
"""What stage 3 learns in the time of such a step."""
PREFERENCE_STEP_TOKENS = {"reward_steps": 4000, "ppo_steps": 28000}
"""As `DECODER_STEP_TOKENS`."""
MEL_SHARE, HALF_LIFE_SHARE = 49 / 50, 2 / 7
"""Of the vocoder's steps: those before its discriminators, and those in which its rates fall by half."""
WARMUP_SHARE = 1 / 9
"""Of PPO's steps, in which the critic learns alone."""
MOST_JOINED = 4


def main(config: QuickstartConfig) -> None:
    run = Path(config.run_dir)
    with exclusive(run):
        parts = Parts(run, total=12 if config.corpus is not None else 14 if config.until_fine_tuned else 22)
        try:
            _run_all(config, run, parts)
        except UserError as error:
            sys.stderr.write(f"quickstart: {error}\n")
            raise SystemExit(1) from None


def _run_all(config: QuickstartConfig, run: Path, parts: Parts) -> None:
    stepaudio = [sys.executable, "-m", "stepaudio_train.cli"]
    source = _corpus(config, run, parts)
    _data(config, run, parts, stepaudio, source)
    _stages(config, run, parts, stepaudio)
    folders = {"model_dir": "stage3/export", "tokens": "tokens", "output": "evaluation"}
    settings = [f"{key}={quoted(str(run / folder))}" for key, folder in folders.items()]
    parts.run("evaluate", [*stepaudio, "run", "evaluate", *settings])
    if config.corpus is None:
        _fine_tuning(config, run, parts, stepaudio)
        if config.until_fine_tuned:
            sys.stdout.write(f"fine-tuned: {run}/sft; without until_fine_tuned the same command goes on from here\n")
            return
        _preferences(config, run, parts, stepaudio)
    _sound(config, run, parts, stepaudio)
    results = QuickstartResults.read(run, parts.seconds)
    write_atomically(run / "summary.json", json.dumps(results.summary(), indent=1).encode())
    report = write_quickstart_report(results)
    sys.stdout.write(f"{results.headline()}\nreport: {report}\n")


def _corpus(config: QuickstartConfig, run: Path, parts: Parts) -> Path:
    """The recordings: given, or made."""
    if config.corpus is not None:
        return Path(config.corpus)
    size = ["--minutes", f"{config.corpus_minutes:g}", "--seed", str(config.seed)]
    parts.run("corpus", [sys.executable, "-m", "data_tools.make_corpus", f"{run}/corpus", *size])
    scale = ["--scale", f"{config.instruction_scale:g}", "--seed", str(config.seed)]
    made = [sys.executable, "-m", "data_tools.make_instruction_corpus", f"{run}/instructions", *scale]
    parts.run("instructions", made)
    return _joined_manifest(run, ("corpus", "instructions"))


def _joined_manifest(run: Path, folders: Sequence[str]) -> Path:
    """One manifest of what several folders' manifests list."""
    lines = []
    for folder in folders:
        for line in (run / folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            lines.append(json.dumps({**entry, "audio": f"{folder}/{entry['audio']}"}, ensure_ascii=False))
    path = run / "recordings.jsonl"
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def _data(config: QuickstartConfig, run: Path, parts: Parts, stepaudio: list[str], source: Path) -> None:
    """Shards of recordings, the tokenizers, shards of tokens."""
    records = find_recordings(source).records
    prepare = [*stepaudio, "prepare", str(source), f"{run}/prepared", "--join-max", str(_join_max(config, records))]
    if config.speed_copies:
        prepare += ["--speed-copies", ",".join(map(str, config.speed_copies))]
    if config.heldout_speaker is not None:
        prepare += ["--heldout-speaker", config.heldout_speaker]
    parts.run("prepare", prepare, {"recordings": _fingerprint(records)})
    texts, tokenizer = f"{run}/transcripts.txt", f"{run}/tokenizer"
    parts.run("transcripts", [sys.executable, "-m", "data_tools.transcripts", f"{run}/prepared/train", texts])
    encoders = ("linguistic_training", "semantic_training")
    train = ["run", "tokenizer", f"corpus={quoted(f'{run}/prepared')}", f"run_dir={quoted(tokenizer)}"]
    train.append(f"seed={config.seed}")
    if config.corpus is None:
        train.append(f"texts={quoted(f'{run}/instructions/texts.txt')}")
    parts.run(
        "tokenizers", [*stepaudio, *train, *(f"{encoder}.steps={config.tokenizer_steps}" for encoder in encoders)]
    )
    text_tokenizer = ["--text-tokenizer", f"{tokenizer}/text.model"]
    speech_tokenizer = ["--speech-tokenizer", tokenizer]
    tokenize = [*stepaudio, "tokenize"]
    parts.run("tokenize", [*tokenize, f"{run}/prepared", f"{run}/tokens", *text_tokenizer, *speech_tokenizer])
    parts.run("tokenize_text", [*tokenize, texts, f"{run}/tokens_text", *text_tokenizer])


def _stages(config: QuickstartConfig, run: Path, parts: Parts, stepaudio: list[str]) -> None:
    """The paper's three stages, each from the last one's weights."""
    length = _row_tokens(TokenStats.read(run / "tokens" / "train" / STATS_FILE))
    rows = max(NUM_PROCESSES, TOKENS_PER_STEP // length)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= NUM_PROCESSES else "cpu"
    steps = {"stage1": config.stage1_steps, "stage2": config.stage2_steps}
    for stage in STAGES:
        if stage == "stage3":
            steps[stage] = _shared(_share(config, run, parts), config.stage3_steps)
        experiment = f"experiment=quickstart_{stage}"
        config_of_stage = to_mapping(load_config("pretrain", PretrainConfig, [experiment]))
        settings = [
            experiment,
            *_moved(config_of_stage, run),
            f"engine.device={device}",
            f"training.seed={config.seed}",
            f"training.max_steps={steps[stage]}",
            f"optimizer.warmup_steps={steps[stage] // 12}",
            f"training.sequence_length={length}",
            f"training.global_batch_rows={rows}",
            f"training.micro_batch_rows={rows // 4 if stage == 'stage1' else rows // 2}",
        ]
        parts.run(stage, [*stepaudio, "run", "pretrain", *settings, "--nproc", str(NUM_PROCESSES)])


def _fine_tuning(config: QuickstartConfig, run: Path, parts: Parts, stepaudio: list[str]) -> None:
    """Conversations whose instruction tags are true, and what the model learned of them (paper 5)."""
    experiment = "experiment=quickstart_sft"
    settings = [
        experiment,
        *_moved(to_mapping(load_config("sft", SftConfig, [experiment])), run),
        f"training.seed={config.seed}",
        f"data.epochs={_share(config, run, parts) * config.sft_epochs:g}",
    ]
    parts.run("sft", [*stepaudio, "run", "sft", *settings, "--nproc", str(NUM_PROCESSES)])
    held_out, answers = f"{run}/instructions/test.jsonl", f"{run}/answers"
    # A small model drops and swaps words when it does not take the most likely token.
    asked = ["--output", answers, "--reference", f"{run}/instructions/train.jsonl", "--temperature", "0"]
    parts.run("answers", [*stepaudio, "evaluate", "answers", f"{run}/sft", held_out, *asked])
    compared = [f"--{name}={answers}/{name}.jsonl" for name in ("reference", "truth")]
    spoken = [f"{answers}/answers.jsonl", "--output", f"{run}/control"]
    parts.run("control", [*stepaudio, "evaluate", "control", *spoken, *compared])


def _preferences(config: QuickstartConfig, run: Path, parts: Parts, stepaudio: list[str]) -> None:
    """A reward model of right and wrong answers to spoken questions, and a policy that learns from it (paper 5.2)."""
    folder, seed = f"{run}/preferences", str(config.seed)
    made = [sys.executable, "-m", "data_tools.make_question_preferences", f"{run}/instructions", folder]
    parts.run("preferences", [*made, "--seed", seed])
    share = _share(config, run, parts)
    ppo_steps = _shared(share, config.ppo_steps)
    lengths = {
        "reward": [f"training.max_steps={_shared(share, config.reward_steps)}"],
        "ppo": [f"training.max_steps={ppo_steps}", f"critic.warmup_steps={int(WARMUP_SHARE * ppo_steps)}"],
    }
    for recipe, schema in (("reward", RewardConfig), ("ppo", PpoRunConfig)):
        experiment = f"experiment=quickstart_{recipe}"
        moved = _moved(to_mapping(load_config(recipe, schema, [experiment])), run)
        settings = [experiment, *moved, f"training.seed={seed}", *lengths[recipe]]
        parts.run(recipe, [*stepaudio, "run", recipe, *settings, "--nproc", str(NUM_PROCESSES)])
    # Drawn as PPO draws them, from the model's own distribution: this is what it makes better.
    drawn = [f"{run}/instructions/held_out_questions.jsonl", "--written-temperature", "1", "--top-k", "0"]
    for name, model in (("before", "sft"), ("after", "ppo")):
        asked = [f"{run}/{model}", *drawn, "--seed", seed, "--output", f"{folder}/{name}"]
        parts.run(f"answers_{name}", [*stepaudio, "evaluate", "answers", *asked])


def _sound(config: QuickstartConfig, run: Path, parts: Parts, stepaudio: list[str]) -> None:
    """The speech decoder, and what it makes of recordings' tokens and of a model's answers (paper 3.3)."""
    share = _share(config, run, parts)
    data = [f"corpus={quoted(f'{run}/prepared')}"]
    seed, tokens = f"seed={config.seed}", f"tokens={quoted(f'{run}/tokens')}"
    encoder_steps = _shared(share, config.flow_encoder_steps)
    flow = [*data, tokens, f"run_dir={quoted(f'{run}/flow')}", seed, f"training.encoder_steps={encoder_steps}"]
    flow.append(f"training.max_steps={encoder_steps + _shared(share, config.flow_steps)}")
    # In minutes the encoder learns more than the network: the later a mel begins, the better it is understood.
    flow.append("flow.start_time=0.8")
    parts.run("flow", [*stepaudio, "run", "flow", *flow, "--nproc", str(NUM_PROCESSES)])
    vocoder = [*data, f"run_dir={quoted(f'{run}/vocoder')}", seed]
    steps = _shared(share, config.vocoder_steps)
    vocoder.append(f"training.max_steps={steps}")
    vocoder.append(f"training.discriminators_from={round(MEL_SHARE * steps)}")
    # Prepared audio has 16 kHz.
    vocoder.append("losses.highest_hz=8000")
    # Rates that have hardly fallen leave a vocoder that makes little of the flow's smooth spectra.
    vocoder.append(f"optimizer.half_life_steps={_shared(HALF_LIFE_SHARE, steps)}")
    parts.run("vocoder", [*stepaudio, "run", "vocoder", *vocoder, "--nproc", str(NUM_PROCESSES)])
    folders = {"decoder": "flow", "vocoder": "vocoder", "output": "samples"}
    if config.corpus is None:
        folders["answers"] = "answers"
    else:
        folders |= {"corpus": "prepared", "tokens": "tokens", "model_dir": "stage3/export"}
    heard = [*(f"{key}={quoted(str(run / folder))}" for key, folder in folders.items()), seed, "temperature=0"]
    # DNSMOS hears nine seconds of each clip, which takes most of the time of judging.
    parts.run("speech", [*stepaudio, "run", "evaluate_decoder", *heard, "judges.quality=none"])


def _moved(mapping: dict[str, Any], run: Path, prefix: str = "") -> list[str]:
    """Overrides that turn every path under runs/quickstart into one under `run`."""
    overrides = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            overrides += _moved(value, run, f"{prefix}{key}.")
        elif isinstance(value, str) and value.startswith(f"{HOME}/"):
            overrides.append(f"{prefix}{key}={quoted(str(run / value.removeprefix(f'{HOME}/')))}")
    return overrides


def _share(config: QuickstartConfig, run: Path, parts: Parts) -> float:
    """How much of the steps that are asked for, from stage 3 on, the minutes left allow. It is decided once."""
    decided = run / "share.json"
    if decided.is_file():
        return float(json.loads(decided.read_text(encoding="utf-8")))
    # Half of the batch on each process is the fastest layout: 1.8 times stage 1's pipeline where it was measured.
    speeds = [line["tokens_per_s"] * 1.8 for line in read_metrics(run / "stage1" / "metrics.jsonl")]
    tokens_per_s = sorted(speeds)[len(speeds) // 2]
    tokens = config.stage3_steps * TOKENS_PER_STEP
    tokens += sum(getattr(config, key) * number for key, number in DECODER_STEP_TOKENS.items())
    if config.corpus is None:
        tokens += round(config.sft_epochs * config.instruction_scale * SFT_TOKENS)
        tokens += sum(getattr(config, key) * number for key, number in PREFERENCE_STEP_TOKENS.items())
    left_s = config.minutes * 60 - sum(parts.seconds.values()) - RESERVE_S
    share = round(min(1.0, max(left_s * tokens_per_s / tokens, LEAST_SHARE)), 2)
    if share < 1:
        sys.stdout.write(
            f"        this machine is slow: from stage 3 on all learn {share:.0%} of the steps, to end within "
            f"{config.minutes:g} minutes; type minutes={2 * config.minutes:g} for better models\n"
        )
    write_atomically(decided, json.dumps(share).encode())
    return share


def _shared(share: float, steps: int) -> int:
    return max(1, round(share * steps))


def _join_max(config: QuickstartConfig, records: list[Record]) -> int:
    if config.join_max is not None:
        return config.join_max
    durations = []
    for record in records[:: max(1, len(records) // 200)]:
        try:
            durations.append(soundfile.info(record.audio_parts()[0].audio).duration)
        except (OSError, soundfile.SoundFileError):
            continue  # `stepaudio prepare` refuses it by name
    mean_s = sum(durations) / len(durations) if durations else config.joined_s
    return max(1, min(MOST_JOINED, round(config.joined_s / mean_s)))


def _fingerprint(records: list[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        for part in record.audio_parts():
            path = Path(part.audio)
            version = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else "missing"
            digest.update(f"{record.id} {part.text} {version}\n".encode())
    return f"{len(records)} recordings, {digest.hexdigest()[:16]}"


def _row_tokens(stats: TokenStats) -> int:
    """The shortest row that holds every sample, or samples four times as long as they are on average."""
    task = stats.tasks["asr"]
    needed = min(task.max_tokens, 4 * task.num_tokens / max(1, task.num_samples))
    return next((length for length in ROW_TOKENS if length >= needed), ROW_TOKENS[-1])


if __name__ == "__main__":
    run_recipe(main, QuickstartConfig, "quickstart", quickstart_problems)
