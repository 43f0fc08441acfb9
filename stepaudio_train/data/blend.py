"""Everything that can be wrong with a blend, told before training."""

from __future__ import annotations

from pathlib import Path

from stepaudio_train.config.schema import BlendEntry, DataConfig
from stepaudio_train.data.shards import ShardError, shard_counts
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats


def check_blend(
    config: DataConfig, sequence_length: int, text_tokenizer_sha256: str
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """The shards (name -> samples) of every entry that has a weight and can be used; and the problems of the others."""
    usable: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for name, entry in config.blend.items():
        if entry.weight == 0:
            continue
        found = _check_entry(f"data.blend.{name}", entry, sequence_length, text_tokenizer_sha256)
        if isinstance(found, str):
            problems.append(found)
        else:
            usable[name] = found
    if not usable and not problems:
        problems.append("data.blend: no entry with a weight over 0; type data.blend.NAME.weight=1")
    return usable, problems


def _check_entry(key: str, entry: BlendEntry, sequence_length: int, text_tokenizer_sha256: str) -> dict[str, int] | str:
    """The entry's shards, or its problem."""
    if entry.weight < 0:
        return f"{key}.weight={entry.weight}: must not be negative"
    if entry.task == "image":
        return f"{key}: image data is not supported yet; type {key}.weight=0 to train without it"
    try:
        counts = shard_counts(Path(entry.path))
        stats = TokenStats.read(Path(entry.path) / STATS_FILE)
    except ShardError as error:
        return f"{key}.path={entry.path}: {error}; or type {key}.weight=0"
    task = stats.tasks[entry.task]
    if stats.text_tokenizer_sha256 != text_tokenizer_sha256:
        return (
            f"{key}.path={entry.path}: was counted with another text tokenizer; give `stepaudio tokenize` the file in "
            "vocabulary.text_tokenizer"
        )
    if not task.num_samples:
        return f"{key}.task={entry.task}: no sample of {entry.path} has what it needs"
    if task.min_tokens > sequence_length:
        return (
            f"training.sequence_length={sequence_length}: the shortest {entry.task} sample of {entry.path} has "
            f"{task.min_tokens} tokens"
        )
    return counts
