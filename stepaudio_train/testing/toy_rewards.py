"""A task with a known optimum for PPO, GRPO and DPO: a policy that says a word again or the one behind it is to say
the one behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepaudio_train.config.policy_runs import (
    CriticConfig,
    GrpoRunConfig,
    PolicyTrainingConfig,
    PpoRunConfig,
    PromptDataConfig,
    RewardSourceConfig,
)
from stepaudio_train.config.rlhf import GrpoConfig, PpoConfig
from stepaudio_train.config.rollout import RolloutConfig
from stepaudio_train.config.schema import EngineConfig, LoggingConfig, ModelConfig, OptimizerConfig
from stepaudio_train.config.sft import SftConfig, SftDataConfig, SftTrainingConfig
from stepaudio_train.convert.companions import write_companions
from stepaudio_train.convert.huggingface_files import SafetensorsWriter
from stepaudio_train.convert.sources import LazyWeights, open_source
from stepaudio_train.models.step1.weight_map import VALUE_HEAD, hf_shapes
from stepaudio_train.testing.toy_preferences import MODEL, VOCABULARY, write_toy_preferences

ASKED = ("one", "two", "four", "six")
"""Behind the last one comes the first."""
TRAINING = PolicyTrainingConfig(max_steps=30, sequence_length=128, micro_batch_rows=4, epochs_per_iteration=2)
RIGHT_ANSWERS = RewardSourceConfig(rules={"exact": 1.0})
"""Pays 1 for the right word: the optimum. Any other answer gets nothing, or -1 where it does not end."""
_QUIET = LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False)


def write_toy_rewards(folder: Path) -> None:
    """Every word with the one behind it as the right answer (prompts.jsonl), with both words (guesses.jsonl), and with
    the one behind it as the better one (pairs.jsonl); and all of `toy_preferences.write_toy_preferences`."""
    write_toy_preferences(folder)
    steps = list(zip(ASKED, (*ASKED[1:], ASKED[0]), strict=True))
    files = {
        "prompts": [_conversation(*step) for step in steps],
        "guesses": [_conversation(asked, answer) for asked, behind in steps for answer in (asked, behind)],
        "pairs": [_pair(asked, behind, asked) for asked, behind in steps],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_toy_opinions(run: Path, folder: Path) -> Path:
    """The weights of a run with a value head drawn at random, a reward model or critic that knows nothing."""
    source = open_source(run)
    model = replace(MODEL, value_head=True)
    random = torch.Generator().manual_seed(1)
    opinions = {
        name: torch.randn(shape, generator=random) * 0.1
        for name, shape in hf_shapes(model).items()
        if name in VALUE_HEAD
    }
    folder.mkdir(parents=True)
    writer = SafetensorsWriter(folder, model, torch.float32)
    for name, tensor in {**LazyWeights(source.reader, MODEL), **opinions}.items():
        writer.write_tensor(name, tensor)
    writer.finish()
    write_companions(folder, model, "float32", source.text_tokenizer, add_bos=True, card=None)
    return folder


def toy_guessing_config(folder: Path, run_dir: Path) -> SftConfig:
    """Fine-tuning after which a policy says a word again or the one behind it, both as likely; takes seconds."""
    return SftConfig(
        run_dir=str(run_dir),
        model=_model(folder / "weights"),
        vocabulary=VOCABULARY,
        engine=EngineConfig(device="cpu"),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=5),
        training=SftTrainingConfig(max_steps=80, sequence_length=128, global_batch_rows=2, micro_batch_rows=2),
        data=SftDataConfig(str(folder / "guesses.jsonl")),
        logging=_QUIET,
    )


def toy_ppo_config(folder: Path, init: Path, run_dir: Path, **fields: Any) -> PpoRunConfig:
    """A PPO run on what `write_toy_rewards` wrote, in one process.

    Args:
        init: the run directory of `toy_guessing_config`.
        fields: of `PpoRunConfig`, in place of the toy's.
    """
    critic = CriticConfig(warmup_steps=4, optimizer=OptimizerConfig(learning_rate=2e-3))
    return PpoRunConfig(**{"critic": critic, "loss": PpoConfig(), **_common(folder, init, run_dir), **fields})


def toy_grpo_config(folder: Path, init: Path, run_dir: Path, **fields: Any) -> GrpoRunConfig:
    """A GRPO run; see `toy_ppo_config`."""
    common = _common(folder, init, run_dir)
    common["data"] = replace(common["data"], prompts_per_iteration=8)
    return GrpoRunConfig(**{"loss": GrpoConfig(), **common, **fields})


def _common(folder: Path, init: Path, run_dir: Path) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "model": _model(init),
        "vocabulary": replace(VOCABULARY, text_tokenizer=str(folder / "text.model")),
        "engine": EngineConfig(device="cpu"),
        "optimizer": OptimizerConfig(learning_rate=5e-4, weight_decay=0.0),
        "training": TRAINING,
        "data": PromptDataConfig(str(folder / "prompts.jsonl"), prompts_per_iteration=64),
        "rollout": RolloutConfig(max_new_tokens=12, batch_rows=128),
        "reward": RIGHT_ANSWERS,
        "logging": _QUIET,
    }


def _model(init: Path) -> ModelConfig:
    return replace(MODEL, init=str(init))


def _conversation(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [_turn("human", asked), _turn("assistant", answer)]}


def _pair(asked: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {"chosen": _turn("assistant", chosen), "rejected": _turn("assistant", rejected)}
    return {"messages": [_turn("human", asked)], **answers}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
