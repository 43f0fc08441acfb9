"""Both encoders against plain formulas in float64, one clip at a time, and by the names and shapes of the released."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.audio.features import kaldi_fbank, log_mel, normalise_log_mel, num_kaldi_frames, pad_clips
from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer, SANMEncoder, num_encoder_frames
from stepaudio_train.tokenizers.semantic import SemanticTokenizer

SHAPES = Path(__file__).resolve().parents[4] / "shared" / "reference" / "shapes"
needs_shapes = pytest.mark.skipif(not SHAPES.is_dir(), reason="needs the released shapes in ../shared/reference/shapes")

LINGUISTIC = LinguisticConfig(
    num_mel_bins=8, hidden_size=16, num_heads=2, ffn_size=24, num_blocks=3, kernel_size=5, codebook_size=11
)
SEMANTIC = SemanticConfig(num_mel_bins=8, hidden_size=16, num_heads=2, num_blocks=2, codebook_size=11)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "positional" not in name:
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[T, D] each, head by head."""
    parts = []
    for q, k, v in zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True):
        parts.append(torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=1) @ v)
    return torch.cat(parts, dim=1)


def norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def plain_sanm(x: Tensor, weights: dict[str, Tensor], config: LinguisticConfig) -> Tensor:
    """SAN-M as it is streamed, chunk after chunk with caches, for one clip x [T, input]."""
    depth = x.shape[1]
    x = x * config.hidden_size**0.5
    for position in range(len(x)):
        for index in range(depth // 2):
            angle = (position + 1) * 10000 ** (-index / (depth // 2 - 1))
            x[position, index] += torch.sin(torch.tensor(angle, dtype=torch.float64))
            x[position, depth // 2 + index] += torch.cos(torch.tensor(angle, dtype=torch.float64))
    before = x.new_zeros(config.overlap_frames, depth)
    caches: list[list[Tensor]] = [[x.new_zeros(0, config.hidden_size)] * 2 for _ in range(config.num_blocks)]
    outputs = []
    for chunk in x.split(config.chunk_frames):
        window = torch.cat([before, chunk])
        before = window[-config.overlap_frames :]
        for layer, cache in enumerate(caches):
            name = "encoders0.0" if layer == 0 else f"encoders.{layer - 1}"
            window = plain_layer(window, weights, name, cache, config, residual=layer > 0)
        outputs.append(window[-len(chunk) :])
    return norm(torch.cat(outputs), weights, "after_norm", 1e-12)


def plain_layer(
    x: Tensor, weights: dict[str, Tensor], name: str, cache: list[Tensor], config: LinguisticConfig, residual: bool
) -> Tensor:
    """One layer for one window; the window's first frames replace the oldest in the cache of keys and values."""
    query, key, value = linear(
        norm(x, weights, f"{name}.norm1", 1e-12), weights, f"{name}.self_attn.linear_q_k_v"
    ).chunk(3, 1)
    taps = weights[f"{name}.self_attn.fsmn_block.weight"][:, 0]
    memory = value.clone()
    for t in range(len(x)):
        for tap in range(config.kernel_size):
            if 0 <= t + tap - config.kernel_size // 2 < len(x):
                memory[t] += taps[:, tap] * value[t + tap - config.kernel_size // 2]
    keys, values = torch.cat([cache[0], key]), torch.cat([cache[1], value])
    kept = config.look_back_chunks * config.chunk_frames
    cache[0] = torch.cat([cache[0], key[: len(x) - config.overlap_frames]])[-kept:]
    cache[1] = torch.cat([cache[1], value[: len(x) - config.overlap_frames]])[-kept:]
    attended = linear(attend(query, keys, values, config.num_heads), weights, f"{name}.self_attn.linear_out") + memory
    x = x + attended if residual else attended
    hidden = linear(norm(x, weights, f"{name}.norm2", 1e-12), weights, f"{name}.feed_forward.w_1").clamp(min=0)
    return x + linear(hidden, weights, f"{name}.feed_forward.w_2")


def plain_whisper(mel: Tensor, weights: dict[str, Tensor], config: SemanticConfig) -> Tensor:
    """The semantic encoder as published, for one clip mel [F, bins]."""
    x = mel.T[None]
    for name in ("conv1", "conv2"):
        x = F.gelu(F.conv1d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1))
    x = x[0].T + weights["positional_embedding"][: x.shape[2]]
    for layer in range(config.num_blocks):
        name = f"blocks.{layer}"
        inner = norm(x, weights, f"{name}.attn_ln", 1e-5)
        query, key, value = (linear(inner, weights, f"{name}.attn.{part}") for part in ("query", "key", "value"))
        x = x + linear(attend(query, key, value, config.num_heads), weights, f"{name}.attn.out")
        hidden = F.gelu(linear(norm(x, weights, f"{name}.mlp_ln", 1e-5), weights, f"{name}.mlp.0"))
        x = x + linear(hidden, weights, f"{name}.mlp.2")
    return x


def released_count(num_samples: int) -> int:
    """Tokens of the released front end, simulated: chunks of 240 ms, what it holds of frames, when it gives up."""
    stacked, done, held, chunk_samples = 0, 0, None, 3840
    for start in range(0, num_samples, chunk_samples):
        heard = min(start + chunk_samples, num_samples)
        final = heard - start < chunk_samples
        complete = 0 if heard < 400 else 1 + (heard - 400) // 160
        new, done = complete - done, complete
        if new == 0:
            break
        available = new + (3 if held is None else held)
        if available < 7:
            break
        if final:
            stacked += -(-(available - 3) // 6)
        else:
            whole = (available - 7) // 6 + 1
            stacked, held = stacked + whole, available - 6 * whole
    return stacked


def doubles(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in module.state_dict().items()}


def noises(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.3 * torch.randn(length, generator=generator) for length in lengths]


def test_sanm_is_the_plain_formula_whatever_the_padding():
    encoder = randomised(SANMEncoder(LINGUISTIC))
    clips = [clip.reshape(-1, LINGUISTIC.input_size) for clip in noises(30 * 56, 1 * 56, 4 * 56, 23 * 56)]
    with torch.inference_mode():
        together = encoder(*pad_clips(clips))
    for row, clip in zip(together, clips, strict=True):
        wanted = plain_sanm(clip.double(), doubles(encoder), LINGUISTIC)
        torch.testing.assert_close(row[: len(clip)].double(), wanted, atol=1e-4, rtol=1e-4)


def test_linguistic_ids_are_the_nearest_centroids():
    tokenizer = randomised(LinguisticTokenizer(LINGUISTIC))
    clips = noises(4000, 16000, 2000)
    ids, counts = tokenizer(*pad_clips(clips))
    for row, count, clip in zip(ids, counts.tolist(), clips, strict=True):
        fbank, frames = kaldi_fbank(clip[None], torch.tensor([len(clip)]), LINGUISTIC.num_mel_bins)
        assert count == released_count(len(clip))
        stacked, _ = tokenizer.stack(fbank, frames)
        x = (stacked[0].double() + tokenizer.cmvn_shift.double()) * tokenizer.cmvn_scale.double()
        hidden = plain_sanm(x, doubles(tokenizer.encoder), LINGUISTIC)
        distances = torch.cdist(hidden, tokenizer.centroids.double())
        assert row[:count].tolist() == distances.argmin(1).tolist()


def test_semantic_ids_are_the_nearest_codes_whatever_the_padding():
    tokenizer = randomised(SemanticTokenizer(SEMANTIC))
    clips = noises(4000, 16000, 2000)
    ids, counts = tokenizer(*pad_clips(clips))
    for row, count, clip in zip(ids, counts.tolist(), clips, strict=True):
        mel, frames = log_mel(clip[None], torch.tensor([len(clip)]), SEMANTIC.num_mel_bins)
        assert count == ((len(clip) // 160 + 1) // 2 + 1) // 2
        x = normalise_log_mel(mel, frames)[0].double()
        hidden = F.normalize(plain_whisper(x, doubles(tokenizer.encoder), SEMANTIC), dim=1)
        distances = torch.cdist(hidden, tokenizer.quantizer.codes.double())
        assert row[:count].tolist() == distances.argmin(1).tolist()


def test_linguistic_counts_are_the_released():
    published = {3840: 4, 7680: 8, 16000: 16, 32000: 33, 48000: 50, 64000: 67, 80000: 83, 128000: 133, 8000: 8}
    assert {samples: released_count(samples) for samples in published} == published
    lengths = torch.arange(0, 60000, 7)
    counts = num_encoder_frames(num_kaldi_frames(lengths), LinguisticConfig())
    assert counts.tolist() == [released_count(length) for length in lengths.tolist()]


@pytest.mark.parametrize(("samples", "codes"), [(480, 1), (16000, 25), (16160, 26), (480000, 750)])
def test_semantic_counts_are_the_released(samples, codes):
    tokenizer = randomised(SemanticTokenizer(SEMANTIC))
    _, counts = tokenizer(torch.zeros(1, samples), torch.tensor([samples]))
    assert counts.tolist() == [codes]


@needs_shapes
def test_full_sizes_have_the_released_names_and_shapes():
    with torch.device("meta"):
        linguistic = SANMEncoder(LinguisticConfig.released())
        semantic = SemanticTokenizer(SemanticConfig.released())
    for module, file in ((linguistic, "paraformer_encoder.json"), (semantic, "s3tokenizer_v1_25hz_torch.json")):
        wanted = json.loads((SHAPES / file).read_text(encoding="utf-8"))
        assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == wanted
