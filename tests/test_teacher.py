"""The client of OpenAI-compatible servers: the real `openai` package against a server that misbehaves."""

from __future__ import annotations

import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import CANARY, Colour, config_for, request, serving, stored_replies, teacher_for

from alignkit.core.config import PricesConfig, TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.teacher.client import Answer, open_teacher
from alignkit.teacher.openai_client import OUTAGE_REQUESTS, PATIENCE, OpenAITeacher


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", CANARY)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    seen: dict[int, Answer] = {}
    with serving(lambda prompt, attempt: "slow" if prompt == "0" else "ok") as server:
        answers = teacher_for(server, tmp_path).ask([request(str(i)) for i in range(20)], seen.__setitem__)
        assert server.keys == {CANARY}
        assert server.paths == {"/v1/chat/completions"}
    assert [answer.value for answer in answers] == [f"reply to {i}" for i in range(20)]
    assert seen == dict(enumerate(answers))


def test_no_more_requests_are_under_way_than_concurrency(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "slow") as server:
        teacher_for(server, tmp_path, concurrency=3).ask([request(str(i)) for i in range(12)])
        assert server.most_in_flight == 3


FAULTS = ["rate_limited", "broken", "truncated", "html", "no_choices", "error_with_200", "dropped"]


def test_a_faulty_server_loses_nothing_and_is_paid_once(tmp_path: Path) -> None:
    def behaviour(prompt: str, attempt: int) -> str:  # every fault twice for some prompt, then an answer
        return FAULTS[int(prompt) % len(FAULTS)] if attempt < 2 else "ok"

    requests = [request(str(i)) for i in range(35)]
    with serving(behaviour) as server:
        teacher = teacher_for(server, tmp_path)
        answers = teacher.ask(requests)
        assert [answer.value for answer in answers] == [f"reply to {i}" for i in range(35)]
        assert set(server.completed.values()) == {1} and len(server.completed) == 35
        assert set(server.attempts.values()) == {3}
        again = teacher_for(server, tmp_path).ask(requests)
        assert server.attempts.total() == 105  # the second run sent nothing
    assert [answer.value for answer in again] == [answer.value for answer in answers]
    assert all(answer.stored for answer in again) and not any(answer.stored for answer in answers)
    # 35 answers of 5 + 3 tokens, and 5 prompts with two completions each that held no choices but cost 100 + 10
    assert (teacher.usage.prompt_tokens, teacher.usage.completion_tokens) == (35 * 5 + 1000, 35 * 3 + 100)
    assert teacher.usage.sent == 105
    assert teacher.usage.unreported == 5 * 2 * 2  # truncated and HTML: replies that may have been paid for


def test_what_waits_holds_no_slot_and_goes_before_what_is_new(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "later" if prompt == "0" and attempt == 0 else "slow") as server:
        teacher_for(server, tmp_path, concurrency=1).ask([request(str(i)) for i in range(12)])
        order = [body["messages"][0]["content"] for body in server.bodies]
        pause = server.times[[i for i, prompt in enumerate(order) if prompt == "0"][1]] - server.times[0]
    assert order[1:4] == ["1", "2", "3"]  # in the one slot, while 0 waits
    assert order.index("0", 1) < len(order) - 1  # and 0 does not wait for all of them
    assert pause >= 0.3  # what the server asked for


def test_the_deadline_is_for_the_whole_request(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "trickle" if attempt == 0 else "ok") as server:
        began = time.monotonic()
        (answer,) = teacher_for(server, tmp_path, timeout_seconds=0.3).ask([request("a")])
    assert answer.value == "reply to a"
    assert time.monotonic() - began < 2  # the trickle alone would take 5 seconds


