"""Where a run's first weights come from, and how they leave it in Hugging Face layout."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import RunConfig, Step1Config
from stepaudio_train.engines.base import Engine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import read_released_config, write_released_config
from stepaudio_train.training.checkpoints import latest_checkpoint, read_state, require_same_engine

log = logging.getLogger(__name__)

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_SHARD_BYTES = 5 * 2**30


def initialise(engine: Engine, config: RunConfig) -> None:
    """Set the engine's weights from `model.init`, or at random from `training.seed`.

    Raises:
        ConfigError: there are no weights there, or they do not fit the model.
    """
    fresh = InitialWeights(config.model, config.training.seed)
    if config.model.init is None:
        engine.load_weights(fresh)
        return
    source = Path(config.model.init)
    for directory in (source, source / "export"):
        if (directory / "config.json").is_file():
            engine.load_weights(_fitting(directory, config, fresh))
            log.info("weights from %s", directory)
            return
    checkpoint = source if (source / "state.json").is_file() else latest_checkpoint(source / "checkpoints")
    if checkpoint is None:
        raise ConfigError(
            [
                f"model.init={source}: holds neither config.json, nor export/, nor a complete checkpoint; type "
                "the folder of a finished run, a checkpoint, or a Hugging Face directory"
            ]
        )
    require_same_engine(checkpoint, read_state(checkpoint), config.engine.name)
    engine.load(checkpoint / "engine", optimizer=False)
    log.info("weights from %s", checkpoint)


def export(engine: Engine, directory: Path, text_tokenizer: str | None) -> None:
    """Write weights (bf16 is a later conversion: these are the fp32 master weights), config.json and the text
    tokenizer. Every rank calls it; rank 0 writes. The folder appears when it is complete.
    """
    partial = directory.with_suffix(".partial")
    if engine.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    writer = _ShardWriter(partial) if engine.is_main else None
    for name, tensor in engine.export_weights():
        if writer is not None:
            writer.add(name, tensor)
    if writer is not None:
        writer.finish()
        write_released_config(engine.config.model, partial)
        if text_tokenizer is not None:
            shutil.copyfile(text_tokenizer, partial / "tokenizer.model")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    engine.barrier()


class HuggingFaceWeights(Mapping[str, Tensor]):
    """Name -> tensor of a directory's safetensors files, read when asked for."""

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        for shard in sorted(directory.glob("*.safetensors")):
            with safe_open(shard, "pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), shard)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class GrownWeights(Mapping[str, Tensor]):
    """A text-only model's weights with rows for the audio and reserved ids (stage 1, paper 4.2).

    New rows are the mean of the old ones plus the noise of a fresh initialisation: near what the model knows, and
    not all alike.
    """

    def __init__(self, old: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
        self._old, self._fresh = old, fresh

    def __getitem__(self, name: str) -> Tensor:
        old = self._old[name]
        if name not in _EMBEDDINGS:
            return old
        grown = self._fresh[name].to(old.dtype)
        grown += old.float().mean(0).to(old.dtype)
        grown[: old.shape[0]] = old
        return grown

    def __iter__(self) -> Iterator[str]:
        return iter(self._old)

    def __len__(self) -> int:
        return len(self._old)


def _fitting(directory: Path, config: RunConfig, fresh: InitialWeights) -> Mapping[str, Tensor]:
    theirs, ours = read_released_config(directory), config.model
    weights = HuggingFaceWeights(directory)
    problems = [
        f"model.init={directory}: has {name}={getattr(theirs, name)}; type model.{name}={getattr(theirs, name)}"
        for name in _sizes()
        if getattr(theirs, name) != getattr(ours, name)
    ]
    missing = [name for name in fresh if name not in weights]
    if missing:
        problems.append(f"model.init={directory}: lacks {len(missing)} tensor(s), such as {missing[0]}")
    text_only = theirs.vocab_size == config.vocabulary.text_size
    if theirs.vocab_size != ours.vocab_size and not text_only:
        problems.append(
            f"model.init={directory}: has vocab_size={theirs.vocab_size}, neither model.vocab_size="
            f"{ours.vocab_size} nor a text-only vocabulary of vocabulary.text_size={config.vocabulary.text_size}"
        )
    if problems:
        raise ConfigError(problems)
    if theirs.vocab_size == ours.vocab_size:
        return weights
    log.info("growing the vocabulary from %d text ids to %d", theirs.vocab_size, ours.vocab_size)
    return GrownWeights(weights, fresh)


def _sizes() -> tuple[str, ...]:
    free = {"vocab_size", "max_seq_len", "init_std", "rms_norm_eps"}
    return tuple(name for name in Step1Config.__dataclass_fields__ if name not in free)


class _ShardWriter:
    """Safetensors files of bounded size with an index, in the released naming (model-00001.safetensors)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, Tensor] = {}
        self._open_bytes = self._total_bytes = 0
        self._map: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._open and self._open_bytes + size > _SHARD_BYTES:
            self._flush()
        self._open[name] = tensor.contiguous()
        self._open_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        self._flush()
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._map}
        path = self._directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        file = f"model-{len(set(self._map.values())) + 1:05d}.safetensors"
        save_file(self._open, self._directory / file, metadata={"format": "pt"})
        self._map |= dict.fromkeys(self._open, file)
        self._open, self._open_bytes = {}, 0
