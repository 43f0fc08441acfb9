"""Preferences of a task that a tiny model learns in seconds: the right answer to a digit is the digit behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepaudio_train.config.preference_runs import DpoRunConfig, PreferenceTrainingConfig, RewardConfig
from stepaudio_train.config.preferences import PreferenceDataConfig
from stepaudio_train.config.rlhf import DpoConfig
from stepaudio_train.config.schema import EngineConfig, LoggingConfig, ModelConfig, OptimizerConfig, VocabularyConfig
from stepaudio_train.convert.companions import write_companions
from stepaudio_train.convert.huggingface_files import SafetensorsWriter
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.testing.token_data import TEXT_SIZE, WORDS, write_text_tokenizer

VOCABULARY = VocabularyConfig(text_size=TEXT_SIZE, linguistic_size=64, semantic_size=96, reserved_size=8)
MODEL = ModelConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_attention_groups=2,
    vocab_size=VOCABULARY.total_size, init_std=0.3,
)  # fmt: skip
TRAINING = PreferenceTrainingConfig(sequence_length=128, global_batch_rows=4, micro_batch_rows=2, eval_every=36)


def write_toy_preferences(folder: Path) -> None:
    """72 pairs (train.jsonl) and 18 with other wrong answers (held_out.jsonl), in the categories even and odd; weights
    drawn at random, and a text tokenizer (weights/)."""
    (folder / "weights").mkdir(parents=True)
    tokenizer = write_text_tokenizer(folder / "text.model")
    writer = SafetensorsWriter(folder / "weights", MODEL, torch.float32)
    for name, tensor in InitialWeights(MODEL, 0).items():
        writer.write_tensor(name, tensor)
    writer.finish()
    write_companions(folder / "weights", MODEL, "float32", tokenizer, add_bos=True, card=None)
    pairs = [(digit, wrong) for digit in range(10) for wrong in range(10) if wrong != (digit + 1) % 10]
    for name, chosen in (("train", (0, 1, 2, 4)), ("held_out", (3,))):
        lines = [json.dumps(_line(*pair)) + "\n" for index, pair in enumerate(pairs) if index % 5 in chosen]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def toy_reward_config(folder: Path, run_dir: Path, epochs: float = 8.0, **training: Any) -> RewardConfig:
    """A reward model's run on what `write_toy_preferences` wrote, in one process."""
    common = _common(folder, run_dir, epochs, training)
    return RewardConfig(**{**common, "model": replace(common["model"], value_head=True)})


def toy_dpo_config(folder: Path, run_dir: Path, epochs: float = 8.0, **training: Any) -> DpoRunConfig:
    """A DPO run on what `write_toy_preferences` wrote, in one process."""
    return DpoRunConfig(loss=DpoConfig(beta=0.5), **_common(folder, run_dir, epochs, training))


def _common(folder: Path, run_dir: Path, epochs: float, training: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "model": replace(MODEL, init=str(folder / "weights")),
        "vocabulary": VOCABULARY,
        "engine": EngineConfig(device="cpu"),
        "optimizer": OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=5),
        "training": replace(TRAINING, **training),
        "data": PreferenceDataConfig(str(folder / "train.jsonl"), str(folder / "held_out.jsonl"), epochs=epochs),
        "logging": LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False),
    }


def _line(digit: int, wrong: int) -> dict[str, Any]:
    answers = {"chosen": (digit + 1) % 10, "rejected": wrong}
    return {
        "messages": [{"role": "human", "content": WORDS[digit]}],
        **{name: {"role": "assistant", "content": WORDS[answer]} for name, answer in answers.items()},
        "category": ("even", "odd")[digit % 2],
        "margin": 1 + digit % 3,
    }
