"""DeepSpeed's checkpoints: ZeRO 1 to 3 and universal ones read, ZeRO-3 and universal ones written, by one process.

ZeRO-3 cuts every parameter into equal runs of elements, one a rank, the last padded with zeros, and keeps them in fp32
one behind the other (`fp32_flat_groups`). ZeRO-1 and 2 put the parameters of a group one behind the other, pad the end
and cut that into one run a rank (`single_partition_of_fp32_groups`). A universal checkpoint has a folder a parameter.
A ZeRO-3 checkpoint is written with weights alone: DeepSpeed loads it with `load_optimizer_states=False`, and its
zero_to_fp32 reads it. A universal one is written with an optimizer that has made no step, without which DeepSpeed does
not load it; its zeros take no room.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.tensor_files import (
    StoredTensor,
    WeightError,
    map_torch_archive,
    start_torch_archive,
    stored,
    write_at,
)
from stepaudio_train.models.step1.weight_map import Entry, hf_shapes

TAG = "global_step0"
LATEST_FILE, LATEST_UNIVERSAL_FILE = "latest", "latest_universal"
_MODEL_PREFIX = "module."
_DEEPSPEED_VERSION = "0.19.8"
"""Whose formats these are."""


def find_tag(directory: Path) -> Path | None:
    """The folder with a checkpoint's files: `directory` itself, or the one that its `latest` file names."""
    for name in (LATEST_FILE, LATEST_UNIVERSAL_FILE):
        if (directory / name).is_file():
            return directory / (directory / name).read_text(encoding="utf-8").strip()
    if list(directory.glob("*zero_pp_rank_*_optim_states.pt")) or (directory / "zero").is_dir():
        return directory
    return None


