"""Preferences -> pairs of documents to train on, and what was left out and why.

Both documents of a pair are rendered as conversations are, so that they differ in the last answer alone, which is what
teaches. They lie in one row: an objective that compares them needs nothing from other rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.preferences import PreferenceDataConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.chat import task_of
from stepaudio_train.data.conversation_files import (
    ConversationFile,
    EncodedConversations,
    Worker,
    encode_conversations,
    require_known_tags,
    require_recordings,
)
from stepaudio_train.data.extras import CATEGORY, MARGIN, PAIR, SIDE
from stepaudio_train.data.packing import Document, pack_rows
from stepaudio_train.data.preference_files import Preference, PreferenceFile
from stepaudio_train.data.records import RecordError
from stepaudio_train.data.render import Renderer, RenderError, TokenSample
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import TagError, TagVocabulary


@dataclass(frozen=True)
class DocumentPair:
    """A better and a worse answer to one prompt."""

    chosen: Document
    rejected: Document
    category: int
    """Index in `Preferences.categories`."""
    margin: float
    """By how much the better one is rated higher; 0 where that is not known."""

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    def content(self) -> bytes:
        """All that is learned from, to tell data by."""
        more = np.asarray([self.category, self.margin], np.float64).tobytes()
        return self.chosen.content() + self.rejected.content() + more


@dataclass(frozen=True)
class Preferences:
    """What one file gives to train on."""

    path: Path
    pairs: list[DocumentPair]
    categories: tuple[str, ...]
    """The same for all files of a run."""
    refused: list[Refusal]

    def __len__(self) -> int:
        return len(self.pairs)

    def report(self) -> dict[str, Any]:
        """Counts, and every line and pair that was left out with the reason."""
        documents = [document for pair in self.pairs for document in (pair.chosen, pair.rejected)]
        return {
            "path": str(self.path),
            "pairs": len(self.pairs),
            "categories": dict(Counter(self.categories[pair.category] for pair in self.pairs).most_common()),
            "tokens": sum(len(document) for document in documents),
            "tokens_with_loss": sum(int((document.loss_weights[1:] > 0).sum()) for document in documents),
            "num_refused": len(self.refused),
            "refused": [asdict(refusal) for refusal in self.refused],
        }


def load_preferences(
    data: PreferenceDataConfig, renderer: Renderer, longest: int, cache: Path, worker: Worker | None = None
) -> dict[str, Preferences]:
    """The pairs of "data", and those of "held_out" if there are any.

    Every process of a run calls it; each encodes a share of the recordings, and all get the same pairs.

    Args:
        longest: tokens of a row; both documents of a pair have to fit into one.
        cache: folder for the codes of recordings, seen by all processes.

    Raises:
        UserError: a file holds no pair that can be used.
    """
    tokenizer = None if data.speech_tokenizer is None else Path(data.speech_tokenizer)
    paths = [Path(path) for path in (data.path, data.held_out) if path is not None]
    files = [usable(PreferenceFile.read(path), TagVocabulary(data.own_tags), tokenizer is not None) for path in paths]
    categories = tuple(sorted({_category(preference) for file in files for preference in file.preferences}))
    conversations = [
        ConversationFile(file.path, [(one.where, one.joined()) for one in file.preferences], file.refused)
        for file in files
    ]
    encoded = encode_conversations(conversations, tokenizer, cache, worker or Worker())
    rendered = [
        render_preferences(file.preferences, found, renderer, data, longest, categories)
        for file, found in zip(files, encoded, strict=True)
    ]
    return dict(zip(("data", "held_out"), rendered, strict=False))


def render_preferences(
    preferences: Sequence[Preference],
    found: EncodedConversations,
    renderer: Renderer,
    data: PreferenceDataConfig,
    longest: int,
    categories: tuple[str, ...],
) -> Preferences:
    """Pairs of at most `longest` tokens.

    Args:
        found: `preferences`, joined, with the codes of their recordings.
        categories: all that there are.

    Raises:
        UserError: no pair can be used.
    """
    by_where = {preference.where: preference for preference in preferences}
    pairs, refused = [], list(found.refused)
    for where, sample in found.samples:
        preference = by_where[where]
        category = categories.index(_category(preference))
        try:
            for (better, worse, margin), chosen, rejected in _rendered(preference, sample, renderer, data):
                pair = DocumentPair(chosen, rejected, category, margin)
                if len(pair) <= longest:
                    pairs.append(pair)
                    continue
                answers = f"answers {better + 1} and {worse + 1}"
                reason = f"{answers} have {len(pair)} tokens; type training.sequence_length={len(pair)} or more"
                refused.append(Refusal(where, reason))
        except RenderError as error:
            refused.append(Refusal(where, str(error).removeprefix(f"{sample.record.id}: ")))
    refused.sort(key=lambda refusal: int(refusal.name.rpartition(":")[2]))
    if not pairs:
        reasons_shown = "; ".join(f"{r.name}: {r.reason}" for r in refused[:3]) or "it is empty"
        raise UserError(f"{found.path}: no pair can be used ({reasons_shown})")
    return Preferences(found.path, pairs, categories, refused)


def pack_pairs(rows: Sequence[Sequence[DocumentPair]], sequence_length: int) -> TokenBatch:
    """As `data.packing.pack_rows`, the documents of a pair behind each other and told by extras (`data/extras.py`).

    Raises:
        ValueError: a row's pairs are together longer than the row.
    """
    batch = pack_rows([[d for pair in row for d in (pair.chosen, pair.rejected)] for row in rows], sequence_length)
    documents = batch.documents.long()
    # Behind the pairs of a row comes its padding, which is a document of its own.
    filled = torch.tensor([2 * len(row) for row in rows])[:, None]
    pair = torch.where(documents < filled, documents // 2, -1)
    extras = {PAIR: pair, SIDE: torch.where(pair < 0, 0, 1 - documents % 2)}
    for name, dtype, padding in ((CATEGORY, torch.int64, -1), (MARGIN, torch.float32, 0)):
        table = torch.full((len(rows), documents.shape[1] // 2 + 1), padding, dtype=dtype)
        for number, row in enumerate(rows):
            table[number, : len(row)] = torch.tensor([getattr(one, name) for one in row], dtype=dtype)
        extras[name] = table.gather(1, torch.where(pair < 0, table.shape[1] - 1, pair))
    return replace(batch, extras=extras)


def usable(file: PreferenceFile, tags: TagVocabulary, with_recordings: bool) -> PreferenceFile:
    """Those whose tags and recordings are there.

    Args:
        with_recordings: whether recordings may come without their codes.
    """
    kept, refused = [], list(file.refused)
    for preference in file.preferences:
        where = preference.where
        try:
            require_recordings(preference.joined(), where, file.path.parent, with_recordings)
            for index in range(len(preference.answers)):
                require_known_tags(preference.conversation(index), tags)
        except (RecordError, TagError) as error:
            refused.append(Refusal(where, str(error).removeprefix(f"{where}: ")))
        else:
            kept.append(preference)
    return PreferenceFile(file.path, kept, refused)


def _category(preference: Preference) -> str:
    return preference.category or task_of(preference.conversation(0))


def _rendered(
    preference: Preference, sample: TokenSample, renderer: Renderer, data: PreferenceDataConfig
) -> Iterator[tuple[tuple[int, int, float], Document, Document]]:
    """Each pair's (better, worse, margin), and its two documents."""
    ordered = preference.ordered(data.min_rating_difference)
    if not ordered:
        rated = sum(preference.mean_rating(index) is not None for index in range(len(preference.answers)))
        raise RenderError(
            f"no two of its {rated} rated answers differ by min_rating_difference={data.min_rating_difference:g}"
            if rated > 1
            else f"has {rated} rated answers; type stepaudio data rate or stepaudio data judge to have two or more"
        )
    documents: Mapping[int, Document] = {
        index: renderer.render_chat(
            replace(sample, record=preference.conversation(index)), data.template, "last", data.history
        )
        for index in sorted({index for one in ordered for index in one[:2]})
    }
    for one in ordered:
        chosen, rejected = documents[one[0]], documents[one[1]]
        if np.array_equal(chosen.ids, rejected.ids):
            raise RenderError(f"answers {one[0] + 1} and {one[1] + 1} are the same when rendered")
        yield one, chosen, rejected
