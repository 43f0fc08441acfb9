"""The configuration: composed, typed, and refused with everything that is wrong."""

import pytest

from stepaudio_train.config.checks import pretrain_problems
from stepaudio_train.config.compose import load_config, read_config, save_config
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.paths import configs_dir
from stepaudio_train.config.schema import PretrainConfig


def load(*overrides: str) -> PretrainConfig:
    return load_config("pretrain", PretrainConfig, overrides)


def problems_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("pretrain", PretrainConfig, overrides, pretrain_problems)
    return str(caught.value)


def test_overrides_beat_experiment_beats_defaults():
    assert load().training.max_steps == 100
    assert load("experiment=debug").training.max_steps == 20
    config = load("experiment=debug", "training.max_steps=7", "engine=megatron", "engine.tensor_parallel=2")
    assert (config.training.max_steps, config.engine.name, config.engine.tensor_parallel) == (7, "megatron", 2)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_misspelt_keys_are_refused_with_a_suggestion(prefix):
    message = problems_of(f"{prefix}training.max_stpes=20", f"{prefix}optimizer.learnin_rate=1")
    assert "did you mean training.max_steps?" in message
    assert "did you mean optimizer.learning_rate?" in message


def test_misspelt_keys_inside_a_blend_entry():
    message = problems_of("data.blend.a.task=asr", "data.blend.a.path=x", "data.blend.a.wieght=1")
    assert "did you mean data.blend.a.weight?" in message


def test_wrong_types_are_told_together():
    message = problems_of("training.max_steps=ten", "training.micro_batch_rows=1.5", "engine.precision=fp8")
    assert all(key in message for key in ("training.max_steps", "training.micro_batch_rows", "engine.precision"))


def test_unknown_group_option_lists_the_known_ones():
    message = problems_of("model=step1_13b")
    assert "step1_130b" in message


def test_impossible_layouts_are_told_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    message = problems_of(
        "engine=megatron", "engine.tensor_parallel=4", "engine.pipeline_parallel=3", "training.global_batch_rows=6"
    )
    assert "--nproc 12" in message
    assert "num_attention_groups" in message
    assert "num_hidden_layers" in message
    assert "training.global_batch_rows=8" in message


def test_local_engine_takes_no_layout():
    assert "type engine=megatron" in problems_of("engine.tensor_parallel=2")


def test_image_data_is_refused_with_what_to_type():
    message = problems_of("data.source=shards", "data.blend.image.task=image", "data.blend.image.path=images")
    assert "type data.blend.image.weight=0" in message


def test_saved_configuration_reads_back_equal(tmp_path):
    config = load("experiment=debug", "engine.extra.foo=1")
    save_config(config, tmp_path / "config.yaml")
    assert read_config(PretrainConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("model", sorted(p.stem for p in (configs_dir() / "model").glob("*.yaml")))
def test_every_model_preset_composes(model):
    released = model in ("step1_1b", "step1_3b", "step1_130b")
    config = load(f"model={model}", f"vocabulary={'released' if released else 'small'}")
    assert pretrain_problems(config) == []
