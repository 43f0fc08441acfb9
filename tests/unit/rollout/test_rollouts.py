"""Rollouts of one process: what an answer depends on, what it holds, and what is refused."""

from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.rollout import RolloutConfig, rollout_problems
from stepaudio_train.engines.base import Engine
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.rollout.rollouts import Rollout, RolloutModel
from stepaudio_train.rollout.sampling import ANSWER_ENDS
from stepaudio_train.testing.small_runs import SMALL_RUN

MODEL = replace(SMALL_RUN.model, init_std=0.3)
PROMPTS = [[1, 5, 9], [1, 7, 7, 30, 12, 3, 41], [1], [1, 40, 2, 2, 8]]
SEEDS = [4, 5, 6, 7]
SAMPLING = RolloutConfig(max_new_tokens=12, top_k=40)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return _engine(seed=0)


def _engine(seed: int) -> Engine:
    engine = LocalEngine(replace(SMALL_RUN, model=MODEL))
    weights = dict(InitialWeights(MODEL, seed))
    # An end that is likely, so that some answers end and some are cut off.
    weights["lm_head.weight"][ANSWER_ENDS[0]] *= 3
    engine.load_weights(weights)
    return engine


def _answers(engine: Engine, config: RolloutConfig, chosen: list[int] | None = None) -> list[Rollout]:
    model = RolloutModel(engine, config)
    model.refresh(engine)
    order = range(len(PROMPTS)) if chosen is None else chosen
    return model.answer([PROMPTS[i] for i in order], [SEEDS[i] for i in order])


def test_an_answer_depends_on_its_prompt_and_seed_alone(engine):
    answers = _answers(engine, SAMPLING)
    assert [list(answer.prompt) for answer in answers] == PROMPTS
    assert _answers(engine, SAMPLING) == answers
    assert _answers(engine, replace(SAMPLING, batch_rows=1)) == answers
    assert _answers(engine, SAMPLING, [2, 0]) == [answers[2], answers[0]]
    model = RolloutModel(engine, SAMPLING)
    model.refresh(engine)
    assert model.answer([PROMPTS[0]] * 2, [1, 2])[0] != model.answer([PROMPTS[0]] * 2, [1, 2])[1]


def test_an_answer_that_ended_holds_the_id_that_ended_it(engine):
    model = RolloutModel(engine, SAMPLING)
    model.refresh(engine)
    answers = model.answer([PROMPTS[0]] * 40, range(40))
    ended, cut_off = ([a for a in answers if a.ended is kind] for kind in (True, False))
    assert ended and cut_off
    assert all(a.ids[-1] in ANSWER_ENDS and not set(a.ids[:-1]) & set(ANSWER_ENDS) for a in ended)
    assert all(len(a.ids) == 12 and not set(a.ids) & set(ANSWER_ENDS) for a in cut_off)


def test_answers_are_those_of_the_last_refresh(engine):
    other = _engine(seed=1)
    model = RolloutModel(engine, SAMPLING)
    with pytest.raises(RuntimeError, match=r"call refresh\(engine\) first"):
        model.answer(PROMPTS, SEEDS)
    model.refresh(engine)
    before = model.answer(PROMPTS, SEEDS)
    storage = model.weights()["lm_head.weight"].data_ptr()
    engine_weights = dict(engine.export_weights())
    try:
        engine.load_weights(dict(other.export_weights()))
        assert model.answer(PROMPTS, SEEDS) == before
        model.refresh(engine)
        assert model.answer(PROMPTS, SEEDS) == _answers(other, SAMPLING) != before
    finally:
        engine.load_weights(engine_weights)
    assert model.weights()["lm_head.weight"].data_ptr() == storage


def test_weights_lie_in_the_dtype_that_is_asked_for(engine):
    exported = dict(engine.export_weights())
    sizes = {}
    for name, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = RolloutModel(engine, replace(SAMPLING, dtype=name))
        sizes[name] = model.refresh(engine).num_bytes
        for weight, parameter in model.weights().items():
            assert torch.equal(parameter, exported[weight].to(dtype))
            assert parameter.dtype == dtype and not parameter.requires_grad
    assert sizes["auto"] == sizes["fp32"] == 4 * engine.num_parameters() == 2 * sizes["bf16"]


def test_wrong_prompts_and_seeds_are_refused(engine):
    model = RolloutModel(engine, SAMPLING)
    model.refresh(engine)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.answer([[1], []], [0, 1])
    with pytest.raises(ValueError, match="2 prompts, but 1 seeds"):
        model.answer([[1], [2]], [0])
    assert model.answer([], []) == []


def test_answers_that_failed_elsewhere_are_not_waited_for(engine, monkeypatch):
    model = RolloutModel(engine, SAMPLING)
    model.refresh(engine)
    monkeypatch.setattr(engine, "any_rank", lambda _: True)
    with pytest.raises(UserError, match="another replica could not draw its answers"):
        model.answer(PROMPTS, SEEDS)


def test_a_configuration_tells_all_its_problems():
    assert rollout_problems(RolloutConfig(), "rollout") == []
    config = RolloutConfig(
        max_new_tokens=0, temperature=float("inf"), top_p=0.0, top_k=-1, repetition_window=-1, batch_rows=0
    )
    problems = rollout_problems(config, "rollout")
    assert len(problems) == 6
    assert problems[2] == "rollout.top_p=0.0: must be over 0 and at most 1; type rollout.top_p=1"
