"""What a text says: words and numbers, containment, verdicts, open questions, inventions."""

from __future__ import annotations

import pytest

from alignkit.data.wording import contains, invented, language_problem, leaves_open, script, tokens, verdict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Café-Bar, 1,000.50 m!", ["café", "bar", "1000.50", "m"]),
        ("from -5 to −3.5 (-2)", ["from", "-5", "to", "-3.5", "-2"]),
        ("2008–09, 2008-09", ["2008", "09", "2008", "09"]),
        ("列车长5米", ["列", "车", "长", "5", "米"]),
        ("ＡＢＣ", ["abc"]),
        ("", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("It was built in 1931.", "in 1931", True),
        ("It was built in 19310.", "1931", False),
        ("It costs 1,000 crowns.", "1000", True),
        ("It is -5 degrees.", "5", False),
        ("It is 3.5 km.", "5", False),
        ("Kenya's father", "Kenya", True),
        ("New York", "York New", False),
        ("它建于1931年。", "1931年", True),
        ("anything", "the", False),
    ],
)
def test_contains(text: str, part: str, expected: bool) -> None:
    assert contains(text, part) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, it is.", "yes"),
        ("The maker of A is B, so no.", "no"),
        ("Yes and no.", None),
        ("There is no doubt about it.", None),
    ],
)
def test_verdict(text: str, expected: str | None) -> None:
    assert verdict(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "The statement does not say.",
        "The text doesn't explicitly mention when it sank.",
        "It cannot be determined from the context.",
        "There is no information about the crew.",
        "The year is not given.",
        "文中没有说明。",
        "无法确定船的年龄。",
    ],
)
def test_what_leaves_a_question_open(text: str) -> None:
    assert leaves_open(text)


def test_what_does_not_leave_a_question_open() -> None:
    assert not any(map(leaves_open, ["It is old.", "The church was not built in 1931.", "没有船。", ""]))


def test_invented_names_and_numbers() -> None:
    source = "When did the Alma sink?"
    assert invented("The text does not say when the Alma sank.", source) == []
    assert invented("It does not say that the Alma sank in 1950 near Oslo.", source) == ["Oslo", "1950"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The tower", "LATIN"),
        ("Über Öl", "LATIN"),
        ("ＡＢＣ", "LATIN"),
        ("塔在巴黎", "CJK"),
        ("用 Python 写的代码", "CJK"),
        ("とうきょうタワー", "CJK"),
        ("탑은 파리에 있다", "HANGUL"),
        ("Башня стоит в Париже.", "CYRILLIC"),
        ("1889, 330 %", None),
    ],
)
def test_the_script_of_a_text(text: str, found: str | None) -> None:
    assert script(text) == found


def test_a_script_that_none_of_the_texts_beside_it_is_in() -> None:
    problem = language_problem("船建于1931年。", "When was the ship built?", "1931")
    assert problem == "another language than asked for: CJK script instead of LATIN"
    assert language_problem("船建于1931年。", "When was the ship built?", "一九三一") is None
    assert language_problem("船建于1931年。", "1931", "") is None
    assert language_problem("1931", "When was the ship built?") is None
