"""The dry run: what it counts, what it costs, and that it neither sends nor writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.core.config import PricesConfig, TeacherConfig, TeacherMode
from alignkit.core.records import Message
from alignkit.teacher.client import Request
from alignkit.teacher.dry_run import DRY_RUN, DryRunTeacher
from alignkit.teacher.prices import cost, show_cost
from alignkit.teacher.store import Reply, ResponseStore
from alignkit.teacher.tokens import TokenCounter
from alignkit.teacher.wire import request_parts, store_key

PRICES = PricesConfig(input_per_million=2.0, output_per_million=8.0, as_of="2026-11-20")


def asked(text: str, sample: int = 0) -> Request:
    return Request([Message(role="user", content=text)], sample=sample)


@pytest.fixture
def config(tmp_path: Path) -> TeacherConfig:
    return TeacherConfig(
        mode=TeacherMode.openai,
        base_url="http://127.0.0.1:9/v1",  # nobody listens there
        model="some-model",
        api_key_env="",
        max_tokens=100,
        store=str(tmp_path / "teacher.sqlite"),
        prices=PRICES,
    )


def test_cost_is_tokens_times_prices() -> None:
    assert cost(PRICES, 1_000_000, 500_000) == 2.0 + 4.0
    assert cost(PRICES, 0, 0) == 0.0


@pytest.mark.parametrize(
    ("prices", "prompt_tokens"),
    [(PricesConfig(), 10), (PricesConfig(input_per_million=1.0), 10), (PRICES, None)],
)
def test_what_is_not_known_makes_the_cost_unknown_and_not_zero(prices: PricesConfig, prompt_tokens: int | None) -> None:
    assert cost(prices, prompt_tokens, 5) is None
    assert show_cost(None, prices) == "n/a"


def test_costs_are_shown_with_currency_and_date() -> None:
    assert show_cost(1234.5, PRICES) == "1,234.50 USD (prices of 2026-11-20)"
    assert show_cost(0.00123, PricesConfig(currency="EUR")) == "0.0012 EUR"
    assert show_cost(0.0, PricesConfig()) == "0.00 USD"


def test_the_store_answers_and_the_rest_is_refused_and_counted(config: TeacherConfig) -> None:
    known, new = asked("known"), asked("a new question")
    parts = request_parts(config, known)
    with ResponseStore(Path(config.store)) as store:
        store.put(store_key(parts), parts, Reply("its answer", prompt_tokens=5, completion_tokens=3))
    teacher = DryRunTeacher(config)
    teacher.step = "questions"
    answers = teacher.ask([known, new, asked("a new question"), asked("a new question", sample=1)])
    assert [answer.reason for answer in answers] == [None, DRY_RUN, DRY_RUN, DRY_RUN]
    assert answers[0].value == "its answer"
    step = teacher.steps["questions"]
    assert (step.requests, step.stored, step.equal, step.to_send) == (4, 1, 1, 2)
    with ResponseStore(Path(config.store)) as store:
        assert store.count() == 1


def test_the_price_spans_the_estimate_and_the_length_of_the_answers(config: TeacherConfig) -> None:
    teacher = DryRunTeacher(config)
    teacher.counter = TokenCounter(len, "characters", 0.5)
    teacher.ask([asked("x" * 93)])  # 93 + 4 + 3 = 100 tokens of prompt, at most 100 of answer
    step = teacher.steps["requests"]
    assert (step.prompt_tokens, step.most_completion_tokens) == (100, 100)
    # half of 100 tokens at 2 a million; and 150 of them with 100 at 8 a million
    lowest, highest = teacher.cost_range(step)
    assert lowest == pytest.approx(0.0001)
    assert highest == pytest.approx(0.0003 + 0.0008)
    assert "0.0001 to 0.0011 USD (prices of 2026-11-20)" in teacher.report()


def test_the_report_has_a_line_a_step_and_says_what_is_missing(config: TeacherConfig) -> None:
    config.prices = PricesConfig()
    teacher = DryRunTeacher(config)
    for step, count in (("topics", 2), ("questions", 3)):
        teacher.step = step
        teacher.ask([asked(f"{step} {number}") for number in range(count)])
    lines = teacher.report().splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["topics", "2"], ["questions", "3"], ["total", "5"]]
    assert all(line.endswith("n/a") for line in lines[1:4])
    assert "made from the answers of earlier ones" in lines[-1]


def test_without_a_store_none_is_made(config: TeacherConfig) -> None:
    DryRunTeacher(config).ask([asked("anything")])
    assert not Path(config.store).exists()


def test_the_scripted_teacher_has_no_price(tmp_path: Path) -> None:
    config = TeacherConfig(model="scripted", store=str(tmp_path / "teacher.sqlite"))
    teacher = DryRunTeacher(config)
    assert teacher.ask([asked("anything")])[0].reason == DRY_RUN
    assert "n/a" in teacher.report()
