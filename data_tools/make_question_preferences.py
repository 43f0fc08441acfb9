"""Preferences of right answers in a sentence to spoken questions: over the bare word, and over wrong sentences.

    python -m data_tools.make_question_preferences INSTRUCTIONS OUT --seed 0

Takes what `data_tools.make_instruction_corpus` writes: INSTRUCTIONS/{questions,held_out_questions}.jsonl, questions
that fine-tuning does not see. Writes OUT/{preferences,held_out_preferences}.jsonl, a line for each question. The right
answer in a sentence is chosen. Five lines of six reject the bare word, the others a wrong sentence in the same
language. The category of a line says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.make_hearing_corpus import with_names
from data_tools.make_instruction_corpus import QUESTION_FILES, in_a_sentence, questions
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.pair_lines import pair_to_json
from stepaudio_train.data.records import Message, Record, TextPart, read_records

WORD, WRONG = "bare word", "wrong answer"
_LINES_OF_WRONG = 6
"""One line of so many rejects a wrong answer."""


def question_preferences(records: Sequence[Record], seed: int) -> Iterator[dict[str, Any]]:
    """Lines of preferences, one of each record.

    Args:
        records: conversations of spoken questions with the written sentences of `make_instruction_corpus`.

    Raises:
        UserError: a record whose last turn is no such answer.
    """
    rng = np.random.default_rng(seed)
    words = {in_a_sentence(word): word for word in _answers()}
    for number, record in enumerate(records):
        last = record.messages[-1]
        right = "".join(part.text for part in last.content if isinstance(part, TextPart))
        if last.role != "assistant" or right not in words:
            raise UserError(
                f"{record.id}: does not end with a sentence of data_tools.make_instruction_corpus: {right!r}"
            )
        others = [other for other in words if other != right and other.isascii() == right.isascii()]
        wrong = others[rng.integers(len(others))]
        category, text = (WRONG, wrong) if number % _LINES_OF_WRONG == 0 else (WORD, words[right])
        rejected = Message("assistant", (TextPart(text),))
        prompt = replace(record, messages=record.messages[:-1])
        yield pair_to_json(prompt, last, rejected, category, right)


def _answers() -> list[str]:
    """Every word that answers a question."""
    return sorted({answer for _, _, answer in questions()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="INSTRUCTIONS", help="of data_tools.make_instruction_corpus")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name in QUESTION_FILES:
            path = arguments.output / f"{name.replace('questions', 'preferences')}.jsonl"
            records = [
                with_names(record, arguments.source, path)
                for record in read_records(arguments.source / f"{name}.jsonl")
            ]
            pairs = list(question_preferences(records, arguments.seed))
            lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
            write_atomically(path, "".join(lines).encode())
            sys.stderr.write(f"{len(lines)} preferences in {path}\n")
    except (UserError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
