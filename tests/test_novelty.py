"""ROUGE-L and the novelty filter: values by hand, brute force, `rouge_score` itself, and text beyond English."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from alignkit.data.words import words
from alignkit.scoring.novelty import Match, NoveltyFilter, rouge_l_f

SEED_TASKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "self-instruct" / "seed_tasks.jsonl"
POOL = ("Write a short story about a brave dog.", "List five uses for a paper clip.")


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The longest common subsequence by the textbook's table."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            diagonal, row[column] = row[column], diagonal + 1 if word == other else max(row[column], row[column - 1])
    return row[-1]


def slow_f(a: Sequence[str], b: Sequence[str]) -> float:
    common = common_subsequence(a, b)
    if not common:
        return 0.0
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall)


def novelty_of(texts: Sequence[str], threshold: float = 0.7) -> NoveltyFilter:
    novelty = NoveltyFilter(threshold)
    for text in texts:
        novelty.add(text)
    return novelty


def accept(texts: Sequence[str], threshold: float = 0.7) -> list[Match | None]:
    """Go through texts in order, accept each that is new, and tell what blocks the others; labels are positions."""
    novelty = NoveltyFilter(threshold)
    blocked = []
    for position, text in enumerate(texts):
        blocked.append(novelty.most_similar(text))
        if blocked[-1] is None:
            novelty.add(text, str(position))
    return blocked


def brute_force(texts: Sequence[str], threshold: float) -> list[bool]:
    """Which texts are new, by comparing all pairs."""
    kept: list[str] = []
    novel = []
    for text in texts:
        novel.append(text not in kept and all(slow_f(words(text), words(other)) <= threshold for other in kept))
        if novel[-1]:
            kept.append(text)
    return novel


def mutated(rng: Random, count: int, vocabulary: int, longest: int) -> list[str]:
    """Random texts; half of them are earlier ones with some words changed."""
    texts: list[str] = []
    for _ in range(count):
        base = rng.choice(texts).split() if texts and rng.random() < 0.5 else []
        base = base or [f"w{rng.randrange(vocabulary)}" for _ in range(rng.randrange(1, longest))]
        for _ in range(rng.randrange(len(base))):
            base[rng.randrange(len(base))] = f"w{rng.randrange(vocabulary)}"
        texts.append(" ".join(base))
    return texts


# -- words -------------------------------------------------------------------------------------------------------------


def test_words_of_many_scripts() -> None:
    assert words("Don't PANIC: größer, 42_7!") == ["don", "t", "panic", "grösser", "42", "7"]  # case-folded
    assert words("北京的天气，how？ かな ｆｕｌｌ") == ["北", "京", "的", "天", "气", "how", "か", "な", "full"]
    assert words("हिन्दी में लिखो") == ["हिन्दी", "में", "लिखो"]  # vowel signs are marks, and belong to the word
    assert words("한국어 문장") == ["한국어", "문장"]  # Korean has spaces between its words
    assert words("ภาษา") == ["ภ", "า", "ษ", "า"]  # Thai has none
    assert words("?! ...") == words("！？。") == []


def test_words_of_english_are_those_of_rouge_score() -> None:
    tokenizers = pytest.importorskip("rouge_score.tokenizers")
    tokenize = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize
    everything = "".join(map(chr, range(128)))
    for text in (everything, "It’s 5 × 3 m² — “why?” … ½™ 20°", "snake_case, 3.14; e-mail@x.org\tTAB", ""):
        assert words(text) == tokenize(text)


# -- similarity --------------------------------------------------------------------------------------------------------


def test_rouge_l_by_hand() -> None:
    police = "police killed the gunman".split()
    # Lin (2004), section 3: the longest common subsequences are "police the gunman" (3) and "the gunman" (2)
    assert rouge_l_f(police, "police kill the gunman".split()) == pytest.approx(3 / 4)
    assert rouge_l_f(police, "the gunman kill police".split()) == pytest.approx(2 / 4)
    assert rouge_l_f("a b c".split(), "a c".split()) == pytest.approx(2 * 2 / 5)  # P = 1, R = 2/3, F = 4/5
    assert rouge_l_f(police, "nothing else".split()) == 0.0
    assert rouge_l_f([], []) == 0.0


@pytest.mark.parametrize(
    ("text", "similarity"),
    [
        ("Write a short story about a brave cat.", 7 / 8),
        ("Write a long essay about the brave dog.", 5 / 8),
        ("write A SHORT story, about a brave dog!!!", 1.0),
        ("Name five uses for a clip", 2 * 5 / 13),
        ("Dog!", 2 * 1 / 9),
        ("", 0.0),
        ("!!! ???", 0.0),
        ("中文 指令", 0.0),
    ],
)
def test_the_highest_similarity_is_exact_above_and_below_the_threshold(text: str, similarity: float) -> None:
    novelty = novelty_of(POOL)
    assert novelty.max_similarity(text) == pytest.approx(similarity, abs=1e-15)
    assert (novelty.most_similar(text) is not None) is (similarity > 0.7)


@pytest.mark.parametrize(
    ("common", "left", "right", "above"),
    [
        *((7, 7, 13, True), (7, 13, 7, True), (7, 8, 12, True), (14, 14, 26, True)),
        *((7, 10, 10, False), (14, 20, 20, False), (21, 30, 30, False), (14, 19, 21, False)),
    ],
)
def test_at_the_threshold_the_last_digit_decides_as_in_rouge_score(
    common: int, left: int, right: int, above: bool
) -> None:
    a = [f"w{i}" for i in range(common)] + [f"a{i}" for i in range(left - common)]
    b = [f"w{i}" for i in range(common)] + [f"b{i}" for i in range(right - common)]
    assert 2 * common / (left + right) == 0.7
    assert (rouge_l_f(a, b) > 0.7) is above
    novelty = novelty_of([" ".join(b)])
    assert (novelty.most_similar(" ".join(a)) is not None) is above
    assert novelty.max_similarity(" ".join(a)) == slow_f(a, b)


def test_of_two_equal_fractions_the_higher_float_is_the_highest() -> None:
    query, one_of_four, two_of_ten = "w0 w1", "w0 x y z", "w0 w1 a b c d e f g h"
    low, high = slow_f(query.split(), one_of_four.split()), slow_f(query.split(), two_of_ten.split())
    assert high - low == pytest.approx(0, abs=1e-15) and high > low  # both are a third
    for order in ((one_of_four, two_of_ten), (two_of_ten, one_of_four)):
        assert novelty_of(order).max_similarity(query) == high


def test_nothing_at_a_cutoff_is_lost() -> None:
    """Each pair of lengths and each overlap, found among others that do not reach it (rapidfuzz alone loses some)."""
    for left in range(1, 22):
        for right in range(1, 22):
            for common in range(1, min(left, right) + 1):
                a = [f"w{i}" for i in range(common)] + [f"a{i}" for i in range(left - common)]
                b = [f"w{i}" for i in range(common)] + [f"b{i}" for i in range(right - common)]
                novelty = novelty_of(["other words", " ".join(b)])
                assert novelty.max_similarity(" ".join(a)) == slow_f(a, b)


@pytest.mark.parametrize(("vocabulary", "longest"), [(300, 25), (12, 25), (40, 320)])
def test_the_highest_similarity_equals_the_brute_force(vocabulary: int, longest: int) -> None:
    """Among them words that most texts hold, words that repeat, and texts of more than 255 words."""
    texts = mutated(Random(vocabulary), 40, vocabulary, longest)
    pool, candidates = texts[:30], texts[30:]
    assert longest < 256 or max(len(words(text)) for text in texts) > 255
    novelty = novelty_of(pool)
    for text in candidates:
        assert novelty.max_similarity(text) == max(slow_f(words(text), words(other)) for other in pool)


def test_a_pool_that_grows_past_its_first_room() -> None:
    """The commonest words are counted another way from there on; `rouge_l_f` is the oracle here."""
    texts = mutated(Random(3), 2300, 200, 12)
    pool, candidates = texts[:2200], texts[2200:]
    novelty = NoveltyFilter(0.7)
    split = [words(text) for text in pool]
    for number, text in enumerate(pool):
        novelty.add(text)
        if number + 1 in (1024, 1025, 2048, 2049, 2200):
            for candidate in candidates[::10]:
                expected = max(rouge_l_f(words(candidate), other) for other in split[: number + 1])
                assert novelty.max_similarity(candidate) == expected
    assert len(novelty) == 2200


def test_chinese_is_compared_by_characters() -> None:
    texts = ["灯笼厅展出1780年的船灯。", "灯笼厅展出1790年的船灯。", "图书馆几点关门？", "灯笼厅展出1780年的船灯。"]
    blocked = accept(texts)
    # ten words each, nine in common in their order: F = 9/10
    assert blocked == [None, Match("0", slow_f(words(texts[0]), words(texts[1]))), None, Match("0", 1.0)]
    assert novelty_of(texts[:1]).max_similarity(texts[1]) == pytest.approx(0.9)


def test_exact_repetitions_are_never_new() -> None:
    blocked = accept(["?!", "?!", "...", "A", "A"], threshold=1.0)
    assert [match is None for match in blocked] == [True, False, True, True, False]
    assert novelty_of(["?!"]).max_similarity(" ?! ") == 1.0


def test_the_most_similar_text_is_the_one_named() -> None:
    novelty = NoveltyFilter(0.5)
    novelty.add("one two three four x y", "far")
    novelty.add("one two three four five y", "near")
    found = novelty.most_similar("one two three four five six")
    assert found and found.label == "near"
    assert found.similarity == pytest.approx(10 / 12)
    assert novelty.most_similar("seven eight") is None


def test_asking_adds_nothing() -> None:
    novelty = NoveltyFilter(0.7)
    assert novelty.max_similarity("the same text") == novelty.max_similarity("the same text") == 0.0
    assert novelty.most_similar("the same text") is None and len(novelty) == 0


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85])
def test_decisions_equal_the_brute_force(threshold: float) -> None:
    texts = mutated(Random(7), 250, 300, 25)
    expected = brute_force(texts, threshold)
    assert [match is None for match in accept(texts, threshold)] == expected
    assert 0.2 < sum(expected) / len(expected) < 0.99


def test_decisions_and_values_equal_rouge_score() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts = [f"{text.capitalize()}, don't!" for text in mutated(Random(11), 130, 60, 14)]
    novelty, decisions = NoveltyFilter(0.7), []
    kept: list[str] = []
    for text in texts:
        highest = max((scorer.score(other, text)["rougeL"].fmeasure for other in kept), default=0.0)
        assert novelty.max_similarity(text) == highest
        decisions.append(highest > 0.7)
        assert (novelty.most_similar(text) is not None) is decisions[-1]
        if not decisions[-1]:
            novelty.add(text)
            kept.append(text)
    assert 10 < sum(decisions) < 120


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_thresholds_that_make_no_sense(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        NoveltyFilter(threshold)


@pytest.mark.skipif(not SEED_TASKS.exists(), reason="the Self-Instruct seed tasks are not at hand")
def test_the_175_seed_tasks() -> None:
    tasks = [json.loads(line)["instruction"] for line in SEED_TASKS.read_text(encoding="utf-8").splitlines()]
    blocked = accept(tasks)
    assert [match is None for match in blocked] == brute_force(tasks, 0.7)
    assert {number: match.label for number, match in enumerate(blocked) if match} == {74: "47", 113: "77"}
