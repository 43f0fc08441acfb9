"""The paper's comparison of codebooks (section 4.4, Figure 4): linguistic tokens, semantic tokens, or both together.

    make quickstart
    stepaudio run codebook_study
    stepaudio run codebook_study data_from=runs/mine run_dir=runs/study seeds=3 steps=1000

Four models of the same size learn from the same recordings for the same number of steps: speech as linguistic tokens
alone, as semantic tokens alone, as both interleaved 2:3, and as one stream after the other. Writes summary.json,
curves.png and report.html: how well each predicts held-out speech, and how well it recognises it. About ten minutes on
two cores; what was stopped goes on from there.
"""

import json
import sys
from itertools import islice
from pathlib import Path

from stepaudio_train.commands.parts import Parts, exclusive
from stepaudio_train.config.codebook_study import CodebookStudyConfig, codebook_study_problems
from stepaudio_train.config.compose import quoted, run_recipe
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import SpeechLayout
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.token_shards import read_token_samples
from stepaudio_train.evaluation.codebook_report import LAYOUTS, StudyResults, write_study_report
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

_COUNTED_SAMPLES = 500
_ROW_MULTIPLE = 8


def main(config: CodebookStudyConfig) -> None:
    run = Path(config.run_dir)
    with exclusive(run):
        try:
            _run_all(config, run)
        except UserError as error:
            sys.stderr.write(f"codebook_study: {error}\n")
            raise SystemExit(1) from None


def _run_all(config: CodebookStudyConfig, run: Path) -> None:
    source = Path(config.data_from)
    text_tokenizer, tokens = source / "tokenizer" / "text.model", source / "tokens"
    for path in (text_tokenizer, tokens):
        if not path.exists():
            raise UserError(
                f"data_from={source}: has no {path.name}; type make quickstart, or data_from=RUN of another"
            )
    stepaudio = [sys.executable, "-m", "stepaudio_train.cli"]
    lengths = _row_lengths(config, tokens / "train", text_tokenizer)
    parts = Parts(run, total=2 * len(LAYOUTS) * config.seeds)
    for seed in range(config.seeds):
        for layout in LAYOUTS:
            model = run / f"{layout}_{seed}"
            settings = [
                f"experiment={config.experiment}",
                f"run_dir={quoted(str(model))}",
                f"vocabulary.text_tokenizer={quoted(str(text_tokenizer))}",
                f"data.speech_layout={layout}",
                f"validation.speech_layout={layout}",
                f"data.blend.continuation.path={quoted(f'{tokens}/train')}",
                f"data.blend.asr.path={quoted(f'{tokens}/train')}",
                f"validation.blend.continuation.path={quoted(f'{tokens}/validation')}",
                f"engine.device={config.device}",
                f"training.seed={seed}",
                f"training.max_steps={config.steps}",
                f"training.sequence_length={lengths[layout]}",
                f"optimizer.warmup_steps={config.steps // 12}",
            ]
            parts.run(f"{layout}_{seed}", [*stepaudio, "run", "pretrain", *settings])
            settings = [
                f"model_dir={quoted(f'{model}/export')}",
                f"tokens={quoted(str(tokens))}",
                f"output={quoted(f'{model}/evaluation')}",
                f"speech_layout={layout}",
                "likelihood_tasks=[continuation]",
            ]
            parts.run(f"{layout}_{seed}_evaluation", [*stepaudio, "run", "evaluate", *settings])
    results = StudyResults.read(run, config.seeds)
    write_atomically(run / "summary.json", json.dumps(results.summary(), indent=1).encode())
    sys.stdout.write(f"{results.verdict()}\nreport: {write_study_report(results)}\n")


def _row_lengths(config: CodebookStudyConfig, train: Path, text_tokenizer: Path) -> dict[SpeechLayout, int]:
    """Tokens a row in each layout, so that rows hold about the same recordings in all."""
    samples = list(islice(read_token_samples(train), _COUNTED_SAMPLES))
    text = TextTokenizer.from_file(text_tokenizer)
    counts = {layout: _count(Renderer(Vocabulary(text.text_size), text, layout), samples) for layout in LAYOUTS}
    whole = counts["interleaved"]
    return {
        layout: -(-config.sequence_length * count // (whole * _ROW_MULTIPLE)) * _ROW_MULTIPLE
        for layout, count in counts.items()
    }


def _count(renderer: Renderer, samples: list[TokenSample]) -> int:
    return sum(len(renderer.render(sample, task).ids) for sample in samples for task in ("continuation", "asr"))


if __name__ == "__main__":
    run_recipe(main, CodebookStudyConfig, "codebook_study", codebook_study_problems)
