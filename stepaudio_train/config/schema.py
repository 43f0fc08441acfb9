"""Typed, frozen configuration of a pretraining run. Imports no torch.

Defaults live in these fields alone; YAML files hold only what differs from them. `compose.py` turns Hydra's
composition into a `PretrainConfig`, `checks.py` holds the rules that span several fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)

Precision = Literal["auto", "fp32", "bf16"]
Task = Literal["text", "continuation", "interleaved", "asr", "tts", "image"]


@dataclass(frozen=True)
class Step1Config:
    """Step-1 decoder, with the field names of the released config.json (formats.md 1.1)."""

    __pydantic_config__ = _STRICT

    hidden_size: int = 160
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_attention_groups: int = 2
    """Key/value heads; every group serves num_attention_heads / num_attention_groups contiguous query heads."""
    vocab_size: int = 5760
    """Real vocabulary rows, without any padding for tensor parallelism. Must equal the vocabulary layout's total."""
    max_seq_len: int = 32768
    rms_norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of the initial weights; the residual projections use init_std / sqrt(2 * layers)."""
    value_head: bool = False
    """One more output: a number a token, from the hidden state after the final norm. Reward models and critics have it
    (paper 5.2); the released models have not."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig(Step1Config):
    """A model of a run: its sizes, and where its first weights come from."""

    init: str | None = None
    """Start from these weights: a run directory, a checkpoint of any layout or engine, or a Hugging Face directory. A
    smaller text-only vocabulary is grown by the audio ids. None: random weights."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) in place of full fine-tuning; the model's own weights stay as they are."""

    __pydantic_config__ = _STRICT

    rank: int = 16
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Which of a layer's matrices get an adapter."""


@dataclass(frozen=True)
class VocabularyConfig:
    """Sizes of the id ranges, in order: text (special, bytes, pieces), linguistic, semantic, reserved."""

    __pydantic_config__ = _STRICT

    text_size: int = 512
    linguistic_size: int = 1024
    semantic_size: int = 4096
    reserved_size: int = 128
    text_tokenizer: str | None = None
    """SentencePiece file. None where no text has to be encoded (made-up tokens)."""

    @property
    def total_size(self) -> int:
        return self.text_size + self.linguistic_size + self.semantic_size + self.reserved_size


Recompute = Literal["none", "selective", "full", "offload"]
"""What is computed again in the backward: nothing; attention; or whole layers, of which the inputs alone are kept, on
the device or (`offload`) in host memory."""


@dataclass(frozen=True)
class EngineConfig:
    """How the model is computed: one process (`local`), Megatron-Core's 3D parallelism, or DeepSpeed's ZeRO."""

    __pydantic_config__ = _STRICT

    name: Literal["local", "megatron", "deepspeed"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "fp32"
    """auto: bf16 where the device multiplies bf16 natively, else fp32. Master weights are always fp32."""
    tensor_parallel: int = 1
    """Ranks that share each matrix. Sequence parallelism comes with it whenever it is over 1."""
    context_parallel: int = 1
    """Ranks that share each row's tokens, for rows too long for one. `megatron` only."""
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved schedule). Needs pipeline_parallel > 1 when over 1."""
    recompute: Recompute = "none"
    fused_kernels: Literal["auto", "liger", "none"] = "auto"
    """Who computes norms and SwiGLU. auto: liger-kernel on CUDA where it is installed, but norms only of a hidden size
    of 8192 and more, below which PyTorch's are faster; PyTorch elsewhere. On a GPU `megatron` has a fused SwiGLU of its
    own."""
    distributed_optimizer: bool = True
    """Adam's states cut over the data-parallel ranks. `megatron` only; `deepspeed` always cuts them."""
    zero_stage: Literal[1, 2, 3] = 3
    """What DeepSpeed cuts over the ranks: 1 Adam's states, 2 gradients too, 3 weights too. `deepspeed` only."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in host memory: Adam's states, or (stage 3) weights too. `deepspeed` only."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Passed verbatim to the engine's own configuration (Megatron's TransformerConfig, DeepSpeed's JSON), and checked
    by it."""


