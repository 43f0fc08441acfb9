"""What a conversation's loss depends on: its answers, and nothing else; not what shares its row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stepaudio_train.config.schema import EngineConfig, ModelConfig
from stepaudio_train.config.sft import SftConfig
from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.packing import pack_rows
from stepaudio_train.data.records import AudioPart, Message, Record, TextPart
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.engines.build import build_engine
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.objectives.base import TokenOutputs
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.testing.token_data import write_text_tokenizer
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

LENGTH = 192


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    tokenizer = TextTokenizer.from_file(write_text_tokenizer(tmp_path_factory.mktemp("text") / "text.model"))
    return Renderer(Vocabulary(tokenizer.size, reserved_size=128), tokenizer)


@pytest.fixture(scope="module")
def documents(renderer):
    """Conversations of several tasks, with spoken and written answers."""
    random = np.random.default_rng(0)

    def spoken(groups: int) -> AudioPart:
        codes = [(*random.integers(0, 1024, 2), *random.integers(1024, 5120, 3)) for _ in range(groups)]
        return AudioPart(tokens="".join(f"<audio_{code}>" for group in codes for code in group), text="one two")

    found = []
    for number in range(12):
        asked = spoken(2 + number % 4) if number % 3 else TextPart("one two three")
        answer = TextPart("four five") if number % 2 else spoken(2)
        spoken_to = (Message("system", (TextPart("be brief"),)), Message("human", (asked,)))
        turns = (*spoken_to, Message("assistant", (answer,)))
        found.append(renderer.render_chat(TokenSample(Record(str(number), turns)), "tts"))
    assert {TASKS[document.task] for document in found} == {"tqta", "aqta", "tts", "aqaa"}
    return found


def engine_of(renderer: Renderer) -> LocalEngine:
    vocab_size = renderer.vocabulary.total_size
    model = ModelConfig(32, 48, 2, 4, 2, vocab_size=vocab_size)
    torch.manual_seed(0)
    engine = build_engine(replace(SftConfig(), model=model, engine=EngineConfig(device="cpu", precision="fp32")))
    assert isinstance(engine, LocalEngine)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in engine.model.named_parameters()}
    engine.load_weights(weights)
    return engine


def gradients(engine: LocalEngine, batch, objective) -> dict[str, torch.Tensor]:
    engine.model.zero_grad()
    log_probs = engine.model.log_probs(batch.input_ids, batch.targets, batch.documents, batch.loss_weights != 0, False)
    objective(TokenOutputs(log_probs), batch).loss_sum.backward()
    return {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}


def test_what_is_given_gets_no_gradient_at_all(renderer, documents):
    engine, objective = engine_of(renderer), LanguageModelling(renderer.vocabulary)
    batch = pack_rows([documents[:3]], 3 * LENGTH)
    log_probs = torch.full(batch.targets.shape, -1.0, requires_grad=True)
    objective(TokenOutputs(log_probs), batch).loss_sum.backward()
    given = batch.loss_weights == 0
    assert (log_probs.grad[given] == 0).all() and (log_probs.grad[~given] == -1).all()
    # Whatever stands there as the target, not one bit of any weight's gradient depends on it.
    other = replace(batch, targets=torch.where(given, (batch.targets + 17) % 300, batch.targets))
    assert not torch.equal(other.targets, batch.targets)
    own, changed = gradients(engine, batch, objective), gradients(engine, other, objective)
    assert all(torch.equal(own[name], changed[name]) for name in own) and float(own["lm_head.weight"].abs().sum()) > 0


def test_packing_conversations_changes_nothing(renderer, documents):
    engine, objective = engine_of(renderer), LanguageModelling(renderer.vocabulary)
    apart = pack_rows([[document] for document in documents], LENGTH)
    packed = pack_rows([documents[:5], documents[5:]], sum(len(document) for document in documents))
    losses, together = engine.evaluate([apart], objective), engine.evaluate([packed], objective)
    assert set(losses) == set(together)
    for name, (total, weight) in losses.items():
        assert together[name] == pytest.approx((total, weight), rel=1e-5)
    own, other = gradients(engine, apart, objective), gradients(engine, packed, objective)
    for name, gradient in own.items():
        assert torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-4 * float(gradient.abs().max())), name
