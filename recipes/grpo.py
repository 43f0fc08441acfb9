"""Group-relative policy optimisation: answers to one prompt are judged against each other. See docs/rlhf.md.

stepaudio run grpo model.init=runs/sft reward.model=runs/reward data=conversations.jsonl
stepaudio run grpo model.init=runs/sft reward.rules={exact:1} data=conversations.jsonl loss.group_size=16
"""

import logging
from functools import partial

from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.policy_checks import grpo_run_problems
from stepaudio_train.config.policy_runs import GrpoRunConfig
from stepaudio_train.config.sft import with_text_tokenizer
from stepaudio_train.engines.process_group import World
from stepaudio_train.objectives.grpo import GrpoLoss
from stepaudio_train.rlhf.metrics import loss_metrics
from stepaudio_train.rlhf.models import model_problems
from stepaudio_train.rlhf.placement import with_judges
from stepaudio_train.rlhf.report import write_policy_report
from stepaudio_train.rlhf.run import policy_run
from stepaudio_train.rlhf.signals import grpo_signals
from stepaudio_train.training.loop import fit

log = logging.getLogger("grpo")


def main(config: GrpoRunConfig) -> None:
    config = with_text_tokenizer(config)
    with_judges(config, lambda world: _learn(config, world))


def _learn(config: GrpoRunConfig, world: World | None) -> None:
    with policy_run(config, lambda c: partial(grpo_signals, config=c), world) as (config, run, models, loader, samples):
        finished = fit(
            config,
            models.policy,
            loader,
            GrpoLoss(config.loss),
            run,
            sampler=samples,
            summarise=lambda sums: {**loader.metrics, **loss_metrics(sums)},
            report=write_policy_report,
        )
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)


def problems(config: GrpoRunConfig) -> list[str]:
    return grpo_run_problems(config) + model_problems(config)


if __name__ == "__main__":
    run_recipe(main, GrpoRunConfig, "grpo", problems)