def test_after_all_attempts_the_request_has_a_reason_and_is_not_stored(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "broken" if prompt == "bad" else "ok") as server:
        teacher = teacher_for(server, tmp_path)
        bad, good = teacher.ask([request("bad"), request("good")])
        assert server.attempts["bad"] == teacher.attempts
        assert good.value == "reply to good"
        assert not bad.usable and bad.reason == "no answer" and "500" in bad.detail
        assert stored_replies(tmp_path) == 1
        server.behaviour = lambda prompt, attempt: "ok"
        assert teacher_for(server, tmp_path).ask([request("bad")])[0].usable


def test_a_server_that_only_asks_for_patience_gets_it(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "rate_limited" if attempt < 8 else "ok") as server:
        teacher = OpenAITeacher(config_for(server, tmp_path), attempts=2, first_delay_seconds=0.001)
        assert teacher.ask([request("a")])[0].usable and server.attempts["a"] == 9
        server.behaviour = lambda prompt, attempt: "rate_limited"
        assert teacher.ask([request("b")])[0].reason == "no answer"
        assert server.attempts["b"] == PATIENCE * teacher.attempts


# -- failures of one item, and content that cannot be used -------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "reason", "tokens"),
    [
        ("cut", "cut at teacher.max_tokens", 5),
        ("filtered", "withheld by the server's content filter", 5),
        ("refusal", "refused by the teacher", 5),
        ("huge", "answer far too long", 5),
        ("too_long", "prompt too long for the model", None),
        ("bad_request", "refused by the server", None),
    ],
)
def test_failures_of_one_item_are_stored_and_asked_again_only_on_demand(
    tmp_path: Path, behaviour: str, reason: str, tokens: int | None
) -> None:
    requests = [request("bad"), request("good")]
    with serving(lambda prompt, attempt: behaviour if prompt == "bad" else "ok") as server:
        bad, good = teacher_for(server, tmp_path).ask(requests)
        assert good.value == "reply to good"
        assert (bad.value, bad.reason, bad.prompt_tokens) == (None, reason, tokens)
        assert CANARY not in bad.detail
        again, _ = teacher_for(server, tmp_path).ask(requests)
        assert again == replace(bad, stored=True)
        assert server.attempts["bad"] == 1 and stored_replies(tmp_path) == 2
        server.behaviour = lambda prompt, attempt: "ok"
        mended, _ = teacher_for(server, tmp_path, retry_failed=True).ask(requests)
        assert mended.value == "reply to bad"
        assert server.attempts == {"bad": 2, "good": 1}
    assert (tmp_path / "teacher.sqlite").stat().st_size < 1_000_000  # little is kept of 30 MB


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("prose", "no JSON object in the answer"),
        ("half", "the JSON of the answer is broken"),
        ("empty", "empty answer"),
        ("ok", "no JSON object in the answer"),
    ],
)
def test_what_cannot_be_read_is_asked_for_twice_more_and_then_recorded(
    tmp_path: Path, behaviour: str, reason: str
) -> None:
    def mended(prompt: str, attempt: int) -> str:
        return "json"

    with serving(lambda prompt, attempt: behaviour) as server:
        teacher = teacher_for(server, tmp_path)
        (answer,) = teacher.ask([request("a", shape=Colour)])
        assert (answer.value, answer.reason) == (None, reason)
        assert len(server.bodies) == 3 and stored_replies(tmp_path) == 3
        assert (answer.prompt_tokens, answer.completion_tokens) == (15, 9)
        assert (teacher.usage.prompt_tokens, teacher.usage.failed, teacher.usage.requests) == (15, 1, 1)
        roles = [message["role"] for message in server.bodies[-1]["messages"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
        assert reason in server.bodies[1]["messages"][-1]["content"]
        server.behaviour = mended
        assert not teacher_for(server, tmp_path).ask([request("a", shape=Colour)])[0].usable
        assert len(server.bodies) == 3
        (answer,) = teacher_for(server, tmp_path, retry_failed=True).ask([request("a", shape=Colour)])
        assert answer.value == Colour(colour="blue", count=3)
        assert len(server.bodies) == 4


def test_a_repetition_that_succeeds_is_the_answer_and_all_tokens_count(tmp_path: Path) -> None:
    def check(found: Colour) -> str | None:
        return None if found.count == 3 else f"wrong count: {found.count}"

    with serving(lambda prompt, attempt: "json" if "broken" in prompt else "half") as server:
        teacher = teacher_for(server, tmp_path)
        (answer,) = teacher.ask([request("a", shape=Colour, check=check)])
        again = teacher_for(server, tmp_path)
        assert again.ask([request("a", shape=Colour, check=check)]) == [replace(answer, stored=True)]
        assert len(server.bodies) == 2
    assert answer.value == Colour(colour="blue", count=3)
    assert answer.prompt_tokens == teacher.usage.prompt_tokens == again.usage.prompt_tokens == 10
    assert (again.usage.from_store, again.usage.sent) == (1, 0)


def test_half_a_surrogate_pair_is_stored_as_a_mark(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "surrogate") as server:
        (answer,) = teacher_for(server, tmp_path).ask([request("a\ud800")])
    assert answer.value == "half a pair: ?"


def test_usage_sums_what_servers_report_and_counts_what_they_do_not(tmp_path: Path) -> None:
    behaviours = {"a": "ok", "b": "no_usage", "c": "cut"}
    prices = PricesConfig(input_per_million=100.0, output_per_million=1000.0)
    with serving(lambda prompt, attempt: behaviours[prompt]) as server:
        teacher = teacher_for(server, tmp_path, prices=prices)
        teacher.ask([request(prompt) for prompt in "abca"])
        teacher.ask([request("a")])  # known by now: neither sent nor counted again
        again = teacher_for(server, tmp_path, prices=prices)
        again.ask([request(prompt) for prompt in "abc"])
        unknown = teacher_for(server, tmp_path)
        unknown.ask([request("a")])
    usage = teacher.usage
    assert (usage.requests, usage.from_store, usage.failed, usage.sent) == (5, 1, 1, 3)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.unreported) == (10, 6, 1)
    assert usage.cost == usage.paid_now == pytest.approx((10 * 100 + 6 * 1000) / 1e6)
    assert again.usage.cost == usage.cost and again.usage.paid_now is None
    assert unknown.usage.cost is None  # not 0


# -- limits on money and pace ------------------------------------------------------------------------------------------


def test_no_more_is_sent_than_max_cost_allows(tmp_path: Path) -> None:
    # A request may cost what its prompt is estimated at and max_tokens=100 at 1 a token, and does cost 3 (see server).
    prices = PricesConfig(input_per_million=0.0, output_per_million=1e6)
    requests = [request(str(i)) for i in range(50)]
    with serving(lambda prompt, attempt: "ok") as server:
        limited = {"prices": prices, "max_tokens": 100, "max_cost": 130.0}
        teacher = teacher_for(server, tmp_path, **limited)
        with pytest.raises(UserError, match=r"teacher\.max_cost=130.*39 requests are unanswered"):
            teacher.ask(requests)
        assert server.completed.total() == 11  # after 11 answers 33 are spent, and 33 + 100 > 130
        assert teacher.usage.cost == 33
        with pytest.raises(UserError, match=r"teacher\.max_cost"):
            teacher_for(server, tmp_path, **limited).ask(requests)
        assert server.completed.total() == 11  # what is stored counts as spent
        answers = teacher_for(server, tmp_path, **{**limited, "max_cost": 1000.0}).ask(requests)
        assert all(answer.usable for answer in answers) and set(server.completed.values()) == {1}
        with pytest.raises(UserError, match=r"teacher\.max_cost needs teacher\.prices"):
            teacher_for(server, tmp_path, max_cost=1.0)


def test_requests_per_minute_are_evenly_spaced(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "ok") as server:
        teacher_for(server, tmp_path, requests_per_minute=1200.0).ask([request(str(i)) for i in range(8)])
        assert server.times[-1] - server.times[0] >= 7 * 0.05 - 0.04  # 1200 a minute: one every 50 ms


def test_what_the_headers_say_is_left_is_not_overrun(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "ok") as server:
        server.headers = {
            "x-ratelimit-limit-requests": "1",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "100ms",
        }
        teacher_for(server, tmp_path, concurrency=1).ask([request(str(i)) for i in range(4)])
        gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert all(gap >= 0.1 for gap in gaps)


# -- fatal failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refused", "the key was refused"),
        ("forbidden", "access was refused"),
        ("unknown_model", "no such model"),
        ("no_quota", "the quota is used up"),
        ("tomorrow", "asks to wait 1440 minutes"),
    ],
)
def test_a_fatal_failure_stops_the_run_and_loses_nothing(tmp_path: Path, behaviour: str, message: str) -> None:
    mended = threading.Event()

    def behave(prompt: str, attempt: int) -> str:
        return "ok" if int(prompt) < 10 or mended.is_set() else behaviour

    requests = [request(str(i)) for i in range(100)]
    with serving(behave) as server:
        with pytest.raises(UserError, match=message) as caught:
            teacher_for(server, tmp_path, concurrency=4).ask(requests)
        assert CANARY not in "".join(traceback.format_exception(caught.value))
        assert server.attempts.total() <= 10 + 4  # nothing is sent after the first fatal answer came back
        assert stored_replies(tmp_path) == server.completed.total() == 10
        mended.set()
        answers = teacher_for(server, tmp_path).ask(requests)
        assert set(server.completed.values()) == {1}
    assert [answer.value for answer in answers] == [f"reply to {i}" for i in range(100)]


