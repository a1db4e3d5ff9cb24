"""How a server wants to be spoken to: what the client learns from what one refuses or ignores."""

from __future__ import annotations

from pathlib import Path

import pytest
from misbehaving_server import CANARY, Colour, MisbehavingServer, request, serving, teacher_for

from alignkit.core.config import Structured, TeacherApi
from alignkit.core.records import Message
from alignkit.teacher.client import Request


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", CANARY)


def formats(server: MisbehavingServer) -> list[str]:
    return [body.get("response_format", {"type": "text"})["type"] for body in server.bodies]


@pytest.mark.parametrize(
    ("behaviour", "sent"),
    [
        ("json", ["json_schema"] * 4),
        ("no_schema", ["json_schema", "json_object", "json_object", "json_object", "json_object"]),
        ("no_format", ["json_schema", "json_object", "text", "text", "text", "text"]),
        ("fenced", ["json_schema", "json_schema", "json_schema", "json_object"]),  # accepts it, and ignores it
    ],
)
def test_the_ladder_goes_down_for_a_server_that_refuses_or_ignores_it(
    tmp_path: Path, behaviour: str, sent: list[str]
) -> None:
    requests = [request(str(i), shape=Colour) for i in range(4)]
    with serving(lambda prompt, attempt: behaviour) as server:
        answers = teacher_for(server, tmp_path, concurrency=1).ask(requests)
        assert [answer.value for answer in answers] == [Colour(colour="blue", count=3)] * 4
        assert formats(server) == sent
        server.bodies.clear()
        teacher_for(server, tmp_path).ask([request("new", shape=Colour)])
        assert formats(server) == sent[-1:]  # remembered
        teacher_for(server, tmp_path).ask([request("words")])
        teacher_for(server, tmp_path, structured=Structured.json_object).ask([request("set", shape=Colour)])
        assert formats(server)[1:3] == ["text", "json_object"]


def test_a_refusal_for_another_reason_teaches_nothing(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "bad_request" if prompt == "bad" else "json") as server:
        bad, good = teacher_for(server, tmp_path, concurrency=1).ask(
            [request("bad", shape=Colour), request("good", shape=Colour)]
        )
        assert formats(server) == ["json_schema", "json_object", "text", "json_schema"]
    assert bad.reason == "refused by the server" and good.usable


def test_many_requests_at_once_learn_it_together(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "no_format") as server:
        answers = teacher_for(server, tmp_path).ask([request(str(i), shape=Colour) for i in range(40)])
        assert all(answer.usable for answer in answers)
        assert server.attempts.total() <= 40 + 4 * 8 and set(server.completed.values()) == {1}


def test_parameters_that_a_model_refuses_are_left_out(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "newer") as server:
        teacher_for(server, tmp_path, concurrency=1).ask([request("a"), request("b")])
        teacher_for(server, tmp_path).ask([request("c")])
        assert [sorted(body) for body in server.bodies] == [
            ["max_tokens", "messages", "model", "temperature"],
            ["max_completion_tokens", "messages", "model", "temperature"],
            *[["max_completion_tokens", "messages", "model"]] * 3,
        ]


def test_completions_mode_sends_one_prompt(tmp_path: Path) -> None:
    conversation = [Message(role="system", content="Be brief."), Message(role="user", content="Why?")]
    with serving(lambda prompt, attempt: "fenced") as server:
        teacher = teacher_for(server, tmp_path, api=TeacherApi.completions)
        (answer,) = teacher.ask([Request(conversation, shape=Colour)])
        assert server.paths == {"/v1/completions"}
        assert server.bodies == [
            {
                "model": "m",
                "prompt": "System: Be brief.\n\nUser: Why?\n\nAssistant:",
                "stop": ["\nUser:"],
                "max_tokens": 1024,
                "temperature": 0.7,
            }
        ]
    assert answer.value == Colour(colour="blue", count=3)
