"""How many words are in a stream of codes: a small recogniser that sees nothing but the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import pad_clips
from stepaudio_train.tokenizers.learning.recognition import Alphabet, ctc_loss, greedy, word_error_rate

_STEPS = 400
_CLIPS_PER_STEP = 32
_LEARNING_RATE = 5e-3
_WIDTH = 64


@dataclass(frozen=True)
class CodedClips:
    """Streams of codes and what was said."""

    codes: list[Tensor]
    """[T] int64 each."""
    texts: list[str]


class CodeRecogniser(nn.Module):
    """Embedding, two convolutions that see 7 codes, and a CTC head."""

    def __init__(self, num_codes: int, alphabet: Alphabet) -> None:
        super().__init__()
        self.labels_per_token = alphabet.labels_per_token
        self.embedding = nn.Embedding(num_codes + 1, _WIDTH, padding_idx=0)
        self.wide = nn.Conv1d(_WIDTH, _WIDTH, 5, padding=2)
        self.narrow = nn.Conv1d(_WIDTH, _WIDTH, 3, padding=1)
        self.head = nn.Linear(_WIDTH, alphabet.num_labels * alphabet.labels_per_token)

    def forward(self, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Codes [T] each -> logits [B, places, labels], places [B]."""
        ids, lengths = pad_clips([clip + 1 for clip in codes])
        x = self.embedding(ids).transpose(1, 2)
        x = x + F.relu(self.wide(x))
        x = x + F.relu(self.narrow(x))
        logits = self.head(x.transpose(1, 2)).unflatten(-1, (self.labels_per_token, -1)).flatten(1, 2)
        return logits, lengths * self.labels_per_token


def probe_word_error(
    train: CodedClips, held_out: CodedClips, num_codes: int, alphabet: Alphabet, generator: torch.Generator
) -> float:
    """Word error rate in percent on `held_out` of a recogniser trained for seconds on `train`'s codes.

    An upper bound of what the codes lose: a language model with more context reads them better.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = CodeRecogniser(num_codes, alphabet)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=True)
    labels = [alphabet.encode(text) for text in train.texts]
    usable = [index for index, codes in enumerate(train.codes) if len(codes)]
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - step / _STEPS)
        drawn = torch.randint(len(usable), (_CLIPS_PER_STEP,), generator=generator).tolist()
        chosen = [usable[place] for place in drawn]
        logits, places = model([train.codes[index] for index in chosen])
        loss = ctc_loss(logits, places, [labels[index] for index in chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return word_error_rate(held_out.texts, _read(model, held_out.codes, alphabet))


@torch.inference_mode()
def _read(model: CodeRecogniser, codes: list[Tensor], alphabet: Alphabet) -> list[str]:
    texts = [""] * len(codes)
    usable = sorted((i for i, clip in enumerate(codes) if len(clip)), key=lambda i: len(codes[i]))
    for start in range(0, len(usable), 64):
        part = usable[start : start + 64]
        for index, labels in zip(part, greedy(*model([codes[i] for i in part])), strict=True):
            texts[index] = alphabet.decode(labels)
    return texts
