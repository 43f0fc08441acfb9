import numpy as np
import pytest

from stepaudio_train.tokenizers.dual import (
    audio_ids_to_text,
    audio_text_to_ids,
    in_layout,
    merge_streams,
    num_groups,
    split_streams,
)
from stepaudio_train.tokenizers.vocabulary import Vocabulary

RELEASED = Vocabulary(65536)
SMALL = Vocabulary(512, reserved_size=128)


def released_loop(linguistic: list[int], semantic: list[int]) -> str:
    """What the released inference program does with two streams of codes."""
    out, i, j = "", 0, 0
    while i < len(linguistic) - 1 and j < len(semantic) - 2:
        out += "".join(f"<audio_{code}>" for code in linguistic[i : i + 2])
        out += "".join(f"<audio_{1024 + code}>" for code in semantic[j : j + 3])
        i, j = i + 2, j + 3
    return out


def test_merge_order_and_ids():
    assert merge_streams([7, 8], [1, 2, 3], RELEASED).tolist() == [65543, 65544, 66561, 66562, 66563]
    assert merge_streams([7, 8], [1, 2, 3], SMALL).tolist() == [519, 520, 1537, 1538, 1539]


def test_every_length_is_cut_as_released():
    for first in range(14):
        for second in range(20):
            linguistic, semantic = list(range(first)), list(range(100, 100 + second))
            ids = merge_streams(linguistic, semantic, RELEASED)
            assert len(ids) == 5 * num_groups(first, second) == 5 * min(first // 2, second // 3)
            assert audio_ids_to_text(ids, RELEASED) == released_loop(linguistic, semantic)


@pytest.mark.parametrize("vocabulary", [RELEASED, SMALL])
def test_round_trips(vocabulary):
    generator = np.random.default_rng(0)
    linguistic, semantic = generator.integers(0, 1024, 20), generator.integers(0, 4096, 30)
    ids = merge_streams(linguistic, semantic, vocabulary)
    back = split_streams(ids, vocabulary)
    np.testing.assert_array_equal(back[0], linguistic)
    np.testing.assert_array_equal(back[1], semantic)
    np.testing.assert_array_equal(audio_text_to_ids(audio_ids_to_text(ids, vocabulary), vocabulary), ids)


def test_a_last_group_that_is_not_whole_is_dropped():
    ids = merge_streams([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], SMALL)
    for missing in (1, 4):
        linguistic, semantic = split_streams(ids[:-missing], SMALL)
        assert (linguistic.tolist(), semantic.tolist()) == ([1, 2], [1, 2, 3])


def test_empty_streams():
    assert merge_streams([], [], SMALL).size == 0
    assert merge_streams([1, 2], [], SMALL).size == 0
    assert [part.size for part in split_streams([], SMALL)] == [0, 0]
    assert audio_ids_to_text([], SMALL) == ""
    assert audio_text_to_ids("", SMALL).size == 0


def test_errors_name_the_id_and_the_place():
    with pytest.raises(ValueError, match=r"linguistic code 1024 at position 1 .* 0\.\.1023"):
        merge_streams([0, 1024], [0, 0, 0], SMALL)
    with pytest.raises(ValueError, match="semantic code -1 at position 2"):
        merge_streams([0, 0], [0, 0, -1], SMALL)
    with pytest.raises(ValueError, match="id 1536 at position 1 should be linguistic"):
        split_streams([512, 1536], SMALL)
    with pytest.raises(ValueError, match="id 5632 at position 2 should be semantic"):
        split_streams([512, 513, 5632], SMALL)
    with pytest.raises(ValueError, match="id 3 at position 0 is no audio id"):
        audio_ids_to_text([3], SMALL)
    with pytest.raises(ValueError, match="<audio_5120> is no audio token"):
        audio_text_to_ids("<audio_1><audio_5120>", SMALL)
    with pytest.raises(ValueError, match="found 'hello'"):
        audio_text_to_ids("<audio_1>hello", SMALL)
    with pytest.raises(ValueError, match="flat list of integers"):
        split_streams([[512, 513]], SMALL)


def test_layouts_hold_the_same_tokens_in_another_order():
    vocabulary = Vocabulary(text_size=100)
    ids = merge_streams(range(5), range(10, 17), vocabulary)
    linguistic = [100, 101, 102, 103]
    semantic = [1124 + code for code in range(10, 16)]
    assert in_layout(ids, "interleaved").tolist() == ids.tolist()
    assert in_layout(ids, "linguistic").tolist() == linguistic
    assert in_layout(ids, "semantic").tolist() == semantic
    assert in_layout(ids, "sequential").tolist() == linguistic + semantic
    assert in_layout(ids[:0], "sequential").tolist() == []
