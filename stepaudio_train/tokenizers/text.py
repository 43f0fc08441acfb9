"""Text tokenizer: a SentencePiece unigram file in, the ids that the released model was served with out.

The file is turned into a `tokenizers` unigram model the way transformers 4.48 did for the released checkpoints. Control
pieces such as `<|BOT|>` are parsed wherever they stand in a text, and the word mark `▁` is put before the first word
of a text only, never behind a control piece. Small tokenizers have the released layout: special pieces 0-67, bytes
68-323, learned pieces from 324.
"""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stepaudio_train.tokenizers.vocabulary import FIRST_BYTE_ID, FIRST_PIECE_ID, Special

_WORD_MARK = "▁"
FIRST_AUDIO_PIECE = "<audio_0>"
_KINDS = sentencepiece_file.ModelProto.SentencePiece
_META_PIECES = 3
"""<unk>, <s> and </s>: what SentencePiece counts into the vocabulary besides learned pieces."""


class TextTokenizer:
    """Text to ids and back. Build it with `from_file`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> TextTokenizer:
        """Read a SentencePiece unigram model.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a SentencePiece unigram model.
        """
        return cls(build_tokenizer(read_text_tokenizer(path)))

    @property
    def size(self) -> int:
        """Number of ids, control and byte pieces included."""
        return self._tokenizer.get_vocab_size()

    @property
    def text_size(self) -> int:
        """Number of ids before `<audio_0>`; `size` where there is none, as in files that this project trains."""
        first_audio = self._tokenizer.token_to_id(FIRST_AUDIO_PIECE)
        return self.size if first_audio is None else first_audio

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`; with `add_bos`, behind `<s>`."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [int(Special.BOS), *ids] if add_bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control pieces written out.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        size = self.size
        for index in ids:
            if not 0 <= index < size:
                raise ValueError(f"id {index} is outside this text tokenizer's 0..{size - 1}")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def read_text_tokenizer(path: str | PathLike[str]) -> sentencepiece_file.ModelProto:
    """Read a SentencePiece unigram model. Errors as in `TextTokenizer.from_file`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text tokenizer file")
    proto = sentencepiece_file.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: is not a SentencePiece model") from error
    if proto.trainer_spec.model_type != sentencepiece_file.TrainerSpec.UNIGRAM or not proto.pieces:
        raise ValueError(f"{path}: is not a SentencePiece unigram model")
    return proto


def build_tokenizer(proto: sentencepiece_file.ModelProto, more_pieces: Iterable[str] = ()) -> Tokenizer:
    """The `tokenizers` object of a SentencePiece unigram model; `more_pieces` get the ids behind the model's own."""
    # The first three pieces count as score 0 whatever the file says, as in the released tokenizer's conversion.
    scored = [(p.piece, p.score if index > 2 else 0.0) for index, p in enumerate(proto.pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, proto.trainer_spec.unk_id, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_WORD_MARK, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens(
        [
            AddedToken(p.piece, normalized=False, special=p.type != _KINDS.USER_DEFINED)
            for p in proto.pieces
            if p.type in (_KINDS.UNKNOWN, _KINDS.CONTROL, _KINDS.USER_DEFINED)
        ]
    )
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in more_pieces])
    return tokenizer


def train_text_tokenizer(texts: Iterable[str], text_size: int, path: Path) -> None:
    """Learn a SentencePiece unigram model and write it to `path`; the same texts give the same file.

    Args:
        texts: the corpus; empty lines do not count.
        text_size: ids in all. Where the corpus is too small for that many pieces, pieces that no text uses fill up.
        path: the file to write, usually `text.model`.

    Raises:
        ValueError: no text, or no room for pieces.
    """
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("cannot train a text tokenizer: there is no text")
    if text_size <= FIRST_PIECE_ID:
        raise ValueError(
            f"text_size={text_size}: must be over {FIRST_PIECE_ID}, the special and byte ids; type at least "
            f"{FIRST_PIECE_ID + 64}"
        )
    learned = _learn(lines, text_size - FIRST_PIECE_ID)
    proto = _with_released_layout(learned, text_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(proto.SerializeToString(deterministic=True))
    temporary.replace(path)


def _learn(lines: list[str], num_pieces: int) -> sentencepiece_file.ModelProto:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_spellable(lines, num_pieces)),
        model_writer=model,
        model_type="unigram",
        vocab_size=num_pieces + _META_PIECES,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece_file.ModelProto.FromString(model.getvalue())


def _spellable(lines: list[str], num_pieces: int) -> list[str]:
    """The lines with rare characters taken out: at most half the pieces are single characters, bytes spell the rest."""
    counts = Counter(character for line in lines for character in line)
    kept = {character for character, _ in counts.most_common(max(1, num_pieces // 2))}
    return ["".join(character if character in kept else " " for character in line) for line in lines]


def _with_released_layout(learned: sentencepiece_file.ModelProto, text_size: int) -> sentencepiece_file.ModelProto:
    proto = sentencepiece_file.ModelProto()
    proto.trainer_spec.CopyFrom(learned.trainer_spec)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = text_size
    proto.normalizer_spec.CopyFrom(learned.normalizer_spec)
    for piece, kind in special_pieces():
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for value in range(FIRST_PIECE_ID - FIRST_BYTE_ID):
        proto.pieces.add(piece=f"<0x{value:02X}>", score=0.0, type=_KINDS.BYTE)
    for piece in learned.pieces:
        # In a vocabulary this small, runs of characters of scripts written without spaces are too rare to be learned.
        if piece.type == _KINDS.NORMAL and sum(map(_is_ideograph, piece.piece)) < 2:
            proto.pieces.add(piece=piece.piece, score=piece.score, type=_KINDS.NORMAL)
    for index in range(text_size - len(proto.pieces)):
        proto.pieces.add(piece=f"<unused_{index}>", score=0.0, type=_KINDS.USER_DEFINED)
    return proto


def _is_ideograph(character: str) -> bool:
    return unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) == "W"


def special_pieces() -> list[tuple[str, int]]:
    """Pieces 0-67 of the released text tokenizer and their SentencePiece types, in the order of their ids."""
    control = [
        *("<s>", "</s>", "<|EOT|>", "<|BOT|>", "<|CALL_START|>", "<|CALL_END|>", "<|THINK_START|>", "<|THINK_END|>"),
        *("<|IMG_START|>", "<|IMG_END|>", "<|META_START|>", "<|META_END|>", "<im_patch>", "<im_start>", "<im_end>"),
        *("<dream>", "<dream_start>", "<dream_end>"),
    ]
    pieces = [("<unk>", _KINDS.UNKNOWN), *((piece, _KINDS.CONTROL) for piece in control)]
    pieces += [("<|MASK_1e69f|>", _KINDS.USER_DEFINED), ("<|UNMASK_1e69f|>", _KINDS.USER_DEFINED)]
    pieces += [(piece, _KINDS.CONTROL) for piece in ("<video_start>", "<video_end>", "<row_patch>", "<column_patch>")]
    pieces += [("<|SEP_1e69f|>", _KINDS.USER_DEFINED)]
    pieces += [(f"<user_defined_symbol_{index}>", _KINDS.USER_DEFINED) for index in range(22, 27)]
    pieces += [(f"<{kind}_{edge}>", _KINDS.CONTROL) for kind in ("audio", "text") for edge in ("start", "end")]
    pieces += [(f"<|{task}|>", _KINDS.CONTROL) for task in ("TTS", "ASR", "TQAA", "AQTA")]
    pieces += [(f"<user_defined_symbol_{index}>", _KINDS.USER_DEFINED) for index in range(35, 64)]
    return pieces
