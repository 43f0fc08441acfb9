"""Batched generation with a key/value cache: evaluation, data synthesis and serving of small batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rollout.sampling import NO_TOKEN, SamplingConfig, choose_tokens, forbid_repeats
from stepaudio_train.tokenizers.vocabulary import PAD_ID

_PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Generation:
    """What followed one prompt."""

    ids: list[int]
    """Without the stop id."""
    stop_id: int | None
    """What ended it; None if `max_new_tokens` did."""


@torch.inference_mode()
def generate(
    model: Step1ForCausalLM,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    seeds: Sequence[int] | None = None,
    batch_rows: int = 64,
) -> list[Generation]:
    """Go on from every prompt, `batch_rows` at a time; results in the prompts' order.

    Prompts of one batch are padded on the left by a document of its own, which no other token sees: a result does not
    depend on its neighbours.

    Args:
        prompts: token ids, at least one each.
        seeds: one per prompt, for drawing; the prompt's index if not given.

    Raises:
        ValueError: an empty prompt, or another number of seeds than of prompts.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    require_prompts(prompts, seeds)
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: dict[int, Generation] = {}
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        batch = _generate_batch(model, [prompts[i] for i in chosen], config, [seeds[i] for i in chosen])
        results.update(zip(chosen, batch, strict=True))
    return [results[index] for index in range(len(prompts))]


def require_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
    """Raises:
    ValueError: an empty prompt, or another number of seeds than of prompts.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
    empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: there is nothing to go on from")


def _generate_batch(
    model: Step1ForCausalLM, prompts: list[Sequence[int]], config: SamplingConfig, seeds: list[int]
) -> list[Generation]:
    device = model.lm_head.weight.device
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), PAD_ID)
    documents = torch.full((len(prompts), longest), _PADDING_DOCUMENT, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        documents[row, longest - len(prompt) :] = 0
    input_ids, documents = input_ids.to(device), documents.to(device)
    recent = _recent(prompts, config.repetition_window).to(device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stop_ids = torch.tensor(config.stop_ids, dtype=torch.int64, device=device)
    cache = model.new_cache()
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    steps = []
    for _ in range(config.max_new_tokens):
        hidden = model.model(input_ids, documents, cache)[:, -1]
        logits = model.lm_head(hidden)
        if config.repetition_window:
            logits = forbid_repeats(logits, recent, config.repetition_share)
        tokens = choose_tokens(logits, config, generators)
        recent = torch.cat([recent, tokens[:, None]], dim=1)[:, 1:]
        steps.append(tokens)
        stopped |= torch.isin(tokens, stop_ids)
        if bool(stopped.all()):
            break
        input_ids = tokens[:, None]
        documents = torch.cat([documents, documents.new_zeros(len(prompts), 1)], dim=1)
    return [_cut(row, config.stop_ids) for row in torch.stack(steps, dim=1).tolist()]


def _recent(prompts: list[Sequence[int]], window: int) -> torch.Tensor:
    """[R, window]: the prompts' last ids, padding not counted."""
    recent = torch.full((len(prompts), window), NO_TOKEN)
    for row, prompt in enumerate(prompts):
        known = min(window, len(prompt))
        recent[row, window - known :] = torch.as_tensor(prompt[len(prompt) - known :])
    return recent


def _cut(ids: list[int], stop_ids: tuple[int, ...]) -> Generation:
    for index, token in enumerate(ids):
        if token in stop_ids:
            return Generation(ids[:index], token)
    return Generation(ids, None)
