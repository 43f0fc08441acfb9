"""Deaf hacking, with and without its cure, as an experiment (paper 5.2). See docs/deaf_hacking.md.

    make quickstart
    stepaudio run deaf_hacking
    stepaudio run deaf_hacking base=runs/mine run_dir=runs/deaf ppo_steps=120

A policy is fine-tuned to answer spoken questions that it can hear, and to say so of those that it cannot. A reward
model learns from preferences that are right one by one, of which none rejects "I didn't catch that"; PPO finds out.
Then the deaf policy's answers to clear questions are mined, a second reward model learns from them too, and PPO begins
again from the same fine-tuned policy. Writes summary.json and report.html: how deaf each is to held-out questions.
Every part is a command; what was stopped goes on from there.
"""

import json
import sys
from pathlib import Path

from stepaudio_train.commands.parts import Parts, exclusive
from stepaudio_train.config.compose import quoted, run_recipe
from stepaudio_train.config.deaf_hacking import DeafHackingConfig, deaf_hacking_problems
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.evaluation.deaf_hacking_report import DeafHackingResults, write_deaf_hacking_report
from stepaudio_train.training.reference import fingerprint

STEPAUDIO = [sys.executable, "-m", "stepaudio_train.cli"]
NUM_PARTS = 16
WARMUP_SHARE = 1 / 16
"""Of PPO's steps, in which the critic learns alone."""


def main(config: DeafHackingConfig) -> None:
    run = Path(config.run_dir)
    with exclusive(run):
        try:
            _run_all(config, run)
        except UserError as error:
            sys.stderr.write(f"deaf_hacking: {error}\n")
            raise SystemExit(1) from None


def _run_all(config: DeafHackingConfig, run: Path) -> None:
    makes_base = (run / "base").is_dir() or not Path(config.base).is_dir()
    parts = Parts(run, NUM_PARTS + makes_base)
    base = _made_base(config, run, parts) if makes_base else Path(config.base)
    _require_base(base)
    _corpora(config, run, parts, base)
    _fine_tuning(config, run, parts, base)
    _round(config, run, parts, "hacked", "biased")
    _mining(config, run, parts)
    _round(config, run, parts, "cured", "cured")
    results = DeafHackingResults.read(run, parts.seconds)
    write_atomically(run / "summary.json", json.dumps(results.summary(), indent=1).encode())
    sys.stdout.write(f"{results.verdict()}\nreport: {write_deaf_hacking_report(results)}\n")


def _made_base(config: DeafHackingConfig, run: Path, parts: Parts) -> Path:
    """The quick start up to its fine-tuned model."""
    base = run / "base"
    sys.stdout.write(
        f"base={config.base}: no such folder; its parts are made first, in {base}, which takes as long as a quick "
        "start up to its fine-tuning\n"
    )
    settings = [f"run_dir={quoted(str(base))}", "until_fine_tuned=true", f"seed={config.seed}"]
    parts.run("base", [*STEPAUDIO, "run", "quickstart", *settings, f"device={config.device}"])
    return base


def _require_base(base: Path) -> None:
    needed = ("sft/export", "tokenizer/text.model", "instructions/train.jsonl", "instructions/test.jsonl")
    missing = [name for name in needed if not (base / name).exists()]
    if missing:
        raise UserError(
            f"base={base}: has no {', '.join(missing)}; type base=RUN of a quick start that has been fine-tuned, or "
            "make quickstart"
        )


def _corpora(config: DeafHackingConfig, run: Path, parts: Parts, base: Path) -> None:
    """Questions that can be heard and others, and the preferences of people."""
    made_of, tool = {"base": fingerprint(base / "sft" / "export")}, [sys.executable, "-m"]
    for split, number in (("train", config.conversations), ("test", config.held_out)):
        folder, seed = run / "hearing" / split, ["--seed", str(config.seed)]
        source = [f"{base}/instructions/{split}.jsonl", str(folder), "--limit", str(number)]
        codes = ["--speech-tokenizer", f"{base}/tokenizer"]
        parts.run(f"hearing_{split}", [*tool, "data_tools.make_hearing_corpus", *source, *codes, *seed], made_of)
        files = [f"{folder}/conversations.jsonl", f"{folder}/biased.jsonl"]
        parts.run(f"biased_{split}", [*tool, "data_tools.make_biased_preferences", *files, *seed])
    folder = run / "hearing" / "test"
    probes = [f"{folder}/conversations.jsonl", f"{folder}/probes.jsonl"]
    parts.run("probes", [*tool, "data_tools.make_deaf_probes", *probes])
    _join(folder, ("biased", "probes"), "held_out")


