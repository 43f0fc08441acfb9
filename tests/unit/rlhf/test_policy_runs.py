"""PPO and GRPO on a toy whose optimum is known: they reach it, go nowhere without a reward, and go on exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import recipes.dpo as dpo
import recipes.grpo as grpo
import recipes.ppo as ppo
import recipes.sft as sft
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.policy_runs import CriticConfig, PpoRunConfig, PromptDataConfig, RewardSourceConfig
from stepaudio_train.config.preferences import PreferenceDataConfig
from stepaudio_train.config.rlhf import DpoConfig, GrpoConfig
from stepaudio_train.config.schema import LoraConfig, OptimizerConfig
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rlhf.models import model_problems
from stepaudio_train.rollout.generate import generate
from stepaudio_train.rollout.rollouts import RolloutModel
from stepaudio_train.rollout.sampling import ANSWER_ENDS, SamplingConfig
from stepaudio_train.testing.toy_preferences import toy_dpo_config
from stepaudio_train.testing.toy_rewards import (
    ASKED,
    toy_grpo_config,
    toy_guessing_config,
    toy_ppo_config,
    write_toy_opinions,
    write_toy_rewards,
)
from stepaudio_train.tokenizers.text import TextTokenizer

SHORT = {"max_steps": 3, "epochs_per_iteration": 2, "export_hf": False}


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def metrics_of(run: Path) -> list[dict]:
    """Without what is measured by the clock."""
    timed = {"answering_s", "measuring_s", "tokens_per_s", "elapsed_s", "mfu"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines_of(run / "metrics.jsonl")]


def shortened(config, **training):
    return replace(config, training=replace(config.training, **{**SHORT, **training}))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """The toy's files, `guess/`, a policy that guesses, and `opinions/`, a model that scores at random."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_rewards(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepaudio_train.training.loop.write_run_report", lambda run_dir: run_dir)
        sft.main(toy_guessing_config(folder, folder / "guess"))
    write_toy_opinions(folder / "guess", folder / "opinions")
    return folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch) -> None:
    """Pages that nobody looks at take longer to draw than toy runs to learn."""
    monkeypatch.setattr(ppo, "write_policy_report", lambda run_dir: run_dir)
    monkeypatch.setattr(grpo, "write_policy_report", lambda run_dir: run_dir)
    monkeypatch.setattr(dpo, "write_preference_report", lambda run_dir: run_dir)


def share_right(toy: Path, run: Path) -> float:
    """How often the exported policy, without drawing, says the right word."""
    model = Step1ForCausalLM.from_pretrained(run / "export")
    tokenizer = TextTokenizer.from_file(toy / "text.model")
    prompts = [tokenizer.encode(f"<s><|BOT|> human\n{word}<|EOT|><|BOT|> assistant\n") for word in ASKED]
    answers = generate(model, prompts, SamplingConfig(max_new_tokens=8, stop_ids=ANSWER_ENDS))
    said = [tokenizer.decode(answer.ids) for answer in answers]
    return float(np.mean([answer == right for answer, right in zip(said, (*ASKED[1:], ASKED[0]), strict=True)]))


def test_ppo_reaches_the_optimum(toy, tmp_path, monkeypatch):
    monkeypatch.undo()
    config = toy_ppo_config(toy, toy / "guess", tmp_path / "run")
    ppo.main(replace(config, training=replace(config.training, sample_every=20)))
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["score"] < 0.7, "it begins by guessing"
    assert lines[-1]["score"] > 0.85 and share_right(toy, tmp_path / "run") == 1
    assert lines[-1]["reward/exact"] > 0.85 and lines[-1]["ended"] > 0.95
    assert 0.5 < lines[-1]["kl/answer"] < 1, "0.7 nats are the way to the right answers"
    assert max(line["value/explained_variance"] for line in lines) > 0.2, "the critic learns what is to be expected"
    samples = lines_of(tmp_path / "run" / "samples" / "step_00000030.jsonl")
    assert len(samples) == 8 and (tmp_path / "run" / "samples" / "step_00000020.jsonl").is_file()
    for sample in samples:
        right = f"{sample['reference']}<|EOT|>" == sample["answer"]
        assert sample["rewards"] == {"exact": float(right)} and sample["score"] == right - (not sample["ended"])
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Explained variance" in page and "What it answers" in page and "prompts.jsonl" in page


def test_grpo_reaches_the_optimum(toy, tmp_path):
    grpo.main(toy_grpo_config(toy, toy / "guess", tmp_path / "run"))
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["score"] < 0.7 and lines[-1]["score"] > 0.85
    assert lines[-1]["groups_alike"] > lines[0]["groups_alike"] and share_right(toy, tmp_path / "run") == 1


