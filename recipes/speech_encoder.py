"""Train or adapt one of the two speech encoders at any size, on any number of processes (paper 3.1).

    stepaudio prepare recordings corpora/prepared
    stepaudio run speech_encoder encoder=semantic corpus=corpora/prepared run_dir=runs/speech --nproc 8
    stepaudio run speech_encoder encoder=linguistic corpus=corpora/prepared run_dir=runs/speech --nproc 8
    stepaudio run speech_encoder encoder=linguistic init=Step-Audio-Tokenizer training.learning_rate=1e-4 --nproc 8

The linguistic encoder learns by CTC and attention on transcripts, then mini-batch k-means places its centroids; the
semantic one learns codes (moving averages, unused ones brought back) that keep words and spectrum. With both encoders
in one run_dir, or with init, that directory is a speech tokenizer. Stopped, the same command goes on from the last
checkpoint, with the same losses.
"""

import json
import logging
import signal
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import peak_normalise
from stepaudio_train.audio.features import pad_clips
from stepaudio_train.config.compose import read_config, run_recipe, save_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.speech_encoder import SpeechEncoderConfig, speech_encoder_problems
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.data.transcribed import ClipStream, clips, transcripts
from stepaudio_train.engines.process_group import join_process_group, own_device
from stepaudio_train.tokenizers.learning.augment import corrupt, warp
from stepaudio_train.tokenizers.learning.clustering import MiniBatchKMeans, kmeans
from stepaudio_train.tokenizers.learning.corpus import Clip, ClipFeatures
from stepaudio_train.tokenizers.learning.linguistic_training import LinguisticObjective, set_cmvn
from stepaudio_train.tokenizers.learning.optimisation import Optimiser, Term, combine
from stepaudio_train.tokenizers.learning.parallel import all_sum, from_first
from stepaudio_train.tokenizers.learning.recognition import Alphabet, read_clips, word_error_rate, words_of
from stepaudio_train.tokenizers.learning.semantic_training import SemanticObjective, altered_mel
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer
from stepaudio_train.tokenizers.weight_files import (
    LINGUISTIC_FILE,
    SEMANTIC_FILE,
    load_weights,
    save_settings,
    save_weights,
)

log = logging.getLogger("speech_encoder")

_STATISTICS_BATCHES = 20
"""Batches that mean and deviation of the features, and the first centroids, are computed from."""


