"""The shipped pretraining configurations hold the paper's rates and ratios, and could run but for their data."""

import pytest

from stepaudio_train.config.checks import pretrain_problems
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.paths import configs_dir
from stepaudio_train.config.schema import PretrainConfig

PAPER = sorted(p.stem for p in (configs_dir() / "experiment").glob("pretrain_*.yaml"))


def load(name: str, *overrides: str) -> PretrainConfig:
    return load_config("pretrain", PretrainConfig, [f"experiment={name}", *overrides])


def shares(config: PretrainConfig) -> dict[str, float]:
    total = sum(entry.weight for entry in config.data.blend.values())
    return {name: entry.weight / total for name, entry in config.data.blend.items()}


def test_all_six_are_there():
    assert len(PAPER) == 6


@pytest.mark.parametrize("name", PAPER)
def test_only_data_weights_and_images_are_missing(name, monkeypatch):
    config = load(name)
    monkeypatch.setenv("WORLD_SIZE", "256")
    problems = pretrain_problems(config)
    allowed = ("no such f", "image data cannot be read yet")
    assert problems and all(any(reason in p for reason in allowed) for p in problems), problems


@pytest.mark.parametrize("size", ["130b", "3b"])
def test_rates_and_ratios_of_the_three_stages(size):
    one, two, three = (load(f"pretrain_{size}_stage{stage}") for stage in (1, 2, 3))
    assert shares(one) == {"continuation": 0.5, "text": 0.25, "image": 0.25}
    assert shares(two) == {"continuation": 0.25, "interleaved": 0.25, "text": 0.25, "image": 0.25}
    assert shares(three) == {
        "continuation": 0.1, "interleaved": 0.1, "asr": 0.1, "tts": 0.1, "text": 0.3, "image": 0.3,
    }  # fmt: skip
    assert [c.optimizer.learning_rate for c in (one, two, three)] == [2e-5] * 3
    assert [c.optimizer.embedding_learning_rate_multiplier for c in (one, two, three)] == [5, 5, 1]
    assert (three.optimizer.schedule, three.optimizer.min_learning_rate) == ("cosine", 5e-6)
    tokens = [
        c.training.max_steps * c.training.global_batch_rows * c.training.sequence_length for c in (one, two, three)
    ]
    assert tokens == pytest.approx([1.2e12, 0.8e12, 1.3e12], rel=1e-4)
    assert two.model.init == one.run_dir and three.model.init == two.run_dir
