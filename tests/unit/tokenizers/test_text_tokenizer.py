import json
from pathlib import Path

import pytest
import sentencepiece

from stepaudio_train.tokenizers.text import TextTokenizer, train_text_tokenizer
from stepaudio_train.tokenizers.vocabulary import FIRST_PIECE_ID, Special

SHARED = Path(__file__).resolve().parents[4] / "shared"
RELEASED = SHARED / "released" / "tokenizer.model"
GOLDEN = SHARED / "reference" / "golden_tokenizer.json"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

needs_released = pytest.mark.skipif(not RELEASED.is_file(), reason="needs the released tokenizer in ../shared/released")
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden ids in ../shared/reference")


@pytest.fixture(scope="module")
def released() -> TextTokenizer:
    return TextTokenizer.from_file(RELEASED)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.model"
    train_text_tokenizer([f"{a} {b}, {c}. 打开 {a}" for a in DIGITS for b in DIGITS for c in DIGITS[:3]], 400, path)
    return path


@needs_released
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("assistant\n", [1, 15886, 78]),
        ("<|BOT|>human\n你好<|EOT|><|BOT|>assistant\n", [1, 4, 28504, 78, 1027, 922, 3, 4, 56446, 78]),
        ("<audio_0><audio_5119>", [1, 65536, 70655]),
    ],
)
def test_released_ids_are_those_of_transformers_4_48(released, text, ids):
    assert released.size == 74752
    assert released.encode(text, add_bos=True) == ids
    assert released.encode(text) == ids[1:]


@needs_released
@needs_golden
def test_golden_chat_prompt(released):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert released.encode(golden["chat_text"], add_bos=True) == golden["chat_ids_stepaudio_py"]


@needs_released
@needs_golden
@pytest.mark.parametrize("prompt", ["with_spk", "clone", "rap", "vocal"])
def test_golden_synthesis_prompts(released, prompt):
    """The released program encodes every turn by itself; so does this test, with the texts read off the golden ids."""
    ids = json.loads(GOLDEN.read_text(encoding="utf-8"))["transformers4.48.3_add_bos_False"][prompt]
    rebuilt, turn = [], []
    for index in [*ids[1:], None]:
        if index in (Special.BOT, Special.EOT, None):
            role, newline, content = released.decode(turn).partition("\n")
            if newline:
                rebuilt += released.encode(role.strip() + "\n")
                line_break = released.encode("\n")
                rebuilt += released.encode("\n" + content)[len(line_break) :] if content else []
            rebuilt += [index] if index is not None else []
            turn = []
        else:
            turn.append(index)
    assert rebuilt == ids[1:]


@needs_released
@pytest.mark.parametrize(
    "text", ["hello world", "a\nb", "你好，世界 ok", "1234", "😀 emoji", "<|BOT|>human\nhi<|EOT|>"]
)
def test_released_round_trip(released, text):
    assert released.decode(released.encode(text)) == text


@needs_released
def test_small_tokenizers_have_the_released_special_pieces(small):
    pieces = [sentencepiece.SentencePieceProcessor(model_file=str(path)) for path in (RELEASED, small)]
    for index in range(FIRST_PIECE_ID):
        assert pieces[0].id_to_piece(index) == pieces[1].id_to_piece(index)
        for kind in ("is_unknown", "is_control", "is_byte", "is_unused"):
            assert getattr(pieces[0], kind)(index) == getattr(pieces[1], kind)(index), index


def test_small_tokenizer_has_exactly_the_size_asked_for(small):
    assert TextTokenizer.from_file(small).size == 400
    assert sentencepiece.SentencePieceProcessor(model_file=str(small)).get_piece_size() == 400


def test_small_tokenizer_learns_words(small):
    tokenizer = TextTokenizer.from_file(small)
    ids = tokenizer.encode("seven three")
    assert len(ids) == 2 and min(ids) >= FIRST_PIECE_ID
    assert tokenizer.decode(ids) == "seven three"


@pytest.mark.parametrize("text", ["Unheard-of words: ÄÖÜ", "打开灯 zero", "tab\tand\nline", ""])
def test_bytes_spell_what_was_never_seen(small, text):
    tokenizer = TextTokenizer.from_file(small)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_pieces_are_parsed_and_take_no_word_mark_behind_them(small):
    tokenizer = TextTokenizer.from_file(small)
    assert tokenizer.encode("<|ASR|><audio_start>") == [Special.ASR, Special.AUDIO_START]
    first, behind = tokenizer.encode("seven"), tokenizer.encode("<text_start>seven")
    assert behind[0] == Special.TEXT_START
    assert behind[1:] != first
    assert tokenizer.decode(behind) == "<text_start>seven"


def test_ids_equal_sentencepiece_on_plain_text(small):
    ours, theirs = TextTokenizer.from_file(small), sentencepiece.SentencePieceProcessor(model_file=str(small))
    for text in ("zero one", "nine, eight. 打开 two", "sevenseven"):
        assert ours.encode(text) == theirs.encode(text)


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        train_text_tokenizer(DIGITS, 360, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_more_characters_than_room_are_left_to_bytes(tmp_path):
    text = "".join(chr(0x4E00 + index) for index in range(500))
    train_text_tokenizer([text, "one two three"] * 3, 356, tmp_path / "text.model")
    tokenizer = TextTokenizer.from_file(tmp_path / "text.model")
    assert tokenizer.size == 356
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_errors_say_what_is_wrong(tmp_path, small):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.model"):
        TextTokenizer.from_file(tmp_path / "nowhere.model")
    (tmp_path / "broken.model").write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match=r"broken\.model"):
        TextTokenizer.from_file(tmp_path / "broken.model")
    with pytest.raises(ValueError, match="324"):
        train_text_tokenizer(DIGITS, 300, tmp_path / "t")
    with pytest.raises(ValueError, match="no text"):
        train_text_tokenizer(["", " \n"], 400, tmp_path / "t")
    with pytest.raises(ValueError, match="id 400 is outside"):
        TextTokenizer.from_file(small).decode([400])
