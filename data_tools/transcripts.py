"""Write what is said in a prepared dataset as plain text, a transcript a line: a text corpus of the same domain.

    python -m data_tools.transcripts corpora/prepared/train corpora/transcripts.txt

Each text stands there as often as it was said, but for joined and sped-up copies of recordings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.records import parse_record
from stepaudio_train.data.shards import list_shards, read_shard


def transcripts(folder: Path) -> Iterator[str]:
    """Transcripts of a folder of shards, in their order, without those of copies."""
    for shard in list_shards(folder):
        for sample in read_shard(shard):
            record = parse_record(sample.members["json"], f"{shard}: {sample.key}")
            if "speed" not in record.meta:
                yield from (part.text for part in record.audio_parts() if part.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path, help="one split of an output of `stepaudio prepare`")
    parser.add_argument("output", type=Path, help="text file to write")
    arguments = parser.parse_args()
    lines = list(transcripts(arguments.shards))
    write_atomically(arguments.output, "".join(f"{line}\n" for line in lines).encode())
    sys.stdout.write(f"{len(lines)} transcripts in {arguments.output}\n")


if __name__ == "__main__":
    main()
