"""Weights of any format behind one interface: entry by entry of the weight map, under Hugging Face names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import yaml
from torch import Tensor

from stepaudio_train.config.compose import from_mapping
from stepaudio_train.config.paths import result_checkpoint
from stepaudio_train.config.schema import ModelConfig, Step1Config
from stepaudio_train.convert.deepspeed_files import DeepSpeedCheckpoint, find_tag
from stepaudio_train.convert.huggingface_files import SafetensorsWeights
from stepaudio_train.convert.tensor_files import METADATA_FILE, WeightError
from stepaudio_train.models.step1.modeling import read_released_config
from stepaudio_train.models.step1.weight_map import Entry, entries, hf_shapes

Format = Literal["hf", "plain", "megatron", "deepspeed"]
COMPANIONS = "model"
"""Folder of a Megatron, DeepSpeed or plain checkpoint with everything of the model but its weights."""


class WeightReader(Protocol):
    """Reads the weights of one model."""

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """Hugging Face name -> full CPU tensor, for the tensors of one entry."""


@dataclass(frozen=True)
class Source:
    """A model's weights in some folder, and what lies beside them."""

    path: Path
    """The folder with the weights."""
    format: Format
    model: Step1Config
    reader: WeightReader
    companions: Path | None
    """Folder with config.json, tokenizer and the like; None if there is none."""
    text_tokenizer: Path | None
    """SentencePiece file."""


class LazyWeights(Mapping[str, Tensor]):
    """A reader as a mapping Hugging Face name -> tensor, each read when it is asked for."""

    def __init__(self, reader: WeightReader, model: Step1Config) -> None:
        self._reader = reader
        self._entry = {name: entry for entry in entries(model).values() for name in entry.hf}
        self._shapes = hf_shapes(model)
        self._last: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        # Tensors of one entry are asked for one after the other.
        if name not in self._last:
            self._last = self._reader.read(self._entry[name])
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def open_source(path: Path, config_dir: Path | None = None, prefer_masters: bool = False) -> Source:
    """Weights in `path`: a Hugging Face directory, a run directory or checkpoint of any engine, or what `stepaudio
    convert` wrote. No weight is read yet.

    Args:
        config_dir: folder with a config.json, for checkpoints that come without.
        prefer_masters: read the fp32 master weights that a bf16 run keeps beside its weights.

    Raises:
        WeightError: there are none, or they are incomplete; the message says what is there.
    """
    if not path.is_dir():
        raise WeightError(f"{path}: no such folder")
    if (path / "config.yaml").is_file():
        return _open_run(path, prefer_masters)
    if (path / "state.json").is_file():
        run = path.parent.parent / "config.yaml"
        if not run.is_file():
            raise WeightError(f"{path}: is a checkpoint without its run's config.yaml two folders above; move it back")
        return _open_checkpoint(path, run, prefer_masters)
    files = config_dir or next((d for d in (path, path / COMPANIONS) if (d / "config.json").is_file()), None)
    if files is None:
        what = "weights" if _format_of(path) else "no weights that are known here, and"
        raise WeightError(f"{path}: holds {what} without a config.json; type --config DIR, a folder that has one")
    model = _released_config(files)
    tokenizer = files / "tokenizer.model"
    return _opened(path, model, files, tokenizer if tokenizer.is_file() else None, prefer_masters)


def _open_run(run: Path, prefer_masters: bool) -> Source:
    """The newest checkpoint of a run, with training.early_stop its best; its export where they hold adapters alone."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    checkpoint = result_checkpoint(run / "checkpoints")
    if checkpoint is not None and not settings.get("lora"):
        return _open_checkpoint(checkpoint, run / "config.yaml", prefer_masters)
    if (run / "export" / "config.json").is_file():
        return open_source(run / "export")
    raise WeightError(f"{run}: holds neither a complete checkpoint nor export/; let the run reach one")


def _open_checkpoint(checkpoint: Path, config_file: Path, prefer_masters: bool) -> Source:
    settings: dict[str, Any] = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    sizes = {name: value for name, value in settings["model"].items() if name != "init"}
    model = from_mapping(ModelConfig, sizes)
    tokenizer = settings["vocabulary"]["text_tokenizer"]
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise WeightError(f"{checkpoint}: its run's vocabulary.text_tokenizer={tokenizer} is no longer there")
    export = config_file.parent / "export"
    companions = export if (export / "config.json").is_file() else None
    where = checkpoint / "engine"
    return _opened(where, model, companions, Path(tokenizer) if tokenizer else None, prefer_masters)


def _opened(
    path: Path, model: Step1Config, companions: Path | None, text_tokenizer: Path | None, prefer_masters: bool
) -> Source:
    kind = _format_of(path)
    reader: WeightReader
    if kind == "megatron":
        # Only now: the classes of such an index take seconds to import.
        from stepaudio_train.convert.megatron_files import MegatronCheckpoint

        reader = MegatronCheckpoint(path, model, prefer_masters)
    elif kind == "deepspeed":
        tag = find_tag(path)
        assert tag is not None
        reader = DeepSpeedCheckpoint(tag, model)
    else:
        # Says what is missing where there is nothing.
        kind, reader = kind or "hf", SafetensorsWeights(path, model)
    return Source(path, kind, model, reader, companions, text_tokenizer)


def _format_of(path: Path) -> Format | None:
    if (path / METADATA_FILE).is_file():
        return "megatron"
    if find_tag(path) is not None:
        return "deepspeed"
    if list(path.glob("*.safetensors")):
        return "hf" if (path / "config.json").is_file() else "plain"
    return None


def _released_config(directory: Path) -> Step1Config:
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightError(f"{directory / 'config.json'}: is not JSON: {error}") from None
    if fields.get("tie_word_embeddings"):
        raise WeightError(
            f"{directory / 'config.json'}: says tie_word_embeddings=true; Step-1's head is a matrix of its own. Set it "
            "to false if lm_head.weight is there"
        )
    try:
        return read_released_config(directory)
    except KeyError as error:
        raise WeightError(f"{directory / 'config.json'}: lacks {error}; is this a Step-1 model?") from None
