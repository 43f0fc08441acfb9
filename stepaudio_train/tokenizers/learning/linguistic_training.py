"""Train a linguistic tokenizer: a SAN-M encoder by CTC on transcripts, then k-means over its frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from stepaudio_train.config.tokenizer import AugmentConfig, EncoderTrainConfig, LinguisticConfig
from stepaudio_train.tokenizers.dual import LINGUISTIC_PER_GROUP
from stepaudio_train.tokenizers.learning.attention_head import AttentionHead
from stepaudio_train.tokenizers.learning.augment import corrupt, warp
from stepaudio_train.tokenizers.learning.clustering import kmeans, perplexity
from stepaudio_train.tokenizers.learning.corpus import ClipFeatures, shuffled_batches, sorted_batches
from stepaudio_train.tokenizers.learning.optimisation import Report, Term, combine, optimise, resolve_device
from stepaudio_train.tokenizers.learning.parallel import all_sum
from stepaudio_train.tokenizers.learning.probe import CodedClips, probe_word_error
from stepaudio_train.tokenizers.learning.recognition import Alphabet, ctc_term, read_clips, word_error_rate
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer

_KMEANS_ITERATIONS = 20
_KMEANS_POINTS = 200_000
_BATCH_S = 60.0
"""Seconds per batch where no gradient is needed."""


class LinguisticObjective(nn.Module):
    """What the linguistic encoder learns by: CTC on transcripts, and attention beside it where it has a weight."""

    def __init__(self, tokenizer: LinguisticTokenizer, alphabet: Alphabet, attention_weight: float = 0.0) -> None:
        super().__init__()
        size = tokenizer.config.hidden_size
        self.tokenizer = tokenizer
        self.alphabet = alphabet
        self.head = nn.Linear(size, alphabet.labels_per_token * alphabet.num_labels)
        self.attention = AttentionHead(size, alphabet.num_labels) if attention_weight else None
        self._attention_weight = attention_weight

    def recognise(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, places, labels] and the places [B] of the frames that the dual codebook keeps.

        What is dropped behind the last whole group must not be needed to tell the words."""
        return self._places(*self.tokenizer.encode_features(features, num_frames))

    def terms(self, features: Tensor, num_frames: Tensor, labels: Sequence[Sequence[int]]) -> dict[str, Term]:
        """The parts of the loss for a batch of fbank features [B, T, M]."""
        hidden, counts = self.tokenizer.encode_features(features, num_frames)
        found = {"ctc": ctc_term(*self._places(hidden, counts), labels)}
        if self.attention is not None:
            term = self.attention(hidden, counts, labels)
            found["attention"] = Term(term.total, term.count, self._attention_weight)
        return found

    def _places(self, hidden: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(hidden).unflatten(-1, (self.alphabet.labels_per_token, -1)).flatten(1, 2)
        kept = counts // LINGUISTIC_PER_GROUP * LINGUISTIC_PER_GROUP
        return logits, kept * self.alphabet.labels_per_token


def train_linguistic(
    config: LinguisticConfig,
    training: EncoderTrainConfig,
    augment: AugmentConfig,
    train: ClipFeatures,
    held_out: ClipFeatures,
    seed: int,
    device: str,
    report: Report,
) -> tuple[LinguisticTokenizer, dict[str, float]]:
    """Train on fbank features (`LinguisticTokenizer.features`) and measure on `held_out`.

    Returns:
        The tokenizer, and metrics: `ctc_word_error` (percent, held out), `probe_word_error` (percent, held out, read
        from the codes alone), `codes_used`, `perplexity` of the codes of the training clips.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    alphabet = Alphabet(train.texts)
    place = resolve_device(device)
    tokenizer = LinguisticTokenizer(config)
    set_cmvn(tokenizer, (train.stack(indices) for indices in sorted_batches(train, _BATCH_S)))
    objective = LinguisticObjective(tokenizer, alphabet).to(place)
    labels = [alphabet.encode(text) for text in train.texts]
    batches = shuffled_batches(train, training.batch_s, generator)

    def losses(step: int) -> dict[str, Tensor]:
        indices = next(batches)
        features, num_frames = warp(*train.stack(indices), augment, generator)
        features = corrupt(features, num_frames, augment, generator)
        terms = objective.terms(features.to(place), num_frames.to(place), [labels[index] for index in indices])
        return combine(terms)

    optimise([tokenizer.encoder, objective.head], training, losses, report)
    objective.to("cpu").eval()
    with torch.inference_mode():
        points = torch.cat([*_frames(tokenizer, train), *_frames(tokenizer, train, augment, generator)])
        sample = points[torch.randperm(len(points), generator=generator)[:_KMEANS_POINTS]]
        tokenizer.centroids.copy_(kmeans(sample, config.codebook_size, _KMEANS_ITERATIONS, generator))
        coded = [_coded(tokenizer, data) for data in (train, held_out)]
        readings = read_clips(objective.recognise, alphabet, held_out)
    codes = torch.cat(coded[0].codes)
    return tokenizer, {
        "ctc_word_error": word_error_rate(held_out.texts, readings),
        "probe_word_error": probe_word_error(*coded, config.codebook_size, alphabet, generator),
        "codes_used": len(codes.unique()),
        "perplexity": perplexity(codes, config.codebook_size),
    }


def set_cmvn(tokenizer: LinguisticTokenizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Shift and scale every input of the encoder to mean 0 and deviation 1 over batches of fbank features, [B, T, M]
    and [B] frames; those of all processes that train together."""
    size = tokenizer.config.input_size
    total, squares, count = torch.zeros(size).double(), torch.zeros(size).double(), torch.zeros(1).double()
    for batch in batches:
        stacked, counts = tokenizer.stack(*batch)
        # Stacked frames past a clip's end are zero and add nothing.
        total += stacked.double().sum(dim=(0, 1))
        squares += stacked.double().square().sum(dim=(0, 1))
        count += counts.sum()
    for sums in (total, squares, count):
        all_sum(sums)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=1e-6).sqrt()
    tokenizer.cmvn_shift.copy_(-mean)
    tokenizer.cmvn_scale.copy_(1 / deviation)


def _frames(
    tokenizer: LinguisticTokenizer,
    data: ClipFeatures,
    augment: AugmentConfig | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Encoder frames [T, D] of every clip, in the clips' order; with `augment`, of altered clips."""
    frames: list[Tensor] = [torch.empty(0)] * len(data.texts)
    for indices in sorted_batches(data, _BATCH_S):
        features, num_frames = data.stack(indices)
        if augment is not None and generator is not None:
            features, num_frames = warp(features, num_frames, augment, generator)
            features = corrupt(features, num_frames, augment, generator)
        hidden, counts = tokenizer.encode_features(features, num_frames)
        for index, row, count in zip(indices, hidden, counts.tolist(), strict=True):
            frames[index] = row[:count].clone()
    return frames


def _coded(tokenizer: LinguisticTokenizer, data: ClipFeatures) -> CodedClips:
    return CodedClips([tokenizer.quantise(frames) for frames in _frames(tokenizer, data)], data.texts)
