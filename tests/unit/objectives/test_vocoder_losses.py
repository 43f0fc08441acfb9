"""The vocoder's losses by hand, and where their gradients go."""

import pytest
import torch

from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.config.vocoder import DiscriminatorConfig, MelConfig, VocoderConfig, VocoderLossConfig
from stepaudio_train.models.decoder.discriminators import VocoderDiscriminators
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.objectives.vocoder import (
    JudgedSpeech,
    deceiving_loss,
    discriminator_losses,
    feature_matching_loss,
    generator_losses,
    mel_loss,
    relativistic_loss,
    telling_apart_loss,
)

RECORDED = [torch.tensor([[1.0, 0.5]]), torch.tensor([[2.0]])]
GENERATED = [torch.tensor([[0.0, 0.5]]), torch.tensor([[-1.0]])]


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_least_squares():
    assert deceiving_loss(GENERATED).item() == pytest.approx((1 + 0.25) / 2 + 4)
    assert telling_apart_loss(RECORDED, GENERATED).item() == pytest.approx((0 + 0.25) / 2 + 1 + (0 + 0.25) / 2 + 1)


def test_features_are_summed_over_layers_and_discriminators():
    recorded = [[torch.tensor([1.0, 2.0]), torch.tensor([0.0])], [torch.tensor([5.0])]]
    generated = [[torch.tensor([1.0, 4.0]), torch.tensor([3.0])], [torch.tensor([4.5])]]
    assert feature_matching_loss(recorded, generated).item() == 2 * (1.0 + 3.0 + 0.5)


def test_relativistic_loss_counts_what_is_under_the_median():
    # Differences 0, 1, 2, 5 and 9: the median is 2, and those under it lie 2 and 1 below.
    preferred, other = [torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0])], [torch.ones(5)]
    assert relativistic_loss(preferred, other, limit=10).item() == (4 + 1) / 2
    assert relativistic_loss(preferred, other, limit=0.04).item() == pytest.approx(0.04)
    assert relativistic_loss(preferred * 2, other * 2, limit=0.04).item() == pytest.approx(0.08)


def test_relativistic_loss_of_equals_is_nothing():
    scores = [torch.zeros(2, 4, requires_grad=True)]
    loss = relativistic_loss(scores, [torch.ones(2, 4)], limit=0.04)
    loss.backward()
    assert loss.item() == 0
    assert scores[0].grad.isfinite().all()


def test_mel_loss_is_of_the_whole_band_or_up_to_a_limit():
    mel = MelConfig(highest_hz=4000.0)
    clip = noise(2, 4096)
    assert mel_loss(clip, clip, mel).item() == 0
    assert mel_loss(clip, 0.5 * clip, mel).item() == pytest.approx(0.6931, abs=1e-2)  # ln 2
    high = clip + 0.1 * torch.sin(torch.arange(4096) * (2 * torch.pi * 9000 / 22050))
    narrow = (decoder_log_mel(high, mel) - decoder_log_mel(clip, mel)).abs().mean()
    assert mel_loss(clip, high, mel) > 10 * narrow
    assert mel_loss(clip, high, mel, highest_hz=4000.0) == narrow


def test_the_sum_is_weighted():
    clip = noise(1, 2048)
    weights = VocoderLossConfig(mel=3.0, features=5.0, relativistic=7.0, relativistic_limit=1.0, f0=11.0)
    recorded = JudgedSpeech(clip, torch.tensor([[100.0, 0.0]]), RECORDED, [[torch.tensor([1.0])]])
    generated = JudgedSpeech(0.5 * clip, torch.tensor([[101.0, 3.0]]), GENERATED, [[torch.tensor([0.0])]])
    parts = {name: loss.item() for name, loss in generator_losses(recorded, generated, MelConfig(), weights).items()}
    assert parts["f0"] == 2.0
    assert parts["features"] == 2.0
    # Generated minus recorded: -1 and 0, whose lower median is -1; a single value is its own median.
    assert parts["relativistic"] == 0.0
    wanted = parts["adversarial"] + 3 * parts["mel"] + 5 * 2.0 + 11 * 2.0
    assert parts["loss"] == pytest.approx(wanted)
    told = {name: loss.item() for name, loss in discriminator_losses(RECORDED, GENERATED, weights).items()}
    assert told["loss"] == pytest.approx(told["adversarial"] + 7 * told["relativistic"])


def test_every_weight_of_the_vocoder_learns_and_the_pitch_from_its_loss_alone():
    torch.manual_seed(0)
    config = VocoderConfig(base_channels=8, f0_channels=8)
    judges = VocoderDiscriminators(DiscriminatorConfig(period_channels=(4, 8), spectrogram_channels=4))
    model, clip = HiFTGenerator(config), noise(2, 4096)
    made = model(decoder_log_mel(clip, config.mel), torch.Generator().manual_seed(0))
    recorded = JudgedSpeech(clip, torch.full((2, 16), 120.0), *judges(clip))
    generated = JudgedSpeech(made.waveform, made.f0_hz, *judges(made.waveform))
    parts = generator_losses(recorded, generated, config.mel, VocoderLossConfig())
    pitch = list(model.f0_predictor.parameters())
    sound = [weight for name, weight in model.named_parameters() if not name.startswith("f0_predictor")]
    (parts["loss"] - parts["f0"]).backward(retain_graph=True)
    assert all(weight.grad.abs().sum() > 0 for weight in sound)
    assert all(weight.grad is None or weight.grad.abs().sum() == 0 for weight in pitch)
    parts["f0"].backward()
    assert all(weight.grad.abs().sum() > 0 for weight in pitch)
