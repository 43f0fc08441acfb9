"""Preferences that tell whether a reward model pays for deafness: on clear recordings, right answers against deaf ones.

    python -m data_tools.make_deaf_probes HEARING/conversations.jsonl OUT.jsonl

Takes what `data_tools.make_hearing_corpus` writes. Of each clear recording its answer is chosen, and what is answered
to the same question in noise is rejected. They are for measuring: no person who hears a clear recording gives that
answer, which is why a reward model never sees it rejected (paper 5.2). The category is `deaf_on_clear`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.make_hearing_corpus import noisy_copies, with_names
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.pair_lines import pair_to_json
from stepaudio_train.data.records import Record, read_records

CATEGORY = "deaf_on_clear"


def deaf_probes(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Lines of preferences, one of each clear recording.

    Raises:
        UserError: there is none, or one has no copy in noise.
    """
    noisy = noisy_copies(records)
    for record in records:
        if record.id in noisy:
            prompt = replace(record, id=f"{record.id}#probe", messages=record.messages[:-1])
            yield pair_to_json(prompt, record.messages[-1], noisy[record.id].messages[-1], CATEGORY)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="CONVERSATIONS", help="of data_tools.make_hearing_corpus")
    parser.add_argument("output", type=Path, metavar="OUT", help="JSONL file to write")
    arguments = parser.parse_args()
    try:
        records = [
            with_names(record, arguments.source.parent, arguments.output) for record in read_records(arguments.source)
        ]
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in deaf_probes(records)]
    except (UserError, OSError, ValueError) as error:
        parser.error(str(error))
    write_atomically(arguments.output, "".join(lines).encode())
    sys.stderr.write(f"{len(lines)} preferences in {arguments.output}\n")


if __name__ == "__main__":
    main()
