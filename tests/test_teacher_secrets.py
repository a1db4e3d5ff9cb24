"""The teacher's key and the documents go to the server that was named, and nowhere else."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import pytest
from misbehaving_server import CANARY, request, serving, teacher_for

from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError
from alignkit.teacher.address import DEFAULT_BASE_URL, checked_url, read_key


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", CANARY)


def test_the_key_is_in_no_file_no_log_and_no_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    behaviours = {"a": "ok", "b": "too_long", "c": "broken", "e": "tells_key", "f": "html_key", "g": "at_the_cut"}
    with serving(lambda prompt, attempt: behaviours.get(prompt, "refused")) as server:
        teacher = teacher_for(server, tmp_path)
        answers = teacher.ask([request(prompt) for prompt in behaviours])
        with pytest.raises(UserError) as caught:
            teacher.ask([request("d")])
        assert server.keys == {CANARY}
    assert answers[3].value == "your key is ***"
    for path in tmp_path.rglob("*"):
        assert CANARY[:10].encode() not in path.read_bytes()
    assert answers[5].detail.endswith("x***")
    told = [caplog.text, *traceback.format_exception(caught.value), *map(repr, answers), repr(teacher.usage)]
    assert all(CANARY[:10] not in text for text in told)  # nor a part of it
    assert f"m at 127.0.0.1:{server.server_port}" in caplog.text  # the host is said at the start


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TEACHER_KEY")
    with pytest.raises(UserError, match="TEST_TEACHER_KEY is not set"):
        read_key("TEST_TEACHER_KEY")
    assert read_key("") == "none"
    for impossible in ("schlüssel", "two words", 'quo"te'):
        monkeypatch.setenv("TEST_TEACHER_KEY", impossible)
        with pytest.raises(UserError, match="characters that no key has"):
            read_key("TEST_TEACHER_KEY")
    with pytest.raises(UserError, match="NAME of an environment variable") as caught:
        read_key(CANARY)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("base_url", "allow_http", "problem"),
    [
        ("https://teacher.example/v1/", False, None),
        ("http://127.0.0.1:8000/v1", False, None),
        ("http://localhost/v1", False, None),
        ("http://[::1]:8000/v1", False, None),
        ("http://teacher.example/v1", True, None),
        ("http://teacher.example/v1", False, "teacher.allow_http=true"),
        ("http://127.0.0.1.example/v1", False, "teacher.allow_http=true"),
        ("http://10.0.0.7/v1", False, "teacher.allow_http=true"),
        ("https://user:secret@teacher.example/v1", False, "must hold no user"),
        ("https://teacher.example/v1?key=secret", False, "must hold no user"),
        ("teacher.example/v1", False, "not a URL"),
        ("ftp://teacher.example/v1", False, "not a URL"),
        ("http://127.0.0.1:80a/v1", False, "not a URL"),
        ("http://[::1/v1", False, "not a URL"),
    ],
)
def test_base_urls(base_url: str, allow_http: bool, problem: str | None) -> None:
    config = TeacherConfig(base_url=base_url, allow_http=allow_http, model="m")
    if problem is None:
        assert checked_url(config) == base_url.rstrip("/")
    else:
        with pytest.raises(UserError, match=problem) as caught:
            checked_url(config)
        assert "secret" not in str(caught.value)


def test_a_server_cannot_send_the_documents_elsewhere(tmp_path: Path) -> None:
    with serving(lambda prompt, attempt: "ok") as elsewhere, serving(lambda prompt, attempt: "moved") as server:
        with pytest.raises(UserError, match="redirects to another address"):
            teacher_for(server, tmp_path).ask([request(f"{elsewhere.base_url}/chat/completions")])
        assert not elsewhere.attempts


def test_the_environment_cannot_redirect_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    assert checked_url(TeacherConfig(model="m")) == DEFAULT_BASE_URL
    with serving(lambda prompt, attempt: "ok") as proxy, serving(lambda prompt, attempt: "ok") as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        assert teacher_for(server, tmp_path).ask([request("a")])[0].usable
        assert not proxy.attempts and server.attempts
