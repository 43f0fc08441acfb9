"""Typed, frozen configuration of supervised fine-tuning. Imports no torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ConfigDict

from stepaudio_train.config.schema import EngineConfig, OptimizerConfig, RunConfig, TrainingConfig
from stepaudio_train.config.shorthand import NamedByFile

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)

ChatTemplate = Literal["tts", "tts_bos", "chat"]
AnswerLoss = Literal["last", "all"]
ChatHistory = Literal["text", "audio"]
ChatTask = Literal["asr", "tts", "tqta", "aqta", "taqta", "aqaa", "edit", "tool", "role_play"]
"""What a conversation teaches (paper 5). Q and A are the last question and answer, T text and A audio; `edit` turns a
recording into the same words said otherwise."""


@dataclass(frozen=True)
class SftDataConfig(NamedByFile):
    """Conversations to learn from. `data=FILE` means `data.path=FILE`."""

    __pydantic_config__ = _STRICT

    path: str = ""
    """JSONL file, a conversation a line (docs/fine_tuning.md). Required."""
    template: ChatTemplate = "tts"
    """How turns are opened, as the released models were: `<|BOT|> human` (tts: TTS-3B, EditX) or `<|BOT|>human`
    (chat: Chat). tts_bos: `<|BOT|><s> human`, which StepFun's own tts.py feeds TTS-3B."""
    loss: AnswerLoss = "last"
    """Which of a conversation's answers teach; the paper trains on the last one (5.2)."""
    history: ChatHistory = "text"
    """How earlier recordings of a dialogue go in: as their transcripts (paper 5.2.1), or as they are."""
    task_weights: dict[ChatTask, float] = field(default_factory=dict)
    """What a token of a task's answers counts, relative to the others' 1. Spoken answers have many more tokens than
    written ones, so that these hardly count otherwise: `task_weights={aqta:10}`."""
    own_tags: tuple[str, ...] = ()
    """Instruction tags besides the paper's: `own_tags=[whisper,"breathy 1-5"]`, the second with levels."""
    speech_tokenizer: str | None = None
    """Directory of the speech tokenizer, for recordings that come without their codes."""
    epochs: float = 1.0
    """How often the file is gone through. No effect when training.max_steps is given."""


@dataclass(frozen=True)
class SftTrainingConfig(TrainingConfig):
    """Sizes and length of a fine-tuning run."""

    max_steps: int = 0
    """0: as many as data.epochs takes."""
    sequence_length: int = 4096
    micro_batch_rows: int = 1
    sample_every: int = 0
    """Steps between answers to held-out conversations, written to `samples/`; also at the end. 0: none."""
    num_samples: int = 4
    """How many conversations are answered: the first ones of `validation`, or of `data` where there is none."""


def _paper_optimizer() -> OptimizerConfig:
    """Rates of the paper's TTS fine-tuning (5.1)."""
    return OptimizerConfig(learning_rate=2e-5, min_learning_rate=2e-6, schedule="cosine")


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """A fine-tuning run (paper 5.1, 5.2): conversations in, a model that answers out."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/sft"
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(precision="auto"))
    optimizer: OptimizerConfig = field(default_factory=_paper_optimizer)
    training: SftTrainingConfig = field(default_factory=SftTrainingConfig)
    data: SftDataConfig = field(default_factory=SftDataConfig)
    validation: str | None = None
    """JSONL file of held-out conversations; template, loss and speech tokenizer are those of `data`."""


C = TypeVar("C", bound=RunConfig)


def with_text_tokenizer(config: C) -> C:
    """`config` with vocabulary.text_tokenizer set: what was given, or else the file that came with the weights."""
    if config.vocabulary.text_tokenizer is not None or config.model.init is None:
        return config
    init = Path(config.model.init)
    found = [folder / "tokenizer.model" for folder in (init, init / "export")]
    given = next((str(path) for path in found if path.is_file()), None)
    return replace(config, vocabulary=replace(config.vocabulary, text_tokenizer=given))


def with_max_steps(config: C, steps_of_epochs: int) -> C:
    """`config` with training.max_steps set: what was given, or else the steps that data.epochs takes."""
    max_steps = config.training.max_steps or steps_of_epochs
    return replace(config, training=replace(config.training, max_steps=max_steps))
