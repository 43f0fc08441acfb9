"""The models around a policy that learns from rewards: critic, reference, reward model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stepaudio_train.config.checks import layout_problems
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.paths import latest_checkpoint
from stepaudio_train.config.policy_runs import PolicyRunConfig, PpoRunConfig
from stepaudio_train.config.schema import ModelConfig, Step1Config
from stepaudio_train.config.sft import with_text_tokenizer
from stepaudio_train.convert.sources import Source, open_source
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.extras import OLD_LOG_PROBS, OLD_VALUES, REFERENCE_LOG_PROBS
from stepaudio_train.engines.base import Engine, Judge
from stepaudio_train.engines.build import build_engine, build_judge
from stepaudio_train.objectives.base import TokenOutputs
from stepaudio_train.training.run_directory import RunDirectory
from stepaudio_train.training.weights import initialise

SCORES = "reward_model"
"""What the reward model says after each token; not an extra that an objective reads."""


@dataclass(frozen=True)
class Judges:
    """Models that say what answers are worth, and do not learn."""

    reference: Judge | None = None
    """None: there is none, or it is the policy without its adapters."""
    reward: Judge | None = None

    def measure(self, micro_batches: Sequence[TokenBatch]) -> dict[str, Tensor]:
        """What each says of this replica's rows; see `Models.measure`."""
        found = {}
        if self.reference is not None:
            found[REFERENCE_LOG_PROBS] = _log_probs(self.reference.outputs(micro_batches))
        if self.reward is not None:
            found[SCORES] = _values(self.reward.outputs(micro_batches))
        return found


@dataclass(frozen=True)
class Models:
    """The policy, and what judges it, of what this rank holds."""

    policy: Engine
    critic: Engine | None
    """None: there is none, or it is the policy's own value head."""
    judges: Judges
    config: PolicyRunConfig

    def measure(self, batch: TokenBatch) -> dict[str, Tensor]:
        """What each says of this replica's rows, [R, T] each, by names in `TokenBatch.extras`, and SCORES. Every rank
        calls it."""
        micro_batches = batch.split(self.config.training.micro_batch_rows)
        policy = self.policy.outputs(micro_batches)
        found = {OLD_LOG_PROBS: _log_probs(policy)}
        if self.critic is not None:
            found[OLD_VALUES] = _values(self.critic.outputs(micro_batches))
        elif self.policy.config.model.value_head:
            found[OLD_VALUES] = _values(policy)
        if self.config.kl_coefficient > 0 and not self.config.has_reference:
            with self.policy.without_adapters():
                found[REFERENCE_LOG_PROBS] = _log_probs(self.policy.outputs(micro_batches))
        return {**found, **self.judges.measure(micro_batches)}


@contextmanager
def companions(config: PolicyRunConfig, policy: Engine, run: RunDirectory) -> Iterator[Models]:
    """Start the models around the policy, with their weights, in the policy's layout, but for judges that have ranks of
    their own. Every rank of the policy enters it.

    A critic whose weights a checkpoint of the run holds is left without any.
    """
    with ExitStack() as leaving:
        judges = Judges() if config.judge_ranks else leaving.enter_context(judging(config))
        critic = None
        if isinstance(config, PpoRunConfig) and config.critic.kind == "own":
            init = config.critic.init or config.reward.model or config.model.init
            model = _model_of(init, config, value_head=True)
            critic = build_engine(replace(config, model=model, optimizer=config.critic.optimizer))
            leaving.callback(critic.close)
            if config.lora is not None or latest_checkpoint(run.checkpoints) is None:
                initialise(critic, critic.config)
        yield Models(policy, critic, judges, config)


@contextmanager
def judging(config: PolicyRunConfig) -> Iterator[Judges]:
    """Start reference and reward model, with their weights. Every rank that holds them enters it."""
    with ExitStack() as leaving:

        def judge(init: str | None, value_head: bool) -> Judge:
            started = build_judge(replace(config, model=_model_of(init, config, value_head), lora=None))
            leaving.callback(started.close)
            initialise(started, started.config)
            return started

        reward = judge(config.reward.model, value_head=True) if config.reward.model is not None else None
        reference = judge(config.model.init, value_head=False) if config.has_reference else None
        yield Judges(reference, reward)


def _model_of(init: str | None, config: PolicyRunConfig, value_head: bool) -> ModelConfig:
    """Others than the policy's weights have their own sizes; these have the policy's, which may have grown their
    vocabulary."""
    if init is None or init == config.model.init:
        return replace(config.model, value_head=value_head)
    sizes = open_source(Path(init)).model
    fields = {name: getattr(sizes, name) for name in Step1Config.__dataclass_fields__}
    return ModelConfig(**{**fields, "init": init, "value_head": value_head})


def model_problems(config: PolicyRunConfig) -> list[str]:
    """A line for each model around the policy that does not fit it. No weight is read."""
    config = with_text_tokenizer(config)
    given = {"reward.model": config.reward.model}
    if isinstance(config, PpoRunConfig):
        given["critic.init"] = config.critic.init
    problems = []
    for key, folder in given.items():
        if folder is None or not Path(folder).is_dir():
            continue
        try:
            source = open_source(Path(folder))
        except UserError as error:
            problems.append(f"{key}={folder}: {error}")
            continue
        problems += [f"{key}={folder}: {problem}" for problem in _misfits(source, config)]
        if key == "reward.model" and not source.model.value_head:
            problems.append(f"{key}={folder}: has no value head; type the run directory of `stepaudio run reward`")
    return problems


def _misfits(source: Source, config: PolicyRunConfig) -> Iterator[str]:
    theirs, ours = source.model.vocab_size, config.model.vocab_size
    sizes = {name: getattr(source.model, name) for name in Step1Config.__dataclass_fields__}
    laid_out = replace(config, model=replace(config.model, **{**sizes, "vocab_size": ours}))
    world_size = int(os.environ.get("WORLD_SIZE", "1")) - config.judge_ranks
    # What the policy breaks too is told of the policy.
    told = layout_problems(config, world_size)
    yield from (problem for problem in layout_problems(laid_out, world_size) if problem not in told)
    if theirs != ours:
        yield f"has vocab_size={theirs}, the policy has model.vocab_size={ours}; it has to read the policy's ids"
    tokenizer = config.vocabulary.text_tokenizer
    if source.text_tokenizer is None or tokenizer is None or not Path(tokenizer).is_file():
        return
    if source.text_tokenizer.read_bytes() != Path(tokenizer).read_bytes():
        yield f"has another text tokenizer than vocabulary.text_tokenizer={tokenizer}; it has to read the policy's ids"


def _log_probs(outputs: Sequence[TokenOutputs]) -> Tensor:
    return torch.cat([one.log_probs for one in outputs])


def _values(outputs: Sequence[TokenOutputs]) -> Tensor:
    return torch.cat([one.values for one in outputs if one.values is not None])
