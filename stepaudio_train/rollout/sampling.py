"""Which token comes next: greedy, or drawn from a tempered and truncated distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepaudio_train.tokenizers.vocabulary import Special

ANSWER_ENDS = (int(Special.EOT), int(Special.EOS))
"""What ends an answer: its proper end, and the end of everything, after which no answer goes on."""
NO_TOKEN = -1
"""Stands for what is before a sample's first id."""


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and when generation ends. The defaults are greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token, always; 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0 among all. No effect at temperature 0."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities add up to this much. No effect at temperature 0."""
    repetition_window: int = 0
    """The released programs' rule against stutters, over the last so many ids (theirs: 10), the prompt's included: the
    last id is not chosen again while it makes up more than `repetition_share` of them. 0: no such rule."""
    repetition_share: float = 0.1
    stop_ids: tuple[int, ...] = ()
    """Generation of a sample ends with the first of these; it is not part of the result."""

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("repetition_window", self.repetition_window, self.repetition_window >= 0, "0 (no rule) or more"),
            ("repetition_share", self.repetition_share, 0 <= self.repetition_share <= 1, "between 0 and 1"),
        )
        broken = [f"{name}={value}: must be {rule}" for name, value, holds, rule in rules if not holds]
        if broken:
            raise ValueError("; ".join(broken))


def choose_tokens(logits: Tensor, config: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """The next token of every sample.

    Args:
        logits: [R, V].
        generators: one per row, on the CPU; each is advanced by one number, so that a sample's tokens depend on its
            own seed and not on which others share its batch.

    Returns:
        [R] int64 on the logits' device.
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    scores, ids = torch.sort(logits.float() / config.temperature, dim=-1, descending=True, stable=True)
    if config.top_k:
        scores, ids = scores[:, : config.top_k], ids[:, : config.top_k]
    probabilities = scores.softmax(-1)
    if config.top_p < 1:
        # A token stays if those before it do not yet reach top_p; the most likely one always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    drawn = uniform[:, None].to(logits.device) * cumulative[:, -1:]
    # right=True steps over tokens of probability 0. Rounding may put the draw at the total, the last kept one's.
    index = torch.searchsorted(cumulative, drawn, right=True)
    last_kept = (probabilities > 0).sum(-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(index, last_kept)).squeeze(1)


def forbid_repeats(logits: Tensor, recent: Tensor, share: float) -> Tensor:
    """Logits [R, V] in which the last id is impossible where it makes up more than `share` of the window, as StepFun's
    RepetitionAwareLogitsProcessor has it (formats.md 7).

    Args:
        recent: [R, W] int64, each sample's last ids, `NO_TOKEN` before the first one. As released, nothing is forbidden
            before there are W ids.
    """
    last = recent[:, -1:].clamp(min=0)
    whole = (recent != NO_TOKEN).all(1, keepdim=True)
    repeated = (recent == last).sum(1, keepdim=True) > share * recent.shape[1]
    return logits.scatter(1, last, logits.gather(1, last).masked_fill(whole & repeated, -torch.inf))
