"""Configuration of preferences: a file by its name, and everything that is wrong told at once."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stepaudio_train.config.compose import from_mapping, load_config
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.preferences import PreferenceDataConfig, preference_data_problems


def test_the_defaults_are_sound(tmp_path: Path):
    (tmp_path / "p.jsonl").touch()
    assert preference_data_problems(PreferenceDataConfig(str(tmp_path / "p.jsonl"))) == []


def test_everything_wrong_is_told_together_with_what_to_type():
    wrong = {"held_out": "h.jsonl", "speech_tokenizer": "no/folder", "min_rating_difference": 0.0, "epochs": 0.0}
    told = preference_data_problems(PreferenceDataConfig("p.jsonl", **wrong), "preferences")
    assert [line.split("=")[0] for line in told] == ["preferences", *(f"preferences.{name}" for name in wrong)]
    assert "no such file" in told[0] and "type preferences.min_rating_difference=1" in told[3]
    assert preference_data_problems(PreferenceDataConfig())[0].startswith("data: required; type data=FILE.jsonl")
    assert preference_data_problems(PreferenceDataConfig(__file__, min_rating_difference=4.5))


def test_unknown_keys_and_wrong_types_are_refused():
    with pytest.raises(ConfigError, match="did you mean min_rating_difference"):
        from_mapping(PreferenceDataConfig, {"path": "x", "min_rating_diference": 1})
    with pytest.raises(ConfigError, match="template"):
        from_mapping(PreferenceDataConfig, {"path": "x", "template": "vicuna"})


@dataclass(frozen=True)
class Run:
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)


def test_a_file_stands_for_the_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "toy.yaml").write_text("defaults: [toy_defaults, _self_]\n")
    monkeypatch.setattr("stepaudio_train.config.compose.configs_dir", lambda: tmp_path)
    config = load_config("toy", Run, ["data=my.jsonl", "data.epochs=2"])
    assert (config.data.path, config.data.epochs) == ("my.jsonl", 2)
