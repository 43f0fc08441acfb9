"""Generation: cache against no cache, padding, stopping, and the distributions that are drawn from."""

import pytest
import torch

from stepaudio_train.config.schema import Step1Config
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rollout.generate import generate
from stepaudio_train.rollout.sampling import NO_TOKEN, SamplingConfig, choose_tokens, forbid_repeats

PROMPTS = [[1, 5, 9], [1, 7, 7, 30, 12, 3, 41], [1], [1, 40, 2, 2, 8]]


@pytest.fixture(scope="module")
def model() -> Step1ForCausalLM:
    config = Step1Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64, init_std=0.3)
    model = Step1ForCausalLM(config)
    model.load_state_dict(dict(InitialWeights(config, seed=1)))
    return model.eval()


def greedy_without_cache(model: Step1ForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_whole_forwards_whatever_shares_the_batch(model):
    results = generate(model, PROMPTS, SamplingConfig(max_new_tokens=12))
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.ids == greedy_without_cache(model, prompt, 12)
        assert result.stop_id is None


def test_small_batches_give_the_same(model):
    config = SamplingConfig(max_new_tokens=10, temperature=0.8, top_k=20, top_p=0.9)
    seeds = [11, 12, 13, 14]
    assert generate(model, PROMPTS, config, seeds) == generate(model, PROMPTS, config, seeds, batch_rows=1)


def test_seeds_make_samples_differ_and_repeat(model):
    config = SamplingConfig(max_new_tokens=20, temperature=1.0)
    first, second, again = (generate(model, [PROMPTS[0]], config, [seed])[0].ids for seed in (1, 2, 1))
    assert first == again
    assert first != second


def test_a_stop_id_ends_its_own_sample_only(model):
    free = generate(model, PROMPTS, SamplingConfig(max_new_tokens=12))
    stop = free[1].ids[4]
    stopped = generate(model, PROMPTS, SamplingConfig(max_new_tokens=12, stop_ids=(stop,)))
    for before, after in zip(free, stopped, strict=True):
        if stop in before.ids:
            assert after.ids == before.ids[: before.ids.index(stop)]
            assert after.stop_id == stop
        else:
            assert after == before


def forbidden_by_the_released_rule(ids: list[int], window: int, share: float) -> int | None:
    """The rule in its own words, on one sample: the id that may not come next."""
    if len(ids) < window:
        return None
    count = sum(1 for one in ids[-window:] if one == ids[-1])
    return ids[-1] if count / window > share else None


@pytest.mark.parametrize(("window", "share"), [(10, 0.1), (10, 0.3), (3, 0.5)])
def test_repeats_are_forbidden_as_the_rule_says(window, share):
    random = torch.Generator().manual_seed(0)
    # Few different ids, so that about half of the samples break the rule; some are shorter than the window.
    samples = [torch.randint(0, 6, (length,), generator=random).tolist() for length in [*range(1, 13), *[30] * 60]]
    recent = torch.tensor([([NO_TOKEN] * window + ids)[-window:] for ids in samples])
    logits = torch.randn(len(samples), 7, generator=random)
    found, forbidden = forbid_repeats(logits, recent, share), 0
    for row, ids in enumerate(samples):
        expected = logits[row].clone()
        if (last := forbidden_by_the_released_rule(ids, window, share)) is not None:
            expected[last], forbidden = -torch.inf, forbidden + 1
        assert torch.equal(found[row], expected)
    assert 5 < forbidden < len(samples) - 5


def test_generation_without_repeats_is_the_same_alone_and_in_a_batch(model):
    stutter = [1, *[5, 5, 5, 9] * 3]
    prompts = [*PROMPTS, stutter, [1, *range(20, 40), 7]]
    config = SamplingConfig(max_new_tokens=25, repetition_window=10)
    results = generate(model, prompts, config)
    for prompt, result in zip(prompts, results, strict=True):
        ids = list(prompt)
        for _ in range(config.max_new_tokens):
            logits = model(torch.tensor([ids]))[0, -1].detach()
            if (last := forbidden_by_the_released_rule(ids, 10, 0.1)) is not None:
                logits[last] = -torch.inf
            ids.append(int(logits.argmax()))
        assert result.ids == ids[len(prompt) :]
        assert generate(model, [prompt], config) == [result]
    free = generate(model, prompts, SamplingConfig(max_new_tokens=25))
    assert free != results  # the rule had something to do
    drawn = SamplingConfig(max_new_tokens=25, temperature=0.7, top_k=20, repetition_window=10)
    assert generate(model, prompts, drawn) == generate(model, prompts, drawn, batch_rows=1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
        (SamplingConfig(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(temperature=1.0, top_p=0.6), [4 / 7, 3 / 7, 0, 0]),
        (SamplingConfig(temperature=1.0, top_p=0.01), [1, 0, 0, 0]),
        (SamplingConfig(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ],
)
def test_drawn_frequencies_follow_the_truncated_distribution(config, expected):
    num_draws = 5_000
    # Shuffled ids, so that rank and id are told apart.
    ids = torch.tensor([2, 0, 3, 1])
    logits = torch.empty(4)
    logits[ids] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = choose_tokens(logits.expand(num_draws, 4), config, [generator] * num_draws)
    frequencies = torch.bincount(drawn, minlength=4)[ids] / num_draws
    torch.testing.assert_close(frequencies, torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repetition_window": -1}, "repetition_window"),
        ({"repetition_share": 1.5}, "repetition_share"),
    ],
)
def test_impossible_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**options)


def test_empty_prompts_and_missing_seeds_are_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], SamplingConfig())
    with pytest.raises(ValueError, match="2 prompts, but 1 seeds"):
        generate(model, [[1], [2]], SamplingConfig(), seeds=[1])
