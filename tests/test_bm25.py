"""BM25: the scores of the formula, ties by position, and the inputs that search engines stumble over."""

from __future__ import annotations

from math import log

import pytest

pytest.importorskip("bm25s")

from alignkit.retrieval.bm25 import BM25Index, Hit, tokens

TEXTS = ["a b c", "a a d", "b d e f", "g"]


def found(texts: list[str], query: str, k: int = 10) -> list[int]:
    return [hit.index for hit in BM25Index(texts).search([query], k)[0]]


def test_scores_are_those_of_the_formula() -> None:
    hits = BM25Index(TEXTS).search(["a d", "a a d"], 10)
    idf = log(1 + (4 - 2 + 0.5) / (2 + 0.5))  # a and d stand in two of the four texts each
    average = (3 + 3 + 4 + 1) / 4

    def weight(frequency: int, length: int) -> float:
        return idf * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * length / average))

    expected = {0: weight(1, 3), 1: weight(2, 3) + weight(1, 3), 2: weight(1, 4)}
    assert {hit.index: hit.score for hit in hits[0]} == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx({0: 0.266362, 1: 0.651201, 2: 0.230177}, abs=1e-6)
    assert [hit.index for hit in hits[0]] == [1, 0, 2]
    repeated = {0: 2 * weight(1, 3), 1: 2 * weight(2, 3) + weight(1, 3), 2: weight(1, 4)}
    assert {hit.index: hit.score for hit in hits[1]} == pytest.approx(repeated, rel=1e-5)


def test_a_text_without_any_token_of_the_query_is_no_hit() -> None:
    assert found(TEXTS, "b zzz") == [0, 2]
    assert found(TEXTS, "zzz") == found(TEXTS, "") == found(TEXTS, "?!") == []


def test_equal_scores_stand_in_the_order_of_the_texts_also_at_the_cut() -> None:
    texts = ["other words", *["same words"] * 50, "same same words"]
    assert found(texts, "same", 5) == [51, 1, 2, 3, 4]
    assert found(texts, "same", 100) == [51, *range(1, 51)]


def test_chinese_is_found_by_its_characters_and_pairs() -> None:
    assert tokens("Ａlaska 州的首府, U2") == ["alaska", "州", "的", "首", "府", "州的", "的首", "首府", "u2"]
    assert found(["朱诺是首府。", "人口很少。", "府首"], "首府是什么？") == [0, 2]


@pytest.mark.parametrize("texts", [[], [""], ["", "?!"]])
def test_nothing_is_found_where_there_are_no_words(texts: list[str]) -> None:
    assert BM25Index(texts).search(["a", ""], 3) == [[], []]


def test_empty_texts_keep_their_positions() -> None:
    assert found(["", "word", "", "word"], "word") == [1, 3]
    assert BM25Index(["word"]).search([], 3) == []
    assert found(["word"], "word", 0) == []


def test_a_common_word_still_scores_above_zero() -> None:
    hits = BM25Index(["x", "x", "x"]).search(["x"], 3)[0]
    assert [hit.index for hit in hits] == [0, 1, 2] and all(hit.score > 0 for hit in hits)
    assert Hit(0, hits[0].score) == hits[0]
