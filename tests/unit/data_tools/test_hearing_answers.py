"""What is made of a hearing corpus: answers that doubt, and probes for reward models; and the corpus with codes."""

from __future__ import annotations

import json

import pytest
import soundfile

from data_tools import make_deaf_probes, make_doubting_answers, make_hearing_corpus
from data_tools.make_deaf_probes import CATEGORY, deaf_probes
from data_tools.make_doubting_answers import doubting
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.records import Message, Record, TextPart, read_records
from stepaudio_train.evaluation.deaf_hacking_report import PROBES
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.tokenizers.dual import TOKENS_PER_GROUP


def record(question: str, condition: str, answer: str) -> Record:
    turns = (Message("human", (TextPart("?"),)), Message("assistant", (TextPart(answer),)))
    return Record(f"{question}#{condition}", turns, meta={"condition": condition})


def corpus(questions: int) -> list[Record]:
    copies = (("clear", "seven"), ("noisy", "Sorry, again?"), ("silent", "Pardon?"))
    return [record(f"q{n}", condition, answer) for n in range(questions) for condition, answer in copies]


def answers(records: list[Record]) -> list[str]:
    return [one.messages[-1].content[0].text for one in records]  # type: ignore[union-attr]


def test_a_share_of_the_clear_ones_is_asked_again_and_nothing_else_changes():
    records = corpus(400)
    made = list(doubting(records, 0.25, seed=0))
    changed = [(before, after) for before, after in zip(records, made, strict=True) if before != after]
    assert 70 < len(changed) < 130
    assert all(before.meta["condition"] == "clear" for before, _ in changed)
    assert set(answers([after for _, after in changed])) == {"Sorry, again?"}
    assert [one.id for one in made] == [one.id for one in records]
    # The same ones whatever else is there, and others with another seed.
    assert list(doubting(records[:300], 0.25, seed=0)) == made[:300]
    assert list(doubting(records, 0.25, seed=1)) != made
    assert list(doubting(records, 0.0, seed=0)) == records
    assert "seven" not in answers(list(doubting(records, 1.0, seed=0)))


def test_probes_set_the_right_answer_against_the_deaf_one():
    lines = list(deaf_probes(corpus(2)))
    assert [line["id"] for line in lines] == ["q0#clear#probe", "q1#clear#probe"]
    said = [{side: line[side]["content"][0]["text"] for side in ("chosen", "rejected")} for line in lines]
    assert said == [{"chosen": "seven", "rejected": "Sorry, again?"}] * 2
    assert [line["category"] for line in lines] == [CATEGORY] * 2 and CATEGORY == PROBES
    assert all(len(line["messages"]) == 1 for line in lines)


@pytest.mark.parametrize("make", [lambda records: list(deaf_probes(records)), lambda r: list(doubting(r, 0.5, 0))])
def test_without_clear_ones_or_their_copies_it_says_so(make):
    with pytest.raises(UserError, match="no conversation has meta.condition clear"):
        make([record("q", "noisy", "Sorry?")])
    with pytest.raises(UserError, match="q#clear: needs its copy q#noisy"):
        make([record("q", "clear", "seven")])


def test_the_commands_on_a_corpus_with_codes(tmp_path, monkeypatch):
    (tmp_path / "wav").mkdir()
    soundfile.write(tmp_path / "wav/q.wav", speech_like(16000).numpy() / 4, 16000)
    heard = {"type": "audio", "audio": "wav/q.wav", "text": "what comes after six", "language": "English"}
    turns = [{"role": "human", "content": [heard]}, {"role": "assistant", "content": "seven"}]
    lines = [json.dumps({"id": f"q{n}", "messages": turns}) + "\n" for n in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    small_speech_tokenizer().save(tmp_path / "tokenizer")

    def typed(tool, *arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
        tool.main()

    out = tmp_path / "out"
    source = (tmp_path / "in.jsonl", out, "--limit", 2, "--speech-tokenizer", tmp_path / "tokenizer")
    typed(make_hearing_corpus, *source)
    records = list(read_records(out / "conversations.jsonl"))
    assert [one.id.partition("#")[0] for one in records] == ["q0"] * 4 + ["q1"] * 4
    counts = [part.tokens.count("<audio_") for one in records for part in one.audio_parts() if part.tokens]
    assert len(counts) == 8 and all(count and count % TOKENS_PER_GROUP == 0 for count in counts)
    typed(make_doubting_answers, out / "conversations.jsonl", out / "doubting.jsonl", "--share", 1)
    made = list(read_records(out / "doubting.jsonl"))
    assert "seven" not in answers(made) and [one.audio_parts() for one in made] == [r.audio_parts() for r in records]
    typed(make_deaf_probes, out / "conversations.jsonl", out / "probes.jsonl")
    assert len((out / "probes.jsonl").read_text().splitlines()) == 2
    with pytest.raises(SystemExit):
        typed(make_doubting_answers, out / "conversations.jsonl", out / "x.jsonl", "--share", 2)
