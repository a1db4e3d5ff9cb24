"""Runs of words that stand in rows and in evaluation rows: which count, and which do not."""

from __future__ import annotations

import pytest

from alignkit.data.hygiene import Match, contamination
from alignkit.data.hygiene.contamination import SHORTEST, contaminated

ARTICLE = " ".join(f"word{number}" for number in range(40))
QUESTION = "In which year did the miller of the village sell his last sack of flour to the baker?"


def test_a_copied_question_is_found_wherever_the_row_holds_it() -> None:
    rows = [
        (f"Answer this. {QUESTION}", "", "In 1901."),
        ("", "Repeat after me", QUESTION.upper()),
        ("In which year did the miller of the village sell", "his last sack of flour to the baker?", "In 1901."),
        ("In which year did the miller sell the mill?", "", "In 1902."),
    ]
    assert contaminated(rows, [QUESTION]) == [Match(0, 1.0), Match(0, 1.0), Match(0, 1.0), None]


def test_the_similarity_is_the_share_of_the_evaluation_ngrams() -> None:
    """40 words have 28 runs of 13. The first 26 words have 14 of them, the first 25 have 13."""
    half, less = " ".join(ARTICLE.split()[:26]), " ".join(ARTICLE.split()[:25])
    assert contaminated([half, less], [ARTICLE]) == [Match(0, 14 / 28), None]
    assert contaminated([half, less], [ARTICLE], share=13 / 28) == [Match(0, 14 / 28), Match(0, 13 / 28)]
    assert contaminated([half], [ARTICLE], share=0.51) == [None]


def test_a_text_shorter_than_the_ngram_must_be_held_whole() -> None:
    short = "Name the three rivers of the northern valley."
    assert len(short.split()) == SHORTEST
    rows = ["Please: name the three rivers of the northern valley!", "Name the three rivers of the southern valley."]
    assert contaminated(rows, [short]) == [Match(0, 1.0), None]


def test_a_very_short_text_must_be_a_whole_part() -> None:
    rows = [("Write a poem about the sea", ""), ("write a POEM!", ""), ("Do it:", "Write a poem")]
    assert contaminated(rows, ["Write a poem."]) == [None, Match(0, 1.0), Match(0, 1.0)]


def test_a_shared_statement_with_another_question_is_no_contamination() -> None:
    evaluation = [(ARTICLE, "Is word3 red?"), (ARTICLE, "Is word4 blue?")]
    rows = [
        (ARTICLE, "Is word9 red?", "Yes."),
        (ARTICLE, "Is word4 blue?", "No."),
        (f"{ARTICLE}\nIs word3 red?", "", "Yes."),
        ("Another statement.", "Is word4 blue?", "No."),
    ]
    assert contaminated(rows, evaluation) == [None, Match(1, 1.0), Match(0, 1.0), None]


def test_a_question_shared_by_many_statements_is_no_contamination() -> None:
    evaluation = [(f"{ARTICLE} {number}", "Is it true?") for number in range(5)]
    assert contaminated([("Snow is white.", "Is it true?", "Yes.")], evaluation) == [None]
    assert contaminated([(f"{ARTICLE} 3", "Is it true?", "Yes.")], evaluation) == [Match(3, 1.0)]


def test_a_template_of_the_evaluation_texts_is_no_evidence() -> None:
    """The template has 40 of 43 words; only the runs that reach into the last three words count."""
    evaluation = [f"{ARTICLE} {subject}" for subject in ("red old mill", "blue new boat", "cold dark sea")]
    rows = [f"{ARTICLE} green small hut", f"{ARTICLE} blue new boat", f"{ARTICLE} blue new house"]
    assert contaminated(rows, evaluation) == [None, Match(1, 1.0), Match(1, 2 / 3)]


def test_a_text_all_of_whose_runs_stand_in_others_must_be_a_whole_part() -> None:
    beginning = " ".join(ARTICLE.split()[:20])
    evaluation = [beginning, ARTICLE]
    assert contaminated([beginning, f"{beginning} and more"], evaluation) == [Match(0, 1.0), None]


def test_of_several_the_one_held_most_is_named_and_of_equals_the_first() -> None:
    first, second = ARTICLE, " ".join(f"other{number}" for number in range(30))
    text = " ".join(first.split()[:30]) + " " + second
    assert contaminated([text], [first, second]) == [Match(1, 1.0)]
    assert contaminated([first], [second, first, first.upper()]) == [Match(1, 1.0)]


def test_chinese_words_are_characters() -> None:
    question = "磨坊主在哪一年把最后一袋面粉卖给了面包师？"
    rows = [f"请回答：{question}", "磨坊主在哪一年出生？"]
    assert contaminated(rows, [question]) == [Match(0, 1.0), None]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"{number} {ARTICLE} {number}" if number % 3 else f"word{number}" for number in range(20)]
    expected = contaminated(rows, [ARTICLE])
    monkeypatch.setattr(contamination, "_BLOCK", 3)
    assert contaminated(rows, [ARTICLE]) == expected
    assert [match is not None for match in expected] == [number % 3 > 0 for number in range(20)]


def test_nothing_to_compare() -> None:
    assert contaminated([], [ARTICLE]) == []
    assert contaminated([ARTICLE, ""], []) == [None, None]
    assert contaminated([ARTICLE, ""], ["", "?!", ("", "")]) == [None, None]
    assert contaminated(["one"], [ARTICLE]) == [None]


@pytest.mark.parametrize(("length", "share"), [(0, 0.5), (13, 0.0), (13, 1.5)])
def test_settings_that_mean_nothing_are_refused(length: int, share: float) -> None:
    with pytest.raises(ValueError, match=f"length={length}"):
        contaminated(["a"], ["a"], length, share)
