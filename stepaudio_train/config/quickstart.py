"""Typed, frozen configuration of the quick start. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class QuickstartConfig:
    """Recordings in, a pretrained and fine-tuned model that is heard and a report out, on two processes."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/quickstart"
    """Everything is written here. A run that was stopped goes on when it is started again."""
    corpus: str | None = None
    """What `stepaudio prepare` takes: a folder of transcribed recordings, or a manifest. None: an espeak-ng corpus."""
    corpus_minutes: float = 45.0
    """Length of the espeak-ng corpus. No effect with `corpus`."""
    instruction_scale: float = 1.0
    """Size of the corpus of conversations; 1 is about 9,000. No effect with `corpus`, which is not fine-tuned on."""
    heldout_speaker: str | None = None
    """No recording of this speaker is trained on; the report has an error rate of their own."""
    join_max: int | None = None
    """Training also joins 2 to this many recordings of a speaker. None: as many as last about `joined_s`, at most 4."""
    joined_s: float = 2.5
    """No effect where join_max is given."""
    speed_copies: tuple[float, ...] = ()
    """Training also gets copies at these speeds. They help a corpus of few minutes, and take time."""
    tokenizer_steps: int = 1600
    """Of each speech encoder."""
    stage1_steps: int = 50
    stage2_steps: int = 50
    stage3_steps: int = 900
    """The third stage is where the model learns to recognise and to speak."""
    sft_epochs: float = 5.0
    """How often fine-tuning goes through the conversations."""
    reward_steps: int = 120
    """Of the reward model. No effect with `corpus`."""
    ppo_steps: int = 32
    """Of the policy that learns from it, the critic's warm-up counted in. No effect with `corpus`."""
    flow_encoder_steps: int = 800
    """Of the speech decoder's flow, before its network learns."""
    flow_steps: int = 150
    """Of the flow's network."""
    vocoder_steps: int = 2000
    until_fine_tuned: bool = False
    """End behind the fine-tuning, without preferences, sound and report. Not with `corpus`."""
    minutes: float = 28.0
    """What all parts together may take. If the machine is too slow for that, stage 3 and what comes behind it get fewer
    steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there are two devices, one for each process."""
    seed: int = 0


def quickstart_problems(config: QuickstartConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    stages = ("tokenizer_steps", "stage1_steps", "stage2_steps", "stage3_steps")
    steps = (*stages, "reward_steps", "ppo_steps", "flow_encoder_steps", "flow_steps", "vocoder_steps")
    positive = ("corpus_minutes", "joined_s", "minutes", *steps)
    problems = [f"{key}={getattr(config, key)}: must be over 0" for key in positive if getattr(config, key) <= 0]
    if config.until_fine_tuned and config.corpus is not None:
        problems.append(
            f"until_fine_tuned=true: corpus={config.corpus} is not fine-tuned on; type until_fine_tuned=false"
        )
    if config.join_max is not None and config.join_max < 1:
        problems.append(f"join_max={config.join_max}: must be at least 1; type join_max=1 for no joining")
    return problems
