"""What PPO's and GRPO's runs have in common."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from stepaudio_train.config.compose import save_config
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.policy_runs import PolicyRunConfig, PpoRunConfig
from stepaudio_train.config.schema import OptimizerConfig
from stepaudio_train.config.sft import with_max_steps
from stepaudio_train.data.conversation_files import Worker
from stepaudio_train.data.conversations import chat_renderer, write_report
from stepaudio_train.data.files import write_atomically
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.process_group import World
from stepaudio_train.rlhf.loader import RolloutLoader
from stepaudio_train.rlhf.models import Models, companions
from stepaudio_train.rlhf.placement import judges_apart
from stepaudio_train.rlhf.prompts import load_prompts
from stepaudio_train.rlhf.rules import rule_problems
from stepaudio_train.rlhf.signals import Signals
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.engine_run import engine_run
from stepaudio_train.training.run_directory import RunDirectory
from stepaudio_train.training.schedule import learning_rate_at

log = logging.getLogger(__name__)

C = TypeVar("C", bound=PolicyRunConfig)


@dataclass(frozen=True)
class SampleFiles:
    """Writes `samples/step_XXXXXXXX.jsonl` of the answers that the step learned from. See `training.loop.Sampler`."""

    loader: RolloutLoader
    folder: Path
    every_steps: int

    def __call__(self, engine: Engine, step: int) -> None:
        """The main rank writes; nothing is generated."""
        if engine.is_main:
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.loader.samples]
            write_atomically(self.folder / f"step_{step:08d}.jsonl", "".join(lines).encode())


@contextmanager
def policy_run(
    config: C, signals: Callable[[C], Signals], world: World | None = None
) -> Iterator[tuple[C, RunDirectory, Models, RolloutLoader, SampleFiles | None]]:
    """The configuration with its number of steps, the run's directory, claimed, the models, of which the policy is
    without weights, and what makes batches and samples. Every process of a run enters it.

    Args:
        signals: what the algorithm adds to answers.
        world: where reference and reward model have ranks of their own, the policy's.

    Raises:
        ConfigError: the directory is not the run's, the tokenizer does not fit the vocabulary, or the prompts do not
            fit the rewards or the number of steps.
        UserError: the file holds no prompt that can be used.
    """
    with engine_run(config) as (run, policy), judges_apart(world, policy) as apart:
        renderer = chat_renderer(config.vocabulary, Vocabulary.from_config(config.vocabulary))
        worker = Worker(policy.rank, policy.world_size, str(policy.device), policy.barrier, config.logging.progress_bar)
        prompts = load_prompts(config, renderer, run.path / "tokens", worker)
        problems = rule_problems(config.reward, prompts.prompts)
        if problems:
            raise ConfigError(problems)
        if policy.is_main:
            write_report({"data": prompts}, run.path / "data_report.json")
        with companions(config, policy, run) as models:
            loader = RolloutLoader(config, models, prompts, renderer, signals(config), apart)
            config = with_max_steps(config, loader.steps(config.data.epochs))
            _require_steps(config)
            if policy.is_main:
                save_config(config, run.config_file)
                log.info("%d steps of %d answers", config.training.max_steps, _answers_per_step(config))
            every = config.training.sample_every
            samples = SampleFiles(loader, run.path / "samples", every) if every else None
            yield config, run, models, loader, samples


def delayed_rate(config: OptimizerConfig, max_steps: int, delay_steps: int) -> Callable[[int], float]:
    """Learning rate of a step: 0 for the first `delay_steps`, and over the others as `config` has it."""

    def rate_at(step: int) -> float:
        if step <= delay_steps:
            return 0.0
        return learning_rate_at(step - delay_steps, max_steps - delay_steps, config)

    return rate_at


def with_value_head(config: PpoRunConfig) -> PpoRunConfig:
    """`config` whose policy has a value head where policy and critic are one model."""
    return replace(config, model=replace(config.model, value_head=config.critic.kind == "shared"))


def _answers_per_step(config: PolicyRunConfig) -> int:
    return config.answers_per_iteration // config.training.minibatches


def _require_steps(config: PolicyRunConfig) -> None:
    steps = config.training.max_steps
    if isinstance(config, PpoRunConfig) and steps <= config.critic.warmup_steps:
        raise ConfigError(
            [
                f"critic.warmup_steps={config.critic.warmup_steps}: leaves none of the run's {steps} steps to the "
                "policy; type a smaller number, or more data.epochs"
            ]
        )
