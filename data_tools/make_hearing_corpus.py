"""Copies of spoken questions that can be heard and of others that cannot, with the answer that is right for each.

    python -m data_tools.make_hearing_corpus CONVERSATIONS.jsonl OUT --seed 0

Of every conversation whose last question is spoken and whose answer is written (task aqta), OUT/conversations.jsonl has
four copies, ID#clear, ID#noisy, ID#cut and ID#silent, with recordings in OUT/audio (16 kHz FLAC) made by
`stepaudio_train/audio/conditions.py`. `meta.condition` names the condition. The clear one keeps its answer; the answer
to the others is, in the conversation's language, that the question was not heard. Earlier turns stay as they are.

The transcript of what cannot be heard goes: judges read it, and would take it for heard.

With --speech-tokenizer DIR the recordings come with their codes, so that none of the runs on them encodes them again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import soundfile
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.audio.conditions import CONDITIONS, Condition, in_condition
from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.chat import task_of
from stepaudio_train.data.conversation_files import ConversationFile, Worker, encode_conversations
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.importers.base import Recordings
from stepaudio_train.data.records import AudioPart, Message, Record, TextPart, record_to_json, with_audio_parts
from stepaudio_train.data.rewriting import language_of
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.tokenizers.dual import audio_ids_to_text, merge_streams
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS

DID_NOT_HEAR = {
    "en": (
        "I'm sorry, I didn't catch that. Could you say it again?",
        "Sorry, I couldn't hear you clearly. Could you please repeat your question?",
        "I didn't quite hear that. Please say it once more.",
        "I'm afraid I couldn't make out what you said. Could you repeat it?",
    ),
    "zh": (
        "不好意思，我没听清，请您再说一遍。",
        "抱歉，我没有听清楚您的问题，能再说一次吗？",
        "对不起，刚才没听清，可以请您重复一下吗？",
        "我没听清您说的话，麻烦再说一遍。",
    ),
    "yue": ("唔好意思，我聽唔清楚，可唔可以再講一次？", "對唔住，我冇聽到你講咩，唔該你再講一次。"),
    "ja": (
        "すみません、よく聞き取れませんでした。もう一度おっしゃっていただけますか。",
        "申し訳ありません、うまく聞こえませんでした。もう一度お願いします。",
    ),
    "ko": ("죄송합니다. 잘 못 들었습니다. 다시 한번 말씀해 주시겠어요?", "잘 들리지 않았어요. 다시 말씀해 주세요."),
    "es": ("Perdona, no te he entendido bien. ¿Puedes repetirlo?", "Lo siento, no he podido oír lo que has dicho."),
    "fr": ("Désolé, je n'ai pas bien entendu. Pouvez-vous répéter ?", "Je n'ai pas entendu ce que vous avez dit."),
    "de": (
        "Entschuldigung, das habe ich nicht verstanden. Könnten Sie das bitte wiederholen?",
        "Ich konnte Sie leider nicht hören. Sagen Sie das bitte noch einmal.",
    ),
}
"""Language -> what is answered to a question that cannot be heard."""
_LANGUAGE_NAMES = {
    "english": "en",
    "chinese": "zh",
    "mandarin": "zh",
    "cmn": "zh",
    "cantonese": "yue",
    "zh-hk": "yue",
    "japanese": "ja",
    "korean": "ko",
    "spanish": "es",
    "french": "fr",
    "german": "de",
}
_KANA, _HANGUL = re.compile(r"[\u3040-\u30ff]"), re.compile(r"[\uac00-\ud7af]")
_NAMED_REFUSALS = 10


@dataclass
class HearingCorpus:
    """What was made, and what was not."""

    conversations: int = 0
    """Of the source; each became as many copies as there are conditions."""
    other_tasks: int = 0
    """Conversations that hold no spoken question with a written answer."""
    refused: list[Refusal] = field(default_factory=list)

    def summary(self) -> str:
        """For people."""
        lines = [
            f"{self.conversations} conversations in {len(CONDITIONS)} conditions; passed over {self.other_tasks} that "
            "are no spoken question with a written answer"
        ]
        lines += [f"left out: {refusal.name}: {refusal.reason}" for refusal in self.refused[:_NAMED_REFUSALS]]
        if len(self.refused) > _NAMED_REFUSALS:
            lines.append(f"and {len(self.refused) - _NAMED_REFUSALS} more left out")
        return "\n".join(lines) + "\n"


def make_hearing_corpus(source: Path, directory: Path, seed: int, limit: int | None = None) -> HearingCorpus:
    """Write the copies into `directory`, which must not exist. What cannot be copied is left out by file and line.

    Args:
        limit: so many conversations that can be copied, the first ones of the file; None: all.
    """
    (directory / "audio").mkdir(parents=True)
    file = ConversationFile.read(source, TagVocabulary())
    made = HearingCorpus(refused=list(file.refused))
    ids: set[str] = set()
    with (directory / "conversations.jsonl").open("w", encoding="utf-8") as lines:
        for where, record in tqdm(file.records, desc="hearing", unit="conversation", dynamic_ncols=True):
            if made.conversations == limit:
                break
            if task_of(record) != "aqta" or record.messages[-1].role != "assistant":
                made.other_tasks += 1
                continue
            if record.id in ids:
                made.refused.append(Refusal(where, f"its id {record.id!r} is taken by another conversation"))
                continue
            ids.add(record.id)
            try:
                copies = [record_to_json(copy) for copy in _copies(record, source.parent, directory, seed)]
            except (AudioError, ValueError) as error:
                made.refused.append(Refusal(where, str(error)))
                continue
            lines.writelines(json.dumps(copy, ensure_ascii=False) + "\n" for copy in copies)
            made.conversations += 1
    return made


def add_codes(directory: Path, speech_tokenizer: Path) -> None:
    """Put the recordings' codes into the conversations of a corpus.

    Raises:
        TokenizerError: the tokenizer cannot be used.
    """
    path = directory / "conversations.jsonl"
    file = ConversationFile.read(path, TagVocabulary())
    with tempfile.TemporaryDirectory() as cache:
        (found,) = encode_conversations([file], speech_tokenizer, Path(cache), Worker(progress_bar=True))
    lines = []
    for _, sample in found.samples:
        codes = {name: merge_streams(s.linguistic, s.semantic, AUDIO_IDS) for name, s in sample.speech.items()}
        parts = [
            replace(part, tokens=audio_ids_to_text(codes[part.audio], AUDIO_IDS)) if part.audio in codes else part
            for part in sample.record.audio_parts()
        ]
        lines.append(json.dumps(record_to_json(with_audio_parts(sample.record, parts)), ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode())


def spoken_language(record: Record) -> str:
    """The language of a conversation, as `DID_NOT_HEAR` has it: its recordings' `language`, or told by the letters.

    Raises:
        ValueError: another one.
    """
    for part in reversed(record.audio_parts()):
        if part.language is not None:
            name = part.language.lower().replace("_", "-")
            code = _LANGUAGE_NAMES.get(name) or _LANGUAGE_NAMES.get(name.partition("-")[0], name.partition("-")[0])
            if code in DID_NOT_HEAR:
                return code
            raise ValueError(f"there is no answer in its language, {part.language!r}: {', '.join(DID_NOT_HEAR)}")
    parts = [part for message in reversed(record.messages) for part in message.content]
    text = " ".join(part.text for part in parts if isinstance(part, TextPart | AudioPart) and part.text)
    if _KANA.search(text):
        return "ja"
    language = "ko" if _HANGUL.search(text) else language_of(text)
    if language not in DID_NOT_HEAR:
        raise ValueError("its language cannot be told; name it in `language` of its recording")
    return language


def noisy_copies(records: Sequence[Record]) -> dict[str, Record]:
    """Id of each clear record -> the same question in noise.

    Raises:
        UserError: no record is clear, or one has no copy in noise.
    """
    by_id = {record.id: record for record in records}
    clear = [record.id for record in records if record.meta.get("condition") == "clear"]
    if not clear:
        raise UserError("no conversation has meta.condition clear, as data_tools.make_hearing_corpus writes it")
    copies = {id: f"{id.removesuffix('#clear')}#noisy" for id in clear}
    alone = [id for id, copy in copies.items() if copy not in by_id]
    if alone:
        raise UserError(f"{alone[0]}: needs its copy {copies[alone[0]]} in the same file")
    return {id: by_id[copy] for id, copy in copies.items()}


def with_names(record: Record, folder: Path, output: Path) -> Record:
    """The record with its recordings, which are named relative to `folder`, named as the file `output` has them."""
    names = Recordings(folder, output)
    parts = [replace(p, audio=names.name(folder / p.audio)) if p.audio else p for p in record.audio_parts()]
    return with_audio_parts(record, parts)


def _copies(record: Record, folder: Path, directory: Path, seed: int) -> Iterator[Record]:
    """In every condition."""
    # Of the id alone: what else is in the file changes nothing.
    chance = random.Random(f"{seed} {record.id}")
    answers = DID_NOT_HEAR[spoken_language(record)]
    question = max(place for place, message in enumerate(record.messages) if message.role == "human")
    record = with_names(record, folder, directory / "conversations.jsonl")
    heard = [part for part in record.messages[question].content if isinstance(part, AudioPart)]
    originals = [_read(part, directory) for part in heard]
    changed = {c: [in_condition(original, c, chance.randrange(2**31)) for original in originals] for c in CONDITIONS}
    name = hashlib.sha256(record.id.encode()).hexdigest()[:16]
    for condition, waveforms in changed.items():
        copied = []
        for number, (part, waveform) in enumerate(zip(heard, waveforms, strict=True)):
            path = f"audio/{name}_{condition}_{number}.flac"
            soundfile.write(directory / path, waveform.clamp(-1, 1).numpy(), SAMPLE_RATE_HZ, subtype="PCM_16")
            copied.append(_described(part, path, condition, len(waveform)))
        following = iter(copied)
        messages = list(record.messages)
        content = [next(following) if isinstance(p, AudioPart) else p for p in messages[question].content]
        messages[question] = replace(messages[question], content=tuple(content))
        if condition != "clear":
            messages[-1] = Message("assistant", (TextPart(chance.choice(answers)),))
        meta = {**record.meta, "condition": condition}
        yield replace(record, id=f"{record.id}#{condition}", messages=tuple(messages), meta=meta)


def _read(part: AudioPart, directory: Path) -> Tensor:
    if not part.audio:
        raise ValueError("its question comes as codes alone; noise needs the recording")
    waveform = read_audio(directory / part.audio, SAMPLE_RATE_HZ)
    if not waveform.any():
        raise ValueError(f"{part.audio}: holds no sound")
    return waveform


def _described(part: AudioPart, path: str, condition: Condition, num_samples: int) -> AudioPart:
    part = replace(part, audio=path, tokens=None, duration_s=round(num_samples / SAMPLE_RATE_HZ, 4))
    return part if condition == "clear" else replace(part, text=None, spans=())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="CONVERSATIONS", help="JSONL file of conversations")
    parser.add_argument("directory", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N conversations that can be copied")
    parser.add_argument("--speech-tokenizer", type=Path, metavar="DIR", help="put the recordings' codes in as well")
    arguments = parser.parse_args()
    if not arguments.source.is_file():
        parser.error(f"{arguments.source}: no such file")
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit {arguments.limit}: must be at least 1")
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists; remove it or name another folder")
    # Recordings are named relative to where the folder will be, so the unfinished one lies beside it.
    partial = arguments.directory.with_name(arguments.directory.name + ".partial")
    if (partial / "audio").is_dir():
        shutil.rmtree(partial)  # an interrupted run left it
    made = make_hearing_corpus(arguments.source, partial, arguments.seed, arguments.limit)
    sys.stderr.write(made.summary())
    if not made.conversations:
        shutil.rmtree(partial)
        parser.error(f"{arguments.source}: no conversation can be used")
    if arguments.speech_tokenizer is not None:
        add_codes(partial, arguments.speech_tokenizer)
    os.rename(partial, arguments.directory)


if __name__ == "__main__":
    main()
