"""Typed, frozen configuration of the speech decoder's flow matching. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
NORM_GROUPS = 8
"""Groups of the decoder's group norms, as released."""


@dataclass(frozen=True)
class FlowConfig:
    """From tokens to a mel spectrum. The defaults are 3.4 million weights, half a million of them the embedding."""

    __pydantic_config__ = _STRICT

    vocab_size: int = 5120
    """Audio ids, counted from the first linguistic one: 1024 linguistic, then 4096 semantic."""
    hidden_size: int = 96
    """Of the embedding and the encoder."""
    num_heads: int = 2
    ffn_size: int = 192
    num_blocks: int = 2
    dropout: float = 0.0
    """In the encoder. The decoder has none, as released."""
    decoder_channels: int = 128
    decoder_heads: int = 2
    decoder_head_size: int = 32
    decoder_transformers: int = 1
    """Transformer blocks behind each ResNet block."""
    decoder_mid_blocks: int = 1
    """ResNet blocks at half the frame rate, between the two on the way down and the two on the way up."""
    speaker_size: int = 192
    num_mel_bins: int = 80
    sample_rate_hz: int = 22050
    hop_samples: int = 256
    """From one mel frame to the next."""
    token_rate_hz: float = 41.667
    """Tokens of both kinds a second. The released file rounds 16.667 + 25 so, and frames are counted from it."""
    start_time: float = 0.5
    """Where a mel begins between noise (0, as released) and mel (1): at so much of the encoder's own mel, the rest
    noise (shallow diffusion, arXiv 2105.02446). The network learns the times behind it alone, which takes minutes."""

    @classmethod
    def released(cls) -> FlowConfig:
        """Sizes of the released TTS-3B decoder (formats.md 5.1): 105,399,040 weights."""
        return cls(
            hidden_size=512,
            num_heads=8,
            ffn_size=2048,
            num_blocks=6,
            dropout=0.01,
            decoder_channels=256,
            decoder_heads=8,
            decoder_head_size=64,
            decoder_transformers=4,
            decoder_mid_blocks=12,
            start_time=0.0,
        )

    def num_frames(self, num_tokens: int) -> int:
        """Mel frames of so many tokens, rounded down as the released program does."""
        return int(num_tokens / self.token_rate_hz * self.sample_rate_hz / self.hop_samples)


@dataclass(frozen=True)
class FlowSolverConfig:
    """How a mel spectrum is drawn from a trained flow; the defaults are the released program's."""

    __pydantic_config__ = _STRICT

    num_steps: int = 10
    """Euler steps from noise to mel. A mel that begins later (`FlowConfig.start_time`) takes its share of them."""
    guidance: float = 0.7
    """Weight of classifier-free guidance; 0 leaves it out and halves the work."""
    seed: int = 0
    """Of the noise. Every clip's noise begins anew with it, so that neighbours in a batch change nothing."""


@dataclass(frozen=True)
class FlowStreamConfig:
    """Sizes of the pieces in which a mel spectrum is streamed. Multiples of 5 end with whole groups of tokens."""

    __pydantic_config__ = _STRICT

    chunk_tokens: int = 25
    """Tokens whose frames come out together: 25 are 0.6 s."""
    look_ahead_tokens: int = 10
    """Tokens behind a chunk that it waits for. The first frames come when chunk and look-ahead are there."""
    history_tokens: int = 100
    """Tokens before a chunk that it is conditioned on, with the frames that came out for them. Bounds the work."""


def flow_problems(config: FlowConfig) -> list[str]:
    """What is wrong with the sizes of a flow, a line each."""
    counts = {key: value for key, value in asdict(config).items() if key not in ("dropout", "start_time")}
    problems = [f"{key}={value}: must be over 0" for key, value in counts.items() if value <= 0]
    if problems:
        return problems
    multiple = 2 * config.num_heads
    if config.hidden_size % multiple:
        problems.append(
            f"hidden_size={config.hidden_size}: must be a multiple of twice num_heads={config.num_heads}; type "
            f"hidden_size={-(-config.hidden_size // multiple) * multiple}"
        )
    if config.decoder_channels % NORM_GROUPS:
        problems.append(
            f"decoder_channels={config.decoder_channels}: must be a multiple of {NORM_GROUPS}; type "
            f"decoder_channels={-(-config.decoder_channels // NORM_GROUPS) * NORM_GROUPS}"
        )
    if not 0 <= config.dropout < 1:
        problems.append(f"dropout={config.dropout}: must be 0 or more and under 1")
    if not 0 <= config.start_time < 1:
        problems.append(f"start_time={config.start_time}: must be 0 (noise) or more and under 1; type start_time=0.5")
    if config.num_frames(1) < 1:
        problems.append(
            f"token_rate_hz={config.token_rate_hz}: a token must last a mel frame at least; type a lower rate, or "
            f"fewer hop_samples than {config.hop_samples}"
        )
    return problems


def flow_inference_problems(solver: FlowSolverConfig, stream: FlowStreamConfig) -> list[str]:
    """What is wrong with the way a mel spectrum is drawn or streamed, a line each."""
    problems = []
    if solver.num_steps < 1:
        problems.append(f"num_steps={solver.num_steps}: must be at least 1; type num_steps=10")
    if solver.guidance < 0:
        problems.append(f"guidance={solver.guidance}: must not be under 0; type guidance=0.7")
    if stream.chunk_tokens < 1:
        problems.append(f"chunk_tokens={stream.chunk_tokens}: must be at least 1; type chunk_tokens=25")
    for key, value in {"look_ahead_tokens": stream.look_ahead_tokens, "history_tokens": stream.history_tokens}.items():
        if value < 0:
            problems.append(f"{key}={value}: must not be under 0")
    return problems
