"""ROUGE-L and the novelty index: hand-derived values, the brute force, and text without Latin letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from alignkit.scoring.novelty import Match, NoveltyIndex, filter_novel, rouge_l_f, words

SEED_TASKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "self-instruct" / "seed_tasks.jsonl"


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


def brute_force(texts: Sequence[str], threshold: float) -> list[bool]:
    kept: list[str] = []
    novel = []
    for text in texts:
        novel.append(text not in kept and all(slow_f(words(text), words(other)) <= threshold for other in kept))
        if novel[-1]:
            kept.append(text)
    return novel


def test_rouge_l_by_hand() -> None:
    police = "police killed the gunman".split()
    # Lin (2004), section 3: the longest common subsequences are "police the gunman" (3) and "the gunman" (2)
    assert rouge_l_f(police, "police kill the gunman".split()) == pytest.approx(3 / 4)
    assert rouge_l_f(police, "the gunman kill police".split()) == pytest.approx(2 / 4)
    assert rouge_l_f("a b c".split(), "a c".split()) == pytest.approx(2 * 2 / 5)  # P = 1, R = 2/3, F = 4/5
    assert rouge_l_f(police, "nothing else".split()) == 0.0
    assert rouge_l_f([], []) == 0.0


@pytest.mark.parametrize(
    ("common", "left", "right", "above"), [(7, 7, 13, True), (14, 14, 26, True), (7, 10, 10, False)]
)
def test_at_the_threshold_the_last_digit_decides_as_in_rouge_score(
    common: int, left: int, right: int, above: bool
) -> None:
    a = [f"w{i}" for i in range(common)] + [f"a{i}" for i in range(left - common)]
    b = [f"w{i}" for i in range(common)] + [f"b{i}" for i in range(right - common)]
    assert 2 * common / (left + right) == 0.7
    assert (rouge_l_f(a, b) > 0.7) is above
    index = NoveltyIndex(0.7)
    index.add(" ".join(b), "b")
    assert (index.most_similar(" ".join(a)) is not None) is above


def test_words_of_many_scripts() -> None:
    assert words("Don't PANIC: größer, 42_7!") == ["don", "t", "panic", "grösser", "42", "7"]  # case-folded
    assert words("北京的天气，how？ かな ｆｕｌｌ") == ["北", "京", "的", "天", "气", "how", "か", "な", "full"]
    assert words("?! ...") == []


def test_chinese_is_compared_by_characters() -> None:
    texts = ["灯笼厅展出1780年的船灯。", "灯笼厅展出1790年的船灯。", "图书馆几点关门？", "灯笼厅展出1780年的船灯。"]
    decisions = filter_novel(texts, 0.7)
    # ten words each, nine in common in their order: F = 9/10
    assert [decision.novel for decision in decisions] == [True, False, True, False]
    assert decisions[1].blocked_by == Match("0", slow_f(words(texts[0]), words(texts[1])))
    assert slow_f(words(texts[0]), words(texts[1])) == pytest.approx(0.9)
    assert decisions[3].blocked_by == Match("0", 1.0)


def test_exact_repetitions_are_never_new() -> None:
    decisions = filter_novel(["?!", "?!", "..."], threshold=1.0)
    assert [decision.novel for decision in decisions] == [True, False, True]


def test_the_most_similar_text_is_the_one_named() -> None:
    index = NoveltyIndex(0.5)
    index.add("one two three four x y", "far")
    index.add("one two three four five y", "near")
    found = index.most_similar("one two three four five six")
    assert found and found.label == "near"
    assert found.similarity == pytest.approx(10 / 12)
    assert index.most_similar("seven eight") is None


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.85])
def test_decisions_equal_the_brute_force(threshold: float) -> None:
    rng = Random(7)
    texts: list[str] = []
    for _ in range(250):  # half of them are earlier texts with some words changed
        base = rng.choice(texts).split() if texts and rng.random() < 0.5 else []
        base = base or [f"w{rng.randrange(300)}" for _ in range(rng.randrange(1, 25))]
        for _ in range(rng.randrange(len(base))):
            base[rng.randrange(len(base))] = f"w{rng.randrange(300)}"
        texts.append(" ".join(base))
    expected = brute_force(texts, threshold)
    assert [decision.novel for decision in filter_novel(texts, threshold)] == expected
    assert 0.2 < sum(expected) / len(expected) < 0.99


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_thresholds_that_make_no_sense(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        NoveltyIndex(threshold)


@pytest.mark.skipif(not SEED_TASKS.exists(), reason="the Self-Instruct seed tasks are not at hand")
def test_the_175_seed_tasks() -> None:
    tasks = [json.loads(line)["instruction"] for line in SEED_TASKS.read_text(encoding="utf-8").splitlines()]
    decisions = filter_novel(tasks, 0.7)
    assert [decision.novel for decision in decisions] == brute_force(tasks, 0.7)
    blocked = {number: decision.blocked_by.label for number, decision in enumerate(decisions) if decision.blocked_by}
    assert blocked == {74: "47", 113: "77"}
