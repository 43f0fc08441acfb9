"""Proximal policy optimisation: a model learns from the rewards of its own answers (paper 5.2). See docs/rlhf.md.

stepaudio run ppo model.init=runs/sft reward.model=runs/reward data=conversations.jsonl
stepaudio run ppo model.init=runs/sft reward.rules={exact:1} data=conversations.jsonl
"""

import logging
from functools import partial

from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.policy_checks import ppo_run_problems
from stepaudio_train.config.policy_runs import PpoRunConfig
from stepaudio_train.config.sft import with_text_tokenizer
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.process_group import World
from stepaudio_train.objectives.base import Objective
from stepaudio_train.objectives.ppo import PolicyAndValueLoss, PolicyLoss, ValueLoss
from stepaudio_train.rlhf.actor_critic import ActorCritic
from stepaudio_train.rlhf.metrics import loss_metrics
from stepaudio_train.rlhf.models import model_problems
from stepaudio_train.rlhf.placement import with_judges
from stepaudio_train.rlhf.report import write_policy_report
from stepaudio_train.rlhf.run import delayed_rate, policy_run, with_value_head
from stepaudio_train.rlhf.signals import ppo_signals
from stepaudio_train.training.loop import fit

log = logging.getLogger("ppo")


def main(config: PpoRunConfig) -> None:
    config = with_value_head(with_text_tokenizer(config))
    with_judges(config, lambda world: _learn(config, world))


def _learn(config: PpoRunConfig, world: World | None) -> None:
    with policy_run(config, lambda c: partial(ppo_signals, config=c), world) as (config, run, models, loader, samples):
        max_steps, warmup_steps = config.training.max_steps, config.critic.warmup_steps
        engine: Engine = models.policy
        objective: Objective = PolicyAndValueLoss(config.loss)
        if models.critic is not None:
            critic_rate = delayed_rate(config.critic.optimizer, max_steps, 0)
            engine = ActorCritic(models.policy, models.critic, ValueLoss(config.loss), critic_rate)
            objective = PolicyLoss(config.loss)
        finished = fit(
            config,
            engine,
            loader,
            objective,
            run,
            sampler=samples,
            summarise=lambda sums: {**loader.metrics, **loss_metrics(sums)},
            report=write_policy_report,
            rate_at=delayed_rate(config.optimizer, max_steps, warmup_steps),
        )
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)


def problems(config: PpoRunConfig) -> list[str]:
    return ppo_run_problems(config) + model_problems(config)


if __name__ == "__main__":
    run_recipe(main, PpoRunConfig, "ppo", problems)
