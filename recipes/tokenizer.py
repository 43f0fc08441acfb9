"""Train the three tokenizers of a small model: text pieces, linguistic codes (16.7 Hz), semantic codes (25 Hz).

    stepaudio prepare recordings corpora/prepared
    stepaudio run tokenizer corpus=corpora/prepared run_dir=runs/tokenizer

About a minute and a half on two cores for an hour of speech: each encoder has a process of its own. The linguistic
encoder learns by CTC, then k-means names its frames; the semantic one learns codes that both recognise the words and
rebuild the spectrum (paper 3.1). Writes text.model, linguistic.safetensors, semantic.safetensors,
speech_tokenizer.json, metrics.jsonl and summary.json (error rates on held-out recordings, use of the codes).
"""

import json
import logging
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from stepaudio_train.audio.features import Features
from stepaudio_train.commands.parts import exclusive
from stepaudio_train.config.compose import read_config, run_recipe, save_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.tokenizer import TokenizerTrainConfig, tokenizer_problems
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.transcribed import clips, transcripts
from stepaudio_train.tokenizers.learning.corpus import ClipFeatures
from stepaudio_train.tokenizers.learning.linguistic_training import train_linguistic
from stepaudio_train.tokenizers.learning.optimisation import Report
from stepaudio_train.tokenizers.learning.semantic_training import train_semantic
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import (
    LINGUISTIC_FILE,
    SEMANTIC_FILE,
    SpeechTokenizer,
    save_settings,
    save_weights,
)
from stepaudio_train.tokenizers.text import train_text_tokenizer

log = logging.getLogger(__name__)

ENCODERS = ("linguistic", "semantic")
TEXT_FILE = "text.model"


def main(config: TokenizerTrainConfig) -> None:
    run = Path(config.run_dir)
    try:
        with exclusive(run):
            claim(run, config)
            if (run / "summary.json").is_file():
                sys.stdout.write(f"{run}: finished before\n{(run / 'summary.json').read_text(encoding='utf-8')}")
                return
            train_text(run, config)
            waiting = [name for name in ENCODERS if not (run / f"{name}.json").is_file()]
            with ProcessPoolExecutor(len(ENCODERS), multiprocessing.get_context("spawn"), die_with_parent) as workers:
                list(workers.map(train_encoder, waiting, [config] * len(waiting)))
            summarise(run, config)
    except UserError as error:
        sys.stderr.write(f"tokenizer: {error}\n")
        raise SystemExit(1) from None


def claim(run: Path, config: TokenizerTrainConfig) -> None:
    """Write the configuration into the run directory, or refuse one that holds another's."""
    saved = run / "config.yaml"
    if saved.is_file():
        if read_config(TokenizerTrainConfig, saved) != config:
            raise ConfigError([f"run_dir={run}: was made with other settings; type run_dir=ANOTHER_FOLDER"])
    else:
        save_config(config, saved)


def train_text(run: Path, config: TokenizerTrainConfig) -> None:
    """Learn text pieces from the transcripts, and from what else there is to read."""
    if not (run / TEXT_FILE).is_file():
        texts = [text for _, text, _ in transcripts(Path(config.corpus) / config.train_split)]
        if config.texts is not None:
            texts += Path(config.texts).read_text(encoding="utf-8").splitlines()
        train_text_tokenizer(texts, config.text_size, run / TEXT_FILE)


def train_encoder(name: str, config: TokenizerTrainConfig) -> None:
    """Train one of ENCODERS in this process, with its share of the cores; write its weights, then its metrics."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(ENCODERS)))
    run = Path(config.run_dir)
    training = config.linguistic_training if name == "linguistic" else config.semantic_training
    with tqdm(total=training.steps, desc=f"{name:<10}", position=ENCODERS.index(name), dynamic_ncols=True) as bar:
        report = reporter(bar, name, run / "metrics.jsonl")
        common = {"seed": config.seed, "device": config.device, "report": report}
        if name == "linguistic":
            data = features(config, LinguisticTokenizer(config.linguistic).features)
            trained, metrics = train_linguistic(config.linguistic, training, config.augment, *data, **common)
        else:
            data = features(config, SemanticTokenizer(config.semantic).features)
            losses = config.semantic_losses
            trained, metrics = train_semantic(config.semantic, training, losses, config.augment, *data, **common)
    save_weights(trained, run / (LINGUISTIC_FILE if name == "linguistic" else SEMANTIC_FILE))
    write_atomically(run / f"{name}.json", json.dumps(metrics, indent=1).encode())


def summarise(run: Path, config: TokenizerTrainConfig) -> None:
    """Join the parts to one speech tokenizer and say how good they are."""
    save_settings(run, config.linguistic, config.semantic)
    SpeechTokenizer.from_directory(run, "cpu")
    summary = {name: json.loads((run / f"{name}.json").read_text(encoding="utf-8")) for name in ENCODERS}
    content = json.dumps(summary, indent=1) + "\n"
    write_atomically(run / "summary.json", content.encode())
    sys.stdout.write(content)


def features(config: TokenizerTrainConfig, analyse: Features) -> tuple[ClipFeatures, ClipFeatures]:
    """What is learned from, and what is measured on."""
    train, held_out = (
        ClipFeatures.compute(clips(Path(config.corpus) / split), analyse)
        for split in (config.train_split, config.held_out_split)
    )
    return train, held_out


def reporter(bar: tqdm, name: str, metrics_file: Path) -> Report:
    """Shows the loss and writes a line of metrics.jsonl every ten steps. Both processes append whole lines."""

    def report(step: int, metrics: dict[str, float]) -> None:
        bar.update()
        if step % 10 == 0 or step == bar.total:
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
            with metrics_file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"tokenizer": name, "step": step, **metrics}) + "\n")

    return report


def die_with_parent() -> None:
    """End this process when the one that started it has ended, however that was."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    run_recipe(main, TokenizerTrainConfig, "tokenizer", tokenizer_problems)
