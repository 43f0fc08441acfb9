"""Megatron's parts give the log-probabilities of the plain Hugging Face model with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.schema import EngineConfig, ModelConfig, PretrainConfig, VocabularyConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.testing.distributed import run_distributed

PRELOAD = ["stepaudio_train.engines.megatron.engine"]
CONFIG = PretrainConfig(
    model=ModelConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=4,
        # Not a power of two: the slopes of the last heads come from the other series.
        num_attention_heads=6,
        num_attention_groups=2,
        vocab_size=1001,
        init_std=0.2,
    ),
    vocabulary=VocabularyConfig(text_size=401, linguistic_size=200, semantic_size=400, reserved_size=0),
)
LAYOUTS = {1: [{}], 2: [{"tensor_parallel": 2}, {"pipeline_parallel": 2, "virtual_pipeline": 2}]}


@pytest.mark.parametrize("world_size", [1, 2])
def test_log_probs_equal_the_plain_models(world_size):
    batch = _batch()
    model = Step1ForCausalLM(CONFIG.model)
    model.load_state_dict(dict(InitialWeights(CONFIG.model, 0)))
    with torch.no_grad():
        logits = model(batch.input_ids, batch.documents)
    expected = logits.log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    assert expected.std() > 1
    for fields, log_probs in run_distributed(_log_probs, world_size, LAYOUTS[world_size], preload=PRELOAD)[-1]:
        # Relative too: with these weights log-probabilities go down to about -100.
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5, msg=lambda m, f=fields: f"{f}: {m}")


class _Recorder:
    """Keeps the log-probabilities that an engine hands to its objective."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        self.seen.append(outputs.log_probs.detach())
        return ObjectiveOutput(outputs.log_probs.sum(), batch.loss_weights.sum(), {})


def _log_probs(layouts: list[dict]) -> list[tuple[dict, torch.Tensor]]:
    import torch.distributed as dist

    from stepaudio_train.engines.megatron.engine import MegatronEngine

    dist.init_process_group("gloo")
    results = []
    for fields in layouts:
        engine = MegatronEngine(replace(CONFIG, engine=EngineConfig(name="megatron", device="cpu", **fields)))
        engine.load_weights(InitialWeights(CONFIG.model, 0))
        recorder = _Recorder()
        engine.evaluate(_batch().split(2), recorder)
        # The first call only asks for the metrics' names; the others come on the last pipeline stage alone.
        results.append((fields, torch.cat(recorder.seen[1:] or [torch.empty(0)])))
        engine.close()
    dist.destroy_process_group()
    return results


def _batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows, length = 4, 64
    ids, targets = torch.randint(0, CONFIG.model.vocab_size, (2, rows, length), generator=generator)
    documents = (
        torch.randint(0, 2, (rows, length), generator=generator)
        .mul(torch.rand(rows, length, generator=generator) < 0.1)
        .cumsum(1)
    )
    weights = torch.ones(rows, length)
    return TokenBatch(ids, targets, weights, documents.int(), torch.zeros(rows, length, dtype=torch.int8))
