"""What every run with an engine begins and ends with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from stepaudio_train.config.schema import RunConfig
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.build import build_engine
from stepaudio_train.training.loggers import log_to_file
from stepaudio_train.training.run_directory import RunDirectory


@contextmanager
def engine_run(config: RunConfig) -> Iterator[tuple[RunDirectory, Engine]]:
    """The run's directory, claimed, and its engine, without weights. Every process of a run enters it.

    Raises:
        ConfigError: the directory is not the run's.
    """
    run = RunDirectory(config.run_dir)
    if int(os.environ.get("RANK", "0")) == 0:
        run.claim(config)
    engine = build_engine(config)
    try:
        # The others write into the folder once it is there.
        engine.barrier()
        log_to_file(run.logs, engine.rank)
        yield run, engine
    finally:
        engine.close()
        run.release()
