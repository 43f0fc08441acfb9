"""The discriminators: what each sees, shapes, sizes, and that they can learn to tell speech apart."""

from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.vocoder import DiscriminatorConfig, VocoderLossConfig
from stepaudio_train.models.decoder.discriminators import (
    PeriodDiscriminator,
    SpectrogramDiscriminator,
    VocoderDiscriminators,
)
from stepaudio_train.objectives.vocoder import discriminator_losses

SMALL = DiscriminatorConfig(
    periods=(2, 3), period_channels=(4, 8), resolutions=((256, 64, 128), (128, 32, 128)), spectrogram_channels=4
)


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_scores_and_features_of_every_discriminator():
    judged = VocoderDiscriminators(SMALL)(noise(2, 1000))
    assert [len(features) for features in judged.features] == [3, 3, 6, 6]
    # Folded: 500 rows of 2 and 334 of 3; a third of the rows after the first layer.
    assert [tuple(layer.shape) for layer in judged.features[0]] == [(2, 4, 167, 2), (2, 8, 167, 2), (2, 1, 167, 2)]
    assert [tuple(layer.shape) for layer in judged.features[1]] == [(2, 4, 112, 3), (2, 8, 112, 3), (2, 1, 112, 3)]
    # 1000 // hop + 1 frames of 129 and 65 bins, halved three times.
    assert tuple(judged.features[2][0].shape) == (2, 4, 16, 129)
    assert tuple(judged.features[2][-1].shape) == (2, 1, 16, 17)
    assert tuple(judged.features[3][-1].shape) == (2, 1, 32, 9)
    assert [tuple(scores.shape) for scores in judged.scores] == [(2, 334), (2, 336), (2, 272), (2, 288)]


def test_full_sizes():
    made = VocoderDiscriminators(replace(DiscriminatorConfig.full_size(), periods=(2,)))
    shapes = [tuple(conv.weight.shape) for conv in made.mpd[0].convs]
    assert shapes == [(32, 1, 5, 1), (128, 32, 5, 1), (512, 128, 5, 1), (1024, 512, 5, 1), (1024, 1024, 5, 1)]
    assert [conv.stride for conv in made.mpd[0].convs] == [(3, 1)] * 4 + [(1, 1)]
    assert [tuple(conv.weight.shape) for conv in made.mrd[0].convs] == [
        (32, 1, 3, 9),
        *[(32, 32, 3, 9)] * 3,
        (32, 32, 3, 3),
    ]


def test_a_column_holds_every_period_th_sample():
    discriminator = PeriodDiscriminator(3, (4, 8))
    waveform = noise(1, 300)
    changed = waveform.clone()
    changed[0, 1::3] += 1.0
    before, after = (discriminator(samples)[0].view(-1, 3) for samples in (waveform, changed))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_the_sign_of_a_waveform_is_not_in_its_spectrogram():
    discriminator = SpectrogramDiscriminator((256, 64, 128), 4)
    waveform = noise(1, 1000)
    torch.testing.assert_close(discriminator(waveform)[0], discriminator(-waveform)[0])


@pytest.mark.parametrize("num_samples", [1000, 1001])
def test_silence_has_a_gradient(num_samples):
    waveform = torch.zeros(1, num_samples, requires_grad=True)
    sum(scores.sum() for scores in VocoderDiscriminators(SMALL)(waveform).scores).backward()
    assert waveform.grad.isfinite().all()


def test_they_learn_to_tell_a_tone_from_noise():
    torch.manual_seed(0)
    made, weights = VocoderDiscriminators(SMALL), VocoderLossConfig()
    optimiser = torch.optim.Adam(made.parameters(), lr=2e-3)
    tone = 0.1 * torch.sin(torch.arange(2048) * 0.1).expand(2, -1)
    losses = []
    for _ in range(30):
        parts = discriminator_losses(made(tone).scores, made(noise(2, 2048)).scores, weights)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        losses.append(parts["adversarial"].item())
    assert losses[-1] < 0.5 * losses[0]
