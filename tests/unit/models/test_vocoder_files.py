"""A vocoder's files: they return, they bear the released names, and wrong ones are told."""

from pathlib import Path

import pytest
import torch

from stepaudio_train.config.vocoder import MelConfig, VocoderConfig
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import load_vocoder, load_vocoder_weights, save_vocoder
from stepaudio_train.models.decoder.weights import DecoderWeightError

TINY = VocoderConfig(mel=MelConfig(highest_hz=None), base_channels=16, f0_channels=8)


def test_a_vocoder_returns_with_its_sizes(tmp_path: Path):
    made = HiFTGenerator(TINY)
    save_vocoder(made, tmp_path)
    read = load_vocoder(tmp_path)
    assert read.config == TINY
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in read.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hift.json", "hift.safetensors"]


def test_the_released_file_is_a_plain_state_dict_with_released_names(tmp_path: Path):
    made = HiFTGenerator(TINY)
    save_vocoder(made, tmp_path, release=True)
    weights = torch.load(tmp_path / "hift.pt", weights_only=True)
    assert {"conv_pre.weight_g", "conv_pre.weight_v"} <= weights.keys()
    assert not any("parametrizations" in name for name in weights)
    other = HiFTGenerator(TINY)
    load_vocoder_weights(other, tmp_path / "hift.pt")
    assert torch.equal(other.conv_pre.weight, made.conv_pre.weight)


def test_files_that_do_not_fit_are_named(tmp_path: Path):
    with pytest.raises(DecoderWeightError, match=r"hift\.json"):
        load_vocoder(tmp_path)
    save_vocoder(HiFTGenerator(TINY), tmp_path)
    with pytest.raises(DecoderWeightError, match=r"hift\.safetensors: is not of the configured sizes"):
        load_vocoder_weights(HiFTGenerator(VocoderConfig(base_channels=32)), tmp_path / "hift.safetensors")
    (tmp_path / "hift.json").write_text('{"base_chanels": 16}')
    with pytest.raises(DecoderWeightError, match="did you mean base_channels"):
        load_vocoder(tmp_path)
