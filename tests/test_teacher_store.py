"""The response store: what is sent once, what a key is made of, and what a killed run keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from misbehaving_server import CANARY, Colour, config_for, request, serving, stored_replies, teacher_for

from alignkit.core.config import Structured, TeacherApi, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.teacher.openai_client import OpenAITeacher
from alignkit.teacher.store import Reply, ResponseStore
from alignkit.teacher.wire import request_parts, store_key


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", CANARY)


def test_equal_requests_are_sent_once_and_samples_are_told_apart(tmp_path: Path) -> None:
    requests = [
        request("a"),
        request("a"),
        request("a", sample=1),
        request("a", temperature=0.0),
        request("a", sample=1),
    ]
    with serving(lambda prompt, attempt: "ok") as server:
        answers = teacher_for(server, tmp_path).ask(requests)
        assert server.attempts["a"] == 3
        teacher_for(server, tmp_path, max_tokens=7).ask(requests[:1])
        teacher_for(server, tmp_path, model="other").ask(requests[:1])
        assert server.attempts["a"] == 5
    assert [answer.value for answer in answers] == ["reply to a"] * 5


def test_equal_requests_with_different_checks_are_each_read_by_their_own(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "json") as server:
        pleased, displeased = teacher_for(server, tmp_path).ask(
            [request("a", shape=Colour), request("a", shape=Colour, check=lambda found: "not red: blue")]
        )
        assert len(server.bodies) == 3  # one for both, and two more for the one that is never pleased
    assert pleased.usable and (displeased.reason, displeased.detail) == ("not red", "blue")


def test_the_store_key_depends_on_every_part_of_a_request() -> None:
    config = TeacherConfig(model="m", base_url="https://h/v1")
    first = request("é", shape=Colour)
    changed_requests = [
        request("e", shape=Colour),
        request("é"),
        replace(first, sample=1),
        replace(first, temperature=0.0),
        replace(first, max_tokens=1),
    ]
    changed_configs = [
        replace(config, model="n"),
        replace(config, base_url="https://i/v1"),
        replace(config, api=TeacherApi.completions),
    ]
    keys = {store_key(request_parts(config, each)) for each in [first, *changed_requests]}
    keys |= {store_key(request_parts(each, first)) for each in changed_configs}
    assert len(keys) == 9 and all(len(key) == 64 for key in keys)
    same = replace(config, concurrency=64, timeout_seconds=1, structured=Structured.text, max_cost=1.0)
    assert store_key(request_parts(same, first)) == store_key(request_parts(config, first))


def test_a_reply_is_on_disk_before_anybody_sees_it(tmp_path: Path) -> None:
    counts = []
    with serving(lambda prompt, attempt: "ok") as server:
        teacher_for(server, tmp_path).ask(
            [request(str(i)) for i in range(5)], lambda position, answer: counts.append(stored_replies(tmp_path))
        )
    assert len(counts) == 5
    assert all(count >= seen for seen, count in enumerate(counts, start=1))


def test_a_row_of_the_store_says_what_was_asked_and_what_came(tmp_path: Path) -> None:
    asked = request("a", shape=Colour)
    with serving(lambda prompt, attempt: "broken" if attempt == 0 else "json") as server:
        config = config_for(server, tmp_path)
        OpenAITeacher(config, first_delay_seconds=0.001).ask([asked])
    parts = request_parts(config, asked)
    with ResponseStore(Path(config.store)) as store:
        assert store.get(store_key(parts)) == Reply(
            '{"colour": "blue", "count": 3}', "stop", 5, 3, "m-2026", attempts=2
        )
        (plain,) = store._database.execute("SELECT request FROM replies").fetchone()
    assert json.loads(plain) == parts


KILLED = """
import sys
from misbehaving_server import OpenAITeacher, request
from alignkit.core.config import TeacherConfig, TeacherMode
url, store = sys.argv[1:]
config = TeacherConfig(mode=TeacherMode.openai, base_url=url, model="m", api_key_env="", store=store, concurrency=4)
OpenAITeacher(config).ask([request(str(i)) for i in range(400)])
"""


def test_a_killed_run_loses_at_most_what_was_in_flight(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "slow") as server:
        command = [sys.executable, "-c", KILLED, server.base_url, str(tmp_path / "teacher.sqlite")]
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
        while server.completed.total() < 60 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert stored_replies(tmp_path) >= server.completed.total() - 4 > 50
        server.behaviour = lambda prompt, attempt: "ok"
        answers = teacher_for(server, tmp_path, api_key_env="", concurrency=4).ask(
            [request(str(i)) for i in range(400)]
        )
        assert [answer.value for answer in answers] == [f"reply to {i}" for i in range(400)]
        assert server.completed.total() <= 400 + 4


def test_a_damaged_store_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "teacher.sqlite").write_bytes(b"no database at all, but long enough to be read as one" * 40)
    with serving(lambda prompt, attempt: "ok") as server, pytest.raises(UserError, match=r"teacher.store=.*sqlite"):
        teacher_for(server, tmp_path).ask([request("a")])


def test_a_store_that_cannot_be_made_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = ResponseStore(tmp_path / "file" / "teacher.sqlite")
    with pytest.raises(UserError, match=r"teacher.store=.*name another file"), store:
        pass