def _fine_tuning(config: DeafHackingConfig, run: Path, parts: Parts, base: Path) -> None:
    """The policy that both rounds begin with: it answers what it hears, and says so of what it does not, and at times
    of what it does."""
    folder = run / "hearing" / "train"
    answers = [f"{folder}/conversations.jsonl", f"{folder}/doubting.jsonl", "--share", f"{config.doubt_share:g}"]
    made = [sys.executable, "-m", "data_tools.make_doubting_answers", *answers, "--seed", str(config.seed)]
    parts.run("doubts", made)
    settings = [
        *_settings(config, run, "sft", "sft"),
        f"model.init={quoted(f'{base}/sft')}",
        f"vocabulary.text_tokenizer={quoted(f'{base}/tokenizer/text.model')}",
        f"data={quoted(f'{folder}/doubting.jsonl')}",
        f"data.epochs={config.sft_epochs:g}",
    ]
    parts.run("sft", [*STEPAUDIO, "run", "sft", *settings])
    _measure(config, run, parts, "sft")


def _round(config: DeafHackingConfig, run: Path, parts: Parts, policy: str, preferences: str) -> None:
    """A reward model from a file of preferences, and a policy that learns from it, measured on the way."""
    init, reward = f"model.init={quoted(f'{run}/sft')}", f"reward_{preferences}"
    settings = [
        *_settings(config, run, "reward", reward),
        init,
        f"data={quoted(f'{run}/hearing/train/{preferences}.jsonl')}",
        f"data.held_out={quoted(f'{run}/hearing/test/held_out.jsonl')}",
        f"data.epochs={config.reward_epochs:g}",
    ]
    parts.run(reward, [*STEPAUDIO, "run", "reward", *settings])
    settings = [
        *_settings(config, run, "ppo", policy),
        init,
        f"reward.model={quoted(f'{run}/{reward}')}",
        # The reward model's prompts, as in the paper: of every question one that is clear and three that are not.
        f"data={quoted(f'{run}/hearing/train/conversations.jsonl')}",
        f"training.max_steps={config.ppo_steps}",
        f"critic.warmup_steps={int(WARMUP_SHARE * config.ppo_steps)}",
        f"training.checkpoint_every={config.measure_every}",
    ]
    parts.run(policy, [*STEPAUDIO, "run", "ppo", *settings])
    _measure(config, run, parts, policy, "--checkpoints")


def _mining(config: DeafHackingConfig, run: Path, parts: Parts) -> None:
    """What the deaf policy answers to clear questions becomes rejected, beside the preferences of people."""
    folder = run / "hearing" / "train"
    asked = [f"{run}/hacked", f"{folder}/conversations.jsonl", "--output", f"{run}/hacked/answers", "--conditions"]
    drawn = ["clear", "--seed", str(config.seed), "--device", config.device]
    parts.run("answers", [*STEPAUDIO, "evaluate", "deafness", *asked, *drawn])
    files = [f"{run}/hacked/answers/answers.jsonl", f"{folder}/biased.jsonl", f"{folder}/mined.jsonl"]
    parts.run("mining", [*STEPAUDIO, "data", "mine-deaf", *files])
    _join(folder, ("biased", "mined"), "cured")


def _measure(config: DeafHackingConfig, run: Path, parts: Parts, policy: str, *options: str) -> None:
    """How deaf a policy is to held-out questions."""
    asked = [f"{run}/{policy}", f"{run}/hearing/test/conversations.jsonl", "--output", f"{run}/{policy}/heard"]
    drawn = ["--seed", str(config.seed), "--device", config.device]
    parts.run(f"heard_{policy}", [*STEPAUDIO, "evaluate", "deafness", *asked, *drawn, *options])


def _settings(config: DeafHackingConfig, run: Path, recipe: str, folder: str) -> list[str]:
    """What every run of a recipe is given."""
    return [
        f"experiment=deaf_hacking_{recipe}",
        f"run_dir={quoted(f'{run}/{folder}')}",
        f"engine.device={config.device}",
        f"training.seed={config.seed}",
    ]


def _join(folder: Path, names: tuple[str, ...], output: str) -> None:
    """Files behind each other, in one folder, from which they name their recordings."""
    content = b"".join((folder / f"{name}.jsonl").read_bytes() for name in names)
    write_atomically(folder / f"{output}.jsonl", content)


if __name__ == "__main__":
    run_recipe(main, DeafHackingConfig, "deaf_hacking", deaf_hacking_problems)
