"""Configurations of reward models and DPO: the paper's rates, and what cannot be is refused before anything runs."""

from pathlib import Path

import pytest

from stepaudio_train.commands.evaluate import fine_tuning_data
from stepaudio_train.config.checks import dpo_run_problems, reward_run_problems
from stepaudio_train.config.compose import load_config, read_config, save_config
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.paths import configs_dir
from stepaudio_train.config.preference_runs import DpoRunConfig, RewardConfig
from stepaudio_train.config.preferences import PreferenceDataConfig
from stepaudio_train.config.sft import SftConfig, SftDataConfig, with_max_steps

RECIPES = {"reward": (RewardConfig, reward_run_problems), "dpo": (DpoRunConfig, dpo_run_problems)}
WORLD_SIZES = {"reward_130b_tqta": 64, "reward_130b_aqta": 64, "dpo_3b_lora": 1}


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
    return [f"model.init={init}", f"data={tmp_path / 'my.jsonl'}"]


@pytest.mark.parametrize("overrides", [[], ["experiment=reward_130b_tqta"], ["experiment=reward_130b_aqta"]])
def test_the_reward_models_rates_are_the_papers(files, overrides, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64" if overrides else "1")
    config = load("reward", *overrides, *files)
    rates = (config.optimizer.learning_rate, config.optimizer.min_learning_rate, config.optimizer.schedule)
    assert rates == (1.24e-5, 6e-6, "cosine")
    assert (config.data.epochs, config.training.max_steps, config.model.value_head) == (1.0, 0, True)
    assert config.data.template == ("chat" if overrides else "tts")


def test_the_papers_second_phase_begins_with_the_first_ones_result():
    sft, first, second = (
        load_config("reward", RewardConfig, [f"experiment=reward_130b_{phase}"]) for phase in ("tqta", "tqta", "aqta")
    )
    assert sft.model.init == "runs/sft_130b_chat" and second.model.init == first.run_dir


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_shipped_experiments_lack_nothing_but_files(name, files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(WORLD_SIZES[name]))
    load(name.partition("_")[0], f"experiment={name}", *files)


def test_every_experiment_is_tested():
    folder = configs_dir() / "experiment"
    assert {p.stem for p in folder.glob("*.yaml") if p.stem.startswith(("reward_", "dpo_"))} == set(WORLD_SIZES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_that_is_wrong_is_told_together(recipe, tmp_path):
    message = problems_of(
        recipe,
        *("data=absent.jsonl", "data.held_out=gone.jsonl", "data.epochs=0", "training.max_steps=-1"),
        *("training.early_stop.patience=2", "engine.tensor_parallel=2", "training.global_batch_rows=3"),
        "training.micro_batch_rows=2",
    )
    for part in (
        *("data=absent.jsonl: no such file", "data.held_out=gone.jsonl: no such file", "data.epochs=0.0"),
        *("type model.init=DIR", "training.max_steps=-1: must be at least 0", "type training.eval_every=STEPS"),
        *("type engine=megatron", "type training.global_batch_rows=4"),
    ):
        assert part in message, part
    assert "type vocabulary.text_tokenizer=FILE.model" in problems_of(recipe, f"model.init={tmp_path}")
    assert "type data.held_out=FILE.jsonl" in problems_of(recipe, "training.early_stop.patience=2")
    assert "must be one of val/loss\n" in problems_of(recipe, "training.early_stop.metric=val/loss/text") + "\n"


def test_settings_of_a_loss_that_cannot_be_are_told_under_their_keys(files):
    message = problems_of("dpo", *files, "loss.beta=0", "loss.target_margin=1", "model.value_head=true")
    for part in ("loss.beta=0.0: must be over 0", "type loss.form=simpo", "type model.value_head=false"):
        assert part in message
    message = problems_of("reward", *files, "loss.margin_scale=-1", "model.value_head=false")
    assert "type loss.margin_scale=0" in message and "type model.value_head=true" in message
    assert "did you mean loss.centring?" in problems_of("reward", *files, "loss.centering=1")


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_configuration_reads_back_equal(recipe, files, tmp_path):
    config = with_max_steps(load(recipe, *files, "lora.rank=4"), 3)
    assert config.training.max_steps == 3
    save_config(config, tmp_path / "config.yaml")
    assert read_config(RECIPES[recipe][0], tmp_path / "config.yaml") == config


def test_a_policy_that_learned_from_preferences_is_asked_as_they_were_rendered(tmp_path):
    data = PreferenceDataConfig(path="pairs.jsonl", template="chat", history="audio", own_tags=("hoarse",))
    save_config(DpoRunConfig(data=data), tmp_path / "config.yaml")
    asked = fine_tuning_data(tmp_path)
    assert (asked.template, asked.history, asked.own_tags) == ("chat", "audio", ("hoarse",))
    save_config(SftConfig(data=SftDataConfig(path="chats.jsonl", template="tts_bos")), tmp_path / "config.yaml")
    assert fine_tuning_data(tmp_path).template == "tts_bos"
