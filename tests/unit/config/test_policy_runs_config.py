"""Configurations of PPO and GRPO: the paper's figures, and what cannot be is refused before anything runs."""

from pathlib import Path

import pytest

from stepaudio_train.commands.evaluate import fine_tuning_data
from stepaudio_train.config.compose import load_config, read_config, save_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.paths import configs_dir
from stepaudio_train.config.policy_checks import grpo_run_problems, ppo_run_problems
from stepaudio_train.config.policy_runs import GrpoRunConfig, PpoRunConfig, PromptDataConfig
from stepaudio_train.config.preference_runs import RewardConfig
from stepaudio_train.rlhf.run import delayed_rate

RECIPES = {"ppo": (PpoRunConfig, ppo_run_problems), "grpo": (GrpoRunConfig, grpo_run_problems)}


def load(recipe: str, *overrides: str):
    return load_config(recipe, RECIPES[recipe][0], overrides, RECIPES[recipe][1])


def problems_of(recipe: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(recipe, *overrides)
    return str(caught.value)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides of a run whose files are all there."""
    init = tmp_path / "weights"
    init.mkdir()
    (init / "tokenizer.model").touch()
    (tmp_path / "my.jsonl").touch()
    return [f"model.init={init}", f"reward.model={init}", f"data={tmp_path / 'my.jsonl'}"]


@pytest.mark.parametrize("overrides", [[], ["experiment=ppo_130b_aqta"]])
def test_ppos_figures_are_the_papers(files, overrides, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64" if overrides else "1")
    config = load("ppo", *overrides, *files)
    rate_at = delayed_rate(config.optimizer, 180, config.critic.warmup_steps)
    assert [rate_at(step) for step in (1, 80)] == [0, 0], "the critic alone learns"
    assert rate_at(81) == pytest.approx(1e-6, rel=1e-3) and rate_at(180) == pytest.approx(2e-7)
    assert (config.loss.clip, config.loss.kl_coefficient, config.critic.kind) == (0.2, 0.05, "own")
    assert config.data.template == ("chat" if overrides else "tts")


def test_the_papers_ppo_goes_on_from_its_reward_models_second_phase():
    ppo = load_config("ppo", PpoRunConfig, ["experiment=ppo_130b_aqta"])
    second, first = (
        load_config("reward", RewardConfig, [f"experiment=reward_130b_{phase}"]) for phase in ("aqta", "tqta")
    )
    assert ppo.reward.model == second.run_dir and ppo.model.init == first.model.init


def test_every_experiment_is_tested():
    folder = configs_dir() / "experiment"
    assert {p.stem for p in folder.glob("*.yaml") if p.stem.startswith(("ppo_", "grpo_"))} == {"ppo_130b_aqta"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_that_is_wrong_is_told_together(recipe, tmp_path):
    message = problems_of(
        recipe,
        *("data=absent.jsonl", "data.epochs=0", "data.prompts_per_iteration=0", "reward.model=gone"),
        *("reward.rules={length:1}", "reward.pattern='('", "reward.no_end_penalty=-1", "rollout.temperature=0"),
        *("rollout.max_new_tokens=64", "training.sequence_length=64", "training.global_batch_rows=8"),
        *("training.eval_every=5", "training.epochs_per_iteration=0", "engine.tensor_parallel=2"),
    )
    for part in (
        *("data=absent.jsonl: no such file", "data.epochs=0.0: must be over 0", "type data.prompts_per_iteration=64"),
        *("reward.model=gone: no such folder", "type reward.max_words=40", "type reward.rules.pattern=1"),
        *("is no regular expression", "reward.no_end_penalty=-1.0: must be 0 or more", "type rollout.temperature=1"),
        *("type training.sequence_length=128", "type data.prompts_per_iteration=NUMBER", "no held-out loss"),
        *("training.epochs_per_iteration=0: must be at least 1", "type engine=megatron", "type model.init=DIR"),
    ):
        assert part in message, part
    assert "reward: nothing is paid for" in problems_of(recipe, f"model.init={tmp_path}")


def test_a_critic_that_cannot_be_is_refused(files):
    message = problems_of(
        "ppo",
        *files,
        *("critic.kind=shared", "critic.init=gone", "critic.optimizer.learning_rate=1e-5", "gae.gamma=2"),
        *("model.value_head=true", "loss.kl_as=loss", "loss.kl_coefficient=0", "training.minibatches=3"),
    )
    for part in (
        *("type critic.warmup_steps=0", "type critic.init=null", "set optimizer.* alone", "type gae.gamma=1.0"),
        *("follows from critic.kind", "type loss.kl_as=reward", "training.minibatches=3: must divide the 64 answers"),
    ):
        assert part in message, part
    assert "leaves none of training.max_steps=80" in problems_of("ppo", *files, "training.max_steps=80")
    assert load("ppo", *files, "critic.kind=shared", "critic.warmup_steps=0").critic.kind == "shared"


@pytest.mark.parametrize(
    "world_size, overrides, told",
    [
        (1, ["judge_ranks=1"], "type --nproc 2, or judge_ranks=0"),
        (2, ["judge_ranks=-1"], "judge_ranks=-1: must be 0"),
        (3, ["judge_ranks=2"], "of which engine.name=local takes one; type judge_ranks=1"),
        (3, ["judge_ranks=1", "engine=megatron", "engine.tensor_parallel=2"], "type judge_ranks=2"),
        (3, ["judge_ranks=2", "engine=megatron", "engine.tensor_parallel=2"], "number of processes, 1; type --nproc 2"),
        (
            2,
            ["judge_ranks=1", "reward.model=null", "reward.rules={exact:1}", "loss.kl_coefficient=0"],
            "there is neither a reward model nor a reference",
        ),
    ],
)
def test_ranks_that_cannot_be_set_apart_are_refused(files, monkeypatch, world_size, overrides, told):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert told in problems_of("ppo", *files, *overrides)


def test_policy_and_judges_each_have_a_layout_of_their_own(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load("ppo", *files, "judge_ranks=1").engine.name == "local"
    monkeypatch.setenv("WORLD_SIZE", "6")
    layout = ["judge_ranks=2", "engine=megatron", "engine.tensor_parallel=2"]
    assert load("grpo", *files, *layout).judge_ranks == 2


def test_a_group_is_several_answers(files):
    assert "type loss.group_size=8" in problems_of("grpo", *files, "loss.group_size=1", "model.value_head=true")
    assert load("grpo", *files, "loss.group_size=4", "training.minibatches=256").answers_per_iteration == 256


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_configuration_reads_back_equal(recipe, files, tmp_path):
    config = load(recipe, *files, "lora.rank=4", "reward.rules={exact:1,hearing:0.5}")
    save_config(config, tmp_path / "config.yaml")
    assert read_config(RECIPES[recipe][0], tmp_path / "config.yaml") == config


@pytest.mark.parametrize("config", [PpoRunConfig, GrpoRunConfig])
def test_a_policy_that_learned_from_rewards_is_asked_as_its_prompts_were_rendered(config, tmp_path):
    data = PromptDataConfig(path="prompts.jsonl", template="chat", history="audio", own_tags=("hoarse",))
    save_config(config(data=data), tmp_path / "config.yaml")
    asked = fine_tuning_data(tmp_path)
    assert (asked.template, asked.history, asked.own_tags) == ("chat", "audio", ("hoarse",))
    save_config(RewardConfig(), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="is no run directory of"):
        fine_tuning_data(tmp_path)
