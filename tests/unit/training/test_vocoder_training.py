"""Training of the vocoder: it learns, it goes on bit for bit, and what is wrong is told."""

import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import recipes.vocoder as recipe
from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.schema import LoggingConfig
from stepaudio_train.config.vocoder import DiscriminatorConfig, VocoderConfig, VocoderLossConfig
from stepaudio_train.config.vocoder_training import (
    VocoderOptimizerConfig,
    VocoderTrainConfig,
    VocoderTrainingConfig,
    vocoder_train_problems,
)
from stepaudio_train.data.segments import FileRecordings, SegmentBatches
from stepaudio_train.engines.process_group import join_process_group
from stepaudio_train.models.decoder.vocoder_files import load_vocoder
from stepaudio_train.training import learning
from stepaudio_train.training.vocoder import HeldOutClips, VocoderLearner

CONFIG = VocoderTrainConfig(
    held_out_clips=2,
    vocoder=VocoderConfig(base_channels=16, resblock_kernels=(3,), dilations=(1, 3), f0_channels=16, num_harmonics=2),
    discriminators=DiscriminatorConfig(
        periods=(2, 3), period_channels=(4, 8), resolutions=((256, 64, 256),), spectrogram_channels=4
    ),
    optimizer=VocoderOptimizerConfig(learning_rate=2e-3, half_life_steps=100, average=0.9),
    training=VocoderTrainingConfig(
        max_steps=8,
        log_every=1,
        eval_every=4,
        checkpoint_every=100,
        batch_segments=2,
        segment_samples=2048,
        discriminators_from=3,
    ),
    logging=LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False),
    device="cpu",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(6):
        clip = (0.3 * speech_like(12000, number)).clamp(-1, 1)
        soundfile.write(folder / f"{number}.wav", clip.numpy(), 16000)
    return folder


@contextmanager
def alone():
    join_process_group(torch.device("cpu"))
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(corpus: Path, run_dir: Path, monkeypatch, **training: object) -> list[dict]:
    """A run of the recipe in this process; the lines of metrics.jsonl without the speed."""
    config = replace(CONFIG, corpus=str(corpus), run_dir=str(run_dir), training=replace(CONFIG.training, **training))
    monkeypatch.setattr(learning, "log_to_file", lambda folder, rank: None)
    recipe.main(config)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_s"} for line in lines]


def stop_at(monkeypatch, step: int) -> None:
    """A signal arrives in the middle of a step."""
    before = VocoderLearner.step

    def interrupted(self, number, batch):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, number, batch)

    monkeypatch.setattr(VocoderLearner, "step", interrupted)


@pytest.mark.parametrize("step", [2, 6], ids=["before the discriminators", "with the discriminators"])
def test_a_stopped_run_goes_on_bit_for_bit(corpus: Path, tmp_path: Path, monkeypatch, step: int):
    whole = train(corpus, tmp_path / "whole", monkeypatch)
    with monkeypatch.context() as context:
        stop_at(context, step)
        assert len(train(corpus, tmp_path / "parts", context)) == step
    assert not (tmp_path / "parts" / "hift.safetensors").is_file()
    # Lines behind the checkpoint, as of a run that was killed later, are done again.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": step + 1, "loss": 0.0}) + "\n")
    assert train(corpus, tmp_path / "parts", monkeypatch) == whole
    first, second = (load_file(tmp_path / name / "hift.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for folder in ("checkpoints", "samples"):
        files = sorted((tmp_path / "whole" / folder / "step_00000008").iterdir())
        assert files
        for path in files:
            assert path.read_bytes() == (tmp_path / "parts" / folder / "step_00000008" / path.name).read_bytes()


def test_some_steps_bring_held_out_speech_nearer(corpus: Path, tmp_path: Path, monkeypatch):
    lines = train(corpus, tmp_path, monkeypatch, max_steps=40, eval_every=5, discriminators_from=30, batch_segments=4)
    measured = {line["step"]: line["val/mel"] for line in lines if "val/mel" in line}
    assert measured[40] < 0.75 * measured[5]
    assert all(("loss/adversarial" in line) == (line["step"] > 30) for line in lines)
    names = sorted(path.name for path in (tmp_path / "samples" / "step_00000040").iterdir())
    assert names == [f"{number:02d}_{kind}.wav" for number in range(2) for kind in ("generated", "recorded")]
    with soundfile.SoundFile(tmp_path / "samples" / "step_00000040" / names[0]) as file:
        assert (file.samplerate, file.frames % CONFIG.vocoder.mel.hop_samples) == (22050, 0)
    assert load_vocoder(tmp_path).config == CONFIG.vocoder


def test_the_mel_of_a_segment_is_that_of_the_whole_recording(corpus: Path):
    config = CONFIG.vocoder.mel
    clip = speech_like(20000)
    with alone():
        learner = VocoderLearner(CONFIG, HeldOutClips([], CONFIG, None), torch.device("cpu"))
    segment, mel = learner._with_mel(clip[None, 512 : 512 + 8192])
    assert torch.equal(segment[0], clip[1024 : 1024 + 7168])
    torch.testing.assert_close(mel, decoder_log_mel(clip[None], config)[:, :, 4:32], atol=1e-4, rtol=1e-4)


def test_a_loss_that_is_not_finite_is_told(corpus: Path):
    config = replace(CONFIG, losses=VocoderLossConfig(mel=float("inf")))
    with alone():
        learner = VocoderLearner(config, HeldOutClips([], config, None), torch.device("cpu"))
        found = FileRecordings(str(corpus), 22050, [str(corpus / "0.wav")])
        with pytest.raises(UserError, match="step 1: loss is not finite"):
            learner.step(1, SegmentBatches(found, config.vocoder.mel, 2, 2048, 0)[1])


def test_all_that_is_wrong_is_told_at_once(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    wrong = [
        f"corpus={tmp_path}/none",
        "training.max_steps=0",
        "training.segment_samples=5000",
        "training.batch_segments=4",
        "optimizer.average=1.0",
        "optimizer.learning_rate=0",
        "vocoder.base_channels=17",
        "losses.highest_hz=12000",
    ]
    with pytest.raises(ConfigError) as told:
        load_config("vocoder", VocoderTrainConfig, wrong, vocoder_train_problems)
    message = str(told.value)
    for key in wrong:
        assert key.split("=")[0] in message
    assert "type training.segment_samples=5120" in message
    assert "type training.batch_segments=6" in message


def test_the_released_sizes_compose(tmp_path: Path):
    config = load_config(
        "vocoder", VocoderTrainConfig, ["experiment=vocoder_released", f"corpus={tmp_path}"], vocoder_train_problems
    )
    assert config.vocoder == VocoderConfig.released()
    assert config.discriminators == DiscriminatorConfig.full_size()
    assert config.training.discriminators_from == 0 and config.optimizer.half_life_steps is None
