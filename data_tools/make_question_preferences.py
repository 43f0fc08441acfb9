"""Preferences of right answers to spoken questions over wrong ones.

    python -m data_tools.make_question_preferences INSTRUCTIONS OUT --seed 0

Takes what `data_tools.make_instruction_corpus` writes: INSTRUCTIONS/{questions,held_out_questions}.jsonl, questions
that fine-tuning does not see. Writes OUT/{preferences,held_out_preferences}.jsonl, a line for each question. The right
answer is chosen. Every other line rejects a near miss, a number one or two away or the word that the question names;
the others any wrong answer in the same language. The category of a line says which.
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
from data_tools.make_instruction_corpus import NUMBERS, OPPOSITES, QUESTION_FILES
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.pair_lines import pair_to_json
from stepaudio_train.data.records import Message, Record, TextPart, read_records

NEAR, FAR = "near miss", "other answer"
_WIDEST_MISS = 2


def question_preferences(records: Sequence[Record], seed: int) -> Iterator[dict[str, Any]]:
    """Lines of preferences, one of each record.

    Args:
        records: conversations of spoken questions with the written answers of `make_instruction_corpus`.

    Raises:
        UserError: a record whose last turn is no such answer.
    """
    rng = np.random.default_rng(seed)
    for number, record in enumerate(records):
        last = record.messages[-1]
        right = "".join(part.text for part in last.content if isinstance(part, TextPart))
        near, others = wrong_answers(right)
        if last.role != "assistant" or not near:
            raise UserError(
                f"{record.id}: does not end with an answer of data_tools.make_instruction_corpus: {right!r}"
            )
        category, wrong = ((NEAR, near), (FAR, others))[number % 2]
        rejected = Message("assistant", (TextPart(wrong[rng.integers(len(wrong))]),))
        prompt = replace(record, messages=record.messages[:-1])
        yield pair_to_json(prompt, last, rejected, category, right)


def wrong_answers(right: str) -> tuple[list[str], list[str]]:
    """Near misses of an answer, and every wrong answer in its language; none of either where it is no answer."""
    words = dict(pair for one, other in OPPOSITES for pair in ((one, other), (other, one)))
    if right in words:
        return [words[right]], [word for word in [*words, *NUMBERS["en"]] if word != right]
    for language, names in NUMBERS.items():
        if right in names:
            place = names.index(right)
            near = names[max(0, place - _WIDEST_MISS) : place + _WIDEST_MISS + 1]
            every = [*names, *(words if language == "en" else ())]
            return [name for name in near if name != right], [name for name in every if name != right]
    return [], []


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
