"""Direct preference optimisation: a model learns from pairs of answers without a reward model. See docs/rlhf.md.

stepaudio run dpo model.init=runs/sft data=preferences.jsonl data.held_out=held_out.jsonl
stepaudio run dpo model.init=runs/sft data=preferences.jsonl loss.form=simpo loss.beta=2
"""

import logging

from stepaudio_train.config.checks import dpo_run_problems
from stepaudio_train.config.compose import run_recipe, save_config
from stepaudio_train.config.preference_runs import DpoRunConfig
from stepaudio_train.config.sft import with_max_steps, with_text_tokenizer
from stepaudio_train.data.preferences import pack_pairs
from stepaudio_train.objectives.dpo import DpoLoss
from stepaudio_train.training.loop import fit
from stepaudio_train.training.preference_report import write_preference_report
from stepaudio_train.training.preferences import preference_batches, preference_run
from stepaudio_train.training.reference import pack_referenced, with_reference

log = logging.getLogger("dpo")


def main(config: DpoRunConfig) -> None:
    config = with_text_tokenizer(config)
    with preference_run(config) as (run, engine, found):
        pairs = {name: preferences.pairs for name, preferences in found.items()}
        if config.loss.form == "simpo":
            batches = preference_batches(config, engine, pairs["data"], pairs.get("held_out", []), pack_pairs)
        else:
            referenced = with_reference(engine, config, run, pairs)
            held_out = referenced.get("held_out", [])
            batches = preference_batches(config, engine, referenced["data"], held_out, pack_referenced)
        loader, validation = batches
        config = with_max_steps(config, loader.steps(config.data.epochs))
        if engine.is_main:
            save_config(config, run.config_file)
            log.info("%d steps of %d rows", config.training.max_steps, config.training.global_batch_rows)
        objective = DpoLoss(config.loss)
        finished = fit(config, engine, loader, objective, run, validation, report=write_preference_report)
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)


if __name__ == "__main__":
    run_recipe(main, DpoRunConfig, "dpo", dpo_run_problems)
