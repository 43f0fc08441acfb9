"""`stepaudio export decoder`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from stepaudio_train.cli import main
from stepaudio_train.config.decoder import FlowConfig
from stepaudio_train.config.speaker import SpeakerEncoderConfig
from stepaudio_train.config.vocoder import VocoderConfig
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.flow_files import save_flow
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import save_vocoder
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.released.onnx_reading import read_semantic_onnx

FLOW = FlowConfig(
    hidden_size=32,
    ffn_size=32,
    num_blocks=1,
    decoder_channels=32,
    decoder_head_size=16,
    decoder_mid_blocks=1,
    start_time=0.0,
)


@pytest.fixture
def runs(tmp_path):
    torch.manual_seed(0)
    save_flow(FlowMatching(FLOW), tmp_path / "flow")
    save_vocoder(
        HiFTGenerator(VocoderConfig(base_channels=16, f0_channels=16, resblock_kernels=(3,))), tmp_path / "vocoder"
    )
    return tmp_path


def export(runs, *arguments: str, source: str = "flow", destination: str = "out") -> int:
    return main(["export", "decoder", str(runs / source), str(runs / destination), *arguments])


def test_a_decoder_is_exported_and_compared(runs, capsys):
    SmallSpeakerEncoder(SpeakerEncoderConfig(channels=8)).save(runs / "flow" / "speaker.safetensors")
    tokenizer = small_speech_tokenizer()
    tokenizer.save(runs / "tokenizer")
    parts = ["--vocoder", str(runs / "vocoder"), "--speech-tokenizer", str(runs / "tokenizer")]
    assert export(runs, *parts) == 0
    shown = capsys.readouterr().out
    assert "read again: samples equal" in shown and "give --speech-tokenizer" not in shown
    names = ["campplus.onnx", "cosyvoice.yaml", "flow.pt", "hift.pt", "speech_tokenizer_v1.onnx"]
    assert sorted(path.name for path in (runs / "out").iterdir())[1:] == names
    codes = read_semantic_onnx(runs / "out" / "speech_tokenizer_v1.onnx").quantizer.codes
    assert torch.equal(codes, tokenizer.semantic.quantizer.codes)
    # A released directory is a source too; what StepFun's code opens besides is taken over from it.
    assert export(runs, source="out", destination="again") == 0
    for name in ("campplus.onnx", "cosyvoice.yaml", "speech_tokenizer_v1.onnx"):
        assert (runs / "again" / name).read_bytes() == (runs / "out" / name).read_bytes()


def test_what_is_missing_is_said(runs, capsys):
    assert export(runs, "--vocoder", str(runs / "vocoder")) == 0
    assert "speech_tokenizer_v1.onnx is not there" in capsys.readouterr().out
    assert export(runs, source="out", destination="again") == 0
    assert export(runs, destination="third") == 2
    assert "hift.json" in capsys.readouterr().err
    assert export(runs, "--vocoder", str(runs / "vocoder")) == 2
    assert "out: exists already" in capsys.readouterr().err
    none = ["--vocoder", str(runs / "vocoder"), "--speech-tokenizer", str(runs / "none")]
    assert export(runs, *none, destination="fourth") == 2
    assert "none" in capsys.readouterr().err and not (runs / "fourth").exists()