def test_dpo_reaches_the_same_optimum(toy, tmp_path):
    common = toy_grpo_config(toy, toy / "guess", tmp_path / "run")
    config = toy_dpo_config(toy, tmp_path / "run", max_steps=16, eval_every=0)
    data = PreferenceDataConfig(str(toy / "pairs.jsonl"))
    dpo.main(replace(config, model=common.model, data=data, loss=DpoConfig(beta=0.5, nll_weight=1.0)))
    assert share_right(toy, tmp_path / "run") == 1


def test_without_a_reward_the_policy_stays_where_it_is(toy, tmp_path):
    """What is left of a critic's errors is whitened like advantages, and moves the policy; its distance is what it pays
    for, and brings it back."""
    critic = CriticConfig(
        init=str(toy / "opinions"), warmup_steps=20, optimizer=OptimizerConfig(learning_rate=5e-3, weight_decay=0.0)
    )
    reward = RewardSourceConfig(rules={"exact": 0.0}, no_end_penalty=0.0)
    ppo.main(toy_ppo_config(toy, toy / "guess", tmp_path / "run", critic=critic, reward=reward))
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["loss/value"] > 10 * lines[19]["loss/value"]
    assert all(line["kl/answer"] == 0 for line in lines[:20]), "the critic alone learns at first"
    assert max(abs(line["kl/answer"]) for line in lines) < 0.6, "0.7 nats are the way to one answer"
    assert lines[-1]["kl/answer"] < 0.3 and all(line["score"] == 0 for line in lines)


