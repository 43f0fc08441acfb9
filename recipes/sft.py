"""Supervised fine-tuning on conversations of text and speech (paper 5.1, 5.2). See docs/fine_tuning.md.

stepaudio run sft model.init=DIR data=my.jsonl lora.rank=16                      # one GPU
stepaudio run sft experiment=sft_3b_zero3 model.init=DIR data=my.jsonl --nproc 8 # eight
"""

import logging
import os

from stepaudio_train.config.checks import sft_problems
from stepaudio_train.config.compose import run_recipe, save_config
from stepaudio_train.config.sft import SftConfig, with_max_steps, with_text_tokenizer
from stepaudio_train.data.conversation_files import Worker
from stepaudio_train.data.conversations import load_conversations, write_report
from stepaudio_train.data.sft_loader import SftLoader, validation_batches
from stepaudio_train.engines.build import build_engine
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.rollout.samples import SampleWriter, first_exchanges
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.loggers import log_to_file
from stepaudio_train.training.loop import fit
from stepaudio_train.training.run_directory import RunDirectory

log = logging.getLogger("sft")


def main(config: SftConfig) -> None:
    config = with_text_tokenizer(config)
    run = RunDirectory(config.run_dir)
    if int(os.environ.get("RANK", "0")) == 0:
        run.claim(config)
    engine = build_engine(config)
    engine.barrier()
    log_to_file(run.logs, engine.rank)
    vocabulary = Vocabulary.from_config(config.vocabulary)
    training, replica = config.training, (engine.data_parallel_rank, engine.data_parallel_size)
    rows = (training.sequence_length, training.global_batch_rows)
    worker = Worker(engine.rank, engine.world_size, str(engine.device), engine.barrier, config.logging.progress_bar)
    try:
        found = load_conversations(config, vocabulary, run.path / "tokens", worker)
        loader = SftLoader(found["data"].documents, *rows, training.seed, *replica)
        validation = []
        if "validation" in found:
            validation = validation_batches(found["validation"].documents, *rows, training.eval_batches, *replica)
        config = with_max_steps(config, loader.steps(config.data.epochs))
        if engine.is_main:
            write_report(found, run.path / "data_report.json")
            save_config(config, run.config_file)
            log.info("%d steps of %d rows", config.training.max_steps, training.global_batch_rows)
        sampler = None
        if training.sample_every:
            exchanges = first_exchanges(found.get("validation", found["data"]).documents, training.num_samples)
            tokenizer = TextTokenizer.from_file(str(config.vocabulary.text_tokenizer))
            sampler = SampleWriter(exchanges, training.sample_every, run.path / "samples", tokenizer, vocabulary)
        finished = fit(config, engine, loader, LanguageModelling(vocabulary), run, validation, sampler)
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)
    finally:
        engine.close()
        run.release()


if __name__ == "__main__":
    run_recipe(main, SftConfig, "sft", sft_problems)
