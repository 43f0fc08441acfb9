"""Fine-tuning's configuration: the paper's rates, a file by its name, and everything that is missing told at once."""

from pathlib import Path

import pytest

from stepaudio_train.config.checks import sft_problems
from stepaudio_train.config.compose import load_config, read_config, save_config
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.paths import configs_dir
from stepaudio_train.config.schema import EarlyStopConfig, PretrainConfig
from stepaudio_train.config.sft import SftConfig, with_max_steps, with_text_tokenizer

EXPERIMENTS = sorted(p.stem for p in (configs_dir() / "experiment").glob("sft_*.yaml"))
WORLD_SIZES = {"sft_3b_lora": 1, "sft_3b_zero3": 8, "sft_3b_megatron": 8, "sft_130b_chat": 64}


def load(*overrides: str) -> SftConfig:
    return load_config("sft", SftConfig, overrides)


def problems_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("sft", SftConfig, overrides, sft_problems)
    return str(caught.value)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides of a run whose files are all there."""
    init = tmp_path / "weights"
    init.mkdir()
    (init / "tokenizer.model").touch()
    (tmp_path / "my.jsonl").touch()
    return [f"model.init={init}", f"data={tmp_path / 'my.jsonl'}"]


def test_defaults_are_the_papers(files):
    config = load_config("sft", SftConfig, files, sft_problems)
    rates = config.optimizer
    assert (rates.learning_rate, rates.min_learning_rate, rates.schedule) == (2e-5, 2e-6, "cosine")
    assert (config.data.epochs, config.data.loss, config.training.max_steps) == (1.0, "last", 0)
    assert (config.model.num_hidden_layers, config.vocabulary.text_size) == (32, 65536)


def test_the_chat_models_rates_are_the_papers(files):
    config = load("experiment=sft_130b_chat", *files)
    rates = (config.optimizer.learning_rate, config.optimizer.min_learning_rate, config.optimizer.schedule)
    assert rates == (5.656e-5, 5.656e-6, "cosine")
    assert (config.data.template, config.data.loss, config.data.epochs) == ("chat", "last", 1.0)


def test_a_file_is_named_where_pretraining_has_a_group(files):
    config = load("data=synthetic", "validation=held_out.jsonl", "data.template=chat")
    assert (config.data.path, config.data.template, config.validation) == ("synthetic", "chat", "held_out.jsonl")
    assert load("+data=my.jsonl").data.path == "my.jsonl"
    assert load_config("pretrain", PretrainConfig, ["data=quickstart"]).data.num_streams == 2


def test_everything_missing_is_told_together(tmp_path):
    message = problems_of(
        "data=absent.jsonl", "validation=gone.jsonl", "data.epochs=0", "data.speech_tokenizer=nowhere"
    )
    for part in ("data=absent.jsonl: no such file", "validation=gone.jsonl", "data.epochs=0.0", "type model.init=DIR"):
        assert part in message
    assert "data.speech_tokenizer=nowhere: no such folder" in message
    assert "type data=FILE.jsonl" in problems_of(f"model.init={tmp_path}")
    assert "type vocabulary.text_tokenizer=FILE.model" in problems_of(f"model.init={tmp_path}")


def test_early_stop_is_turned_on_by_any_of_its_keys_and_says_what_it_needs(files, tmp_path):
    assert load().training.early_stop is None
    assert load("training.early_stop.patience=5").training.early_stop == EarlyStopConfig("val/loss", 5, 0.0)
    held_out = [f"validation={tmp_path / 'my.jsonl'}", "training.eval_every=10"]
    asked = "training.early_stop.metric=val/loss/task/aqta"
    config = load_config("sft", SftConfig, [*files, *held_out, asked], sft_problems)
    assert config.training.early_stop == EarlyStopConfig("val/loss/task/aqta")
    message = problems_of(*files, "training.early_stop.patience=0", "training.early_stop.metric=loss")
    for part in ("type validation=FILE.jsonl", "type training.eval_every=STEPS", "patience=0", "one of val/loss, "):
        assert part in message
    assert "min_delta=-1.0" in problems_of(*files, *held_out, "training.early_stop.min_delta=-1")


def test_samples_cannot_be_fewer_than_none(files):
    assert "type training.sample_every=0" in problems_of(*files, "training.sample_every=-1")
    assert "num_samples=0: must be" in problems_of(*files, "training.num_samples=0")


def test_misspelt_keys_are_refused(files):
    assert "did you mean data.template?" in problems_of(*files, "data.tmeplate=chat")
    assert "data.loss" in problems_of(*files, "data.loss=first")
    assert "training.max_steps=-1: must be at least 0" in problems_of(*files, "training.max_steps=-1")


def test_the_text_tokenizer_comes_with_the_weights(tmp_path):
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "export" / "tokenizer.model").touch()
    config = with_text_tokenizer(load(f"model.init={run}"))
    assert config.vocabulary.text_tokenizer == str(run / "export" / "tokenizer.model")
    given = load(f"model.init={run}", "vocabulary.text_tokenizer=mine.model")
    assert with_text_tokenizer(given) == given


def test_steps_come_from_the_epochs_unless_given():
    assert with_max_steps(load(), 12).training.max_steps == 12
    assert with_max_steps(load("training.max_steps=5"), 12).training.max_steps == 5


def test_saved_configuration_reads_back_equal(tmp_path, files):
    config = with_max_steps(load(*files, "lora.rank=4"), 3)
    save_config(config, tmp_path / "config.yaml")
    assert read_config(SftConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_shipped_experiments_lack_nothing_but_files(name, files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(WORLD_SIZES[name]))
    config = load_config("sft", SftConfig, [f"experiment={name}", *files], sft_problems)
    own_rates = config.lora is not None or name == "sft_130b_chat"
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (2e-5, "cosine") or own_rates


def test_every_experiment_is_tested():
    assert set(EXPERIMENTS) == set(WORLD_SIZES)
