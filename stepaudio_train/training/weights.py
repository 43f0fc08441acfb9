"""Where a run's first weights come from, and how they leave it in Hugging Face layout."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.policy_runs import PolicyRunConfig
from stepaudio_train.config.preference_runs import PreferenceRunConfig
from stepaudio_train.config.schema import RunConfig, Step1Config
from stepaudio_train.config.sft import ChatTemplate, SftConfig
from stepaudio_train.convert.changes import ResizedVocabulary
from stepaudio_train.convert.companions import ModelCard, write_companions
from stepaudio_train.convert.huggingface_files import SafetensorsWriter
from stepaudio_train.convert.sources import LazyWeights, Source, open_source
from stepaudio_train.convert.text_files import CHAT_TEMPLATES
from stepaudio_train.engines.base import Engine, Judge
from stepaudio_train.engines.precision import choose_dtype
from stepaudio_train.models.step1.initialise import InitialWeights

log = logging.getLogger(__name__)


def initialise(engine: Judge, config: RunConfig) -> None:
    """Set the engine's weights from `model.init`, or at random from `training.seed`.

    Raises:
        WeightError: there are no weights there, or they are incomplete.
        ConfigError: they do not fit the model.
    """
    if config.model.init is None:
        engine.load_weights(InitialWeights(config.model, config.training.seed))
        return
    source = open_source(Path(config.model.init), prefer_masters=True)
    _require_fit(source, config)
    reader = source.reader
    if source.model.vocab_size != config.model.vocab_size:
        log.info("growing the vocabulary from %d text ids to %d", source.model.vocab_size, config.model.vocab_size)
        reader = ResizedVocabulary(reader, source.model, config.model.vocab_size, config.training.seed)
    # A value head that is not there begins anew; one that this run has not is left where it is.
    engine.load_weights(LazyWeights(reader, replace(config.model, value_head=source.model.value_head)))
    log.info("weights from %s", source.path)


def export(engine: Engine, directory: Path, text_tokenizer: str | None, metrics: dict[str, float]) -> None:
    """Write a Hugging Face directory: weights, in the dtype that the run computes in, and all that goes with them.

    Every rank calls it; rank 0 writes. The folder appears when it is complete.

    Args:
        metrics: for the model card.
    """
    config = engine.config
    dtype = choose_dtype(config.engine.precision, engine.device)
    partial = directory.with_suffix(".partial")
    if engine.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    writer = SafetensorsWriter(partial, config.model, dtype) if engine.is_main else None
    for name, tensor in engine.export_weights():
        if writer is not None:
            writer.write_tensor(name, tensor.to(dtype))
    if writer is not None:
        writer.finish()
        write_companions(
            partial,
            config.model,
            str(dtype).removeprefix("torch."),
            Path(text_tokenizer) if text_tokenizer is not None else None,
            chat_template=CHAT_TEMPLATES[_chat_template(config)],
            # Every training document begins with <s>.
            add_bos=True,
            card=ModelCard.of_run(config, metrics),
        )
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    engine.barrier()


def _chat_template(config: RunConfig) -> ChatTemplate:
    chats = (SftConfig, PreferenceRunConfig, PolicyRunConfig)
    return config.data.template if isinstance(config, chats) else "chat"


def _require_fit(source: Source, config: RunConfig) -> None:
    theirs, ours, given = source.model, config.model, f"model.init={config.model.init}"
    problems = [
        f"{given}: has {name}={getattr(theirs, name)}; type model.{name}={getattr(theirs, name)}"
        for name in _sizes()
        if getattr(theirs, name) != getattr(ours, name)
    ]
    text_only = theirs.vocab_size == config.vocabulary.text_size
    if theirs.vocab_size != ours.vocab_size and not text_only:
        problems.append(
            f"{given}: has vocab_size={theirs.vocab_size}, neither model.vocab_size={ours.vocab_size} nor a text-only "
            f"vocabulary of vocabulary.text_size={config.vocabulary.text_size}"
        )
    if problems:
        raise ConfigError(problems)


def _sizes() -> tuple[str, ...]:
    free = {"vocab_size", "max_seq_len", "init_std", "rms_norm_eps", "value_head"}
    return tuple(name for name in Step1Config.__dataclass_fields__ if name not in free)
