"""The deaf-hacking experiment's settings: what is refused, and that its runs' configurations compose."""

import pytest

from stepaudio_train.config.compose import load_config
from stepaudio_train.config.deaf_hacking import DeafHackingConfig, deaf_hacking_problems
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.policy_runs import PpoRunConfig
from stepaudio_train.config.preference_runs import RewardConfig
from stepaudio_train.config.quickstart import QuickstartConfig, quickstart_problems
from stepaudio_train.config.sft import SftConfig


def test_settings_that_make_no_sense_are_all_named():
    wrong = ["ppo_steps=0", "sft_epochs=-1", "doubt_share=1.5", "reward_epochs=inf"]
    with pytest.raises(ConfigError) as told:
        load_config("deaf_hacking", DeafHackingConfig, wrong, deaf_hacking_problems)
    for part in ("type ppo_steps=40", "sft_epochs=-1", "doubt_share=1.5: must be 0 to 1", "reward_epochs=inf"):
        assert part in str(told.value)


def test_the_runs_have_one_model_and_its_vocabulary():
    recipes = {"sft": SftConfig, "reward": RewardConfig, "ppo": PpoRunConfig}
    configs = [load_config(name, kind, [f"experiment=deaf_hacking_{name}"]) for name, kind in recipes.items()]
    assert len({(c.model.hidden_size, c.model.vocab_size, c.vocabulary.text_size) for c in configs}) == 1
    assert [config.model.value_head for config in configs] == [False, True, False]
    assert [config.engine.name for config in configs] == ["local"] * 3


def test_a_corpus_that_is_not_fine_tuned_on_cannot_end_there():
    with pytest.raises(ConfigError, match="type until_fine_tuned=false"):
        load_config("quickstart", QuickstartConfig, ["corpus=mine", "until_fine_tuned=true"], quickstart_problems)
