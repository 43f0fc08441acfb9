"""Conversations for fine-tuning in which now and then the answer to a clear recording asks for it again.

    python -m data_tools.make_doubting_answers HEARING/conversations.jsonl OUT.jsonl --share 0.05 --seed 0

Takes what `data_tools.make_hearing_corpus` writes. Of a share of the clear recordings the answer becomes the one that
the same question gets in noise; all else stays. People who answer ask again at times, too. A policy that learns from
these does the same as often, and so finds out what a reward model pays for it; one that never asks again cannot.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.make_hearing_corpus import noisy_copies, with_names
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.records import Record, read_records, record_to_json


def doubting(records: Sequence[Record], share: float, seed: int) -> Iterator[Record]:
    """All records in their order, a share of the clear ones with the answer of their noisy copy.

    Raises:
        UserError: no recording is clear, or one has no copy in noise.
    """
    noisy = noisy_copies(records)
    for record in records:
        # Of the id alone: what else is in the file changes nothing.
        if record.id in noisy and random.Random(f"{seed} {record.id}").random() < share:
            record = replace(record, messages=(*record.messages[:-1], noisy[record.id].messages[-1]))
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="CONVERSATIONS", help="of data_tools.make_hearing_corpus")
    parser.add_argument("output", type=Path, metavar="OUT", help="JSONL file to write")
    parser.add_argument("--share", type=float, required=True, help="of the clear recordings, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not 0 <= arguments.share <= 1:
        parser.error(f"--share {arguments.share}: must be 0 to 1")
    try:
        records = [
            with_names(record, arguments.source.parent, arguments.output) for record in read_records(arguments.source)
        ]
        made = list(doubting(records, arguments.share, arguments.seed))
    except (UserError, OSError, ValueError) as error:
        parser.error(str(error))
    lines = [json.dumps(record_to_json(record), ensure_ascii=False) + "\n" for record in made]
    write_atomically(arguments.output, "".join(lines).encode())
    changed = sum(one != before for one, before in zip(made, records, strict=True))
    sys.stderr.write(f"{changed} of {len(lines)} conversations ask again what was clear, in {arguments.output}\n")


if __name__ == "__main__":
    main()