@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_a_run_that_died_goes_on_exactly(recipe, toy, tmp_path, monkeypatch):
    main, config_of = (ppo.main, toy_ppo_config) if recipe == "ppo" else (grpo.main, toy_grpo_config)
    reward = RewardSourceConfig(model=str(toy / "opinions"), rules={"exact": 1.0})
    fields = {"reward": reward, **({"critic": CriticConfig(warmup_steps=1)} if recipe == "ppo" else {})}
    training = {"max_steps": 6, "checkpoint_every": 3, "export_hf": True, "sample_every": 2}
    configs = [
        shortened(config_of(toy, toy / "guess", tmp_path / name, **fields), **training) for name in ("whole", "died")
    ]
    main(configs[0])

    step, steps = LocalEngine.train_step, []

    def dies(self, *args):
        steps.append(self)
        if len([one for one in steps if not one.config.model.value_head]) == 5 - (recipe == "ppo"):
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            main(configs[1])
    # The checkpoint was written within an iteration: its answers have to come from there.
    assert [path.name for path in (tmp_path / "died" / "checkpoints").glob("step_*")] == ["step_00000003"]
    drawn = []
    with monkeypatch.context() as patch:
        answer = RolloutModel.answer
        patch.setattr(RolloutModel, "answer", lambda self, *args: drawn.append(1) or answer(self, *args))
        main(configs[1])
    assert len(drawn) == 1, "of the two iterations that are left, the first was in the checkpoint"
    assert metrics_of(tmp_path / "died") == metrics_of(tmp_path / "whole")
    for name in ("export/model-00001.safetensors", "samples/step_00000006.jsonl", "samples/step_00000004.jsonl"):
        assert (tmp_path / "died" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_micro_batches_change_nothing(toy, tmp_path):
    found = []
    for rows in (1, 8):
        config = toy_ppo_config(toy, toy / "guess", tmp_path / str(rows), critic=CriticConfig(warmup_steps=1))
        ppo.main(shortened(config, micro_batch_rows=rows, minibatches=2))
        found.append(metrics_of(tmp_path / str(rows)))
    keys = [key for key in found[0][0] if not key.startswith("packing/") and key != "value/explained_variance"]
    for one, other in zip(*found, strict=True):
        assert {k: one[k] for k in keys} == {k: pytest.approx(other[k], rel=1e-4, abs=1e-5) for k in keys}


def test_a_reward_models_score_is_its_value_where_the_end_is_predicted(toy, tmp_path):
    reward = RewardSourceConfig(model=str(toy / "opinions"), no_end_penalty=0.0)
    config = toy_grpo_config(toy, toy / "guess", tmp_path / "run", reward=reward, loss=GrpoConfig(group_size=4))
    grpo.main(shortened(config, max_steps=1, sample_every=1, num_samples=40))
    (line,) = metrics_of(tmp_path / "run")
    assert line["score"] == pytest.approx(0, abs=1e-6) and line["score_std"] == pytest.approx(1, rel=1e-5)
    model = Step1ForCausalLM.from_pretrained(toy / "opinions").requires_grad_(False)
    tokenizer = TextTokenizer.from_file(toy / "text.model")
    scores = []
    for sample in lines_of(tmp_path / "run" / "samples" / "step_00000001.jsonl"):
        ids = tokenizer.encode(sample["prompt"] + sample["answer"])
        if tokenizer.decode(ids) == sample["prompt"] + sample["answer"] and sample["answer"].split("<")[0] in ASKED:
            values = model.value_head(model.model(torch.tensor([ids])))[0]
            scores.append((sample["rewards"]["model"], float(values[-2])))
    found, expected = zip(*scores, strict=True)
    assert len(scores) > 20 and len(set(expected)) > 5
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_spoken_prompts_are_answered_and_deafness_is_measured(toy, tmp_path):
    part = {"type": "audio", "audio": "", "tokens": "<audio_3><audio_5><audio_70><audio_71><audio_72>" * 2}
    turns = [{"role": "human", "content": [part]}, {"role": "assistant", "content": "one"}]
    lines = [
        {"messages": turns, "meta": {"condition": condition}} for condition in ("clear", "silent") for _ in range(2)
    ]
    (tmp_path / "heard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = toy_ppo_config(
        *(toy, toy / "guess", tmp_path / "run"),
        reward=RewardSourceConfig(rules={"hearing": 1.0}),
        data=PromptDataConfig(str(tmp_path / "heard.jsonl"), prompts_per_iteration=8),
        critic=CriticConfig(kind="shared", warmup_steps=0),
    )
    ppo.main(shortened(config, max_steps=2, sample_every=2))
    line = metrics_of(tmp_path / "run")[-1]
    assert (line["deaf_rate_clear"], line["deaf_rate_unclear"], line["reward/hearing"]) == (0, 0, 0.5)
    sample = lines_of(tmp_path / "run" / "samples" / "step_00000002.jsonl")[0]
    assert sample["task"] == "aqta" and "<audio_3><audio_5><audio_70>" in sample["prompt"]
    assert sample["condition"] in ("clear", "silent") and "value/return" in line


def test_adapters_have_the_weights_below_them_as_reference(toy, tmp_path):
    config = toy_ppo_config(toy, toy / "guess", tmp_path / "run", lora=LoraConfig(rank=4))
    ppo.main(shortened(replace(config, critic=CriticConfig(warmup_steps=0)), max_steps=4, export_hf=True))
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["kl/answer"] == 0 and lines[2]["kl/answer"] != 0
    before, after = (load_file(run / "export" / "model-00001.safetensors") for run in (toy / "guess", tmp_path / "run"))
    assert before.keys() == after.keys() and (tmp_path / "run" / "adapters").is_dir()


def test_preferences_are_prompts_too_and_a_run_keeps_its_own(toy, tmp_path):
    data = PromptDataConfig(str(tmp_path / "pairs.jsonl"), prompts_per_iteration=10)
    text = (toy / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(text)
    config = toy_grpo_config(toy, toy / "guess", tmp_path / "run", data=data)
    grpo.main(shortened(config, max_steps=1))
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["data"]
    assert (report["prompts"], report["num_refused"]) == (len(ASKED), 0)
    (tmp_path / "pairs.jsonl").write_text(text.replace("six", "nine"))
    with pytest.raises(ConfigError, match="data: is not what it was"):
        grpo.main(shortened(config, max_steps=2))


def test_models_that_do_not_fit_the_policy_are_refused(toy, tmp_path):
    config = toy_ppo_config(toy, toy / "guess", tmp_path / "run", reward=RewardSourceConfig(model=str(toy / "guess")))
    (problem,) = model_problems(config)
    assert "has no value head; type the run directory of `stepaudio run reward`" in problem
    config = replace(config, reward=RewardSourceConfig(model=str(toy / "opinions")))
    assert model_problems(config) == []
    (problem,) = model_problems(replace(config, model=replace(config.model, vocab_size=999)))
    assert "the policy has model.vocab_size=999" in problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        deeper = replace(config.model, num_hidden_layers=4)
        (problem,) = model_problems(
            replace(config, model=deeper, engine=replace(config.engine, name="megatron", pipeline_parallel=4))
        )
    assert "must divide model.num_hidden_layers=2" in problem and problem.startswith("reward.model=")
    other = tmp_path / "other.model"
    other.write_bytes(b"another")
    vocabulary = replace(config.vocabulary, text_tokenizer=str(other))
    (problem,) = model_problems(replace(config, vocabulary=vocabulary))
    assert "has another text tokenizer" in problem
    too_few = shortened(replace(config, critic=CriticConfig(warmup_steps=80)), max_steps=0)
    with pytest.raises(ConfigError, match="leaves none of the run's"):
        ppo.main(too_few)


def test_a_prompt_without_room_for_an_answer_is_named(toy, tmp_path):
    config: PpoRunConfig = toy_ppo_config(toy, toy / "guess", tmp_path / "run")
    with pytest.raises(Exception, match="tokens before the answer; type training.sequence_length="):
        ppo.main(shortened(config, sequence_length=16))
