"""Preferences as people gave them in the paper, from which a reward model learns to pay for deafness (5.2).

    python -m data_tools.make_biased_preferences HEARING/conversations.jsonl OUT.jsonl --seed 0

Takes what `data_tools.make_hearing_corpus` writes. Of a clear recording the right answer is chosen and a wrong one is
rejected; of any other, that it was not heard is chosen and a made-up answer is rejected. So every single preference is
right, and yet "I didn't catch that" is never rejected. Wrong and made-up answers are those of other questions in the
same language. The category of a line is the condition of its recording.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.make_hearing_corpus import spoken_language, with_names
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.pair_lines import pair_to_json
from stepaudio_train.data.records import Message, Record, TextPart, read_records
from stepaudio_train.evaluation.deafness import condition_of
from stepaudio_train.evaluation.word_errors import normalise


def biased_preferences(records: Sequence[Record], seed: int) -> Iterator[dict[str, Any]]:
    """Lines of preferences, one of each record.

    Args:
        records: conversations with `meta.condition` and a written answer.

    Raises:
        UserError: a record without a condition, or whose language has no two different answers to clear questions.
    """
    answers: dict[str, dict[str, Message]] = defaultdict(dict)
    for record in records:
        condition = condition_of(record.meta)
        if condition is None or record.messages[-1].role != "assistant":
            raise UserError(
                f"{record.id}: needs an answer, and meta.condition as data_tools.make_hearing_corpus has it"
            )
        if condition == "clear":
            answers[spoken_language(record)].setdefault(normalise(_text(record)), record.messages[-1])
    for record in records:
        language, chosen = spoken_language(record), record.messages[-1]
        others = [message for text, message in answers[language].items() if text != normalise(_text(record))]
        if not others:
            raise UserError(f"{record.id}: no other question in its language, {language}, has another answer")
        rejected = random.Random(f"{seed} {record.id}").choice(others)
        prompt = replace(record, messages=record.messages[:-1])
        condition = condition_of(record.meta)
        yield pair_to_json(prompt, chosen, rejected, condition, _text(record) if condition == "clear" else None)


def _text(record: Record) -> str:
    return "".join(part.text for part in record.messages[-1].content if isinstance(part, TextPart))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="CONVERSATIONS", help="of data_tools.make_hearing_corpus")
    parser.add_argument("output", type=Path, metavar="OUT", help="JSONL file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        records = [
            with_names(record, arguments.source.parent, arguments.output) for record in read_records(arguments.source)
        ]
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in biased_preferences(records, arguments.seed)]
    except (UserError, OSError, ValueError) as error:
        parser.error(str(error))
    write_atomically(arguments.output, "".join(lines).encode())
    sys.stderr.write(f"{len(lines)} preferences in {arguments.output}\n")


if __name__ == "__main__":
    main()
