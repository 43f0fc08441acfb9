"""A file of conversations or preferences -> prompts to answer, and in which order they are answered."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepaudio_train.audio.conditions import Condition
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.policy_runs import PolicyRunConfig
from stepaudio_train.data.chat import TurnError, task_of
from stepaudio_train.data.conversation_files import ConversationFile, Worker, encode_conversations
from stepaudio_train.data.preference_files import Preference, PreferenceFile
from stepaudio_train.data.preferences import usable
from stepaudio_train.data.records import Message, Record, TextPart
from stepaudio_train.data.render import Renderer, RenderError, TokenSample
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.evaluation.answers import expected_text
from stepaudio_train.evaluation.deafness import condition_of


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    id: str
    task: str
    ids: tuple[int, ...]
    """Up to the answer's first token."""
    reference: str
    """The answer that the file has; '' if it has none."""
    condition: Condition | None
    """How well its recording can be heard; None: the file does not say."""


@dataclass(frozen=True)
class Prompts:
    """What one file gives to answer. See `data.conversations.Reported`."""

    path: Path
    prompts: list[Prompt]
    refused: list[Refusal]

    def __len__(self) -> int:
        return len(self.prompts)

    def report(self) -> dict[str, Any]:
        """Counts, and every line that was left out with the reason."""
        return {
            "path": str(self.path),
            "prompts": len(self.prompts),
            "tasks": dict(Counter(prompt.task for prompt in self.prompts).most_common()),
            "tokens": sum(len(prompt.ids) for prompt in self.prompts),
            "num_refused": len(self.refused),
            "refused": [asdict(refusal) for refusal in self.refused],
        }

    def digest(self) -> str:
        """Tells prompts by all that is answered and paid for."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(repr(prompt).encode())
        return digest.hexdigest()


def load_prompts(config: PolicyRunConfig, renderer: Renderer, cache: Path, worker: Worker | None = None) -> Prompts:
    """Every process of a run calls it; each encodes a share of the recordings, and all get the same prompts.

    Args:
        cache: folder for the codes of recordings, seen by all processes.

    Raises:
        UserError: the file holds no prompt that can be used, or names an unknown condition.
    """
    data, path = config.data, Path(config.data.path)
    tokenizer = None if data.speech_tokenizer is None else Path(data.speech_tokenizer)
    file = _read(path, TagVocabulary(data.own_tags), tokenizer is not None)
    (found,) = encode_conversations([file], tokenizer, cache, worker or Worker())
    longest = config.training.sequence_length - config.rollout.max_new_tokens
    prompts, refused = [], list(found.refused)
    for where, sample in found.samples:
        try:
            prompt = _prompt(sample, renderer, config)
        except (RenderError, TurnError) as error:
            refused.append(Refusal(where, str(error).removeprefix(f"{sample.record.id}: ")))
            continue
        if len(prompt.ids) <= longest:
            prompts.append(prompt)
            continue
        needed = len(prompt.ids) + config.rollout.max_new_tokens
        reason = f"has {len(prompt.ids)} tokens before the answer; type training.sequence_length={needed} or more"
        refused.append(Refusal(where, reason))
    refused.sort(key=lambda refusal: int(refusal.name.rpartition(":")[2]))
    if not prompts:
        reasons_shown = "; ".join(f"{r.name}: {r.reason}" for r in refused[:3]) or "it is empty"
        raise UserError(f"{path}: no prompt can be used ({reasons_shown})")
    return Prompts(path, prompts, refused)


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts an iteration answers: every one once an epoch, in an order drawn from (seed, epoch)."""

    num_prompts: int
    per_iteration: int
    seed: int

    def of(self, iteration: int) -> list[int]:
        """Indices of the prompts of an iteration, counted from 0."""
        first = iteration * self.per_iteration
        places = np.arange(first, first + self.per_iteration)
        chosen = np.empty(self.per_iteration, np.int64)
        for epoch in np.unique(places // self.num_prompts):
            inside = places // self.num_prompts == epoch
            order = np.random.default_rng([self.seed, int(epoch)]).permutation(self.num_prompts)
            chosen[inside] = order[places[inside] % self.num_prompts]
        return chosen.tolist()

    def iterations(self, epochs: float) -> int:
        """Iterations in so many epochs; a part of one counts as one."""
        return int(np.ceil(epochs * self.num_prompts / self.per_iteration))


def _prompt(sample: TokenSample, renderer: Renderer, config: PolicyRunConfig) -> Prompt:
    record = sample.record
    ids = renderer.render_chat_prompt(sample, config.data.template, config.data.history)
    answered = record.messages[-1].role == "assistant"
    reference = expected_text(record) if answered else ""
    return Prompt(record.id, task_of(record), tuple(ids.tolist()), reference, condition_of(record.meta))


def _read(path: Path, tags: TagVocabulary, with_recordings: bool) -> ConversationFile:
    """Conversations, or preferences, whose own answers are the references."""
    if not _holds_preferences(path):
        return ConversationFile.read(path, tags, with_recordings)
    file = usable(PreferenceFile.read(path), tags, with_recordings)
    records = [(preference.where, _conversation(preference)) for preference in file.preferences]
    return ConversationFile(path, records, file.refused)


def _holds_preferences(path: Path) -> bool:
    """Told by the first line; one that is no JSON is left to be refused."""
    with path.open("rb") as lines:
        first: bytes = next((line for line in lines if line.strip()), b"")
    try:
        plain = json.loads(first)
    except ValueError:
        return False
    return isinstance(plain, dict) and not plain.keys().isdisjoint(("chosen", "rejected", "answers"))


def _conversation(preference: Preference) -> Record:
    if preference.reference:
        answer = Message("assistant", (TextPart(preference.reference),))
        return replace(preference.prompt, messages=(*preference.prompt.messages, answer))
    return preference.conversation(0) if preference.margin is not None else preference.prompt
