"""The yield table and the look at ten rows: the sums are right, and foreign text stays text."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console

from alignkit.core.config import PricesConfig
from alignkit.core.records import ChatExample, Message, QAExample, Row
from alignkit.reporting.plain import code, one_line
from alignkit.reporting.yields import Yields, as_text, print_ten_rows, spread
from alignkit.teacher.client import Answer, Request, Usage
from alignkit.teacher.recipes.asking import Asker, Step


def yields() -> Yields:
    steps = {
        "questions": Step(1200, 1190, 40, Counter({"empty answer": 3, "no JSON object in the answer": 7})),
        "answers": Step(1190, 1190),
    }
    usage = Usage(requests=2390, prompt_tokens=1_234_567, completion_tokens=89_000, unreported=2, cost=3.21)
    dropped = Counter({"too similar": 15, "no JSON object in the answer": 7, "empty answer": 3})
    return Yields(steps, 1175, dropped, usage, PricesConfig(1.0, 2.0, "2026-11-20"))


def test_the_table_in_a_terminal() -> None:
    assert yields().text() == (
        "step          asked    parsed  from store  not usable because\n"
        "questions     1,200     1,190          40  no JSON object in the answer 7, empty answer 3\n"
        "answers       1,190     1,190           0\n"
        "kept       1,175\n"
        "dropped    25: too similar 15, no JSON object in the answer 7, empty answer 3\n"
        "tokens     1,234,567 in prompts, 89,000 in answers; 2 replies came without a count and are missing here\n"
        "cost       3.21 USD (prices of 2026-11-20)\n"
    )


def test_the_table_in_a_datasheet() -> None:
    lines = yields().markdown().splitlines()
    assert lines[2] == "| `questions` | 1,200 | 1,190 | 40 | `no JSON object in the answer 7, empty answer 3` |"
    assert {line.count("|") for line in lines[:4]} == {6}
    assert "- kept: `1,175`" in lines


class Echo:
    def __init__(self) -> None:
        self.usage = Usage()

    def ask(self, requests: list[Request], on_answer: object = None) -> list[Answer]:
        return [Answer("x", "x") if request.sample else Answer(None, reason="no answer") for request in requests]


def test_the_account_of_an_asker_is_what_the_table_shows() -> None:
    ask = Asker(Echo())  # type: ignore[arg-type]
    ask("one", [Request([], sample=sample) for sample in range(4)])
    text = Yields(ask.steps, 3, Counter({"no answer": 1}), Usage(), PricesConfig()).text()
    assert text.splitlines()[1].split() == ["one", "4", "3", "0", "no", "answer", "1"]
    assert text.endswith("cost     n/a\n")  # unknown is not nothing


# -- ten rows ----------------------------------------------------------------------------------------------------------


def shown(rows: list[Row], width: int = 60) -> str:
    file = io.StringIO()
    print_ten_rows(rows, Console(file=file, width=width, force_terminal=True, color_system=None))
    return file.getvalue()


def example(number: int, **fields: str) -> QAExample:
    return QAExample.model_validate({"id": f"row-{number}", "instruction": "The lamp is red.", **fields})


def test_ten_rows_are_spread_over_all() -> None:
    assert spread(10, 10) == list(range(10)) and spread(3, 10) == [0, 1, 2] and spread(0, 10) == []
    assert spread(100, 10) == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    text = shown([example(number) for number in range(100)])
    assert [line for line in text.splitlines() if line.startswith("row-")] == [f"row-{n}" for n in spread(100, 10)]


def test_long_and_wide_text_is_cut_at_the_width_of_the_terminal() -> None:
    text = shown([example(1, input="word " * 1000, output="灯" * 1000)], width=40)
    lines = text.splitlines()
    assert len(lines) == 4
    from rich.cells import cell_len

    assert all(cell_len(line) <= 40 for line in lines)
    assert [line.rstrip()[-1] for line in lines[2:]] == ["…", "…"]


def test_model_text_is_only_text() -> None:
    evil = "[red]x[/red] [link=http://a]\x1b[2J\x1b]0;title\x07 \u202eback\nnew line :smile:"
    text = shown([example(1, input=evil)], width=200)
    assert "[red]x[/red] [link=http://a]�[2J�]0;title� �back new line :smile:" in text
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text


def test_conversations_are_shown_turn_by_turn() -> None:
    prompt, reply = [Message(role="user", content="Why?")], [Message(role="assistant", content="Because.")]
    text = shown([ChatExample(id="a", parents=["p"], prompt=prompt, completion=reply)])
    assert [line.split() for line in text.splitlines()] == [
        ["a"],
        ["prompt", "user:", "Why?"],
        ["completion", "assistant:", "Because."],
    ]
    assert as_text(["a", "ü"]) == '["a", "ü"]' and as_text([]) == "[]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "`plain`"),
        ("a|b", "`a\\|b`"),
        ("`a` and ``b``", "``` `a` and ``b`` ```"),
        ("<script>", "`<script>`"),
        ("two\nlines", "`two lines`"),
        ("", ""),
        (" \n ", ""),
        ("\x1b[1m", "`�[1m`"),
    ],
)
def test_foreign_text_is_a_code_span(text: str, expected: str) -> None:
    assert code(text) == expected


def test_one_line_is_bounded_and_keeps_letters() -> None:
    assert one_line("e\u0301 是 👩\u200d🚀") == "e\u0301 是 👩\u200d🚀"
    assert one_line("x" * 30, 10) == "x" * 10 + "…" and one_line("x" * 10, 10) == "x" * 10
    assert len(one_line("x" * 10_000_000)) == 1001
    assert one_line(" " * 5000 + "late") == "…"
