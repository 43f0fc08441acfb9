"""Word error rate."""

import pytest

from stepaudio_train.evaluation.word_errors import normalise, word_error_rate


def test_errors_are_summed_over_the_corpus():
    found = word_error_rate(["seven stop", "go"], ["seven go left", ""])
    # stop became go, left is too much, go is missing.
    assert (found.substitutions, found.insertions, found.deletions) == (1, 1, 1)
    assert found.num_words == 3
    assert found.percent == pytest.approx(100.0)
    assert word_error_rate(["a b c", "d"], ["a b c", "e"]).percent == pytest.approx(25.0)


def test_mandarin_is_counted_by_characters():
    found = word_error_rate(["三四五六"], ["三四无六"])
    assert found.num_words == 4
    assert found.percent == pytest.approx(25.0)
    assert word_error_rate(["三四 open"], ["三 四 open"]).percent == 0


def test_case_and_punctuation_do_not_count():
    assert normalise("Don't stop, GO!  “left”") == "don't stop go left"
    assert normalise("三月六日。") == "三 月 六 日"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="2 references, but 1 hypotheses"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="reference 1 has no words"):
        word_error_rate(["a", "..."], ["a", "b"])
    with pytest.raises(ValueError, match="no references"):
        word_error_rate([], [])
