"""A voice as a vector: CAM++ of an ONNX file, the small encoder and what it learns."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.speaker import SpeakerEncoderConfig
from stepaudio_train.models.decoder.speaker import (
    CachedEmbedding,
    CamPlusEmbedding,
    SmallSpeakerEncoder,
    SpeakerError,
    speaker_features,
)
from stepaudio_train.objectives.speaker import am_softmax

SMALL = SpeakerEncoderConfig(channels=16, dimension=24)


def write_encoder(path: Path, num_mel_bins: int = 80, dimension: int = 192) -> np.ndarray:
    """An ONNX file with CAM++'s interface: the mean over time of squared features, times a matrix."""
    matrix = np.random.default_rng(0).standard_normal((num_mel_bins, dimension)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["input", "input"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "matrix"], ["output"]),
    ]
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", "T", num_mel_bins])
    given = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", dimension])
    graph = helper.make_graph(nodes, "speaker", [taken], [given], [numpy_helper.from_array(matrix, "matrix")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))
    return matrix


def test_features_are_kaldis_of_unscaled_samples_without_their_mean():
    clip = speech_like(8000)
    filters = mel_filter_bank(257, 80, 20.0, 8000.0, 16000, mel_scale="kaldi", triangularize_in_mel_space=True)
    expected = spectrogram(
        clip.double().numpy(),
        window_function(400, "povey", periodic=False),
        400,
        160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=float(np.finfo(np.float32).eps),
        remove_dc_offset=True,
    ).T
    found = speaker_features(clip).numpy()
    assert found.shape == (48, 80)
    np.testing.assert_allclose(found, expected - expected.mean(axis=0), atol=5e-3)


def test_campplus_gets_the_features_and_gives_the_files_vector(tmp_path: Path):
    matrix = write_encoder(tmp_path / "campplus.onnx")
    clip = speech_like(20000)
    vector = CamPlusEmbedding(tmp_path / "campplus.onnx").embed(clip)
    assert vector.shape == (192,)
    expected = speaker_features(clip).square().mean(dim=0) @ torch.from_numpy(matrix)
    torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-3)


def test_files_that_are_no_speaker_encoder_are_named(tmp_path: Path):
    with pytest.raises(SpeakerError, match=r"none\.onnx: cannot be loaded"):
        CamPlusEmbedding(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(SpeakerError, match=r"text\.onnx: cannot be loaded"):
        CamPlusEmbedding(tmp_path / "text.onnx")
    write_encoder(tmp_path / "wide.onnx", num_mel_bins=128)
    with pytest.raises(SpeakerError, match=r"wide\.onnx: takes .*give campplus\.onnx"):
        CamPlusEmbedding(tmp_path / "wide.onnx")
    write_encoder(tmp_path / "long.onnx", dimension=512)
    with pytest.raises(SpeakerError, match="gives vectors of 512, not of 192"):
        CamPlusEmbedding(tmp_path / "long.onnx")
    assert CamPlusEmbedding(tmp_path / "long.onnx", dimension=None).embed(speech_like(9000)).shape == (512,)


def test_a_prompt_is_embedded_once_whatever_tensor_holds_it():
    class Counting:
        calls = 0

        def embed(self, waveform: Tensor) -> Tensor:
            self.calls += 1
            return waveform[:3].clone()

    inner = Counting()
    cached = CachedEmbedding(inner)
    clip, other = speech_like(4000, 1), speech_like(4000, 2)
    cached.embed(clip).zero_()  # what a caller does to the answer is his own
    assert torch.equal(cached.embed(clip.clone()), clip[:3])
    assert inner.calls == 1
    assert torch.equal(cached.embed(other), other[:3])
    assert inner.calls == 2


def test_the_encoder_is_small_and_its_vectors_have_length_one():
    encoder = SmallSpeakerEncoder(SpeakerEncoderConfig()).eval()
    assert sum(p.numel() for p in encoder.parameters()) < 250_000
    vector = encoder.embed(speech_like(16000))
    assert vector.shape == (192,)
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(SpeakerError, match=r"0\.1 s at least, and this is 0\.050 s"):
        encoder.embed(torch.zeros(800))
    assert torch.isfinite(encoder.embed(torch.zeros(1600))).all()


def test_a_saved_encoder_gives_the_same_vectors(tmp_path: Path):
    torch.manual_seed(0)
    encoder = SmallSpeakerEncoder(SMALL)
    encoder(torch.randn(4, 30, 80))  # running statistics of its own
    encoder.eval().save(tmp_path / "speaker.safetensors")
    loaded = SmallSpeakerEncoder.load(tmp_path / "speaker.safetensors")
    assert loaded.config == SMALL
    assert torch.equal(loaded.embed(speech_like(8000)), encoder.embed(speech_like(8000)))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "none.safetensors"):
        with pytest.raises(SpeakerError, match=f"{name}: cannot be loaded"):
            SmallSpeakerEncoder.load(tmp_path / name)


def test_the_margin_is_taken_from_the_own_cosine_alone():
    centres = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    embeddings = torch.tensor([[3.0, 4.0]])  # cosines 0.6 and 0.8
    loss = am_softmax(embeddings, centres, torch.tensor([0]), margin=0.2, scale=10.0)
    own, other = np.exp(10 * (0.6 - 0.2)), np.exp(10 * 0.8)
    assert float(loss) == pytest.approx(-np.log(own / (own + other)), rel=1e-5)
