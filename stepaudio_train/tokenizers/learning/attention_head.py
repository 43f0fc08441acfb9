"""Recognition by attention, beside CTC: a small Transformer that writes the transcript looking at the frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import length_mask
from stepaudio_train.tokenizers.learning.optimisation import Term
from stepaudio_train.tokenizers.semantic import sinusoids

_LAYERS, _HEADS = 2, 4
_LABEL_SMOOTHING = 0.1
_IGNORED = -100


class AttentionHead(nn.Module):
    """Teacher-forced decoder over encoder frames (hybrid CTC/attention training). Thrown away afterwards."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        """
        Args:
            num_labels: of the alphabet, with the blank, whose place the sign for beginning and end takes.
        """
        super().__init__()
        self.embedding = nn.Embedding(num_labels, hidden_size)
        layer = nn.TransformerDecoderLayer(
            hidden_size, _HEADS, 4 * hidden_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, _LAYERS, nn.LayerNorm(hidden_size))
        self.output = nn.Linear(hidden_size, num_labels)

    def forward(self, frames: Tensor, counts: Tensor, labels: Sequence[Sequence[int]]) -> Term:
        """Cross entropy of the labels and their end, summed; clips without frames count nothing.

        Args:
            frames: [B, T, D]; counts: [B] frames; labels: B sequences without blanks.
        """
        heard = [list(sequence) if count else [] for sequence, count in zip(labels, counts.tolist(), strict=True)]
        longest = max(len(sequence) for sequence in heard) + 1
        given = torch.zeros(len(heard), longest, dtype=torch.int64)
        wanted = torch.full((len(heard), longest), _IGNORED)
        for row, (sequence, count) in enumerate(zip(heard, counts.tolist(), strict=True)):
            given[row, 1 : len(sequence) + 1] = torch.tensor(sequence, dtype=torch.int64)
            if count:
                wanted[row, : len(sequence) + 1] = torch.tensor([*sequence, 0])
        given, wanted = given.to(frames.device), wanted.to(frames.device)
        x = self.embedding(given) + sinusoids(longest, self.embedding.embedding_dim).to(frames.device)
        causal = nn.Transformer.generate_square_subsequent_mask(longest, device=frames.device)
        outside = ~length_mask(counts.clamp(min=1).to(frames.device), frames.shape[1])
        x = self.layers(x, frames, tgt_mask=causal, memory_key_padding_mask=outside, tgt_is_causal=True)
        logits = self.output(x).flatten(0, 1).float()
        total = F.cross_entropy(
            logits, wanted.flatten(), ignore_index=_IGNORED, reduction="sum", label_smoothing=_LABEL_SMOOTHING
        )
        return Term(total, int((wanted != _IGNORED).sum()))
