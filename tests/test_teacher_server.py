"""The scripted teacher behind HTTP: the real `openai` package takes it for a server, and it is the same teacher."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from alignkit.core.config import TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.data.closed_world import World
from alignkit.teacher import server as teacher_server
from alignkit.teacher.client import Request, open_teacher
from alignkit.teacher.scripted import ScriptedTeacher
from alignkit.teacher.server import LARGEST_BODY_BYTES, TeacherServer


def questions(count: int) -> list[Request]:
    requests = []
    for number in range(count):
        world = World(number)
        passage = world.passage()
        content = f"{passage.statement}\n\n{world.ask(passage).text}"
        requests.append(Request([Message(role="user", content=content)]))
    return requests


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_over_http_it_is_the_same_teacher(server: TeacherServer, tmp_path: Path) -> None:
    config = TeacherConfig(
        mode=TeacherMode.openai,
        base_url=server.base_url,
        model="scripted",
        api_key_env="",
        store=str(tmp_path / "teacher.sqlite"),
    )
    requests = questions(30)
    over_http = open_teacher(config).ask(requests)
    assert over_http == ScriptedTeacher().ask(requests)
    assert server.requests == 30


def test_it_answers_the_openai_package(server: TeacherServer) -> None:
    with openai.OpenAI(api_key="none", base_url=server.base_url) as client:
        assert [model.id for model in client.models.list()] == ["scripted"]
        reply = client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": questions(1)[0].messages[0].content}], n=2
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.model == "scripted"
        assert reply.usage and reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
            client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "?"}])
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"no JSON", 400),
        (b'{"model": "scripted"}', 400),
        (b'{"model": "scripted", "messages": []}', 400),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": 3}]}', 400),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "?"}], "stream": true}', 400),
        (b'{"model": "scripted", "messages": [{"role": "user", "content": "?"}], "temperature": 0.5}', 200),
    ],
)
def test_bad_requests_are_refused_in_the_form_of_the_protocol(server: TeacherServer, body: bytes, status: int) -> None:
    got, reply = post(f"{server.base_url}/chat/completions", body)
    assert got == status
    assert ("error" in reply) is (status != 200)


def test_other_paths_and_huge_bodies_are_refused(server: TeacherServer) -> None:
    assert post(f"{server.base_url}/embeddings", b"{}")[0] == 404
    length = str(LARGEST_BODY_BYTES + 1)
    assert post(f"{server.base_url}/chat/completions", b"{}", **{"Content-Length": length})[0] == 413


def test_it_listens_on_this_machine_only(server: TeacherServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_one_clear_message(server: TeacherServer) -> None:
    with pytest.raises(UserError, match=f"--port {server.server_port}"):
        teacher_server.main(["--port", str(server.server_port)])


def test_the_command_serves_until_interrupted() -> None:
    program = (
        "import sys; from alignkit.teacher.server import main; sys.exit(main(['--port', '0', '--mistake-rate', '0']))"
    )
    heeds = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
    try:
        started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heeds)
    with started as process:
        assert process.stdout
        said = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert "scripted teacher" in said and "http://127.0.0.1:" in said
