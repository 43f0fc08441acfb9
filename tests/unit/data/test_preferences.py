"""Preferences from a file: pairs by ratings, the ids of fine-tuning, pairs whole in one row, exact resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.preferences import PreferenceDataConfig
from stepaudio_train.data.batch import TokenBatch
from stepaudio_train.data.conversation_files import Worker
from stepaudio_train.data.packing import Document
from stepaudio_train.data.preference_files import PreferenceFile, parse_preference, preference_to_json
from stepaudio_train.data.preferences import DocumentPair, Preferences, load_preferences, pack_pairs
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.sft_loader import SftLoader, validation_batches
from stepaudio_train.objectives.documents import Pairs
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.vocabulary import Special

GROUP = "<audio_0><audio_1><audio_1024><audio_1025><audio_1026>"
ASKED = [{"role": "user", "content": "say one"}]


def said(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def spoken(name: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "audio", "audio": name, **more}]


def pair(chosen: Any = "one", rejected: Any = "two", messages: Any = ASKED, **fields: Any) -> dict[str, Any]:
    return {"messages": messages, "chosen": said(chosen), "rejected": said(rejected), **fields}


def rated(id: str, *answers: tuple[str, float, str], messages: Any = ASKED, **fields: Any) -> dict[str, Any]:
    given = [{"message": said(text), "rating": rating, "rater": rater} for text, rating, rater in answers]
    return {"id": id, "messages": messages, "answers": given, **fields}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def load(path: Path, renderer: Renderer, longest: int = 256, **data: Any) -> dict[str, Preferences]:
    worker = Worker(device="cpu")
    return load_preferences(PreferenceDataConfig(str(path), **data), renderer, longest, path.parent / "tokens", worker)


BAD: dict[str, Any] = {
    "invalid JSON": '{"messages": [',
    "must hold `chosen` and `rejected`, or `answers`": {"messages": ASKED},
    "rejected: missing": {"messages": ASKED, "chosen": said("one")},
    "chosen and rejected are the same": pair("one", "one"),
    "chosen: must be one turn, ": {**pair(), "chosen": [said("one"), said("two")]},
    "got 2 turns": {**pair(), "rejected": [said("one"), said("two")]},
    "rejected.role: must be assistant, got 'human'": {**pair(), "rejected": {"role": "user", "content": "x"}},
    "chosen.content.0.txt: unknown field": pair([{"type": "text", "txt": "x"}]),
    "score: unknown field": pair(score=3),
    "margin: input should be greater than or equal to 0, got -1": pair(margin=-1),
    "messages: must end where an answer is due, not with a turn of assistant": pair(messages=[*ASKED, said("one")]),
    "turn 1 is tool": pair(messages=[{"role": "tool", "content": "7"}]),
    "task aqta: the last turn of human must hold audio": pair(task="aqta"),
    "answers: must hold at least one": {"messages": ASKED, "answers": []},
    "answers.1.rating: input should be less than or equal to 5, got 6": rated("r", ("one", 5, "a"), ("two", 6, "a")),
    "answers.0.rating: input should be greater than or equal to 1, got 0": rated("r", ("one", 0, "a")),
    "answers.0.stars: unknown field": {"messages": ASKED, "answers": [{"message": said("one"), "stars": 5}]},
    "answers.1: the same answer is rated twice by ann": rated("r", ("one", 5, "ann"), ("one", 4, "ann")),
    "no two of its 2 rated answers differ by min_rating_difference=1": rated(
        "near", ("one", 4, "a"), ("two", 3.5, "a")
    ),
    "has 0 rated answers; type stepaudio data rate": {"messages": ASKED, "answers": [{"message": said("one")}]},
    "id: 'same' has another prompt at": rated("same", ("x", 1, "a"), messages=[{"role": "user", "content": "other"}]),
    "answers 1 and 2 have": pair("one " * 60, "two " * 60),
    "answers 1 and 2 are the same when rendered": pair(
        [{"type": "audio", "tokens": GROUP}], [{"type": "audio", "tokens": GROUP, "speaker": "ann"}]
    ),
    "type data.speech_tokenizer=DIR": pair(spoken("a.wav")),
    "did you mean 'fast'": pair(
        [{"type": "audio", "tokens": GROUP}], messages=[{"role": "user", "content": "(fats)x"}]
    ),
}


def test_bad_lines_are_refused_by_name_and_the_rest_is_used(renderer, tmp_path):
    first = rated("same", ("one", 5, "ann"), ("two", 2, "ann"))
    path = write(tmp_path / "p.jsonl", pair(), first, *BAD.values(), "", pair(category="safety"))
    found = load(path, renderer, longest=100)["data"]
    reasons = {int(refusal.name.removeprefix(f"{path}:")): refusal.reason for refusal in found.refused}
    expected = dict(enumerate(BAD, 3))
    assert reasons.keys() == expected.keys()
    assert [reason for number, reason in expected.items() if reason not in reasons[number]] == []
    assert len(found) == 3 and found.report()["categories"] == {"tqta": 2, "safety": 1}
    report = found.report()
    assert (report["pairs"], report["num_refused"]) == (3, len(BAD))
    assert report["tokens"] == sum(len(one) for one in found.pairs)


def test_nothing_left_is_an_error(renderer, tmp_path):
    path = write(tmp_path / "p.jsonl", {"messages": ASKED})
    with pytest.raises(UserError, match=r"p\.jsonl: no pair can be used \(.*p\.jsonl:1: must hold"):
        load(path, renderer)


def test_every_two_answers_whose_mean_ratings_differ_enough_are_a_pair(tmp_path):
    answers = [("a", 5, "ann"), ("b", 3, "ann"), ("c", 2, "ann"), ("d", 3.5, "ann")]
    lines = [rated("q", *answers), rated("other", ("a", 1, "x")), rated("q", ("b", 4, "bob"), ("e", 5, ""))]
    found = PreferenceFile.read(write(tmp_path / "p.jsonl", *lines)).preferences
    assert [one.prompt.id for one in found] == ["q", "other"]
    texts = [answer.content[0].text for answer in found[0].answers]
    # b is 3.5 on average over its two raters.
    pairs = {(texts[better], texts[worse]): margin for better, worse, margin in found[0].ordered(1.5)}
    expected = {("a", "b"): 1.5, ("a", "c"): 3, ("a", "d"): 1.5, ("b", "c"): 1.5, ("d", "c"): 1.5}
    assert pairs == {**expected, ("e", "b"): 1.5, ("e", "c"): 3, ("e", "d"): 1.5}
    assert found[0].ordered(4) == []
    # Thirds are not whole numbers of bits.
    thirds = [("x", 5, "1"), ("x", 4, "2"), ("x", 4, "3"), ("y", 4, "1"), ("y", 3, "2"), ("y", 3, "3")]
    (one,) = PreferenceFile.read(write(tmp_path / "t.jsonl", rated("t", *thirds))).preferences
    assert [pair[:2] for pair in one.ordered(1)] == [(0, 1)]


def test_the_last_rating_of_a_rater_counts(tmp_path):
    lines = [rated("q", ("a", 5, "ann"), ("b", 1, "ann")), rated("q", ("a", 2, "ann")), rated("q", ("a", 4, "bob"))]
    (one,) = PreferenceFile.read(write(tmp_path / "p.jsonl", *lines)).preferences
    assert (one.mean_rating(0), one.mean_rating(1)) == (3, 1)


def test_what_is_written_is_read_again_the_same():
    fields = {"category": "c", "reference": "r", "criteria": ["x"], "task": "tqta", "meta": {"m": 1}}
    line = rated("q", ("a", 5, "ann"), ("b", 2.5, "ann"), ("b", 3, ""), **fields)
    line["answers"].append({"message": said("unrated")})
    one = parse_preference(json.dumps(line), "f:1", "-")
    assert parse_preference(json.dumps(preference_to_json(one)), "f:1", "-") == one


PROMPTS: dict[str, list[dict[str, Any]]] = {
    "text": ASKED,
    "system and history": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": spoken("", tokens=GROUP * 9, text="what is it")},
        said("a test"),
        {"role": "user", "content": spoken("", tokens=GROUP * 2)},
    ],
    "tool": [*ASKED, said([{"type": "tool_call", "name": "f"}]), {"role": "tool", "content": "7"}],
}
CODES = [{"type": "audio", "tokens": GROUP * 3}]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("rejected", ["two three", CODES], ids=["written", "spoken"])
@pytest.mark.parametrize("template", ["tts", "chat"])
def test_documents_are_what_is_served_and_answered(renderer, tmp_path, prompt, rejected, template):
    path = write(tmp_path / "p.jsonl", pair("one", rejected, messages=prompt))
    (found,) = load(path, renderer, template=template)["data"].pairs
    (preference,) = PreferenceFile.read(path).preferences
    served = renderer.render_chat_prompt(TokenSample(preference.prompt), template)
    written = renderer.text_tokenizer.encode("\none")[len(renderer.text_tokenizer.encode("\n")) :]
    assert found.chosen.ids.tolist() == [*served.tolist(), *written, Special.EOT]
    for document in (found.chosen, found.rejected):
        assert document.ids[: len(served)].tolist() == served.tolist() and document.ids[-1] == Special.EOT
        np.testing.assert_array_equal(document.loss_weights, np.arange(len(document)) >= len(served))
    if rejected is CODES:
        assert len(found.rejected) == len(served) + 15 + 1


def test_taqta_answers_both_begin_with_what_was_heard(renderer, tmp_path):
    heard = [{"type": "text", "text": "answer"}, *spoken("", tokens=GROUP, text="two five")]
    path = write(tmp_path / "p.jsonl", pair(messages=[{"role": "user", "content": heard}], task="taqta"))
    (found,) = load(path, renderer)["data"].pairs
    texts = [renderer.text_tokenizer.decode(d.ids[d.loss_weights > 0].tolist()) for d in (found.chosen, found.rejected)]
    assert ["two five" in text for text in texts] == [True, True]


def test_recordings_of_prompts_and_answers_are_encoded(renderer, tmp_path):
    small_speech_tokenizer().save(tmp_path / "tokenizer")
    for name, duration_s in (("q", 0.48), ("good", 0.6), ("bad", 0.36)):
        noise = np.random.default_rng(0).normal(0, 0.1, int(16000 * duration_s))
        soundfile.write(tmp_path / f"{name}.wav", noise, 16000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    asked = [{"role": "user", "content": spoken("q.wav")}]
    lines = [pair(spoken("good.wav"), spoken(f"{name}.wav"), asked) for name in ("bad", "broken", "missing")]
    path, held_out = write(tmp_path / "p.jsonl", *lines), write(tmp_path / "h.jsonl", pair(category="hold"))
    found = load(path, renderer, speech_tokenizer=str(tmp_path / "tokenizer"), held_out=str(held_out))
    (one,) = found["data"].pairs
    answers = [int(document.loss_weights.sum()) for document in (one.chosen, one.rejected)]
    assert answers == [5 * 5 + 1, 3 * 5 + 1]
    assert [r.name[-1] for r in found["data"].refused] == ["2", "3"]
    # Categories mean the same in both files.
    assert found["data"].categories == found["held_out"].categories == ("aqaa", "hold")
    assert (one.category, found["held_out"].pairs[0].category) == (0, 1)


def pairs_of(count: int, seed: int = 0, longest: int = 20) -> list[DocumentPair]:
    """The documents of pair i hold 2 i + 1 (chosen) and 2 i + 2 alone."""
    random = np.random.default_rng(seed)

    def document(value: int) -> Document:
        length = int(random.integers(2, longest))
        return Document(np.full(length, value, np.int32), np.r_[0, np.ones(length - 1)].astype(np.float32), 6)

    return [DocumentPair(document(2 * i + 1), document(2 * i + 2), i % 3, i / 4) for i in range(count)]


def test_extras_tell_pairs_sides_categories_and_margins():
    first, second, third = (
        replace(one, chosen=shortened(one.chosen), rejected=shortened(one.rejected)) for one in pairs_of(3)
    )
    batch = pack_pairs([[first, second], [third], []], 10)
    expected = {
        "pair": [[0, 0, 0, 0, 1, 1, 1, 1, -1, -1], [0] * 4 + [-1] * 6, [-1] * 10],
        "side": [[1, 1, 0, 0, 1, 1, 0, 0, 0, 0], [1, 1] + [0] * 8, [0] * 10],
        "category": [[0] * 4 + [1] * 4 + [-1] * 2, [2] * 4 + [-1] * 6, [-1] * 10],
        "margin": [[0.0] * 4 + [0.25] * 4 + [0.0] * 2, [0.5] * 4 + [0.0] * 6, [0.0] * 10],
    }
    assert {name: values.tolist() for name, values in batch.extras.items()} == expected
    assert batch.input_ids[0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 0, 0]
    assert {values.dtype for name, values in batch.extras.items() if name != "margin"} == {torch.int64}
    with pytest.raises(ValueError, match="documents of 8 tokens in a row of 7"):
        pack_pairs([[first, second]], 7)


def shortened(document: Document) -> Document:
    return Document(document.ids[:2], document.loss_weights[:2], document.task)


def test_objectives_find_the_pairs():
    pairs = pairs_of(9)
    found = Pairs.of(pack_pairs([pairs[:4], pairs[4:]], 240))
    lengths = sorted((len(one.rejected) - 1, len(one.chosen) - 1) for one in pairs)
    assert sorted(tuple(row) for row in found.lengths.int().tolist()) == lengths


def seen(batch: TokenBatch) -> list[list[int]]:
    return [sorted({int(i) for i in row if i}) for row in batch.input_ids]


def loader(pairs: list[DocumentPair], seed: int = 1, rank: int = 0, size: int = 1) -> SftLoader[DocumentPair]:
    return SftLoader(pairs, 64, 4, seed, rank, size, pack=pack_pairs)


def test_an_epoch_is_every_pair_once_and_whole():
    whole = loader(pairs_of(60))
    for _ in range(2):
        rows = [row for _ in range(whole.steps(1)) for row in seen(whole.next_batch())]
        assert sorted(value for row in rows for value in row) == list(range(1, 121))
        assert all(len(row) % 2 == 0 and row[::2] == [value - 1 for value in row[1::2]] for row in rows)


def test_goes_on_bit_for_bit_at_another_size(tmp_path):
    straight = loader(pairs_of(50))
    for _ in range(7):
        straight.next_batch()
    straight.save(tmp_path)
    ranks = [loader(pairs_of(50), rank=rank, size=2) for rank in range(2)]
    for one in ranks:
        one.load(tmp_path)
    for _ in range(2 * straight.steps(1)):
        together, expected = TokenBatch.concatenate([one.next_batch() for one in ranks]), straight.next_batch()
        assert torch.equal(together.input_ids, expected.input_ids)
        assert all(torch.equal(values, together.extras[name]) for name, values in expected.extras.items())
    with pytest.raises(ConfigError, match="data: is not what it was"):
        loader([replace(one, margin=one.margin + 1) for one in pairs_of(50)]).load(tmp_path)


def test_held_out_pairs_stay_whole():
    batches = validation_batches(pairs_of(10), 64, 2, 20, pack=pack_pairs)
    assert sorted(value for batch in batches for row in seen(batch) for value in row) == list(range(1, 21))
    assert all(int(batch.extras["side"].max()) == 1 for batch in batches)
