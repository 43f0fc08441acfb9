"""Both speech tokenizers at their full released sizes against the packages that people run, with random weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.testing.reference_packages import funasr_cache, funasr_encoder, has_reference, reference_module
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.released.onnx_writing import write_semantic_onnx
from stepaudio_train.tokenizers.semantic import SemanticTokenizer

needs_funasr = pytest.mark.skipif(not has_reference("funasr"), reason="needs funasr; type: make setup")
needs_s3tokenizer = pytest.mark.skipif(not has_reference("s3tokenizer"), reason="needs s3tokenizer; type: make setup")


@pytest.fixture(scope="module")
def encoders():
    """FunASR's encoder, and ours with its weights."""
    torch.manual_seed(0)
    theirs = funasr_encoder(LinguisticConfig.released())
    ours = LinguisticTokenizer(LinguisticConfig.released()).encoder.eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def streamed(encoder: torch.nn.Module, frames: Tensor) -> Tensor:
    """FunASR's encoder over [1, T, 560] as StepFun calls it: chunk_size [0, 4, 5], four chunks looked back at."""
    cache = funasr_cache(LinguisticConfig.released())
    outputs = []
    for chunk in frames.split(4, dim=1):
        hidden, _, _ = encoder.forward_chunk(chunk.clone(), torch.tensor([chunk.shape[1]]), cache)
        outputs.append(hidden[:, -chunk.shape[1] :])
    return torch.cat(outputs, dim=1)


@needs_funasr
@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 33, 67])
@torch.inference_mode()
def test_the_linguistic_encoder_is_funasrs(encoders, length):
    theirs, ours = encoders
    frames = torch.randn(1, length, 560, generator=torch.Generator().manual_seed(length))
    wanted = streamed(theirs, frames)
    found = ours(frames, torch.tensor([length]))
    # The last norm makes every frame's deviation 1.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_funasr
@torch.inference_mode()
def test_the_linguistic_encoder_takes_clips_together(encoders):
    theirs, ours = encoders
    frames = torch.randn(3, 21, 560, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([21, 2, 12])
    found = ours(frames, lengths)
    for row, clip, length in zip(found, frames, lengths.tolist(), strict=True):
        wanted = streamed(theirs, clip[None, :length])[0]
        torch.testing.assert_close(row[:length], wanted, atol=1e-5, rtol=1e-5)
        assert not row[length:].any()


@pytest.fixture(scope="module")
def quantisers():
    """s3tokenizer's module, and ours with its weights; the codes lie among encoder frames, so that many are chosen."""
    torch.manual_seed(0)
    theirs = reference_module("s3tokenizer.model").S3Tokenizer("speech_tokenizer_v1_25hz").eval()
    ours = SemanticTokenizer(SemanticConfig.released()).eval()
    with torch.inference_mode():
        frames, _ = theirs.encoder(torch.randn(6, 128, 2800), torch.full((6,), 2800))
        codes = F.normalize(frames.flatten(0, 1)[:4096], dim=-1)
        theirs.quantizer._codebook.embed.copy_(codes + 3e-4 * torch.randn_like(codes))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@needs_s3tokenizer
@pytest.mark.parametrize("num_frames", [1, 48, 100, 101, 1000, 3000])
@torch.inference_mode()
def test_the_semantic_codes_are_s3tokenizers(quantisers, num_frames):
    theirs, ours = quantisers
    mel = torch.randn(1, 128, num_frames, generator=torch.Generator().manual_seed(num_frames))
    wanted, counts = theirs.quantize(mel, torch.tensor([num_frames]))
    hidden, found_counts = ours.encoder(mel.transpose(1, 2), torch.tensor([num_frames]))
    assert ours.quantizer.encode(hidden).tolist() == wanted.tolist()
    assert found_counts.tolist() == counts.tolist() == [((num_frames + 1) // 2 + 1) // 2]
    assert len(wanted.unique()) > counts.item() // 2


@needs_s3tokenizer
@torch.inference_mode()
def test_the_semantic_codes_do_not_depend_on_the_batch(quantisers):
    theirs, ours = quantisers
    lengths = torch.tensor([700, 33, 402])
    mel = torch.randn(3, 700, 128, generator=torch.Generator().manual_seed(0))
    mel = mel * (torch.arange(700)[None] < lengths[:, None])[:, :, None]
    hidden, counts = ours.encoder(mel, lengths)
    for row, clip, length, count in zip(hidden, mel, lengths.tolist(), counts.tolist(), strict=True):
        wanted, _ = theirs.quantize(clip[None, :length].transpose(1, 2), torch.tensor([length]))
        assert ours.quantizer.encode(row[:count]).tolist() == wanted[0].tolist()


@needs_s3tokenizer
def test_s3tokenizer_reads_the_onnx_that_is_written(tmp_path):
    torch.manual_seed(0)
    config = SemanticConfig(num_mel_bins=16, hidden_size=64, num_heads=4, num_blocks=2, codebook_size=40)
    ours = SemanticTokenizer(config)
    ours.quantizer.codes.normal_()
    write_semantic_onnx(ours, tmp_path / "speech_tokenizer_v1.onnx")
    module = reference_module("s3tokenizer.model")
    sizes = module.ModelConfig(
        n_mels=16, n_audio_state=64, n_audio_head=4, n_audio_layer=2, n_codebook_size=40, n_audio_ctx=1500
    )
    theirs = module.S3Tokenizer("speech_tokenizer_v1_25hz", sizes)
    theirs.init_from_onnx(str(tmp_path / "speech_tokenizer_v1.onnx"))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
