"""Exact and near duplicates: values by hand, and the decisions of brute force."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest

from alignkit.data.hygiene import Match, duplicates
from alignkit.data.hygiene.duplicates import exact_duplicates, near_duplicates
from alignkit.data.hygiene.shingles import Text, normalise, parts_of, shingles
from alignkit.data.words import words

TWENTY = "the old miller of the village sold his last sack of flour to a young baker from over the wide river"


def brute_force(texts: list[Text], threshold: float) -> list[Match | None]:
    """The definition, pair by pair, on the sets that `shingles` makes."""
    sets = shingles(texts)
    rows = [sets.pairs[sets.starts[row] : sets.starts[row + 1]].tolist() for row in range(len(texts))]
    split = [[{p for p in row if sets.part_of[p] == part} for part in range(sets.sizes.shape[1])] for row in rows]
    matches: list[Match | None] = []
    for row, parts in enumerate(split):
        matches.append(None)
        for other in range(row):
            shares = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in zip(parts, split[other], strict=True)]
            if matches[other] is None and min(shares) >= threshold:
                matches[row] = Match(other, min(shares))
                break
    return matches


def made_up(rng: Random, count: int, vocabulary: int, fewest: int = 0, most: int = 25) -> list[Text]:
    texts: list[Text] = []
    for _ in range(count):
        row = [f"w{int(rng.paretovariate(0.5)) % vocabulary}" for _ in range(rng.randint(fewest, most))]
        if texts and rng.random() < 0.5:
            row = str(rng.choice(texts)).split()
            for _ in range(rng.randint(0, 3) if row else 0):
                row[rng.randrange(len(row))] = f"w{rng.randrange(vocabulary)}"
        texts.append(" ".join(row))
    return texts


def test_case_spaces_and_the_width_of_characters_are_no_difference() -> None:
    assert normalise("  ＡＢＣ\tStraße\n ") == "abc strasse"
    assert exact_duplicates(["One two", "three", "one  TWO\n", "ｔｈｒｅｅ", "one, two"]) == [None, None, 0, 1, None]


def test_exact_duplicates_are_told_part_by_part() -> None:
    assert exact_duplicates([("a b", "c"), ("a", "b c"), ("a b", "c ")]) == [None, None, 0]


def test_similarity_is_the_jaccard_index_of_neighbouring_words() -> None:
    """21 words have 20 pairs; another word inside breaks two: 18 / 22 = 0.818."""
    changed = TWENTY.replace("flour", "wheat")
    assert len(words(TWENTY)) == 21
    assert near_duplicates([TWENTY, changed, TWENTY.upper()]) == [None, Match(0, 18 / 22), Match(0, 1.0)]
    assert near_duplicates([TWENTY, changed], threshold=0.82) == [None, None]


def test_the_threshold_itself_is_similar_enough() -> None:
    """Four of five pairs: "a b c d e" has 4 of the 5 in "a b c d e f"."""
    assert near_duplicates(["a b c d e f", "a b c d e"], threshold=0.8) == [None, Match(0, 0.8)]


def test_the_order_of_words_matters() -> None:
    assert near_duplicates(["Is Anna taller than Bob?", "Is Bob taller than Anna?"]) == [None, None]


def test_signs_matter_where_words_are_the_same() -> None:
    assert near_duplicates(["3 + 4", "3 - 4", "3 < 4", "3 + 4!"]) == [None, None, None, Match(0, 1.0)]


def test_texts_without_words_are_alike_only_if_they_are_the_same() -> None:
    assert near_duplicates(["🙂", "🙃", "", "🙂 ", ""]) == [None, None, None, Match(0, 1.0), Match(2, 1.0)]


def test_chinese_is_compared_character_by_character() -> None:
    """21 characters without punctuation have 20 pairs; one other character inside leaves 18 of 22."""
    text = "老磨坊主把最后一袋面粉卖给了河对岸的年轻人。"
    changed = text.replace("粉", "包")
    assert len(words(text)) == 21
    assert near_duplicates([text, changed, "河对岸的年轻人没有来。"]) == [None, Match(0, 18 / 22), None]


def test_of_a_group_the_first_is_kept_and_a_chain_does_not_drag_along() -> None:
    a = "a b c d e f g h i j k"
    b, c = a.replace("k", "x"), a.replace("k", "x").replace("a", "y")
    assert near_duplicates([a, b, c], threshold=0.75) == [None, Match(0, 9 / 11), None]  # c is like b alone


def test_questions_about_one_statement_are_no_near_duplicates() -> None:
    statement = " ".join(f"word{number}" for number in range(300))
    rows = [
        (statement, "Is it red?", "Yes."),
        (statement, "Is it blue?", "Yes."),
        (statement, "Is it red?", "No."),
        (statement + " more", "is it RED", "yes"),
    ]
    assert near_duplicates(rows) == [None, None, None, Match(0, 299 / 300)]


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_decisions_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, threshold: float, block: int) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    monkeypatch.setattr(duplicates, "_AT_ONCE", 64)
    rng = Random(int(10 * threshold))
    texts = made_up(rng, 250, vocabulary=30) + made_up(rng, 250, vocabulary=3000, most=60)
    questions, answers = made_up(rng, 12, 12, most=9), made_up(rng, 12, 9, most=30)
    pairs: list[Text] = [(str(rng.choice(questions)), str(rng.choice(answers))) for _ in range(200)]
    for rows in (texts, pairs):
        expected = brute_force(rows, threshold)
        assert near_duplicates(rows, threshold) == expected
        assert sum(match is not None for match in expected) > 20


def test_many_copies_of_one_text_take_no_quadratic_time() -> None:
    texts = [f"{TWENTY} number {row % 2}" for row in range(10_000)]
    matches = near_duplicates(texts)
    assert matches[0] is None
    assert all(match is not None and match.row == 0 for match in matches[1:])


def test_nothing_depends_on_the_hash_seed() -> None:
    code = (
        "from test_duplicates import *; rows = made_up(Random(3), 300, 40);"
        "from alignkit.data.hygiene.contamination import contaminated;"
        "print(near_duplicates(rows), contaminated(rows, rows[:50], 4))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert "Match" in runs[0]


def test_none_and_one_text() -> None:
    assert near_duplicates([]) == []
    assert near_duplicates([""]) == near_duplicates(["one"]) == [None]
    assert exact_duplicates([]) == []


def test_a_threshold_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold=0"):
        near_duplicates(["a"], 0)


def test_parts_of_a_plain_text() -> None:
    assert list(parts_of("ab")) == ["ab"]