def main(config: SpeechEncoderConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = own_device(config.device)
    join_process_group(device)
    try:
        _EncoderRun(config, device).run()
    except UserError as error:
        sys.stderr.write(f"speech_encoder: {error}\n")
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()


class _EncoderRun:
    """One process's part of a run."""

    def __init__(self, config: SpeechEncoderConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._folder = Path(config.run_dir)
        self._checkpoint = self._folder / f"{config.encoder}.checkpoint.pt"
        self._stopped = torch.zeros(1)
        if self._rank == 0:
            _claim(self._folder / f"{config.encoder}.yaml", config)
        dist.barrier()
        torch.manual_seed(config.seed)
        self._generator = torch.Generator().manual_seed(config.seed)
        start = None if config.init is None else SpeechTokenizer.from_directory(config.init, "cpu")
        self._linguistic = start.linguistic if start else LinguisticTokenizer(config.linguistic)
        self._semantic = start.semantic if start else SemanticTokenizer(config.semantic)
        self._alphabet = Alphabet(self._texts())
        share_s = config.training.batch_s / self._num_ranks
        self._stream = ClipStream(
            Path(config.corpus) / config.train_split, share_s, config.seed, self._rank, self._num_ranks
        )
        self._objective = self._build().to(device)

    def run(self) -> None:
        """All steps that are left, then the result."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        optimiser = Optimiser([m for m in self._learning() if m is not None], self._config.training)
        state = self._load(optimiser)
        step = int(state["step"]) if state else 0
        if not self._supervised(optimiser, step):
            return
        metrics = {"error_rate": self._error_rate()}
        if isinstance(self._objective, LinguisticObjective) and self._config.kmeans_steps:
            metrics |= self._place_centroids(self._objective.tokenizer)
        if self._rank == 0:
            self._write(metrics)

    def _build(self) -> LinguisticObjective | SemanticObjective:
        weight = self._config.attention_weight
        if self._config.encoder == "linguistic":
            if self._config.init is None:
                set_cmvn(
                    self._linguistic, (self._features(b) for b in islice(self._stream.batches(), _STATISTICS_BATCHES))
                )
            return LinguisticObjective(self._linguistic, self._alphabet, weight)
        losses = self._config.semantic_losses
        objective = SemanticObjective(self._semantic, self._alphabet, losses, self._generator, weight)
        if self._config.init is not None:
            objective.go_on_with_codes()
        return objective

    def _learning(self) -> list[torch.nn.Module | None]:
        objective = self._objective
        head = objective.head if isinstance(objective, LinguisticObjective) else objective.decoder
        return [objective.tokenizer.encoder, head, objective.attention]

    def _texts(self) -> list[str]:
        """The training transcripts' alphabet is the same in every run on the corpus; the first process collects it."""
        path = self._folder / "transcripts.txt"
        if self._rank == 0 and not path.is_file():
            folder = Path(self._config.corpus) / self._config.train_split
            lines = sorted({" ".join(text.split()) for _, text, _ in transcripts(folder)})
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
        dist.barrier()
        return path.read_text(encoding="utf-8").splitlines()

    def _supervised(self, optimiser: Optimiser, first: int) -> bool:
        """Steps from `first` on; False if a signal stopped them."""
        config = self._config
        batches = self._stream.batches(skip=first)
        unquantised = round(config.training.steps * config.semantic_losses.unquantised_share)
        total = config.training.steps
        with tqdm(total=total, initial=first, desc=config.encoder, disable=self._rank > 0, dynamic_ncols=True) as bar:
            for step in range(first, total):
                if isinstance(self._objective, SemanticObjective):
                    self._objective.quantise_from(max(1, unquantised), step)
                self._objective.train()
                metrics = optimiser.step(step, combine(self._terms(next(batches), step)))
                self._report(bar, step + 1, metrics)
                stopped = self._asked_to_stop()
                if (step + 1) % config.save_every == 0 or stopped or step + 1 == total:
                    self._save(optimiser, step + 1)
                if stopped and step + 1 < total:
                    log.info("stopped at step %d; the same command goes on from here", step + 1)
                    return False
                if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < total:
                    self._report(bar, step + 1, {"error_rate": self._error_rate()})
        return True

    def _terms(self, batch: list[Clip], step: int) -> dict[str, Term]:
        labels = [self._alphabet.encode(clip.text) for clip in batch]
        generator = torch.Generator().manual_seed((self._config.seed * 10**6 + step) * 10**4 + self._rank)
        features, augment = self._features(batch), self._config.augment
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16"):
            if isinstance(self._objective, SemanticObjective):
                altered = altered_mel(features, augment, generator)
                return self._objective.terms(*(tensor.to(self._device) for tensor in altered), labels)
            warped, num_frames = warp(*features, augment, generator)
            heard = corrupt(warped, num_frames, augment, generator)
            return self._objective.terms(heard.to(self._device), num_frames.to(self._device), labels)

    def _features(self, batch: list[Clip]) -> tuple[Tensor, Tensor]:
        waveforms, num_samples = pad_clips([peak_normalise(clip.waveform) for clip in batch])
        return self._tokenizer.features(waveforms, num_samples)

    @property
    def _tokenizer(self) -> LinguisticTokenizer | SemanticTokenizer:
        return self._linguistic if self._config.encoder == "linguistic" else self._semantic

    @torch.no_grad()
    def _place_centroids(self, tokenizer: LinguisticTokenizer) -> dict[str, float]:
        """Mini-batch k-means over frames of the encoder as it is now."""
        tokenizer.eval()
        batches = self._stream.batches()
        if self._config.init is None:
            points = torch.cat([self._frames(tokenizer, batch) for batch in islice(batches, _STATISTICS_BATCHES)])
            # Few points, as from a few processes: some twice, which mini-batches pull apart or revive.
            missing = tokenizer.config.codebook_size - len(points)
            if missing > 0:
                points = torch.cat([points, points[torch.randint(len(points), (missing,), generator=self._generator)]])
            start = kmeans(points.cpu(), tokenizer.config.codebook_size, 1, self._generator)
            tokenizer.centroids.copy_(from_first(start.to(self._device)))
        learner, found = MiniBatchKMeans(tokenizer.centroids), {}
        with tqdm(total=self._config.kmeans_steps, desc="k-means", disable=self._rank > 0, dynamic_ncols=True) as bar:
            for step in range(self._config.kmeans_steps):
                found = learner.update(self._frames(tokenizer, next(batches)))
                self._report(bar, step + 1, {f"kmeans_{name}": value for name, value in found.items()})
        return found

    def _frames(self, tokenizer: LinguisticTokenizer, batch: list[Clip]) -> Tensor:
        features, num_frames = self._features(batch)
        hidden, counts = tokenizer.encode_features(features.to(self._device), num_frames.to(self._device))
        return torch.cat([row[:count] for row, count in zip(hidden, counts.tolist(), strict=True)])

    @torch.no_grad()
    def _error_rate(self) -> float:
        """Percent of word errors on held-out clips, each process reading its share."""
        self._objective.eval()
        folder = Path(self._config.corpus) / self._config.held_out_split
        own = list(islice(clips(folder), self._rank, self._config.eval_clips, self._num_ranks))
        data = ClipFeatures.compute(own, self._tokenizer.features)

        def recognise(features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
            return self._objective.recognise(features.to(self._device), num_frames.to(self._device))

        heard = read_clips(recognise, self._alphabet, data)
        words = sum(len(words_of(text)) for text in data.texts)
        errors = words * word_error_rate(data.texts, heard) / 100 if words else 0.0
        totals = all_sum(torch.tensor([errors, float(words)], device=self._device))
        return 100 * float(totals[0] / totals[1].clamp(min=1))

    def _report(self, bar: tqdm, step: int, metrics: dict[str, float]) -> None:
        if self._rank:
            return
        if isinstance(self._objective, SemanticObjective) and self._objective.quantised and "loss" in metrics:
            used, perplexity = self._objective.learner.usage()
            metrics = metrics | {"codes_used": used, "perplexity": perplexity}
        if "error_rate" not in metrics:
            bar.update()
            bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:2]))
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"encoder": self._config.encoder, "step": step, **metrics}) + "\n")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped.fill_(1.0)

    def _asked_to_stop(self) -> bool:
        """Whether any process got a signal: all leave after the same step."""
        return bool(all_sum(self._stopped.to(self._device)).item())

    def _save(self, optimiser: Optimiser, step: int) -> None:
        if self._rank == 0:
            semantic = isinstance(self._objective, SemanticObjective)
            state: dict[str, Any] = {
                "step": step,
                "objective": self._objective.state_dict(),
                "adamw": optimiser.adamw.state_dict(),
                "generator": self._generator.get_state(),
                "quantised": semantic and self._objective.quantised,
                "recent": list(self._objective.recent) if semantic else [],
            }
            with replacing(self._checkpoint) as temporary:
                torch.save(state, temporary)
        dist.barrier()

    def _load(self, optimiser: Optimiser) -> dict[str, Any] | None:
        if not self._checkpoint.is_file():
            return None
        state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        self._objective.load_state_dict(state["objective"])
        optimiser.adamw.load_state_dict(state["adamw"])
        self._generator.set_state(state["generator"])
        if isinstance(self._objective, SemanticObjective):
            self._objective.quantised = state["quantised"]
            self._objective.recent.extend(tensor.to(self._device) for tensor in state["recent"])
        return state

    def _write(self, metrics: dict[str, float]) -> None:
        """The weights, and a whole speech tokenizer if the other encoder is there too."""
        self._objective.to("cpu")
        path = self._folder / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        both = {LINGUISTIC_FILE: self._linguistic, SEMANTIC_FILE: self._semantic}
        own = LINGUISTIC_FILE if self._config.encoder == "linguistic" else SEMANTIC_FILE
        save_weights(both[own], self._folder / own)
        (other,) = both.keys() - {own}
        if self._config.init is not None:
            save_weights(both[other], self._folder / other)
        if (self._folder / other).is_file():
            load_weights(both[other], self._folder / other)
            save_settings(self._folder, self._linguistic.config, self._semantic.config)
        content = json.dumps(summary | {self._config.encoder: metrics}, indent=1) + "\n"
        write_atomically(path, content.encode())
        sys.stdout.write(content)


def _claim(saved: Path, config: SpeechEncoderConfig) -> None:
    """Write the configuration beside the results, or refuse a run directory that was made with another."""
    if not saved.is_file():
        saved.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, saved)
        return
    before, now = asdict(read_config(SpeechEncoderConfig, saved)), asdict(config)
    changed = [key for key in now if now[key] != before[key]]
    if changed:
        raise ConfigError(
            [f"run_dir={config.run_dir}: was made with another {', '.join(changed)}; type another run_dir"]
        )


if __name__ == "__main__":
    run_recipe(main, SpeechEncoderConfig, "speech_encoder", speech_encoder_problems)
