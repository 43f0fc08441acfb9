"""`stepaudio data show` and `stepaudio data check`: conversations as a model sees them."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.text import Text

from stepaudio_train.config.sft import AnswerLoss, ChatHistory, ChatTemplate, SftDataConfig
from stepaudio_train.data.batch import TASKS
from stepaudio_train.data.conversation_files import (
    ConversationFile,
    EncodedConversations,
    Worker,
    encode_conversations,
    with_silent_codes,
)
from stepaudio_train.data.conversations import render_conversations
from stepaudio_train.data.packing import Document
from stepaudio_train.data.render import Renderer, RenderError
from stepaudio_train.data.tags import TagVocabulary
from stepaudio_train.tokenizers.dual import TOKENS_PER_GROUP, audio_ids_to_text
from stepaudio_train.tokenizers.text import TextTokenizer
from stepaudio_train.tokenizers.vocabulary import Vocabulary

_TAUGHT, _GIVEN = "bold green", "dim"
_SHOWN_AUDIO_TOKENS = 2 * TOKENS_PER_GROUP


@dataclass(frozen=True)
class DataOptions:
    """What both commands are asked for."""

    file: Path
    """JSONL of conversations (docs/fine_tuning.md)."""
    text_tokenizer: Path
    """SentencePiece file of the model."""
    template: ChatTemplate = "tts"
    loss: AnswerLoss = "last"
    history: ChatHistory = "text"
    own_tags: tuple[str, ...] = ()
    speech_tokenizer: Path | None = None
    """Encodes recordings that come without codes. None shows as many codes as they are long."""
    first: int = 1
    """Line of the file to begin with."""
    count: int = 3
    ids: bool = False
    """Show every id with its piece."""
    sequence_length: int = 4096
    """What is longer is refused."""

    def renderer(self) -> Renderer:
        tokenizer = TextTokenizer.from_file(self.text_tokenizer)
        return Renderer(Vocabulary(tokenizer.text_size, reserved_size=0), tokenizer)

    def read(self) -> ConversationFile:
        return ConversationFile.read(self.file, TagVocabulary(self.own_tags))


def show(options: DataOptions) -> int:
    """Print conversations as the model sees them: what teaches in green, what is given dim; 1 if a line is refused."""
    console, renderer = Console(highlight=False), options.renderer()
    file = options.read()
    chosen = ((where, record) for where, record in file.records if _line(where) >= options.first)
    file = ConversationFile(file.path, list(islice(chosen, options.count)), file.refused)
    found = _encoded(file, options)
    if options.speech_tokenizer is None and file.recordings():
        console.print("recordings are shown by their length alone; type --speech-tokenizer DIR to encode them\n")
    for where, sample in found.samples:
        try:
            document = renderer.render_chat(sample, options.template, options.loss, options.history)
        except RenderError as error:
            console.print(f"{where}: {error}", style="red", soft_wrap=True)
            continue
        num_taught = int(document.loss_weights.sum())
        title = f"{where}  {sample.record.id}  {TASKS[document.task]}  {len(document)} tokens, {num_taught} teach"
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print((_pieces if options.ids else _running_text)(document, renderer), soft_wrap=True)
    for refusal in found.refused:
        console.print(f"{refusal.name}: {refusal.reason}", style="red", soft_wrap=True)
    return 1 if found.refused else 0


def check(options: DataOptions) -> int:
    """Check every line of a file, recordings by their length alone; prints what would be refused. 1 if anything is."""
    data = SftDataConfig(template=options.template, loss=options.loss, history=options.history)
    found = render_conversations(with_silent_codes(options.read()), options.renderer(), data, options.sequence_length)
    for refusal in found.refused:
        sys.stdout.write(f"{refusal.name}: {refusal.reason}\n")
    lengths = [len(document) for document in found.documents]
    num_taught = sum(int(document.loss_weights.sum()) for document in found.documents)
    counts = Counter(TASKS[document.task] for document in found.documents).most_common()
    tasks = ", ".join(f"{number} {task}" for task, number in counts)
    sys.stdout.write(
        f"{options.file}: {len(lengths)} conversations ({tasks}), {len(found.refused)} refused; "
        f"{sum(lengths):,} tokens, {num_taught:,} of them teach; "
        f"lengths: median {int(np.median(lengths))}, longest {max(lengths)}\n"
    )
    return 1 if found.refused else 0


def _encoded(file: ConversationFile, options: DataOptions) -> EncodedConversations:
    if options.speech_tokenizer is None:
        return with_silent_codes(file)
    with TemporaryDirectory() as cache:
        return encode_conversations([file], options.speech_tokenizer, Path(cache), Worker())[0]


def _running_text(document: Document, renderer: Renderer) -> Text:
    shown = Text()
    first_audio = renderer.vocabulary.linguistic_offset
    tokens = zip(document.ids.tolist(), document.loss_weights > 0, strict=True)
    for (audio, taught), run in groupby(tokens, lambda token: (token[0] >= first_audio, bool(token[1]))):
        ids = [index for index, _ in run]
        if audio:
            more = f"... {len(ids)} audio tokens" if len(ids) > _SHOWN_AUDIO_TOKENS else ""
            text = audio_ids_to_text(ids[:_SHOWN_AUDIO_TOKENS], renderer.vocabulary) + more
        else:
            text = renderer.text_tokenizer.decode(ids)
        shown.append(text, style=_TAUGHT if taught else _GIVEN)
    return shown


def _pieces(document: Document, renderer: Renderer) -> Text:
    shown = Text()
    first_audio = renderer.vocabulary.linguistic_offset
    for index, taught in zip(document.ids.tolist(), document.loss_weights > 0, strict=True):
        audio = index >= first_audio
        piece = audio_ids_to_text([index], renderer.vocabulary) if audio else renderer.text_tokenizer.decode([index])
        shown.append(f"{index}:{piece!r} ", style=_TAUGHT if taught else _GIVEN)
    return shown


def _line(where: str) -> int:
    return int(where.rpartition(":")[2])
