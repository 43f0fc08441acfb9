"""A reward model, which scores answers, from pairs of better and worse ones (paper 5.2). See docs/rlhf.md.

stepaudio run reward model.init=runs/sft data=preferences.jsonl data.held_out=held_out.jsonl
"""

import logging
from functools import partial

from stepaudio_train.config.checks import reward_run_problems
from stepaudio_train.config.compose import run_recipe, save_config
from stepaudio_train.config.preference_runs import RewardConfig
from stepaudio_train.config.sft import with_max_steps, with_text_tokenizer
from stepaudio_train.data.preferences import pack_pairs
from stepaudio_train.objectives.reward import RewardLoss
from stepaudio_train.rollout.samples import readable
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.loop import fit
from stepaudio_train.training.preference_report import write_preference_report
from stepaudio_train.training.preferences import HeldOutScores, preference_batches, preference_run, reward_metrics

log = logging.getLogger("reward")


def main(config: RewardConfig) -> None:
    config = with_text_tokenizer(config)
    with preference_run(config) as (run, engine, found):
        data, held_out = found["data"], found.get("held_out")
        if config.loss.margin_scale and not any(pair.margin for pair in data.pairs):
            log.warning("loss.margin_scale=%g: no pair of %s has a margin", config.loss.margin_scale, data.path)
        pairs = held_out.pairs if held_out else []
        loader, validation = preference_batches(config, engine, data.pairs, pairs, pack_pairs)
        config = with_max_steps(config, loader.steps(config.data.epochs))
        scores = None
        if held_out:
            tokenizer = TextTokenizer.from_file(str(config.vocabulary.text_tokenizer))
            vocabulary = Vocabulary.from_config(config.vocabulary)
            as_text = partial(readable, text_tokenizer=tokenizer, vocabulary=vocabulary)
            scores = HeldOutScores(held_out, config, run, as_text)
        if engine.is_main:
            save_config(config, run.config_file)
            log.info("%d steps of %d rows", config.training.max_steps, config.training.global_batch_rows)
        objective = RewardLoss(config.loss, data.categories)
        finished = fit(
            config, engine, loader, objective, run, validation, scores, reward_metrics, write_preference_report
        )
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)


if __name__ == "__main__":
    run_recipe(main, RewardConfig, "reward", reward_run_problems)
