"""Typed, frozen configuration of runs that learn from rewards of their own answers: PPO and GRPO. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from stepaudio_train.config.rlhf import GaeConfig, GrpoConfig, PpoConfig
from stepaudio_train.config.rollout import RolloutConfig
from stepaudio_train.config.schema import EngineConfig, OptimizerConfig, RunConfig, TrainingConfig
from stepaudio_train.config.sft import ChatHistory, ChatTemplate
from stepaudio_train.config.shorthand import NamedByFile

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)

RuleName = Literal["exact", "word_accuracy", "pattern", "length", "hearing"]
"""Rewards that need no model; docs/rlhf.md says what each pays for."""


@dataclass(frozen=True)
class PromptDataConfig(NamedByFile):
    """Conversations to answer. `data=FILE` means `data.path=FILE`."""

    __pydantic_config__ = _STRICT

    path: str = ""
    """JSONL file, a conversation a line (docs/fine_tuning.md) or a preference a line (docs/preferences.md). A last
    answer is not shown to the policy: rules compare with it. Required."""
    template: ChatTemplate = "tts"
    """How turns are opened: as the model was fine-tuned."""
    history: ChatHistory = "text"
    """How earlier recordings of a dialogue go in: as their transcripts (paper 5.2.1), or as they are."""
    own_tags: tuple[str, ...] = ()
    """Instruction tags besides the paper's, of texts to be spoken."""
    speech_tokenizer: str | None = None
    """Directory of the speech tokenizer, for recordings that come without their codes."""
    prompts_per_iteration: int = 64
    """Prompts that are answered at a time, over all data-parallel ranks."""
    epochs: float = 1.0
    """How often the file is gone through. No effect when training.max_steps is given."""


@dataclass(frozen=True)
class RewardSourceConfig:
    """What an answer is paid for: a sum of weighted parts, at its last token."""

    __pydantic_config__ = _STRICT

    model: str | None = None
    """Run directory of `stepaudio run reward`, or its `export/`. None: rules alone."""
    model_weight: float = 1.0
    normalise: bool = True
    """The reward model's scores less their mean, by their standard deviation, both of the first iteration's answers:
    the level of its scores is free, and the weights of the parts mean something."""
    rules: dict[RuleName, float] = field(default_factory=dict)
    """Rule -> weight: `reward.rules.exact=1 reward.rules.length=0.1`. A weight of 0 measures without paying."""
    pattern: str | None = None
    """Regular expression that the rule `pattern` looks for in an answer's text."""
    max_words: int | None = None
    """Words up to which the rule `length` pays in full."""
    no_end_penalty: float = 1.0
    """Taken off the reward of an answer without its `<|EOT|>`."""


@dataclass(frozen=True)
class PolicyTrainingConfig(TrainingConfig):
    """Sizes and length of a run on rewards. A step is an update of the policy."""

    max_steps: int = 0
    """0: as many as data.epochs takes."""
    sequence_length: int = 4096
    """Tokens of a row; a prompt and rollout.max_new_tokens have to fit into one."""
    global_batch_rows: int = 0
    """Not for setting: rows follow from the lengths of the answers."""
    micro_batch_rows: int = 1
    epochs_per_iteration: int = 1
    """How often an iteration's answers are learned from."""
    minibatches: int = 1
    """Updates in each of these epochs, over as many answers each."""
    sample_every: int = 0
    """Steps between answers written to `samples/` with their rewards; also at the end. 0: none."""
    num_samples: int = 8
    """How many answers: the iteration's first ones."""

    @property
    def steps_per_iteration(self) -> int:
        return self.epochs_per_iteration * self.minibatches


def _critic_optimizer() -> OptimizerConfig:
    """The paper names no rate. 9e-6, constant, is InstructGPT's (arXiv 2203.02155, C.4)."""
    return OptimizerConfig(learning_rate=9e-6)


@dataclass(frozen=True)
class CriticConfig:
    """What tells the policy how good its answers can be expected to be."""

    __pydantic_config__ = _STRICT

    kind: Literal["own", "shared"] = "own"
    """own: a model of its own. shared: a value head on the policy (see loss.value_coefficient)."""
    init: str | None = None
    """Weights that an own critic begins with. None: the reward model's, or without one the policy's and a value head
    that says 0."""
    warmup_steps: int = 80
    """Steps in which an own critic learns and the policy does not (paper 5.2)."""
    optimizer: OptimizerConfig = field(default_factory=_critic_optimizer)
    """Of an own critic."""


@dataclass(frozen=True)
class PolicyRunConfig(RunConfig):
    """What PPO's and GRPO's runs have in common."""

    __pydantic_config__ = _STRICT

    engine: EngineConfig = field(default_factory=lambda: EngineConfig(precision="auto"))
    training: PolicyTrainingConfig = field(default_factory=PolicyTrainingConfig)
    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardSourceConfig = field(default_factory=RewardSourceConfig)
    loss: PpoConfig | GrpoConfig = field(default_factory=PpoConfig)
    judge_ranks: int = 0
    """The last ranks, which hold the reference and the reward model alone, in the engine's layout; the others hold
    policy and critic. 0: all ranks hold all models."""

    @property
    def has_reference(self) -> bool:
        """Whether the reference is a model of its own, and not the policy without its adapters."""
        return self.kl_coefficient > 0 and self.lora is None

    @property
    def answers_per_prompt(self) -> int:
        return 1

    @property
    def answers_per_iteration(self) -> int:
        """Over all data-parallel ranks."""
        return self.data.prompts_per_iteration * self.answers_per_prompt

    @property
    def kl_coefficient(self) -> float:
        """0: there is no reference."""
        return self.loss.kl_coefficient


def _ppo_optimizer() -> OptimizerConfig:
    """Rates of the paper's PPO (5.2)."""
    return OptimizerConfig(learning_rate=1e-6, min_learning_rate=2e-7, schedule="cosine")


@dataclass(frozen=True)
class PpoRunConfig(PolicyRunConfig):
    """Proximal policy optimisation (paper 5.2): prompts and a reward in, a policy that is rewarded more out."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/ppo"
    optimizer: OptimizerConfig = field(default_factory=_ppo_optimizer)
    loss: PpoConfig = field(default_factory=PpoConfig)
    gae: GaeConfig = field(default_factory=GaeConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)


def _grpo_optimizer() -> OptimizerConfig:
    """The paper has no GRPO. 1e-6, constant, is DeepSeekMath's (arXiv 2402.03300, 4.2)."""
    return OptimizerConfig(learning_rate=1e-6)


@dataclass(frozen=True)
class GrpoRunConfig(PolicyRunConfig):
    """Group-relative policy optimisation: PPO in which the other answers to a prompt take the critic's place."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/grpo"
    optimizer: OptimizerConfig = field(default_factory=_grpo_optimizer)
    loss: GrpoConfig = field(default_factory=GrpoConfig)

    @property
    def answers_per_prompt(self) -> int:
        return self.loss.group_size
