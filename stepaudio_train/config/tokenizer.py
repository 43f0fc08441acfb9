"""Typed, frozen configuration of the speech tokenizers and of their training. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class LinguisticConfig:
    """SAN-M encoder and centroids. The released tokenizer is 512 wide, 50 blocks deep, with 1024 codes.

    The encoder works in chunks, as it is streamed: a chunk's frames see themselves, the frames before them that are
    computed once more along with the chunk (`overlap_frames`), and what attention keeps of earlier chunks.
    """

    __pydantic_config__ = _STRICT

    num_mel_bins: int = 80
    lfr_window: int = 7
    """Fbank frames put side by side in one encoder frame."""
    lfr_stride: int = 6
    """Fbank frames (10 ms) from one token to the next: 6 gives 16.7 tokens/s."""
    hidden_size: int = 128
    num_heads: int = 4
    ffn_size: int = 512
    num_blocks: int = 3
    kernel_size: int = 11
    """Taps of the memory block's depthwise convolution, in encoder frames."""
    codebook_size: int = 256
    """Centroids; at most the vocabulary's linguistic_size."""
    chunk_frames: int = 4
    """Encoder frames that come out together: 4 are 240 ms."""
    overlap_frames: int = 5
    """Frames in front of a chunk that are computed again with it."""
    look_back_chunks: int = 4
    """Chunks whose keys and values attention still sees."""

    @classmethod
    def released(cls) -> LinguisticConfig:
        """Sizes of the released linguistic tokenizer (Paraformer large, streaming)."""
        return cls(hidden_size=512, num_heads=4, ffn_size=2048, num_blocks=50, codebook_size=1024)

    @property
    def input_size(self) -> int:
        return self.num_mel_bins * self.lfr_window


@dataclass(frozen=True)
class SemanticConfig:
    """Whisper-style encoder and codebook. The released tokenizer is 1280 wide, 6 blocks deep, with 4096 codes."""

    __pydantic_config__ = _STRICT

    num_mel_bins: int = 80
    """128 in the released tokenizer."""
    hidden_size: int = 128
    num_heads: int = 4
    num_blocks: int = 3
    codebook_size: int = 256
    """Codes; at most the vocabulary's semantic_size."""
    max_positions: int = 1500
    """Tokens of the longest stretch encoded at once: 1500 are 60 s."""
    piece_tokens: int = 750
    """Recordings are cut into pieces of this many tokens, 30 s as released. The encoder sees a piece whole, so a stream
    gives its tokens when all of it has been heard."""
    context_tokens: int = 0
    """Tokens' worth of audio in front of a piece that the encoder sees along with it; none as released."""

    @classmethod
    def released(cls) -> SemanticConfig:
        """Sizes of the released semantic tokenizer (CosyVoice, 25 Hz)."""
        return cls(num_mel_bins=128, hidden_size=1280, num_heads=20, num_blocks=6, codebook_size=4096)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training features, so that codes follow the words and not the recording."""

    __pydantic_config__ = _STRICT

    speed: float = 0.1
    """Clips are played between 1 - speed and 1 + speed times as fast."""
    vocal_tract: float = 0.06
    """The mel axis is stretched by up to this share, as another vocal tract would."""
    equaliser_nats: float = 0.3
    """Standard deviation of a smooth random gain over the mel bins."""
    noise_probability: float = 0.3
    noise_floor_nats: tuple[float, float] = (8.0, 16.0)
    """Noise power under the clip's loudest bin, drawn between these."""
    time_masks: int = 1
    time_mask_frames: int = 6
    """Longest time mask, in frames of 10 ms."""
    mel_masks: int = 1
    mel_mask_bins: int = 8
    """Widest mel mask."""


@dataclass(frozen=True)
class EncoderTrainConfig:
    """Training of one encoder."""

    __pydantic_config__ = _STRICT

    steps: int = 1000
    batch_s: float = 8.0
    """Seconds of audio per step."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


@dataclass(frozen=True)
class SemanticLossConfig:
    """What the semantic codes are made to keep, beside the CTC loss of weight 1."""

    __pydantic_config__ = _STRICT

    spectrum: float = 1.0
    """Weight of the log-mel error (mean absolute, in Whisper's normalised units)."""
    commitment: float = 0.25
    """Weight of the squared distance between encoder frames and their codes."""
    unquantised_share: float = 0.3
    """Share of the steps before the codes start."""
    code_decay: float = 0.98
    """Share of a code's running average that a step keeps."""


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """A run that trains the text tokenizer and both speech tokenizers on one corpus."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/tokenizer"
    corpus: str = "corpora/prepared"
    """Output folder of `stepaudio prepare`; every recording with a transcript is used."""
    train_split: str = "train"
    held_out_split: str = "validation"
    """Where error rates are measured. Nothing is learned from it."""
    text_size: int = 512
    """Ids of the text tokenizer: 324 special and byte ids, then learned pieces."""
    texts: str | None = None
    """Text file whose lines the text tokenizer learns from besides the transcripts."""
    linguistic: LinguisticConfig = field(default_factory=LinguisticConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    linguistic_training: EncoderTrainConfig = field(default_factory=EncoderTrainConfig)
    semantic_training: EncoderTrainConfig = field(default_factory=EncoderTrainConfig)
    semantic_losses: SemanticLossConfig = field(default_factory=SemanticLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def tokenizer_problems(config: TokenizerTrainConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    problems = size_problems(config.linguistic, config.semantic)
    trainings = {"linguistic_training": config.linguistic_training, "semantic_training": config.semantic_training}
    for name, training in trainings.items():
        if training.steps < 1 or training.batch_s <= 0:
            problems.append(f"{name}: steps must be at least 1, batch_s over 0")
    if config.text_size <= 324:
        problems.append(f"text_size={config.text_size}: 324 ids are special pieces and bytes; type text_size=512")
    return problems


def size_problems(linguistic: LinguisticConfig, semantic: SemanticConfig) -> list[str]:
    """What is wrong with the sizes of the two encoders, a line each."""
    problems = []
    encoders: dict[str, tuple[LinguisticConfig | SemanticConfig, int]]
    encoders = {"linguistic": (linguistic, 1024), "semantic": (semantic, 4096)}
    for name, (encoder, most_codes) in encoders.items():
        multiple = 2 * encoder.num_heads
        if encoder.hidden_size % multiple:
            problems.append(
                f"{name}.hidden_size={encoder.hidden_size}: must be a multiple of twice {name}.num_heads="
                f"{encoder.num_heads}; type {name}.hidden_size={-(-encoder.hidden_size // multiple) * multiple}"
            )
        if not 2 <= encoder.codebook_size <= most_codes:
            problems.append(f"{name}.codebook_size={encoder.codebook_size}: must be 2 to {most_codes}")
    smallest = {"chunk_frames": 1, "overlap_frames": 0, "look_back_chunks": 1}
    for key, least in smallest.items():
        value = asdict(linguistic)[key]
        if value < least:
            problems.append(f"linguistic.{key}={value}: must be at least {least}")
    if problem := piece_problem(semantic):
        problems.append(f"semantic.{problem}")
    return problems


def piece_problem(semantic: SemanticConfig) -> str | None:
    """What is wrong with the rule by which recordings are cut, if anything."""
    pieces, context = semantic.piece_tokens, semantic.context_tokens
    if pieces < 1 or context < 0 or pieces + context > semantic.max_positions:
        return (
            f"piece_tokens={pieces}, context_tokens={context}: must be at least 1 and 0, and together at most "
            f"max_positions={semantic.max_positions}"
        )
    return None
