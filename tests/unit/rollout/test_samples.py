"""Samples while training: prompts as they are served, answers of the weights at hand, texts a person can read."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stepaudio_train.config.schema import EngineConfig, ModelConfig, RunConfig, VocabularyConfig
from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.packing import Document
from stepaudio_train.data.records import parse_record
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.rollout.generate import generate
from stepaudio_train.rollout.samples import SampleWriter, first_exchanges, readable
from stepaudio_train.rollout.sampling import SamplingConfig
from stepaudio_train.testing.token_data import TEXT_SIZE, write_text_tokenizer
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Special, Vocabulary

VOCABULARY = VocabularyConfig(text_size=TEXT_SIZE + 20, reserved_size=8)
CONFIG = RunConfig(
    model=ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_attention_groups=2,
        vocab_size=VOCABULARY.total_size, init_std=0.2,
    ),
    vocabulary=VOCABULARY,
    engine=EngineConfig(device="cpu"),
)  # fmt: skip
GROUP = "<audio_3><audio_7><audio_1030><audio_2000><audio_5000>"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    tokenizer = write_text_tokenizer(tmp_path_factory.mktemp("text") / "text.model")
    return Renderer(Vocabulary.from_config(VOCABULARY), TextTokenizer.from_file(tokenizer))


def conversation(*turns: tuple[str, object]) -> TokenSample:
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    return TokenSample(parse_record(json.dumps(record), "here", "c"))


@pytest.fixture(scope="module")
def samples() -> list[TokenSample]:
    heard = [{"type": "audio", "tokens": GROUP}]
    return [
        conversation(("human", "one"), ("assistant", "two"), ("human", "three"), ("assistant", "four five")),
        conversation(("human", "seven"), ("assistant", heard)),
        conversation(("system", "write"), ("human", heard), ("assistant", "nine")),
    ]


@pytest.mark.parametrize("loss", ["last", "all"])
def test_prompts_are_what_is_served_and_references_what_was_to_be_said(renderer, samples, loss):
    documents = [renderer.render_chat(sample, "tts", loss) for sample in samples]
    exchanges = first_exchanges(documents, 2)
    assert [(e.id, e.task) for e in exchanges] == [(0, "tqta"), (1, "tts")]
    for exchange, document, sample in zip(exchanges, documents, samples, strict=False):
        assert exchange.prompt == renderer.render_chat_prompt(sample, "tts").tolist()
        assert [*exchange.prompt, *exchange.reference, Special.EOT] == document.ids.tolist()


def test_documents_of_which_nothing_teaches_are_passed_over(renderer, samples):
    document = renderer.render_chat(samples[0], "tts")
    silent = replace(document, loss_weights=np.zeros_like(document.loss_weights))
    assert [e.id for e in first_exchanges([silent, document, document], 1)] == [1]
    without_end = Document(np.array([1, 70, 80, 90]), np.array([0, 0, 1, 0.5], np.float32), TASKS.index("tqta"))
    (exchange,) = first_exchanges([without_end], 4)
    assert (exchange.prompt, exchange.reference) == ([1, 70], [80, 90])


def test_ids_are_readable_whatever_they_are(renderer):
    vocabulary, tokenizer = renderer.vocabulary, renderer.text_tokenizer
    ids = [int(Special.BOT), *tokenizer.encode("one"), vocabulary.linguistic_offset + 3, vocabulary.semantic_offset]
    # Text ids that the tokenizer does not have, and reserved ones.
    ids += [TEXT_SIZE + 5, vocabulary.audio_end + 1, int(Special.EOT)]
    shown = readable(ids, tokenizer, vocabulary)
    assert shown == f"<|BOT|> one<audio_3><audio_1024><id_{TEXT_SIZE + 5}><id_{vocabulary.audio_end + 1}><|EOT|>"
    assert readable([], tokenizer, vocabulary) == ""


def test_answers_are_the_engines_and_repeat(renderer, samples, tmp_path):
    engine = LocalEngine(CONFIG)
    engine.load_weights(InitialWeights(CONFIG.model, seed=3))
    documents = [renderer.render_chat(sample, "tts") for sample in samples]
    exchanges = first_exchanges(documents, 3)
    writer = SampleWriter(exchanges, 5, tmp_path / "samples", renderer.text_tokenizer, renderer.vocabulary)
    writer(engine, 12)
    writer(engine, 13)
    first, second = ((tmp_path / "samples" / f"step_{step:08d}.jsonl").read_text() for step in (12, 13))
    assert first == second
    lines = [json.loads(line) for line in first.splitlines()]
    assert [(line["id"], line["task"]) for line in lines] == [(0, "tqta"), (1, "tts"), (2, "aqta")]
    assert lines[1]["reference"] == GROUP and GROUP in lines[2]["prompt"] and lines[2]["reference"] == "nine"
    assert lines[0]["prompt"].endswith("three<|EOT|><|BOT|> assistant\n")
    # Written answers are greedy, spoken ones are drawn, each by its own seed.
    model = Step1ForCausalLM(CONFIG.model)
    model.load_state_dict(dict(InitialWeights(CONFIG.model, seed=3)))
    stop_ids = (int(Special.EOT), int(Special.EOS))
    written = SamplingConfig(2 * len(exchanges[0].reference) + 32, stop_ids=stop_ids)
    spoken = SamplingConfig(2 * len(exchanges[1].reference) + 32, temperature=0.7, stop_ids=stop_ids)
    for exchange, sampling in ((exchanges[0], written), (exchanges[1], spoken)):
        (expected,) = generate(model, [exchange.prompt], sampling, [exchange.id])
        line = lines[exchange.id]
        assert line["answer"] == readable(expected.ids, renderer.text_tokenizer, renderer.vocabulary) != ""
        assert line["ended"] == (expected.stop_id == Special.EOT)


def test_a_model_of_given_weights_is_the_one_that_draws_its_own():
    weights = dict(InitialWeights(CONFIG.model, seed=1))
    drawn = Step1ForCausalLM(CONFIG.model)
    drawn.load_state_dict(weights)
    given = Step1ForCausalLM.of_weights(CONFIG.model, weights)
    config = SamplingConfig(max_new_tokens=8)
    assert generate(given, [[1, 2, 3]], config) == generate(drawn.eval(), [[1, 2, 3]], config)
    assert given.lm_head.weight.data_ptr() == weights["lm_head.weight"].data_ptr()
    weights.pop("model.norm.weight")
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        Step1ForCausalLM.of_weights(CONFIG.model, weights)