def test_a_server_that_is_down_is_fatal(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "ok") as server:
        teacher = teacher_for(server, tmp_path)
    with pytest.raises(UserError, match=f"{OUTAGE_REQUESTS} requests in a row"):
        teacher.ask([request(str(i)) for i in range(50)])


def test_a_server_that_refuses_everything_from_the_start_is_fatal(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "bad_request") as server:
        teacher = teacher_for(server, tmp_path, concurrency=2)
        with pytest.raises(
            UserError, match=r"every request is refused \(400 I do not like.*teacher\.retry_failed=true"
        ):
            teacher.ask([request(str(i)) for i in range(50)])
        assert server.attempts.total() <= OUTAGE_REQUESTS + 1
        server.behaviour = lambda prompt, attempt: "ok" if prompt == "0" else "bad_request"
        again = teacher_for(server, tmp_path, concurrency=1, retry_failed=True)
        answers = again.ask([request(str(i)) for i in range(50)])
        assert [answer.usable for answer in answers] == [True] + [False] * 49  # it is the requests, not the server


def test_an_error_of_the_caller_stops_the_run(tmp_path: Path) -> None:
    def complain(position: int, answer: Answer) -> None:
        raise ZeroDivisionError("a bug")

    with serving(lambda prompt, attempt: "ok") as server:
        with pytest.raises(ZeroDivisionError):
            teacher_for(server, tmp_path, concurrency=2).ask([request(str(i)) for i in range(20)], complain)
        assert server.attempts.total() <= 3


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"concurrency": 0},
        {"timeout_seconds": 0.0},
        {"max_tokens": 0},
        {"requests_per_minute": 0.0},
        {"tokens_per_minute": -1.0},
        {"max_cost": float("nan")},
    ],
)
def test_numbers_that_make_no_sense(change: dict[str, Any]) -> None:
    config = TeacherConfig(mode=TeacherMode.openai, model="m", api_key_env="")
    with pytest.raises(UserError, match=rf"teacher\.{next(iter(change))}"):
        open_teacher(replace(config, **change))
    with pytest.raises(UserError, match=r"teacher\.mistake_rate"):
        open_teacher(TeacherConfig(model="scripted", mistake_rate=1.5))


def test_open_teacher_takes_the_mode_from_the_config(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "ok") as server:
        assert isinstance(open_teacher(config_for(server, tmp_path)), OpenAITeacher)
    assert not isinstance(open_teacher(TeacherConfig(model="scripted")), OpenAITeacher)
