"""What is chosen and what is paired: by score or by version, and every filter with its reason."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from choosing import Drops, completion, row

from alignkit.core.errors import UserError
from alignkit.core.records import CompletionSet, PreferencePair
from alignkit.scoring.preference_pairs import (
    LENGTHS,
    MARGIN,
    SAME_TEXT,
    ChoiceConfig,
    Pairing,
    check_choice,
    choose,
    eligible,
    pair,
)

ROWS = [
    row("clear", completion("good", 2.0), completion("bad", -1.0), completion("middle", 0.0)),
    row("close", completion("good", 1.0), completion("as good", 0.95)),
    row("same", completion("good", 1.0), completion("good", 1.0)),
    row("cut", completion("good", None, finished=False)),
]
CONFIG = ChoiceConfig()
VERSIONS = ChoiceConfig(pairing=Pairing.versions)


def texts(pairs: list[PreferencePair]) -> list[tuple[str, str, str, float | None]]:
    return [(each.id, each.chosen[0].content, each.rejected[0].content, each.margin) for each in pairs]


def by_id(*rows: CompletionSet) -> dict[str, CompletionSet]:
    return {each.id: each for each in rows}


# -- the best ----------------------------------------------------------------------------------------------------------


def test_best_examples_keep_ids_and_say_what_was_left_out() -> None:
    drop = Drops()
    examples = choose(CONFIG, ROWS, drop)
    assert [(each.id, each.completion[0].content) for each in examples] == [
        ("clear", "good"),
        ("close", "good"),
        ("same", "good"),
    ]
    assert examples[0].parents == ["p"]
    assert drop.reasons == [("cut", "no finished completion with a score")]
    drop = Drops()
    assert [each.id for each in choose(ChoiceConfig(min_score=1.5), ROWS, drop)] == ["clear"]
    assert ("close", "best completion scores below min_score") in drop.reasons
    with pytest.raises(UserError, match="no question has a best completion"):
        choose(CONFIG, ROWS[3:], drop)


def test_a_best_answer_that_nearly_repeats_another_question_s_is_left_out() -> None:
    rows = [
        row("a", completion("the product of Bakoco is clocks", 1.0)),
        row("b", completion("the product of Bakoco is lamps", 1.0)),  # five of six words: F = 5/6
        row("c", completion("nobody knows", 1.0)),
        row("d", completion("the product of Bakoco is lamps", 1.0)),  # b is not kept, so this is held against a
    ]
    drop = Drops()
    assert [each.id for each in choose(ChoiceConfig(max_similarity=0.8), rows, drop)] == ["a", "c"]
    assert [id for id, _ in drop.reasons] == ["b", "d"]
    assert drop.details == ["ROUGE-L 0.833 with a"] * 2
    assert len(choose(ChoiceConfig(max_similarity=0.9), rows, Drops())) == 3  # d repeats b
    assert len(choose(CONFIG, rows, Drops())) == 4


# -- pairs by score ----------------------------------------------------------------------------------------------------


def test_pairs_need_a_margin_and_two_texts() -> None:
    drop = Drops()
    assert texts(pair(CONFIG, ROWS, drop)) == [("clear", "good", "bad", 3.0)]
    assert drop.reasons == [("close", MARGIN), ("same", SAME_TEXT)]  # "cut" is set aside with the best ones
    lenient = ChoiceConfig(min_margin=0.0)
    assert [each.id for each in pair(lenient, ROWS[:3], drop)] == ["clear", "close"]
    drop = Drops()
    assert [each.id for each in pair(replace(lenient, max_pairs=1), ROWS[1::-1], drop)] == ["clear"]
    assert drop.reasons == [("close", "no pair: max_pairs others have a larger margin")]


def test_equal_texts_with_unequal_scores_are_one_text() -> None:
    only = row("only", completion("good", 3.0), completion("good", 1.0))
    other = row("other", completion("good", 3.0), completion("good", 1.0), completion("bad", 0.0))
    drop = Drops()
    assert texts(pair(CONFIG, [only, other], drop)) == [("other", "good", "bad", 2.0)]
    assert drop.reasons == [("only", SAME_TEXT)]


def test_equal_scores_of_different_texts_are_no_pair() -> None:
    drop = Drops()
    tied = row("tied", completion("this", 1.0), completion("that", 1.0))
    assert pair(ChoiceConfig(min_margin=0.0, pairs_per_prompt=3), [tied], drop) == []
    assert drop.reasons == [("tied", SAME_TEXT)]  # the first of equals is both the best and the worst


def test_further_pairs_come_from_the_next_best_and_next_worst() -> None:
    many = row("q", *(completion(text, score) for text, score in zip("abcde", (5.0, 1.0, 4.0, 2.0, 3.0), strict=True)))
    drop = Drops()
    pairs = pair(ChoiceConfig(pairs_per_prompt=9), [many], drop)
    assert texts(pairs) == [("q", "a", "b", 4.0), ("q/2", "c", "d", 2.0)]
    assert [each.parents for each in pairs] == [["p"], ["q"]]
    assert texts(pair(ChoiceConfig(pairs_per_prompt=9, min_margin=3.0), [many], drop)) == [("q", "a", "b", 4.0)]
    assert drop.reasons == []  # that the second best is not that much better is no loss


def test_no_answer_is_chosen_in_one_pair_and_rejected_in_another() -> None:
    draw = Random(4)
    for _ in range(300):
        answers = [completion(draw.choice("abcdefgh"), float(draw.randrange(4))) for _ in range(draw.randrange(1, 9))]
        pairs = pair(ChoiceConfig(pairs_per_prompt=4, min_margin=0.0), [row("q", *answers)], Drops())
        chosen, rejected = ([each[side] for each in texts(pairs)] for side in (1, 2))
        assert not set(chosen) & set(rejected)
        assert len(set(chosen)) == len(chosen) and len({each.id for each in pairs}) == len(pairs)
        margins = [each.margin or 0.0 for each in pairs]
        assert margins == sorted(margins, reverse=True) and all(margin > 0 for margin in margins)


def test_the_previous_version_supplies_the_rejected_answer() -> None:
    previous = by_id(
        row("clear", completion("old", 1.0), completion("older", 0.5)), row("close", completion("better", 3.0))
    )
    drop = Drops()
    assert texts(pair(CONFIG, [*ROWS[:2], row("new", completion("good", 1.0))], drop, previous)) == [
        ("clear", "good", "older", 1.5)
    ]
    assert drop.reasons == [
        ("close", MARGIN),  # the previous version was better
        ("new", "no pair: the previous version has no finished completion with a score"),
    ]


# -- pairs by version --------------------------------------------------------------------------------------------------


def test_by_version_the_latest_answer_is_chosen_whatever_it_scores() -> None:
    latest = [
        row("worse", completion("new", -5.0)),
        row("unscored", completion("cut", None, finished=False), completion("new", None)),
        row("same", completion("as ever", 1.0)),
        row("cut", completion("cut", None, finished=False)),
    ]
    previous = by_id(
        row("worse", completion("old", 5.0)),
        row("unscored", completion("old", None)),
        row("same", completion("as ever", 1.0)),
        row("cut", completion("old", 1.0)),
    )
    drop = Drops()
    assert texts(pair(VERSIONS, latest, drop, previous)) == [
        ("worse", "new", "old", None),
        ("unscored", "new", "old", None),
    ]
    assert drop.reasons == [("same", SAME_TEXT), ("cut", "no pair: one of the versions has no finished completion")]


def test_by_version_answers_are_paired_in_the_order_they_were_drawn() -> None:
    latest = [row("q", completion("b", 1.0), completion("a", 9.0), completion("b", 1.0), completion("c", 0.0))]
    previous = by_id(row("q", completion("z", 9.0), completion("a", 0.0)))
    drop = Drops()
    pairs = pair(replace(VERSIONS, pairs_per_prompt=3), latest, drop, previous)
    assert texts(pairs) == [("q", "b", "z", None)]
    assert drop.reasons == [("q", SAME_TEXT)]


# -- filters -----------------------------------------------------------------------------------------------------------


def test_a_pair_of_very_different_lengths_is_dropped() -> None:
    rows = [
        row("long", completion("one two three four five", 2.0), completion("one two", 0.0)),
        row("even", completion("one two three four", 2.0), completion("one two", 0.0)),
        row("empty", completion("one two three", 2.0), completion("", 0.0)),
    ]
    drop = Drops()

    def words(text: str) -> int:
        return len(text.split())

    pairs = pair(ChoiceConfig(max_length_ratio=2.0), rows, drop, tokens=words)
    assert [each.id for each in pairs] == ["even"]
    assert drop.reasons == [("long", LENGTHS), ("empty", LENGTHS)]
    assert drop.details[0] == "5 tokens chosen, 2 rejected"
    assert len(pair(CONFIG, rows, Drops(), tokens=words)) == 3


def test_answers_of_the_wrong_length_are_neither_chosen_nor_rejected() -> None:
    rows = [row("q", completion("ab", 1.0), completion("abc", 0.5), completion("abcd", 0.0), completion("abcde", -1.0))]
    config, drop = ChoiceConfig(min_characters=3, max_characters=4), Drops()
    kept = eligible(config, rows, drop)
    assert [each.text for each in kept[0].completions] == ["abc", "abcd"]
    assert drop.reasons == [
        ("q", "answer shorter than min_characters"),
        ("q", "answer longer than max_characters"),
    ]
    previous = by_id(row("q", completion("abcd", 0.0), completion("abcdefgh", -9.0)))
    assert texts(pair(config, kept, drop, previous)) == [("q", "abc", "abcd", 0.5)]
    assert eligible(CONFIG, rows, drop) == rows


def test_a_question_that_is_always_answered_alike_is_left_out() -> None:
    drop = Drops()
    assert [each.id for each in eligible(ChoiceConfig(min_distinct=2), ROWS, drop)] == ["clear", "close"]
    assert drop.reasons == [(id, "fewer than min_distinct different answers") for id in ("same", "cut")]
    assert drop.details == ["1 of 2", "1 of 1"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pairs_per_prompt", 0),
        ("min_margin", -0.1),
        ("max_pairs", 0),
        ("max_length_ratio", 0.5),
        ("max_characters", 0),
        ("min_distinct", 0),
        ("max_similarity", 0.0),
        ("max_similarity", 1.5),
    ],
)
def test_filters_that_mean_nothing_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{key}={value}: must be"):
        check_choice(replace(CONFIG, **{key: value}))  # type: ignore[arg-type]
    check_choice(CONFIG)
    with pytest.raises(UserError, match="max_pairs=5 with pairing=versions: such pairs have no margin"):
        check_choice(replace(CONFIG, pairing=Pairing.versions, max_pairs=5))
