"""The local engine's outputs, heads that an objective leaves alone, and adapters beside a value head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepaudio_train.config.schema import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1 import modeling
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.weight_map import VALUE_HEAD
from stepaudio_train.objectives.base import ObjectiveOutput, TokenOutputs
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.weights import export, initialise

VOCABULARY = VocabularyConfig(text_size=345, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_attention_groups=2,
    vocab_size=505,
    init_std=0.1,
    value_head=True,
)
CONFIG = PretrainConfig(
    model=MODEL,
    vocabulary=VOCABULARY,
    engine=EngineConfig(device="cpu"),
    optimizer=OptimizerConfig(weight_decay=0.5, clip_grad_norm=0.0),
    training=TrainingConfig(sequence_length=16, global_batch_rows=4),
)
ADAPTED = replace(CONFIG, lora=LoraConfig(rank=3, alpha=12.0))


class ValuesAlone:
    """Half the squared value of every token: the gradient of a value is the value."""

    def __call__(self, outputs: TokenOutputs, batch: TokenBatch) -> ObjectiveOutput:
        assert outputs.entropies is None and outputs.values is not None
        return ObjectiveOutput(0.5 * outputs.values.square().sum(), batch.loss_weights.sum(), {})


def build(config: PretrainConfig = CONFIG) -> LocalEngine:
    engine = LocalEngine(config)
    head = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    engine.load_weights({**InitialWeights(MODEL, 0), "value_head.weight": head, "value_head.bias": torch.ones(1)})
    return engine


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(0, 505, (2, 4, 16), generator=generator)
    weights = torch.rand(4, 16, generator=generator)
    documents = (torch.rand(4, 16, generator=generator) < 0.2).cumsum(1).int()
    return TokenBatch(ids, targets, weights * (weights > 0.4), documents, torch.zeros(4, 16, dtype=torch.int8))


@torch.no_grad()
def test_outputs_are_the_models_micro_batch_by_micro_batch(batch):
    engine = build()
    (first, second) = engine.outputs(batch.split(2), entropies=True)
    log_p = engine.model(batch.input_ids, batch.documents).double().log_softmax(-1)
    wanted = batch.loss_weights != 0
    expected = {
        "log_probs": log_p.gather(-1, batch.targets[..., None])[..., 0] * wanted,
        "entropies": -(log_p.exp() * log_p).sum(-1) * wanted,
        "values": engine.model.value_head(engine.model.model(batch.input_ids, batch.documents)),
    }
    for name, tensor in expected.items():
        found = torch.cat([getattr(first, name), getattr(second, name)])
        torch.testing.assert_close(found.double(), tensor.double(), rtol=1e-5, atol=1e-5)
    assert engine.outputs([batch])[0].entropies is None


def test_a_loss_of_values_trains_the_head_and_what_is_under_it(batch):
    """The gradient of the head by hand, and that of the language model's head, which the loss does not look at."""
    engine = build()
    before = dict(engine.export_weights())
    with torch.no_grad():
        hidden = engine.model.model(batch.input_ids, batch.documents)
        (outputs,) = engine.outputs([batch])
    engine.train_step(batch.split(1), ValuesAlone(), learning_rate=0.01)
    weight = batch.loss_weights.sum()
    gradients = {name: parameter.grad for name, parameter in engine.model.named_parameters()}
    expected = torch.einsum("rt,rth->h", outputs.values, hidden) / weight
    torch.testing.assert_close(gradients["value_head.weight"][0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients["value_head.bias"][0], outputs.values.sum() / weight, rtol=1e-4, atol=1e-6)
    assert gradients["lm_head.weight"].count_nonzero() == 0
    after = dict(engine.export_weights())
    # AdamW of a gradient of zero: weight decay alone. None on the bias, which makes one step of the rate.
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"] * (1 - 0.01 * 0.5))
    torch.testing.assert_close(after["value_head.bias"], before["value_head.bias"] - 0.01, rtol=1e-4, atol=1e-6)
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_language_modelling_asks_for_no_entropies_and_knows_no_values(batch, monkeypatch):
    seen = []
    head = modeling.target_log_probs

    def watched(*arguments, entropies):
        seen.append(entropies)
        return head(*arguments, entropies=entropies)

    monkeypatch.setattr(modeling, "target_log_probs", watched)
    vocabulary = Vocabulary.from_config(VOCABULARY)
    with_head, without = build(), LocalEngine(replace(CONFIG, model=replace(MODEL, value_head=False)))
    without.load_weights(dict(with_head.export_weights()))
    results = [engine.train_step([batch], LanguageModelling(vocabulary), 0.01) for engine in (with_head, without)]
    assert seen == [False, False]
    assert results[0] == results[1]
    assert without.outputs([batch])[0].values is None


def test_weights_without_a_head_give_a_new_one(batch):
    engine = build()
    engine.load_weights(InitialWeights(replace(MODEL, value_head=False), 0))
    assert engine.outputs([batch])[0].values.count_nonzero() == 0
    assert [name for name, _ in engine.export_weights()][-2:] == list(VALUE_HEAD)


def test_adapters_are_switched_off_and_on_and_the_head_is_trained_beside_them(batch, tmp_path: Path):
    base, engine = build(), build(ADAPTED)
    for _ in range(3):
        engine.train_step([batch], ValuesAlone(), 0.01)
    (adapted,) = engine.outputs([batch])
    with engine.without_adapters():
        (plain,) = engine.outputs([batch])
    assert torch.equal(plain.log_probs, base.outputs([batch])[0].log_probs)
    assert (adapted.log_probs - plain.log_probs).abs().max() > 1e-3
    assert torch.equal(engine.outputs([batch])[0].log_probs, adapted.log_probs)
    trained = {name for name, tensor in engine.export_weights() if not tensor.equal(dict(base.export_weights())[name])}
    assert {*VALUE_HEAD, "model.layers.0.mlp.up_proj.weight"} < trained and "lm_head.weight" not in trained
    engine.save(tmp_path)
    assert load_file(tmp_path / "adapters.safetensors").keys() == {*dict(engine.adapters()), *VALUE_HEAD}
    expected = engine.train_step([batch], ValuesAlone(), 0.01)
    again = build(ADAPTED)
    again.load(tmp_path)
    assert again.train_step([batch], ValuesAlone(), 0.01) == expected


def test_without_adapters_there_are_none_to_switch_off():
    with pytest.raises(ValueError, match="trains all weights"):
        build().without_adapters()


def test_a_critic_begins_with_a_reward_models_export_and_a_reward_model_with_a_language_models(batch, tmp_path: Path):
    """Exported, read back by another run with and without a head, and by transformers."""
    from transformers import AutoModelForCausalLM

    rewarding = build()
    export(rewarding, tmp_path / "reward", None, {})
    started = {}
    for has_head in (True, False):
        config = replace(CONFIG, model=replace(MODEL, init=str(tmp_path / "reward"), value_head=has_head))
        started[has_head] = LocalEngine(config)
        initialise(started[has_head], config)
    expected = rewarding.outputs([batch])[0]
    assert torch.equal(started[True].outputs([batch])[0].values, expected.values)
    assert torch.equal(started[False].outputs([batch])[0].log_probs, expected.log_probs)

    export(started[False], tmp_path / "language", None, {})
    config = replace(CONFIG, model=replace(MODEL, init=str(tmp_path / "language")))
    fresh = LocalEngine(config)
    initialise(fresh, config)
    assert fresh.outputs([batch])[0].values.count_nonzero() == 0

    whole = replace(batch, documents=torch.zeros_like(batch.documents))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "reward", trust_remote_code=True).eval()
    with torch.no_grad():
        values = model.value_head(model.model(whole.input_ids).last_hidden_state)[..., 0]
    torch.testing.assert_close(values, rewarding.outputs([whole])[0].values, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() >= set(VALUE_HEAD)
