"""Pretraining: next-token prediction on packed text and speech tokens (paper 4).

stepaudio run pretrain experiment=debug                                  # made-up tokens, one process, seconds
stepaudio run pretrain experiment=debug engine=megatron engine.tensor_parallel=2 --nproc 2
stepaudio run pretrain experiment=pretrain_130b_stage1 run_dir=RUN       # see launch/ for many nodes
"""

import logging
import os

from stepaudio_train.config.checks import pretrain_problems
from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.loader import build_train_loader, build_validation_batches
from stepaudio_train.engines.build import build_engine
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.loggers import log_to_file
from stepaudio_train.training.loop import fit
from stepaudio_train.training.run_directory import RunDirectory

log = logging.getLogger("pretrain")


def main(config: PretrainConfig) -> None:
    run = RunDirectory(config.run_dir)
    if int(os.environ.get("RANK", "0")) == 0:
        run.claim(config)
    engine = build_engine(config)
    engine.barrier()
    log_to_file(run.logs, engine.rank)
    vocabulary = Vocabulary.from_config(config.vocabulary)
    training, replica = config.training, (engine.data_parallel_rank, engine.data_parallel_size)
    rows = (training.sequence_length, training.global_batch_rows)
    tokenizer = config.vocabulary.text_tokenizer
    loader = build_train_loader(config.data, vocabulary, *rows, training.seed, *replica, tokenizer)
    validation = []
    if config.validation is not None:
        validation = build_validation_batches(
            config.validation, vocabulary, *rows, training.eval_batches, training.seed, *replica, tokenizer
        )
    try:
        finished = fit(config, engine, loader, LanguageModelling(vocabulary), run, validation)
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)
    finally:
        loader.close()
        engine.close()
        run.release()


if __name__ == "__main__":
    run_recipe(main, PretrainConfig, "pretrain", pretrain_problems)
