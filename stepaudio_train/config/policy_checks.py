"""Rules that span several fields of a PPO or GRPO run's configuration. All broken ones are told at once."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from stepaudio_train.config.checks import init_problems, layout_problems, replica_ranks, training_problems
from stepaudio_train.config.policy_runs import (
    CriticConfig,
    GrpoRunConfig,
    PolicyRunConfig,
    PpoRunConfig,
    PromptDataConfig,
    RewardSourceConfig,
)
from stepaudio_train.config.rlhf import gae_problems, grpo_problems, ppo_problems
from stepaudio_train.config.rollout import rollout_problems


def ppo_run_problems(config: PpoRunConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    problems = ppo_problems(config.loss, "loss") + gae_problems(config.gae, "gae") + _critic_problems(config)
    return problems + _policy_run_problems(config)


def grpo_run_problems(config: GrpoRunConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    problems = grpo_problems(config.loss, "loss")
    if config.model.value_head:
        problems.append("model.value_head=true: GRPO has no critic; type model.value_head=false")
    return problems + _policy_run_problems(config)


def _policy_run_problems(config: PolicyRunConfig) -> list[str]:
    problems = _placement_problems(config, int(os.environ.get("WORLD_SIZE", "1")))
    problems += _data_problems(config.data) + _reward_problems(config.reward)
    problems += rollout_problems(config.rollout, "rollout") + _training_problems(config)
    if config.rollout.temperature == 0:
        problems.append(
            "rollout.temperature=0: the same answer every time shows nothing to learn from; type rollout.temperature=1"
        )
    return problems + init_problems(config) + training_problems(config)


def _placement_problems(config: PolicyRunConfig, world_size: int) -> list[str]:
    """Of the ranks of policy and critic, and of those of the models that judge."""
    apart = config.judge_ranks
    if apart == 0:
        return layout_problems(config, world_size)
    if not 0 < apart < world_size:
        return [
            f"judge_ranks={apart}: must be 0, or leave some of the {world_size} process(es) to the policy; type "
            f"--nproc {max(2, apart + 1)}, or judge_ranks=0"
        ]
    problems = layout_problems(config, world_size - apart)
    if not config.has_reference and config.reward.model is None:
        problems.append(
            f"judge_ranks={apart}: there is neither a reward model nor a reference of its own; type judge_ranks=0"
        )
    engine = config.engine
    ranks = replica_ranks(engine)
    if apart % ranks or (engine.name == "local" and apart > 1):
        problems.append(
            f"judge_ranks={apart}: the models on them are cut as engine has it, over {ranks} rank(s) each"
            f"{', of which engine.name=local takes one' if engine.name == 'local' else ''}; type judge_ranks={ranks}"
        )
    return problems


def _data_problems(data: PromptDataConfig) -> list[str]:
    problems = []
    what = "type data=FILE.jsonl, a conversation a line (docs/fine_tuning.md)"
    if not data.path:
        problems.append(f"data: required; {what}")
    elif not Path(data.path).is_file():
        problems.append(f"data={data.path}: no such file; {what}")
    if data.speech_tokenizer is not None and not Path(data.speech_tokenizer).is_dir():
        problems.append(f"data.speech_tokenizer={data.speech_tokenizer}: no such folder")
    if not 0 < data.epochs < math.inf:
        problems.append(f"data.epochs={data.epochs}: must be over 0; type data.epochs=1")
    if data.prompts_per_iteration < 1:
        problems.append(
            f"data.prompts_per_iteration={data.prompts_per_iteration}: must be at least 1; type "
            "data.prompts_per_iteration=64"
        )
    return problems


def _reward_problems(reward: RewardSourceConfig) -> list[str]:
    problems = []
    if reward.model is None and not reward.rules:
        problems.append(
            "reward: nothing is paid for; type reward.model=RUN_DIR of `stepaudio run reward`, or "
            "reward.rules={exact:1}"
        )
    if reward.model is not None and not Path(reward.model).is_dir():
        problems.append(f"reward.model={reward.model}: no such folder; type the run directory of a reward model")
    weights = {"model_weight": reward.model_weight, **{f"rules.{name}": w for name, w in reward.rules.items()}}
    problems += [
        f"reward.{name}={weight}: must be a finite number; type reward.{name}=1"
        for name, weight in weights.items()
        if not math.isfinite(weight)
    ]
    if not 0 <= reward.no_end_penalty < math.inf:
        problems.append(f"reward.no_end_penalty={reward.no_end_penalty}: must be 0 or more, and is taken off")
    # What a rule needs, and a rule for what is given.
    for rule, key, value, example in (
        ("pattern", "pattern", reward.pattern, "'REGULAR EXPRESSION'"),
        ("length", "max_words", reward.max_words, "40"),
    ):
        if rule in reward.rules and value is None:
            problems.append(f"reward.rules.{rule}: needs reward.{key}; type reward.{key}={example}")
        if rule not in reward.rules and value is not None:
            problems.append(f"reward.{key}={value}: is for the rule {rule}; type reward.rules.{rule}=1, or remove it")
    if reward.max_words is not None and reward.max_words < 1:
        problems.append(f"reward.max_words={reward.max_words}: must be at least 1; type reward.max_words=40")
    return problems + _pattern_problems(reward.pattern)


def _pattern_problems(pattern: str | None) -> list[str]:
    try:
        re.compile(pattern or "")
    except re.error as error:
        return [f"reward.pattern={pattern}: is no regular expression: {error}"]
    return []


def _training_problems(config: PolicyRunConfig) -> list[str]:
    training, problems = config.training, []
    for name in ("epochs_per_iteration", "minibatches", "num_samples"):
        if getattr(training, name) < 1:
            problems.append(f"training.{name}={getattr(training, name)}: must be at least 1")
    if training.sample_every < 0:
        problems.append(f"training.sample_every={training.sample_every}: must be 0 or more; 0 writes none")
    if training.global_batch_rows:
        problems.append(
            f"training.global_batch_rows={training.global_batch_rows}: rows follow from the answers' lengths; type "
            "data.prompts_per_iteration=NUMBER instead"
        )
    if training.early_stop is not None or training.eval_every:
        problems.append("training.early_stop, training.eval_every: there is no held-out loss here; remove them")
    answers = config.answers_per_iteration
    if training.minibatches >= 1 and answers % training.minibatches:
        problems.append(
            f"training.minibatches={training.minibatches}: must divide the {answers} answers of an iteration "
            f"(data.prompts_per_iteration={config.data.prompts_per_iteration}); type training.minibatches=1"
        )
    if config.rollout.max_new_tokens >= training.sequence_length:
        problems.append(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens}: leaves no room for a prompt in "
            f"training.sequence_length={training.sequence_length}; type training.sequence_length="
            f"{2 * config.rollout.max_new_tokens}"
        )
    return problems


def _critic_problems(config: PpoRunConfig) -> list[str]:
    critic, shared, problems = config.critic, config.critic.kind == "shared", []
    if config.model.value_head:
        problems.append("model.value_head=true: follows from critic.kind; type model.value_head=false")
    if critic.warmup_steps < 0:
        problems.append(f"critic.warmup_steps={critic.warmup_steps}: must be 0 or more; type critic.warmup_steps=80")
    if critic.init is not None and not Path(critic.init).is_dir():
        problems.append(f"critic.init={critic.init}: no such folder; null takes the reward model's weights")
    if shared and critic.init is not None:
        problems.append(f"critic.init={critic.init}: a shared critic has the policy's weights; type critic.init=null")
    if shared and critic.optimizer != CriticConfig().optimizer:
        problems.append("critic.optimizer: a shared critic learns with the policy; set optimizer.* alone")
    if shared and critic.warmup_steps:
        problems.append(
            f"critic.warmup_steps={critic.warmup_steps}: a shared critic cannot learn without the policy; type "
            "critic.warmup_steps=0"
        )
    if 0 < config.training.max_steps <= critic.warmup_steps:
        problems.append(
            f"critic.warmup_steps={critic.warmup_steps}: leaves none of training.max_steps={config.training.max_steps} "
            "to the policy; type a smaller number"
        )
    return problems
