"""Typed, frozen configuration of runs that learn from preferences: reward models and DPO. Imports no torch."""

from dataclasses import dataclass, field

from pydantic import ConfigDict

from stepaudio_train.config.preferences import PreferenceDataConfig
from stepaudio_train.config.rlhf import DpoConfig, RewardLossConfig
from stepaudio_train.config.schema import EngineConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class PreferenceTrainingConfig(TrainingConfig):
    """Sizes and length of a run on preferences."""

    max_steps: int = 0
    """0: as many as data.epochs takes."""
    sequence_length: int = 4096
    """Tokens of a row; both documents of a pair lie in one."""
    micro_batch_rows: int = 1
    eval_batches: int = 64
    """Global batches of held-out pairs, the first of the file."""


@dataclass(frozen=True)
class PreferenceRunConfig(RunConfig):
    """What a reward model's run and a DPO run have in common."""

    __pydantic_config__ = _STRICT

    engine: EngineConfig = field(default_factory=lambda: EngineConfig(precision="auto"))
    training: PreferenceTrainingConfig = field(default_factory=PreferenceTrainingConfig)
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)


def _paper_optimizer() -> OptimizerConfig:
    """Rates of the paper's reward model (5.2)."""
    return OptimizerConfig(learning_rate=1.24e-5, min_learning_rate=6e-6, schedule="cosine")


@dataclass(frozen=True)
class RewardConfig(PreferenceRunConfig):
    """A reward model (paper 5.2): pairs of answers in, a model that scores answers out."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/reward"
    model: ModelConfig = field(default_factory=lambda: ModelConfig(value_head=True))
    optimizer: OptimizerConfig = field(default_factory=_paper_optimizer)
    loss: RewardLossConfig = field(default_factory=RewardLossConfig)


def _dpo_optimizer() -> OptimizerConfig:
    """The paper has no DPO. 5e-7 is Tulu 3's rate (arXiv 2411.15124), the cosine this project's choice."""
    return OptimizerConfig(learning_rate=5e-7, min_learning_rate=5e-8, schedule="cosine")


@dataclass(frozen=True)
class DpoRunConfig(PreferenceRunConfig):
    """Direct preference optimisation: pairs of answers in, a model that gives the better ones out."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/dpo"
    optimizer: OptimizerConfig = field(default_factory=_dpo_optimizer)
    loss: DpoConfig = field(default_factory=DpoConfig)
