"""The Batch API: against the loopback server, whose batches are over when they have been looked at often enough."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from pydantic import BaseModel

from alignkit.core.config import PricesConfig, TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.data.closed_world import World
from alignkit.teacher import batch_api
from alignkit.teacher.batch import BatchTeacher
from alignkit.teacher.batch_book import BatchBook
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.scripted import ScriptedTeacher
from alignkit.teacher.server import TeacherServer
from alignkit.teacher.store import ResponseStore

CANARY = "canary-5be1d0-never-written-down"


class Number(BaseModel):
    number: int


class Rows:
    """Answers each row as told by its last message, and keeps what was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()

    def __call__(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.bodies.append(body)
        said = body["messages"][0]["content"]
        again = len(body["messages"]) > 1
        if said == "too long":
            return 400, {"error": {"message": "context length exceeded", "code": "context_length_exceeded"}}
        if said == "broken":
            return 500, {"error": {"message": "the server had an error"}}
        if said == "unknown model":
            return 404, {"error": {"message": "no such model", "code": "model_not_found"}}
        if said == "strict" and body["response_format"]["type"] == "json_schema":
            return 400, {"error": {"message": "response_format json_schema is not supported"}}
        self.answered[said] += 1
        text = {"prose, then JSON": '{"number": 7}' if again else "It is seven.", "prose": "It is seven."}
        reply = text.get(said, '{"number": 7}' if "response_format" in body else f"reply to {said} {CANARY}")
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
        return 200, {"choices": [choice], "model": "m", "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


@pytest.fixture
def rows(server: TeacherServer) -> Rows:
    server.batches.answer = rows = Rows()
    return rows


@pytest.fixture
def config(server: TeacherServer, tmp_path: Path) -> TeacherConfig:
    return TeacherConfig(
        mode=TeacherMode.batch,
        base_url=server.base_url,
        model="scripted",
        api_key_env="",
        store=str(tmp_path / "teacher.sqlite"),
    )


def ask(config: TeacherConfig, requests: list[Request], **settings: int) -> list[Answer]:
    teacher = BatchTeacher(config, poll_seconds=0.01)
    for name, value in settings.items():
        setattr(teacher, name, value)
    return teacher.ask(requests)


def ask_and_be_killed_while_waiting(
    config: TeacherConfig, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(seconds: float) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("alignkit.teacher.batch_api.time.sleep", killed)
        ask(config, requests)


def asked(text: str, shape: type[BaseModel] | None = None) -> Request:
    return Request([Message(role="user", content=text)], shape=shape)


def numbered(count: int) -> list[Request]:
    return [asked(f"question {number}") for number in range(count)]


def in_flight(config: TeacherConfig) -> int:
    with BatchBook(Path(config.store)) as book:
        return len(book.batches(f"{config.base_url} {config.model}"))


def test_in_batches_it_is_the_same_teacher(server: TeacherServer, config: TeacherConfig) -> None:
    server.batches.polls = 3
    requests = []
    for number in range(20):
        world = World(number)
        passage = world.passage()
        requests.append(asked(f"{passage.statement}\n\n{world.ask(passage).text}"))
    teacher = BatchTeacher(config, poll_seconds=0.01)
    direct = ScriptedTeacher().ask(requests)
    seen: list[int] = []
    assert teacher.ask(requests, lambda position, answer: seen.append(position)) == direct
    assert seen == list(range(20))
    assert (teacher.usage.requests, teacher.usage.sent, teacher.usage.from_store) == (20, 20, 0)
    again = BatchTeacher(config, poll_seconds=0.01)
    assert [answer.text for answer in again.ask(requests)] == [answer.text for answer in direct]
    assert (again.usage.sent, again.usage.from_store) == (0, 20)
    assert len(server.batches.batches) == 1 and in_flight(config) == 0


def test_a_file_holds_only_so_much(server: TeacherServer, rows: Rows, config: TeacherConfig) -> None:
    assert all(answer.usable for answer in ask(config, numbered(25), most_requests=10))
    sizes = [batch["request_counts"]["total"] for batch in server.batches.batches.values()]
    assert sizes == [10, 10, 5]
    more = [asked("x" * 1000 + str(number)) for number in range(4)]
    assert all(answer.usable for answer in ask(config, more, most_bytes=2500))
    assert [batch["request_counts"]["total"] for batch in server.batches.batches.values()][3:] == [2, 2]


def test_equal_requests_are_sent_once(rows: Rows, config: TeacherConfig) -> None:
    answers = ask(config, [asked("same"), asked("same"), asked("other")])
    assert answers[0] == answers[1]
    assert rows.answered == {"same": 1, "other": 1}


def test_a_killed_process_takes_its_batch_up_again(
    server: TeacherServer, rows: Rows, config: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.batches.polls = 3
    ask_and_be_killed_while_waiting(config, numbered(5), monkeypatch)
    assert in_flight(config) == 1
    answers = ask(config, numbered(8))  # three more have come: only they are sent
    assert all(answer.usable for answer in answers)
    assert [batch["request_counts"]["total"] for batch in server.batches.batches.values()] == [5, 3]
    assert set(rows.answered.values()) == {1} and in_flight(config) == 0


def test_nothing_is_added_under_a_limit_before_an_earlier_batch_is_paid(
    server: TeacherServer, rows: Rows, config: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.batches.polls = 3
    ask_and_be_killed_while_waiting(config, numbered(5), monkeypatch)
    # One more may cost 1024 tokens and its prompt: less than the limit, but not beside the 40 of the five.
    limited = replace(config, max_cost=1055e-6, prices=PricesConfig(1.0, 1.0))
    with pytest.raises(UserError, match=r"teacher\.max_cost"):
        ask(limited, numbered(6))
    assert [batch["request_counts"]["total"] for batch in server.batches.batches.values()] == [5]
    assert in_flight(config) == 0


def test_a_batch_is_found_behind_many_newer_ones(config: TeacherConfig) -> None:
    class Listed:
        """Pages of a list, as the package gives them: `data` is only the first."""

        def __init__(self, marks: list[str]) -> None:
            self.all = [SimpleNamespace(id=f"id-{mark}", metadata={batch_api.MARK: mark}) for mark in marks]
            self.data = self.all[:100]

        def __iter__(self) -> Iterator[SimpleNamespace]:
            return iter(self.all)

    with batch_api.BatchApi(config, poll_seconds=0.01) as api:
        real = api._client
        fake: Any = SimpleNamespace(batches=SimpleNamespace(list=lambda limit: Listed([str(n) for n in range(250)])))
        api._client = fake
        assert api.find("249") == "id-249" and api.find("mine") is None
        api._client = real


def test_a_batch_that_began_while_the_process_died_is_found_by_its_mark(
    server: TeacherServer, rows: Rows, config: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(book: BatchBook, batch: object, id: str) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BatchBook, "name", killed)
        ask(config, numbered(5))
    assert len(server.batches.batches) == 1
    assert all(answer.usable for answer in ask(config, numbered(5)))
    assert len(server.batches.batches) == 1


def test_a_batch_that_never_began_is_begun(
    server: TeacherServer, rows: Rows, config: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(api: object, content: bytes, mark: str) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(batch_api.BatchApi, "begin", killed)
        ask(config, numbered(5))
    assert (in_flight(config), len(server.batches.batches)) == (1, 0)
    assert all(answer.usable for answer in ask(config, numbered(5)))
    assert (in_flight(config), len(server.batches.batches)) == (0, 1)


def test_another_run_does_not_wait_for_batches_that_are_none_of_its_business(
    server: TeacherServer, rows: Rows, config: TeacherConfig
) -> None:
    with ResponseStore(Path(config.store)), BatchBook(Path(config.store)) as book:
        foreign = book.add(f"{config.base_url} {config.model}", "mark", {"a key": {"messages": []}})
        book.name(foreign, "a batch that the server does not know")
    assert all(answer.usable for answer in ask(config, numbered(2)))
    assert in_flight(config) == 1


def test_what_expired_goes_into_another_batch(server: TeacherServer, rows: Rows, config: TeacherConfig) -> None:
    server.batches.expire_after = 3
    assert all(answer.usable for answer in ask(config, numbered(10)))
    totals = [batch["request_counts"] for batch in server.batches.batches.values()]
    assert [(counts["total"], counts["completed"]) for counts in totals] == [(10, 3), (7, 7)]
    assert set(rows.answered.values()) == {1}


def test_failed_rows_have_their_reasons(server: TeacherServer, rows: Rows, config: TeacherConfig) -> None:
    requests = [asked("fine"), asked("too long"), asked("broken")]
    fine, too_long, broken = ask(config, requests)
    assert fine.usable
    assert too_long.reason == "prompt too long for the model"
    assert broken.reason == "server error" and broken.detail.startswith("in 3 batches")
    assert [batch["request_counts"]["total"] for batch in server.batches.batches.values()] == [3, 1, 1]
    ask(config, requests)  # what failed for good is stored, what failed in passing is asked for again
    assert [batch["request_counts"]["total"] for batch in server.batches.batches.values()][3:] == [1, 1, 1]


def test_what_cannot_be_used_is_asked_again_at_most_twice(
    server: TeacherServer, rows: Rows, config: TeacherConfig
) -> None:
    mended, hopeless = ask(config, [asked("prose, then JSON", Number), asked("prose", Number)])
    assert mended.value == Number(number=7) and mended.prompt_tokens == 10
    assert hopeless.reason == "no JSON object in the answer" and hopeless.prompt_tokens == 15
    assert [batch["request_counts"]["total"] for batch in server.batches.batches.values()] == [2, 2, 1]


def test_a_format_that_is_refused_is_replaced_by_the_next(rows: Rows, config: TeacherConfig) -> None:
    (answer,) = ask(config, [asked("strict", Number)])
    assert answer.value == Number(number=7)
    assert [body["response_format"]["type"] for body in rows.bodies] == ["json_schema", "json_object"]


def test_a_fatal_row_stops_the_run_and_the_others_are_stored(rows: Rows, config: TeacherConfig) -> None:
    with pytest.raises(UserError, match="no such model"):
        ask(config, [asked("fine"), asked("unknown model")])
    assert in_flight(config) == 0
    with ResponseStore(Path(config.store)) as store:
        assert store.count() == 1


def test_a_cancelled_batch_keeps_what_it_had_done(server: TeacherServer, rows: Rows, config: TeacherConfig) -> None:
    look = server.batches.look

    def cancelled(id: str) -> dict[str, Any]:
        return {**look(id), "status": "cancelled"}

    server.batches.expire_after = 2
    server.batches.look = cancelled  # type: ignore[method-assign]
    with pytest.raises(UserError, match="was cancelled"):
        ask(config, numbered(5))
    server.batches.look = look  # type: ignore[method-assign]
    assert all(answer.usable for answer in ask(config, numbered(5)))
    assert set(rows.answered.values()) == {1}


def test_a_full_queue_makes_batches_smaller(server: TeacherServer, rows: Rows, config: TeacherConfig) -> None:
    look, refused = server.batches.look, []

    def full(id: str) -> dict[str, Any]:
        batch = server.batches.batches[id]
        if server.batches.files[batch["input_file_id"]].count(b"\n") <= 2:
            return look(id)
        refused.append(id)
        errors = {"data": [{"code": "token_limit_exceeded", "message": "enqueued token limit reached"}]}
        return {**batch, "status": "failed", "errors": errors}

    server.batches.look = full  # type: ignore[method-assign]
    assert all(answer.usable for answer in ask(config, numbered(8)))
    assert len(refused) == 3  # eight at once, then twice four
    assert set(rows.answered.values()) == {1}


def test_a_refused_batch_says_why(server: TeacherServer, rows: Rows, config: TeacherConfig) -> None:
    def failed(id: str) -> dict[str, Any]:
        errors = {"data": [{"code": "mismatched_model", "message": "one model a batch"}]}
        return {**server.batches.batches[id], "status": "failed", "errors": errors}

    server.batches.look = failed  # type: ignore[method-assign]
    with pytest.raises(UserError, match="mismatched_model: one model a batch"):
        ask(config, numbered(2))
    assert in_flight(config) == 0


def test_max_cost_stops_before_anything_is_sent(server: TeacherServer, rows: Rows, config: TeacherConfig) -> None:
    config.max_tokens = 100
    config.prices = PricesConfig(input_per_million=0.0, output_per_million=1_000_000.0)
    config.max_cost = 250.0  # the answers to two requests may cost 200, those to three 300
    with pytest.raises(UserError, match="max_cost"):
        ask(config, numbered(3))
    assert server.batches.files == {}
    assert all(answer.usable for answer in ask(config, numbered(2)))


def test_the_key_is_written_nowhere(
    rows: Rows, config: TeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_TEST_KEY", CANARY)
    config.api_key_env = "BATCH_TEST_KEY"
    (answer,) = ask(config, [asked("say your key")])
    assert answer.text == "reply to say your key ***"
    assert not any(CANARY.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_rows_that_are_no_rows_are_passed_over() -> None:
    for line in (b"", b"no JSON", b"[]", b"{}", b'"text"'):
        assert batch_api.read_row(line) is None
    row = batch_api.read_row(json.dumps({"custom_id": "k", "response": None, "error": None}).encode())
    assert row is not None and row[0] == "k" and "no response" in str(row[1])


def test_limits_that_a_batch_cannot_keep_are_refused(config: TeacherConfig) -> None:
    with pytest.raises(UserError, match="tokens_per_minute: has no effect"):
        BatchTeacher(replace(config, tokens_per_minute=1000.0))
