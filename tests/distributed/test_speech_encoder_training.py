"""Training of the speech encoders: as many processes as one likes, stopped whenever, the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.config.tokenizer import LinguisticConfig, SemanticConfig, SemanticLossConfig
from stepaudio_train.data.prepare import PrepareOptions, prepare
from stepaudio_train.data.transcribed import ClipStream
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.testing.recipes import run_here
from stepaudio_train.tokenizers.learning.clustering import MiniBatchKMeans
from stepaudio_train.tokenizers.learning.linguistic_training import LinguisticObjective
from stepaudio_train.tokenizers.learning.optimisation import combine
from stepaudio_train.tokenizers.learning.parallel import all_sum, sum_gradients
from stepaudio_train.tokenizers.learning.recognition import Alphabet
from stepaudio_train.tokenizers.learning.semantic_training import SemanticObjective
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.speech import SpeechTokenizer

TEXTS = ["one two", "two", "one one two", "two one"]
SIZES = [
    "linguistic={hidden_size: 16, num_heads: 2, ffn_size: 16, num_blocks: 1, codebook_size: 8}",
    "semantic={num_mel_bins: 80, hidden_size: 16, num_heads: 2, num_blocks: 1, codebook_size: 8}",
]


def learned(rank: int, num_ranks: int, join: bool) -> dict[str, torch.Tensor]:
    """Gradients of both objectives on this process's share of four clips, the codes moved once, and the centroids."""
    if join:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    alphabet = Alphabet(TEXTS)
    first = LinguisticTokenizer(LinguisticConfig(hidden_size=16, num_heads=2, ffn_size=16, num_blocks=2))
    second = SemanticTokenizer(SemanticConfig(hidden_size=16, num_heads=2, num_blocks=1, codebook_size=8))
    second.quantizer.codes.copy_(torch.nn.functional.normalize(torch.randn(8, 16), dim=-1))
    linguistic = LinguisticObjective(first, alphabet, attention_weight=0.5)
    generator = torch.Generator().manual_seed(0)
    semantic = SemanticObjective(second, alphabet, SemanticLossConfig(), generator, attention_weight=0.5)
    semantic.go_on_with_codes()
    features, lengths = torch.randn(4, 90, 80), torch.tensor([90, 40, 71, 55])
    labels = [alphabet.encode(text) for text in TEXTS]
    own = slice(rank * 4 // num_ranks, (rank + 1) * 4 // num_ranks)
    mel = features[own].abs()
    found: dict[str, torch.Tensor] = {}
    for name, objective, terms in (
        ("linguistic", linguistic, linguistic.terms(features[own], lengths[own], labels[own])),
        ("semantic", semantic, semantic.terms(features[own], lengths[own], mel, mel.mean(dim=1), labels[own])),
    ):
        values = combine(terms)
        values["loss"].backward()
        parameters = dict(objective.named_parameters())
        sum_gradients(list(parameters.values()))
        found |= {f"{name} gradient {key}": value.grad for key, value in parameters.items()}
        found |= {f"{name} {key}": all_sum(value.detach()) for key, value in values.items()}
    found["codes"] = second.quantizer.codes
    centroids = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    points = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    measured = MiniBatchKMeans(centroids).update(points[rank * 40 // num_ranks : (rank + 1) * 40 // num_ranks])
    return found | {"centroids": centroids, "k-means": torch.tensor(list(measured.values()))}


def learned_by_rank(num_ranks: int) -> dict[str, torch.Tensor]:
    return learned(int(os.environ["RANK"]), num_ranks, join=True)


def test_processes_that_share_a_batch_learn_what_one_learns_from_all_of_it():
    alone = learned(0, 1, join=False)
    states = run_distributed(learned_by_rank, 2, 2)
    for state in states:
        for name, wanted in alone.items():
            torch.testing.assert_close(state[name], wanted, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # The codes are moved on every process by itself, and must never drift apart.
    assert torch.equal(states[0]["codes"], states[1]["codes"])


def test_centroids_find_the_clusters_and_idle_ones_move():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 3, generator=generator)
    centroids = torch.cat([centres[:1] + torch.randn(3, 3, generator=generator), torch.full((1, 3), 1e3)])
    learner = MiniBatchKMeans(centroids)
    for _ in range(800):
        chosen = torch.randint(4, (64,), generator=generator)
        found = learner.update(centres[chosen] + 0.1 * torch.randn(64, 3, generator=generator))
    assert found["used"] == 1.0 and found["inertia"] < 1.0
    assert torch.cdist(centres, centroids).min(dim=1).values.max() < 0.5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    for digit in range(10):
        for take in range(6):
            noise = random.uniform(-0.5, 0.5, int(16000 * random.uniform(0.3, 0.6)))
            soundfile.write(folder / f"{digit}_ann_{take}.wav", noise, 16000)
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(PrepareOptions(folder, output))
    return output


def typed(corpus: Path, run: Path, *more: str) -> list[str]:
    settings = [f"corpus={corpus}", f"run_dir={run}", "device=cpu", "training.batch_s=2.0", "eval_clips=4"]
    settings += ["training.steps=14", "save_every=4", "kmeans_steps=3", *SIZES]
    return [*settings, *more]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_every_process_gets_its_own_clips_once_an_epoch(corpus):
    whole = [clip.waveform for batch in first_epoch(ClipStream(corpus / "train", 2.0, 0)) for clip in batch]
    shares = [first_epoch(ClipStream(corpus / "train", 2.0, 0, rank, 3)) for rank in range(3)]
    sums = sorted(float(clip.waveform.abs().sum()) for share in shares for batch in share for clip in batch)
    assert sums == sorted(float(waveform.abs().sum()) for waveform in whole)
    again = ClipStream(corpus / "train", 2.0, 0).batches(skip=2)
    third = first_epoch(ClipStream(corpus / "train", 2.0, 0))[2]
    assert [clip.text for clip in next(again)] == [clip.text for clip in third]


def first_epoch(stream: ClipStream) -> list:
    return list(stream._epoch(0))


def test_a_stopped_run_goes_on_with_the_same_losses_and_the_result_is_a_tokenizer(corpus, tmp_path, capsys):
    command = [sys.executable, "-m", "stepaudio_train.cli", "run", "speech_encoder"]
    whole, parts = ([*command, *typed(corpus, tmp_path / run, "encoder=semantic")] for run in ("whole", "parts"))
    subprocess.run(whole, check=True, capture_output=True)
    process = subprocess.Popen(parts, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(losses(tmp_path / "parts")) >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    subprocess.run(parts, check=True, capture_output=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 14
    run_here("speech_encoder", typed(corpus, tmp_path / "parts", "encoder=linguistic"))
    summary = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert summary.keys() == {"semantic", "linguistic"} and summary["linguistic"]["inertia"] > 0
    before = SpeechTokenizer.from_directory(tmp_path / "parts", "cpu")
    # Adapting it: the weights are the start, the other encoder stays as it is.
    adapt = ["encoder=linguistic", f"init={tmp_path / 'parts'}", "training.steps=0"]
    run_here("speech_encoder", typed(corpus, tmp_path / "adapted", *adapt))
    after = SpeechTokenizer.from_directory(tmp_path / "adapted", "cpu")
    for name, tensor in before.linguistic.encoder.state_dict().items():
        assert torch.equal(tensor, after.linguistic.encoder.state_dict()[name])
    assert torch.equal(before.semantic.quantizer.codes, after.semantic.quantizer.codes)
    assert not torch.equal(before.linguistic.centroids, after.linguistic.centroids)
    with pytest.raises(SystemExit) as refusal:
        run_here("speech_encoder", typed(corpus, tmp_path / "whole", "encoder=semantic", "seed=1"))
    assert refusal.value.code and "another seed" in capsys.readouterr().err
