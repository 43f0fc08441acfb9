"""What an iteration's answers are like, in numbers for metrics.jsonl, and some of them in words for `samples/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepaudio_train.data.extras import OLD_LOG_PROBS, REFERENCE_LOG_PROBS
from stepaudio_train.data.render import Renderer
from stepaudio_train.evaluation.deafness import deaf_rates
from stepaudio_train.objectives.ppo import explained_variance
from stepaudio_train.rlhf.experience import Experience
from stepaudio_train.rlhf.prompts import Prompt
from stepaudio_train.rlhf.rewards import Rewards
from stepaudio_train.rlhf.rules import Said
from stepaudio_train.rollout.rollouts import Rollout
from stepaudio_train.rollout.samples import readable
from stepaudio_train.training.loop import Sums, means

_RETURNS = "value/squared_return"


@dataclass(frozen=True)
class Answers:
    """The answers of an iteration, those to one prompt together."""

    prompts: Sequence[Prompt]
    """Of each answer."""
    rollouts: Sequence[Rollout]
    said: Sequence[Said]
    rewards: Rewards


def answer_metrics(answers: Answers, experience: Experience, answers_per_prompt: int) -> dict[str, float]:
    """`score`, the reward that is learned from, and `score_std`; `reward/<part>`, what each part says; `length` and
    `length_max` in tokens, `ended`; `kl/answer`, nats of a whole answer's distance from the reference (k1);
    `deaf_rate_clear` and `deaf_rate_unclear` in percent, where conditions are known; `groups_alike`, the share of
    prompts whose answers are all paid the same, where there are several answers."""
    totals = answers.rewards.totals
    lengths = [len(rollout.ids) for rollout in answers.rollouts]
    found = {
        "score": float(totals.mean()),
        "score_std": float(totals.std()),
        **{f"reward/{name}": float(values.mean()) for name, values in answers.rewards.parts.items()},
        "length": float(np.mean(lengths)),
        "length_max": float(max(lengths)),
        "ended": float(np.mean([said.ended for said in answers.said])),
    }
    if REFERENCE_LOG_PROBS in experience.extras:
        old, reference = experience.extras[OLD_LOG_PROBS], experience.extras[REFERENCE_LOG_PROBS]
        # Both are 0 outside of answers.
        distances = [float(np.sum(a - b, dtype=np.float64)) for a, b in zip(old, reference, strict=True)]
        found["kl/answer"] = float(np.mean(distances))
    if answers_per_prompt > 1:
        groups = totals.reshape(-1, answers_per_prompt)
        found["groups_alike"] = float((np.ptp(groups, axis=1) == 0).mean())
    judged = zip(answers.prompts, answers.said, strict=True)
    rates = deaf_rates(
        (p.condition, said.deaf) for p, said in judged if p.condition is not None and said.deaf is not None
    )
    named = {"deaf_rate_clear": rates.deaf_rate_clear, "deaf_rate_unclear": rates.deaf_rate_unclear}
    return found | {name: rate for name, rate in named.items() if rate is not None}


def loss_metrics(sums: Sums) -> dict[str, float]:
    """Means of what the losses measure, and a critic's `value/explained_variance` in place of squares."""
    kept = {name: value for name, value in sums.items() if "/squared_" not in name}
    explained = {"value/explained_variance": explained_variance(sums)} if _RETURNS in sums else {}
    return {**means(kept), **explained}


def sample_lines(answers: Answers, renderer: Renderer, count: int) -> list[dict[str, Any]]:
    """The first answers: `id`, `task`, `prompt`, `reference`, `answer`, `ended`, `score`, `rewards` by part, and
    `condition` where it is known; audio as `<audio_k>`."""
    lines = []
    for index, (prompt, rollout) in enumerate(zip(answers.prompts[:count], answers.rollouts, strict=False)):
        shown = {
            name: readable(ids, renderer.text_tokenizer, renderer.vocabulary)
            for name, ids in (("prompt", prompt.ids), ("answer", rollout.ids))
        }
        line = {
            "id": prompt.id,
            "task": prompt.task,
            "prompt": shown["prompt"],
            "reference": prompt.reference,
            "answer": shown["answer"],
            "ended": answers.said[index].ended,
            "score": float(answers.rewards.totals[index]),
            "rewards": {name: float(values[index]) for name, values in answers.rewards.parts.items()},
        }
        lines.append(line | ({} if prompt.condition is None else {"condition": prompt.condition}))
    return lines