SpeechLayout = Literal["interleaved", "linguistic", "semantic", "sequential"]
"""How the two streams of speech tokens become one: two linguistic and three semantic in turn, as in the paper; one
stream alone; or all linguistic tokens of a recording, then all semantic ones. The last three are for comparison."""


@dataclass(frozen=True)
class BlendEntry:
    """One source of samples and its share of the tokens."""

    __pydantic_config__ = _STRICT

    task: Task
    path: str
    """Folder of token shards written by `stepaudio tokenize`."""
    weight: float = 1.0
    """Share of the blend's tokens, relative to the other entries'. 0 leaves the entry out."""
    loss: Literal["all", "target"] = "all"
    """all: every token teaches. target: only what follows the task's input: the transcript in ASR, the audio in TTS."""


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from. The order of samples never depends on TP, PP or DP."""

    __pydantic_config__ = _STRICT

    source: Literal["synthetic", "shards"] = "synthetic"
    blend: dict[str, BlendEntry] = field(default_factory=dict)
    packing_buffer_samples: int = 512
    """Samples packed at a time. More fills better, and mixes more."""
    num_streams: int = 4
    """Independent sample streams that make up every global batch. The data-parallel size must divide it; a run can
    change its data-parallel size among the divisors and see the same batches."""
    num_workers: int = 0
    """Loader processes per stream on each rank; 0 loads in the training process."""
    speech_layout: SpeechLayout = "interleaved"
    """Other layouts than the paper's are for studies (`stepaudio run codebook_study`): such models do not speak."""
    synthetic_documents: Literal["packed", "single"] = "packed"
    """`synthetic` source only: several documents a row, or one."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and the learning rate over the steps."""

    __pydantic_config__ = _STRICT

    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    """Where the cosine ends. No effect on the constant schedule."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    embedding_learning_rate_multiplier: float = 1.0
    """On the embedding and the LM head; the paper's stages 1 and 2 use 5 (section 4.2)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to norms."""
    clip_grad_norm: float = 1.0


@dataclass(frozen=True)
class EarlyStopConfig:
    """End when held-out data stops getting better, with the best weights instead of the last."""

    __pydantic_config__ = _STRICT

    metric: str = "val/loss"
    """Which of metrics.jsonl's held-out losses; lower is better."""
    patience: int = 3
    """Evaluations in a row that are no better than the best one before the run ends."""
    min_delta: float = 0.0
    """Better means lower by more than this, in nats a token."""


@dataclass(frozen=True)
class TrainingConfig:
    """Sizes of the batch, length of the run, and what is written when."""

    __pydantic_config__ = _STRICT

    max_steps: int = 100
    sequence_length: int = 256
    """Tokens per packed row."""
    global_batch_rows: int = 8
    """Packed rows per optimizer step, over all data-parallel ranks."""
    micro_batch_rows: int = 4
    """Packed rows per forward on one data-parallel rank. Changes speed and memory only."""
    seed: int = 0
    log_every: int = 1
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves only at the end. SIGTERM always saves."""
    keep_checkpoints: int = 2
    async_checkpoint: bool = False
    """Write checkpoints behind the training where the engine supports it."""
    eval_every: int = 0
    """Steps between evaluations on `validation`; 0 evaluates only at the end, if there is any validation data."""
    eval_batches: int = 4
    early_stop: EarlyStopConfig | None = None
    """`training.early_stop.patience=3` turns it on; the best checkpoint is then kept besides the newest ones."""
    export_hf: bool = True
    """Write `export/` in Hugging Face layout at the end of the run."""


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides metrics.jsonl."""

    __pydantic_config__ = _STRICT

    tensorboard: bool = True
    wandb: Literal["auto", "offline", "online", "disabled"] = "auto"
    """auto: online when logged in, else offline."""
    wandb_project: str = "stepaudio"
    progress_bar: bool = True


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it learns from."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/run"
    model: ModelConfig = field(default_factory=ModelConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    lora: LoraConfig | None = None
    """Train adapters alone (`lora.rank=16` turns it on); None: all weights. Not on `megatron`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pretraining run: one stage of the paper's section 4.2, or a debug run."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/pretrain"
    data: DataConfig = field(default_factory=DataConfig)
    validation: DataConfig | None = None
    """Held-out data, same form as `data`."""
