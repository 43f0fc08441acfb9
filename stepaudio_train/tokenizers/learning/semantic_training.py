"""Train a semantic tokenizer: encoder and codes learn to keep what recognises the words and rebuilds the spectrum."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepaudio_train.audio.features import length_mask, normalise_log_mel
from stepaudio_train.config.tokenizer import AugmentConfig, EncoderTrainConfig, SemanticConfig, SemanticLossConfig
from stepaudio_train.tokenizers.dual import SEMANTIC_PER_GROUP
from stepaudio_train.tokenizers.learning.attention_head import AttentionHead
from stepaudio_train.tokenizers.learning.augment import corrupt, warp
from stepaudio_train.tokenizers.learning.clustering import perplexity
from stepaudio_train.tokenizers.learning.codebook import CodebookLearner
from stepaudio_train.tokenizers.learning.corpus import ClipFeatures, shuffled_batches, sorted_batches
from stepaudio_train.tokenizers.learning.optimisation import Report, Term, combine, optimise, resolve_device
from stepaudio_train.tokenizers.learning.probe import CodedClips, probe_word_error
from stepaudio_train.tokenizers.learning.recognition import Alphabet, ctc_term, read_clips, word_error_rate
from stepaudio_train.tokenizers.semantic import SemanticTokenizer

_NATS = math.log(10.0)
_FRAMES_PER_TOKEN = 4
_LAYERS = 2
_TAPS = 5
_RECENT_BATCHES = 50
_BATCH_S = 60.0
"""Seconds per batch where no gradient is needed."""


class Decoder(nn.Module):
    """What gives the codes their meaning in training and is thrown away: characters and spectrum from quantised frames.

    The clip's mean spectrum is given, so that codes need not say whose voice it is."""

    def __init__(self, config: SemanticConfig, num_labels: int, labels_per_token: int) -> None:
        super().__init__()
        self.labels_per_token = labels_per_token
        size = config.hidden_size
        self.enter = nn.Linear(size, size)
        # Convolutions, for the order of the codes is what they say: attention without positions learnt far slower.
        self.layers = nn.ModuleList([nn.Conv1d(size, size, _TAPS, padding=_TAPS // 2) for _ in range(_LAYERS)])
        self.norm = nn.LayerNorm(size)
        self.characters = nn.Linear(size, labels_per_token * num_labels)
        self.voice = nn.Linear(config.num_mel_bins, size)
        mel_values = _FRAMES_PER_TOKEN * config.num_mel_bins
        self.spectrum = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, mel_values))

    def forward(self, codes: Tensor, counts: Tensor, mean_mel: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised frames [B, T, D], counts [B], mean_mel [B, M] -> logits [B, places, labels], mel [B, 4T, M]."""
        # Codes have unit length; rescaled, each number is about 1.
        x = self.enter(codes * math.sqrt(codes.shape[-1]))
        mask = length_mask(counts, x.shape[1])[:, :, None]
        for layer in self.layers:
            x = x + F.gelu(layer((x * mask).transpose(1, 2)).transpose(1, 2))
        x = self.norm(x)
        logits = self.characters(x).unflatten(-1, (self.labels_per_token, -1)).flatten(1, 2)
        mel = self.spectrum(x + self.voice(mean_mel)[:, None])
        return logits, mel.unflatten(-1, (_FRAMES_PER_TOKEN, -1)).flatten(1, 2)


class SemanticObjective(nn.Module):
    """What the semantic encoder and its codes learn by: the codes are made to keep words and spectrum.

    At first frames go on unquantised; then the codes start from the frames seen last and move along."""

    def __init__(
        self,
        tokenizer: SemanticTokenizer,
        alphabet: Alphabet,
        weights: SemanticLossConfig,
        generator: torch.Generator,
        attention_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.alphabet = alphabet
        self.decoder = Decoder(tokenizer.config, alphabet.num_labels, alphabet.labels_per_token)
        self.attention = AttentionHead(tokenizer.config.hidden_size, alphabet.num_labels) if attention_weight else None
        self.learner = CodebookLearner(tokenizer.quantizer._codebook, weights.code_decay, generator)
        self.recent: deque[Tensor] = deque(maxlen=_RECENT_BATCHES)
        """Frames [N, D] of the last batches, as long as there are no codes."""
        self.quantised = False
        self._weights, self._attention_weight = weights, attention_weight

    def quantise_from(self, first: int, step: int) -> None:
        """Call it before every step: from step `first` on frames are quantised, at first by codes placed among the
        frames seen last."""
        if step >= first and not self.quantised:
            self.learner.start(torch.cat(list(self.recent)))
            self.recent.clear()
            self.quantised = True

    def go_on_with_codes(self) -> None:
        """From here on frames are quantised, by the codes that the tokenizer has."""
        self.learner.go_on()
        self.quantised = True

    def terms(
        self, heard: Tensor, num_frames: Tensor, mel: Tensor, mean_mel: Tensor, labels: Sequence[Sequence[int]]
    ) -> dict[str, Term]:
        """The parts of the loss for a batch; the codes are moved on the way.

        Args:
            heard: [B, T, M] log10 mel power; num_frames: [B]; mel: [B, T, M] to rebuild; mean_mel: [B, M] of it.
        """
        hidden, counts = self.tokenizer.encode_features(heard, num_frames)
        frames = self.tokenizer.quantizer.normalise(hidden)
        inside = length_mask(counts, frames.shape[1])
        distances = torch.zeros(1, device=frames.device)
        quantised = frames
        if self.quantised:
            ids = self.tokenizer.quantizer.encode(hidden)
            codes = self.tokenizer.quantizer.codes[ids]
            distances = (frames - codes).square().sum(dim=-1)[inside]
            quantised = frames + (codes - frames).detach()
            self.learner.update(frames[inside].detach(), ids[inside])
        else:
            self.recent.append(frames[inside].detach())
        logits, spectrum = self.decoder(quantised, counts, mean_mel)
        errors = (spectrum[:, : mel.shape[1]] - mel).abs().mean(dim=-1)[length_mask(num_frames, mel.shape[1])]
        found = {
            "ctc": ctc_term(logits, self._places(counts), labels),
            "spectrum": Term(errors.sum(), errors.numel(), self._weights.spectrum),
            "commitment": Term(distances.sum(), distances.numel(), self._weights.commitment),
        }
        if self.attention is not None:
            term = self.attention(quantised, counts, labels)
            found["attention"] = Term(term.total, term.count, self._attention_weight)
        return found

    def recognise(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, places, labels] and places [B], read from the quantised frames alone."""
        hidden, counts = self.tokenizer.encode_features(features, num_frames)
        codes = self.tokenizer.quantizer.codes[self.tokenizer.quantizer.encode(hidden)]
        mean_mel = torch.zeros(len(features), self.decoder.voice.in_features, device=features.device)
        logits, _ = self.decoder(codes, counts, mean_mel)
        return logits, self._places(counts)

    def _places(self, counts: Tensor) -> Tensor:
        """Places for labels in the tokens that the dual codebook keeps."""
        return counts // SEMANTIC_PER_GROUP * SEMANTIC_PER_GROUP * self.alphabet.labels_per_token


def train_semantic(
    config: SemanticConfig,
    training: EncoderTrainConfig,
    weights: SemanticLossConfig,
    augment: AugmentConfig,
    train: ClipFeatures,
    held_out: ClipFeatures,
    seed: int,
    device: str,
    report: Report,
) -> tuple[SemanticTokenizer, dict[str, float]]:
    """Train on log10 mel features (`SemanticTokenizer.features`) and measure on `held_out`.

    Returns:
        The tokenizer, and metrics: `ctc_word_error` (percent, held out, from the quantised frames),
        `probe_word_error` (percent, held out, read from the codes alone), `codes_used`, `perplexity`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    alphabet = Alphabet(train.texts)
    place = resolve_device(device)
    tokenizer = SemanticTokenizer(config).to(place)
    objective = SemanticObjective(tokenizer, alphabet, weights, generator).to(place)
    labels = [alphabet.encode(text) for text in train.texts]
    batches = shuffled_batches(train, training.batch_s, generator)
    first_quantised = round(training.steps * weights.unquantised_share)

    def losses(step: int) -> dict[str, Tensor]:
        indices = next(batches)
        altered = altered_mel(train.stack(indices), augment, generator)
        objective.quantise_from(max(1, first_quantised), step)
        return combine(objective.terms(*(t.to(place) for t in altered), [labels[index] for index in indices]))

    optimise([tokenizer.encoder, objective.decoder], training, losses, report)
    objective.to("cpu").eval()
    with torch.inference_mode():
        coded = [_coded(tokenizer, data) for data in (train, held_out)]
        readings = read_clips(objective.recognise, alphabet, held_out)
    codes = torch.cat(coded[0].codes)
    return tokenizer, {
        "ctc_word_error": word_error_rate(held_out.texts, readings),
        "probe_word_error": probe_word_error(*coded, config.codebook_size, alphabet, generator),
        "codes_used": len(codes.unique()),
        "perplexity": perplexity(codes, config.codebook_size),
    }


def altered_mel(
    batch: tuple[Tensor, Tensor], augment: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the encoder hears [B, T, M] (log10), frames [B], what the decoder rebuilds [B, T, M] and its mean [B, M].

    Speed and vocal tract are changed for both; noise, masks and another microphone only for the encoder, so that the
    codes leave them out."""
    warped, num_frames = warp(*batch, augment, generator)
    heard = corrupt(warped * _NATS, num_frames, augment, generator) / _NATS
    mel = normalise_log_mel(warped, num_frames)
    return heard, num_frames, mel, mel.sum(dim=1) / num_frames[:, None]


def _coded(tokenizer: SemanticTokenizer, data: ClipFeatures) -> CodedClips:
    codes: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(data.texts)
    for indices in sorted_batches(data, _BATCH_S):
        hidden, counts = tokenizer.encode_features(*data.stack(indices))
        for index, row, count in zip(indices, tokenizer.quantizer.encode(hidden), counts.tolist(), strict=True):
            codes[index] = row[:count].clone()
    return CodedClips(codes, data.texts)
