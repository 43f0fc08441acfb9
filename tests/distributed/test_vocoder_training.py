"""Training of the vocoder on two processes: what they learn together is what one learns from the whole batch."""

import os
from pathlib import Path

import soundfile
import torch
import torch.distributed as dist

from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.vocoder import DiscriminatorConfig, VocoderConfig, VocoderLossConfig
from stepaudio_train.config.vocoder_training import VocoderOptimizerConfig, VocoderTrainConfig, VocoderTrainingConfig
from stepaudio_train.data.segments import FileRecordings, SegmentBatches
from stepaudio_train.engines.process_group import join_process_group
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.training.vocoder import HeldOutClips, VocoderLearner

CONFIG = VocoderTrainConfig(
    vocoder=VocoderConfig(base_channels=16, resblock_kernels=(3,), dilations=(1, 3), f0_channels=16, num_harmonics=2),
    discriminators=DiscriminatorConfig(
        periods=(2, 3), period_channels=(4, 8), resolutions=((256, 64, 256),), spectrogram_channels=4
    ),
    # The relativistic loss is about the median of a process's own scores.
    losses=VocoderLossConfig(relativistic=0.0),
    optimizer=VocoderOptimizerConfig(learning_rate=2e-3, average=0.9),
    training=VocoderTrainingConfig(batch_segments=2, segment_samples=2048),
    device="cpu",
)


def learned(corpus: str, rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    """The averaged weights and the last metrics after two steps on this process's share of each batch."""
    join_process_group(torch.device("cpu"))
    mel, training = CONFIG.vocoder.mel, CONFIG.training
    found = FileRecordings(corpus, mel.sample_rate_hz, sorted(str(path) for path in Path(corpus).glob("*.wav")))
    segments = SegmentBatches(found, mel, training.batch_segments, training.segment_samples, 0, rank, num_ranks)
    learner = VocoderLearner(CONFIG, HeldOutClips([], CONFIG, None), torch.device("cpu"))
    metrics = [learner.step(step, segments[step]) for step in (1, 2)]
    return learner.average.state_dict() | {name: torch.tensor(value) for name, value in metrics[-1].items()}


def learned_by_rank(corpus: str, num_ranks: int) -> dict[str, torch.Tensor]:
    return learned(corpus, int(os.environ["RANK"]), num_ranks)


def test_processes_that_share_a_batch_learn_what_one_learns_from_all_of_it(tmp_path: Path):
    for number in range(4):
        clip = (0.3 * speech_like(12000, number)).clamp(-1, 1)
        soundfile.write(tmp_path / f"{number}.wav", clip.numpy(), 16000)
    wanted = learned(str(tmp_path), 0, 1)
    dist.destroy_process_group()
    first, second = run_distributed(learned_by_rank, 2, str(tmp_path), 2)
    for name, tensor in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
