"""The parts of the teacher's client, each on its own: limits, retry queue, kinds of failure, dialect, reading, wire."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from io import StringIO
from typing import Any

import pytest
from pydantic import BaseModel

from alignkit.core.config import PricesConfig, Structured, TeacherConfig
from alignkit.core.records import Message
from alignkit.data.tools import MalformedCallError, read_calls
from alignkit.teacher import live
from alignkit.teacher.client import Request, Usage
from alignkit.teacher.dialect import Dialect, conforms, first_dialect, strict_schema
from alignkit.teacher.failures import FILTERED, REFUSED, Failure, Kind, classify, read_retry_after
from alignkit.teacher.limits import Concurrency, Limits, Pace, Window, read_duration
from alignkit.teacher.reading import SHOWN_CHARACTERS, ask_again, read_object, read_reply
from alignkit.teacher.replay import Pending, replay
from alignkit.teacher.retry_queue import RetryQueue
from alignkit.teacher.store import Reply
from alignkit.teacher.wire import prompt_text, read_completion


class Note(BaseModel):
    text: str
    score: float = 0.0


# -- limits ------------------------------------------------------------------------------------------------------------


def test_concurrency_is_halved_by_refusals_and_grows_back() -> None:
    concurrency = Concurrency(64)
    for _ in range(64):
        concurrency.record(refused=True)
    assert concurrency.now == 32
    for _ in range(32 + 36):  # two rounds without refusals: 32 outcomes, then 36
        concurrency.record(refused=False)
    assert concurrency.now == 40  # 64 / 16 more each
    for _ in range(1000):
        concurrency.record(refused=True)
    assert concurrency.now == 1
    for _ in range(10_000):
        concurrency.record(refused=False)
    assert concurrency.now == 64


def test_a_server_that_refuses_one_in_ten_at_random_keeps_its_slots() -> None:
    rng, concurrency, seen = random.Random(1), Concurrency(64), []
    for _ in range(20_000):
        concurrency.record(refused=rng.random() < 0.1)
        seen.append(concurrency.now)
    assert min(seen) >= 32 and sum(seen) / len(seen) > 60


def test_a_pace_spaces_evenly_and_takes_corrections() -> None:
    pace = Pace(60.0)
    assert pace.wait(100.0) == 0.0
    pace.take(100.0, 3)  # three units of one second each
    assert pace.wait(100.0) == 3.0 and pace.wait(102.5) == 0.5 and pace.wait(104.0) == 0.0
    pace.take(101.0, -2)  # two of them were not used
    assert pace.wait(101.0) == 0.0
    unlimited = Pace(None)
    unlimited.take(0.0, 1e9)
    assert unlimited.wait(0.0) == 0.0


def test_a_window_holds_back_what_the_headers_say_is_not_left() -> None:
    window = Window()
    headers = {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "150",
        "x-ratelimit-reset-tokens": "6s",
    }
    assert window.wait(0.0, 1e9) == 0.0  # nothing is known
    window.learn(headers, "tokens", now=10.0)
    assert window.wait(11.0, 100) == 0.0
    window.take(100)
    assert window.wait(11.0, 100) == 5.0  # 50 are left, until 16
    assert window.wait(16.0, 100) == 0.0  # full again
    window.learn({**headers, "x-ratelimit-remaining-tokens": "1000"}, "tokens", now=20.0)
    assert window.wait(20.0, 5000) == 0.0  # larger than the limit, so it needs no more than all of it
    window.learn({**headers, "x-ratelimit-reset-tokens": "tomorrow"}, "tokens", now=20.0)
    assert window.remaining == 1000  # not understood, so not taken for anything


def test_limits_are_asked_together() -> None:
    now = [0.0]
    limits = Limits(4, requests_per_minute=60.0, tokens_per_minute=600.0, clock=lambda: now[0])
    assert limits.count_tokens and limits.wait(50) == 0.0
    limits.take(50)  # one request is a second, 50 tokens are five
    assert limits.wait(1) == 5.0
    limits.correct(50, 20)
    assert limits.wait(1) == 2.0
    now[0] = 3.0
    assert limits.wait(1) == 0.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("1.5", 1.5),
        ("", None),
        (None, None),
        ("6m0x", None),
        ("-1", None),
        ("inf", None),
    ],
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert read_duration(text) == (None if seconds is None else pytest.approx(seconds))


# -- retry queue -------------------------------------------------------------------------------------------------------


def test_the_queue_repeats_until_done_and_takes_what_is_due_first() -> None:
    order: list[str] = []

    async def attempt(item: str) -> float | None:
        order.append(item)
        await asyncio.sleep(0.01)
        return 0.035 if order.count(item) < 2 and item in "ab" else None

    queue: RetryQueue[str] = RetryQueue(attempt, lambda item: 0.0, lambda: 1)
    asyncio.run(queue.run("abcdefghij"))
    assert sorted(order) == sorted("abcdefghijab")
    assert order[:4] == ["a", "b", "c", "d"]  # both wait outside the only slot
    second = [index for index, item in enumerate(order) if item in "ab"][2:]
    assert order[second[0]] == "a" and second[1] < len(order) - 2  # and come back before what is new


def test_the_queue_waits_for_what_is_under_way_when_something_fails() -> None:
    ended: list[int] = []

    async def attempt(item: int) -> None:
        if item == 2:
            raise ValueError("broken")
        await asyncio.sleep(0.01)
        ended.append(item)

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(RetryQueue(attempt, lambda item: 0.0, lambda: 3).run(range(100)))
    assert ended == [0, 1]


def test_the_queue_is_held_back_by_time_or_by_what_is_under_way() -> None:
    async def main() -> list[tuple[int, int]]:
        begun: list[tuple[int, int]] = []

        async def attempt(item: int) -> None:
            begun.append((item, queue.under_way))
            await asyncio.sleep(0.01)

        def admit(item: int) -> float:
            return math.inf if queue.under_way else 0.0

        queue: RetryQueue[int] = RetryQueue(attempt, admit, lambda: 8)
        await queue.run(range(3))
        return begun

    assert asyncio.run(main()) == [(0, 1), (1, 1), (2, 1)]


def test_an_error_of_admission_ends_the_queue() -> None:
    async def attempt(item: int) -> None:
        await asyncio.sleep(0)

    def refuse(item: int) -> float:
        raise KeyError(item)

    with pytest.raises(KeyError):
        asyncio.run(RetryQueue(attempt, refuse, lambda: 8).run([1]))


def test_a_cancelled_queue_ends_what_is_under_way() -> None:
    async def attempt(item: int) -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        queue: RetryQueue[int] = RetryQueue(attempt, lambda item: 0.0, lambda: 2)
        task = asyncio.ensure_future(queue.run(range(5)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert queue.under_way == 0

    asyncio.run(main())


# -- kinds of failure --------------------------------------------------------------------------------------------------


def error(message: str = "m", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        (401, error(), Kind.fatal, "the key was refused"),
        (403, error(), Kind.fatal, "access was refused"),
        (404, error(code="model_not_found"), Kind.fatal, "no such model or address"),
        (400, error(code="model_not_found"), Kind.fatal, "no such model or address"),
        (429, error(code="insufficient_quota"), Kind.fatal, "the quota is used up"),
        (429, error(type="insufficient_quota"), Kind.fatal, "the quota is used up"),
        (307, "", Kind.fatal, "the server redirects to another address, which is not followed"),
        (429, error(code="rate_limit_exceeded"), Kind.transient, "too many requests"),
        (408, None, Kind.transient, "server error"),
        (409, {}, Kind.transient, "server error"),
        (500, "<html>oops</html>", Kind.transient, "server error"),
        (503, ["odd"], Kind.transient, "server error"),
        (400, error(code="context_length_exceeded"), Kind.per_item, "prompt too long for the model"),
        (400, error("the request exceeds the available context size"), Kind.per_item, "prompt too long for the model"),
        (413, "too large", Kind.per_item, "prompt too long for the model"),
        (400, error(code="content_filter"), Kind.per_item, FILTERED),
        (400, error("triggering Azure OpenAI's content management policy"), Kind.per_item, FILTERED),
        (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, Kind.per_item, REFUSED),
    ],
)
def test_kinds_of_failure(status: int, body: Any, kind: Kind, reason: str) -> None:
    failure = classify(status, body)
    assert (failure.kind, failure.reason) == (kind, reason)
    assert str(status) in failure.detail and len(failure.detail) < 400


def test_a_huge_message_is_cut_and_a_long_wait_is_fatal() -> None:
    assert len(classify(500, "x y " * 10_000_000).detail) < 400
    assert classify(429, error(), 899.0).kind is Kind.transient
    assert classify(429, error(), 3600.0).reason == "the server asks to wait 60 minutes"


def test_retry_after_in_milliseconds_seconds_or_as_a_date() -> None:
    assert read_retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert read_retry_after({"retry-after": "9"}) == 9.0
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert read_retry_after({"retry-after": date}) == pytest.approx(30, abs=2)
    assert read_retry_after({"retry-after": "soon"}) is None
    assert read_retry_after({}) is None


# -- dialect -----------------------------------------------------------------------------------------------------------


def test_what_was_learnt_is_remembered_and_the_configuration_comes_first() -> None:
    learnt = Dialect(Structured.json_object, "max_completion_tokens", temperature=False)
    assert first_dialect(TeacherConfig(model="m"), learnt.dump()) == learnt
    fixed = first_dialect(TeacherConfig(model="m", structured=Structured.json_schema), learnt.dump())
    assert (fixed.structured, fixed.fixed, fixed.max_tokens) == (Structured.json_schema, True, "max_completion_tokens")
    refusal = Failure(Kind.per_item, REFUSED, "response_format is not supported", 400)
    assert fixed.next_rung(Structured.json_schema, refusal) is None
    assert Dialect().next_rung(Structured.json_schema, refusal) is Structured.json_object
    assert Dialect().next_rung(Structured.text, refusal) is None


@pytest.mark.parametrize(
    ("status", "said", "refused"),
    [
        (400, "tools is not supported here", True),
        (404, "No endpoints found that support tool use", True),
        (500, "tools param requires --jinja flag", True),
        (500, "error parsing tool call: raw='{'", False),
        (503, "no tool server", False),
    ],
)
def test_tools_are_refused_by_the_server_and_not_by_a_call_that_went_wrong(
    status: int, said: str, refused: bool
) -> None:
    body: dict[str, Any] = {"tools": []}
    failure = Failure(Kind.per_item, REFUSED, said, status)
    dialect = Dialect()
    assert (dialect.correct(body, failure) is not None) is refused
    assert dialect.tools is not refused
    taken = Dialect()
    assert taken.observe_tools({}) is None
    assert taken.observe_tools(body) == "takes tools"
    assert taken.observe_tools(body) is None
    assert taken.correct(body, failure) is None
    assert taken.tools
    assert first_dialect(TeacherConfig(model="m"), taken.dump()).tools_taken


def test_a_server_that_heeded_the_format_must_name_it_to_refuse_it() -> None:
    dialect = Dialect()
    dialect.observe(Structured.json_schema, conforms=True)
    unclear = Failure(Kind.per_item, REFUSED, "400 no", 400)
    assert dialect.next_rung(Structured.json_schema, unclear) is None
    named = Failure(Kind.per_item, REFUSED, "400 Invalid schema for response_format", 400)
    assert dialect.next_rung(Structured.json_schema, named) is Structured.json_object
    dialect.observe(Structured.json_object, conforms=True)  # for that one shape
    assert dialect.structured is Structured.json_schema


def test_some_malformed_replies_are_no_sign_that_the_format_is_ignored() -> None:
    dialect, rng = Dialect(), random.Random(2)
    dialect.observe(Structured.json_schema, conforms=True)
    for _ in range(5000):
        assert dialect.observe(Structured.json_schema, conforms=rng.random() > 0.1) is None
    assert dialect.structured is Structured.json_schema


def test_strict_schemas_are_closed_and_require_every_field() -> None:
    class Inner(BaseModel):
        title: str = "a default"

    class Outer(BaseModel):
        inner: list[Inner]
        note: str | None = None

    schema = strict_schema(Outer)
    assert schema["required"] == ["inner", "note"] and schema["additionalProperties"] is False
    inner = schema["$defs"]["Inner"]
    assert inner == {
        "type": "object",
        "properties": {"title": {"type": "string"}},  # the field of this name, not the keyword
        "required": ["title"],
        "additionalProperties": False,
    }
    assert "default" not in schema["properties"]["note"]


def test_conforming_is_json_as_a_whole_with_every_field() -> None:
    assert conforms('{"text": "a", "score": 1}', Note, Structured.json_schema)
    assert not conforms('{"text": "a"}', Note, Structured.json_schema)
    assert conforms('{"text": "a"}', Note, Structured.json_object)
    assert not conforms('```json\n{"text": "a", "score": 1}\n```', Note, Structured.json_object)
    assert not conforms("[" * 100_000, Note, Structured.json_object)


# -- reading -----------------------------------------------------------------------------------------------------------

ASKED = Request([Message(role="user", content="q")], shape=Note)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"text": "a"}', Note(text="a")),
        ('Here it is, with {braces}:\n```json\n{"text": "a"}\n```\nEnjoy!', Note(text="a")),
        ('<think>{"text": "a plan"}</think>\n{"text": "a"}', Note(text="a")),
        ('{"text": "two\nlines", "more": [1]}', Note(text="two\nlines")),
        ('{"text": "好", "score": "7"}', Note(text="好", score=7)),
    ],
)
def test_the_object_is_found_whatever_stands_around_it(text: str, value: Note) -> None:
    assert read_reply(ASKED, text).value == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty answer"),
        ("<think>hm</think> ", "empty answer"),
        ("I cannot help with that.", "refused by the teacher"),
        ("抱歉，这个问题不能谈。", "refused by the teacher"),
        ("I would say that it is blue.", "no JSON object in the answer"),
        ("[1, 2]", "no JSON object in the answer"),
        ('{"text": "a"', "the JSON of the answer is broken"),
        ('{"text": {"text": "inner"}, "score": ', "the JSON of the answer is broken"),
        ('{"text": "a", "score": NaN}', "the JSON of the answer is broken"),
        ('{"score": 1}', "the JSON has not the fields asked for"),
        ('{"text": "half a pair \\ud83d"}', "the JSON of the answer is broken"),
        ('{"text":' + '{"a":' * 100_000, "the JSON of the answer is broken"),
        ('{"score": ' + "9" * 10_000 + "}", "the JSON of the answer is broken"),
    ],
)
def test_every_unusable_reply_has_one_reason(text: str, reason: str) -> None:
    answer = read_reply(ASKED, text)
    assert (answer.value, answer.reason) == (None, reason)
    assert "\ud83d" not in answer.detail


def test_reading_thirty_megabytes_takes_no_time() -> None:
    for text in ("{ " * 15_000_000, '{"' * 15_000_000, "<think>" + "x" * 30_000_000):
        assert isinstance(read_object(text), str)


def test_text_is_taken_without_the_thoughts_before_it() -> None:
    plain = Request([Message(role="user", content="q")])
    assert read_reply(plain, "<think>\nlong\n</think>\n\nBlue.").value == "Blue."
    assert read_reply(plain, "Blue <think>").value == "Blue <think>"


def test_a_repetition_shows_the_reply_and_says_what_is_wrong() -> None:
    refused = read_reply(ASKED, "prose " * 10_000)
    asked, said, complaint = ask_again(ASKED, refused).messages
    assert asked == ASKED.messages[0]
    assert said.role == "assistant" and len(said.content) <= SHOWN_CHARACTERS
    assert "no JSON object in the answer" in complaint.content
    assert ask_again(ASKED, read_reply(ASKED, " ")).messages[1].content  # servers refuse an empty turn


def test_replay_walks_the_chain_of_stored_replies() -> None:
    config = TeacherConfig(model="m")
    stored: dict[str, Reply] = {}
    for repeat, text in enumerate(("prose", "", '{"text": "a"}')):
        pending = replay(config, ASKED, stored.get)
        assert isinstance(pending, Pending) and len(pending.request.messages) == 1 + 2 * repeat
        stored[pending.key] = Reply(text, "stop", 10, 1)
    answer = replay(config, ASKED, stored.get)
    assert not isinstance(answer, Pending)
    assert answer.value == Note(text="a") and answer.stored
    assert (answer.prompt_tokens, answer.completion_tokens) == (30, 3)


# -- wire --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [None, [], "text", {}, {"choices": None}, {"choices": []}, {"choices": ["odd"]}, {"choices": {"0": {}}}],
)
def test_what_is_no_completion_is_tried_again(payload: Any) -> None:
    found = read_completion(payload)
    assert isinstance(found, Failure) and found.kind is Kind.transient


def test_an_error_that_comes_with_status_200_is_of_its_own_kind() -> None:
    fatal = read_completion(error("pay first", code=402))
    assert isinstance(fatal, Failure) and fatal.kind is Kind.fatal
    passing = read_completion({"error": "overloaded"})
    assert isinstance(passing, Failure) and passing.kind is Kind.transient and "overloaded" in passing.detail


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "5"}, {"prompt_tokens": -1}, []])
def test_usage_that_makes_no_sense_is_not_reported(usage: Any) -> None:
    reply = read_completion({"choices": [{"message": {"content": "a"}, "finish_reason": 7}], "usage": usage})
    assert reply == Reply("a", None)


def test_a_conversation_as_one_prompt() -> None:
    messages = [Message(role=role, content=role[0]) for role in ("system", "user", "assistant", "user")]
    assert prompt_text(messages) == "System: s\n\nUser: u\n\nAssistant: a\n\nUser: u\n\nAssistant:"


# -- the live line -----------------------------------------------------------------------------------------------------


def test_the_live_line_tells_the_state(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    monkeypatch.setattr("alignkit.teacher.live.time.monotonic", lambda: now[0])
    usage = Usage()
    with caplog.at_level(logging.INFO, logger="alignkit"), live.LiveLine(1000, usage, PricesConfig()) as line:
        for second in range(1, 41):  # two answers and one repetition a second
            now[0] += 1.0
            line.repeated += 1
            usage.paid_now = second / 100
            line.update(failed=second == 1)
            line.update(failed=False)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2  # every 15 seconds
    assert lines[0] == (
        "teacher: 29 of 1,000 answered, 1.9/s, 1 failed, 15 attempts repeated, cost 0.1500 USD, 8:22 left"
    )
    usage.paid_now = None
    assert "cost n/a" in line.line()


def test_a_terminal_has_one_line_that_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(live, "SECONDS_BETWEEN_CHANGES", 0.0)
    with live.LiveLine(3, Usage(), PricesConfig()) as line:
        line.update(failed=False)
    assert "1 of 3 answered" in terminal.getvalue() and caplog.records == []


def test_calls_of_a_reply_are_read_as_text() -> None:
    """What is no JSON, or no call at all, stays to be seen by who reads the turn."""
    functions: list[object] = [
        {"name": "retrieve", "arguments": '{"query": "Where is Lund?"}'},
        {"name": "retrieve", "arguments": {"query": "Wo 在哪?"}},
        {"name": "retrieve", "arguments": '{"query": '},
        None,
    ]
    read: list[object] = []
    for function in functions:
        message = {"content": "So.", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
        reply = read_completion({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
        assert isinstance(reply, Reply) and reply.text is not None
        try:
            read.append([call.function.arguments["query"] for call in read_calls(reply.text)[1]])
        except MalformedCallError:
            read.append("malformed")
    assert read == [["Where is Lund?"], ["Wo 在哪?"], "malformed", "malformed"]