class DeepSpeedCheckpoint:
    """Reads the fp32 weights of a ZeRO or universal checkpoint, whatever number of ranks wrote it."""

    dtype = torch.float32

    def __init__(self, directory: Path, model: Step1Config) -> None:
        """Args: directory: with the files; see `find_tag`.

        Raises:
            WeightError: it is no such checkpoint, or lacks a rank's file or a weight.
        """
        self._directory = directory
        if (directory / "zero").is_dir():
            self._pieces = _universal_pieces(directory / "zero")
        else:
            self._pieces = _zero_pieces(directory)
        shapes = hf_shapes(model)
        missing = [name for name in shapes if name not in self._pieces]
        if missing:
            raise WeightError(f"{directory}: lacks {len(missing)} tensor(s), such as {missing[0]}")
        self._shapes = shapes

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one entry, fp32."""
        return {name: self._read(name) for name in entry.hf}

    def _read(self, name: str) -> Tensor:
        shape, pieces = self._shapes[name], self._pieces[name]
        sizes = [math.prod(piece.shape) for piece in pieces]
        if sum(sizes) < math.prod(shape):
            raise WeightError(f"{self._directory}: {name} has {sum(sizes):,} elements, too few for {list(shape)}")
        flat = torch.empty(sum(sizes), dtype=pieces[0].dtype)
        for piece, part in zip(pieces, flat.split(sizes), strict=True):
            piece.read_into(part)
        return flat[: math.prod(shape)].view(shape)


class ZeroThreeWriter:
    """Writes a ZeRO-3 checkpoint of `world_size` ranks entry by entry."""

    def __init__(self, directory: Path, model: Step1Config, world_size: int) -> None:
        self._directory, self._shapes, self._world_size = directory, hf_shapes(model), world_size
        self._folder = directory / TAG
        self._places: list[dict[str, StoredTensor]] = []

    def resume(self, pieces: list[object]) -> None:
        """Every partition has its place, so there is nothing to remember."""
        self._places = [self._rank_places(self._optimizer_file(rank)) for rank in range(self._world_size)]

    def write(self, entry: Entry, hf_tensors: Mapping[str, Tensor]) -> list[object]:
        """Cut and write the tensors of one entry."""
        if not self._places:
            self._start()
        for name in entry.hf:
            flat = hf_tensors[name].to(torch.float32).flatten()
            size = -(-flat.numel() // self._world_size)
            for rank, places in enumerate(self._places):
                # What no element fills is zero already.
                part = flat[rank * size : (rank + 1) * size]
                with places[name].path.open("r+b") as file:
                    write_at(file, places[name].offset, part)
        return []

    def finish(self) -> None:
        """Write the small files."""
        for rank in range(self._world_size):
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            torch.save(_model_states(self._shapes, self._world_size, 3), self._folder / name)
        (self._directory / LATEST_FILE).write_text(TAG, encoding="utf-8")

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        sizes = [-(-math.prod(shape) // self._world_size) for shape in self._shapes.values()]
        for rank in range(self._world_size):
            state = {
                "zero_stage": 3,
                "partition_count": self._world_size,
                "fp32_flat_groups": [torch.empty(size, dtype=torch.float32) for size in sizes],
            }
            start_torch_archive(self._optimizer_file(rank), {"optimizer_state_dict": state})
        self.resume([])

    def _optimizer_file(self, rank: int) -> Path:
        return self._folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    def _rank_places(self, path: Path) -> dict[str, StoredTensor]:
        groups = map_torch_archive(path)["optimizer_state_dict"]["fp32_flat_groups"]
        return {name: stored(path, group) for name, group in zip(self._shapes, groups, strict=True)}


class UniversalWriter:
    """Writes a universal checkpoint entry by entry: it loads at any number of ranks and any ZeRO stage."""

    def __init__(self, directory: Path, model: Step1Config) -> None:
        self._directory, self._shapes = directory, hf_shapes(model)
        self._folder = directory / TAG

    def resume(self, pieces: list[object]) -> None:
        """Every tensor is a file of its own, so there is nothing to remember."""

    def write(self, entry: Entry, hf_tensors: Mapping[str, Tensor]) -> list[object]:
        """Write the tensors of one entry, each into its folder."""
        for name in entry.hf:
            folder = self._folder / "zero" / name
            folder.mkdir(parents=True, exist_ok=True)
            weight = hf_tensors[name].to(torch.float32)
            torch.save({"param": weight if weight._base is None else weight.clone()}, folder / "fp32.pt")
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.save({"param": torch.zeros(1).expand(weight.shape)}, folder / f"{moment}.pt")
        return []

    def finish(self) -> None:
        """Write the small files."""
        for name, stage in (("mp_rank_00_model_states.pt", 1), ("zero_pp_rank_0_mp_rank_00_model_states.pt", 3)):
            content = _model_states(self._shapes, 1, stage) | {"universal_checkpoint_info": {}}
            torch.save(content, self._folder / name)
        torch.save(_fresh_optimizer(), self._folder / "zero" / "optimizer_state.pt")
        (self._directory / LATEST_UNIVERSAL_FILE).write_text(TAG, encoding="utf-8")


def _model_states(shapes: Mapping[str, tuple[int, ...]], world_size: int, stage: int) -> dict[str, Any]:
    """What DeepSpeed keeps beside the partitions."""
    return {
        "module": OrderedDict((name, torch.empty(0)) for name in shapes) if stage == 3 else OrderedDict(),
        "buffer_names": [],
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "ds_version": _DEEPSPEED_VERSION,
        "ds_config": {},
        "dp_world_size": world_size,
        "mp_world_size": 1,
        "global_steps": 0,
        "global_samples": 0,
        "skipped_steps": 0,
        "lr_scheduler": None,
        "optimizer": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
    }


def _fresh_optimizer() -> dict[str, Any]:
    """The global state of an optimizer before its first step, without settings: those of the run that loads it hold."""
    # Stages 1 and 2 pair these with the optimizer's groups, and leave out groups for which there is none.
    groups: list[dict[str, Any]] = [{} for _ in range(64)]
    states = {"state": {0: {"step": torch.tensor(0.0)}}, "param_groups": groups[:1]}
    return {"optimizer_state_dict": states, "param_groups": groups, "ds_version": _DEEPSPEED_VERSION}


def _universal_pieces(folder: Path) -> dict[str, list[StoredTensor]]:
    pieces = {}
    for path in sorted(folder.glob("*/fp32.pt")):
        pieces[_bare(path.parent.name)] = [stored(path, map_torch_archive(path)["param"])]
    return pieces


def _zero_pieces(directory: Path) -> dict[str, list[StoredTensor]]:
    """Parameter -> the runs of elements that make it up, in order."""
    files = sorted(directory.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    models = sorted(directory.glob("*_model_states.pt"))
    if not files or not models:
        raise WeightError(f"{directory}: holds no *_optim_states.pt and *_model_states.pt of DeepSpeed's ZeRO")
    states = [map_torch_archive(path)["optimizer_state_dict"] for path in files]
    stage, count = states[0]["zero_stage"], states[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != len(files):
        raise WeightError(f"{directory}: {count} ranks wrote it, and files of {len(files)} are there; copy the others")
    model = map_torch_archive(models[0])
    groups = model["param_shapes"]
    if stage == 3:
        flat = [[stored(p, t) for t in s["fp32_flat_groups"]] for p, s in zip(files, states, strict=True)]
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        return _zero_three_runs(flat, shapes)
    pieces: dict[str, list[StoredTensor]] = {}
    paddings = states[0].get("param_alignment_paddings")
    for index, group in enumerate(groups):
        runs = [stored(p, s["single_partition_of_fp32_groups"][index]) for p, s in zip(files, states, strict=True)]
        start = 0
        for number, (name, shape) in enumerate(group.items()):
            pieces[_bare(name)] = _cut(runs, start, math.prod(shape))
            start += math.prod(shape) + (paddings[index][number] if paddings else 0)
    return pieces


def _zero_three_runs(
    flat: list[list[StoredTensor]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[StoredTensor]]:
    pieces: dict[str, list[StoredTensor]] = {}
    start = 0
    for name, shape in shapes.items():
        size = -(-math.prod(shape) // len(flat))
        pieces[_bare(name)] = [run for rank in flat for run in _cut(rank, start, size)]
        start += size
    return pieces


def _cut(runs: list[StoredTensor], start: int, length: int) -> list[StoredTensor]:
    """Elements `start` to `start + length` of runs that lie one behind the other."""
    cut, end = [], start + length
    before = 0
    for run in runs:
        numel = math.prod(run.shape)
        first, last = max(start, before) - before, min(end, before + numel) - before
        if first < last:
            cut.append(StoredTensor(run.path, run.offset + first * run.dtype.itemsize, (last - first,), run.dtype))
        before += numel
    return cut


def _bare(name: str) -> str:
    return name.removeprefix(_MODEL_PREFIX)


def _rank_of(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    assert found is not None
    return int(found.group(1))
