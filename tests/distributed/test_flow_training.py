"""Training of the flow on several processes: the same loss and weights as on one, and a run that ends whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from recipes.flow import main
from stepaudio_train.config.decoder import FlowConfig
from stepaudio_train.config.flow_training import FlowTrainConfig, FlowTrainingConfig
from stepaudio_train.config.schema import LoggingConfig
from stepaudio_train.data.paired_speech import PairedClip
from stepaudio_train.engines.process_group import join_process_group
from stepaudio_train.models.decoder.flow_files import load_flow
from stepaudio_train.models.decoder.flow_loss import FlowBatch, FlowDraws
from stepaudio_train.testing.distributed import run_distributed
from stepaudio_train.testing.paired_data import write_paired_corpus
from stepaudio_train.training.flow import FlowLearner, flow_batch

PRELOAD = ["recipes.flow", "stepaudio_train.testing.paired_data"]
CONFIG = FlowTrainConfig(
    flow=FlowConfig(
        hidden_size=32,
        ffn_size=32,
        num_blocks=1,
        decoder_channels=32,
        decoder_head_size=16,
        decoder_mid_blocks=1,
        dropout=0.0,
    ),
    training=FlowTrainingConfig(max_steps=4, encoder_steps=2),
    logging=LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False),
    device="cpu",
)


def drawn_of_content(batch: FlowBatch, generator: torch.Generator) -> FlowDraws:
    """No chance, so that a clip's draws do not depend on the process that has it."""
    size = len(batch.tokens)
    return FlowDraws(
        torch.full((size,), 0.5), torch.sin(batch.mel), batch.num_frames // 4, torch.ones(size, dtype=torch.bool)
    )


def learned() -> list[tuple[float, dict[str, Tensor]]]:
    """After each of four steps, the loss and the average's weights."""
    join_process_group(torch.device("cpu"))
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    FlowDraws.draw = drawn_of_content
    generator = torch.Generator().manual_seed(0)
    clips = [
        PairedClip(
            torch.randint(0, 5120, (length,), generator=generator),
            torch.randn(CONFIG.flow.num_frames(length), 80, generator=generator),
            torch.randn(192, generator=generator),
        )
        for length in (10, 30, 20, 25)
    ]
    learner = FlowLearner(CONFIG, [], torch.device("cpu"))
    steps = []
    for number in range(1, CONFIG.training.max_steps + 1):
        loss = learner.step(number, flow_batch(clips[rank::num_ranks]))["loss"]
        steps.append((loss, {name: tensor.detach().clone() for name, tensor in learner.average.state_dict().items()}))
    return steps


@pytest.fixture(scope="module")
def alone() -> list[tuple[float, dict[str, Tensor]]]:
    return run_distributed(learned, 1, preload=PRELOAD)[0]


def test_two_processes_learn_what_one_learns(alone):
    for steps in run_distributed(learned, 2, preload=PRELOAD):
        for (loss, weights), (wanted_loss, wanted_weights) in zip(steps, alone, strict=True):
            assert loss == pytest.approx(wanted_loss, abs=1e-5, rel=1e-5)
            for name, tensor in wanted_weights.items():
                torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-4)


def test_the_encoder_learns_before_the_network(alone):
    before, after, later = (weights for _, weights in alone[:3])
    network, encoder = "decoder.estimator.mid_blocks.0.0.block1.block.0.weight", "encoder_proj.weight"
    assert torch.equal(before[network], after[network]) and not torch.equal(after[network], later[network])
    assert not torch.equal(before[encoder], after[encoder])


def test_a_run_of_two_processes_ends_with_one_result(tmp_path):
    corpus = write_paired_corpus(tmp_path, num_clips=12)
    config = replace(
        CONFIG,
        run_dir=str(tmp_path / "run"),
        corpus=str(corpus.prepared),
        tokens=str(corpus.tokens),
        training=FlowTrainingConfig(max_steps=3, encoder_steps=1, log_every=1, eval_every=3, batch_frames=300),
    )
    run_distributed(main, 2, config, preload=PRELOAD)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["val/loss"] > 0
    assert load_flow(tmp_path / "run").config == config.flow
