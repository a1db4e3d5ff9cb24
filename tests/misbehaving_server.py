"""A loopback server that does to each attempt what a test says: `behaviour` names one of the methods of `_Handler`."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from alignkit.core.config import TeacherConfig, TeacherMode
from alignkit.core.records import Message
from alignkit.teacher.client import Request
from alignkit.teacher.openai_client import OpenAITeacher
from alignkit.teacher.store import ResponseStore

CANARY = "canary-3f9c17e2-never-written-down"
Behaviour = Callable[[str, int], str]
"""From the prompt and the number of the attempt at it (from 0) to what the server does."""
JSON_ANSWER = '{"colour": "blue", "count": 3}'


class Colour(BaseModel):
    """The shape of that answer."""

    colour: str
    count: int = 1


class MisbehavingServer(ThreadingHTTPServer):
    """Speaks the chat completions protocol on loopback. `headers` go out with every answer."""

    daemon_threads = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.attempts: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.paths: set[str] = set()
        self.times: list[float] = []
        self.headers: dict[str, str] = {}
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that give up, or are killed, are what the tests are about."""

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: MisbehavingServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        server = self.server
        with server.lock:
            attempt = server.attempts[prompt]
            server.attempts[prompt] += 1
            server.bodies.append(body)
            server.paths.add(self.path)
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.keys.add(self.headers["authorization"].removeprefix("Bearer "))
        self.body = body
        getattr(self, f"_{server.behaviour(prompt, attempt)}")(prompt)
        with server.lock:
            server.in_flight -= 1

    # -- answers

    def _ok(self, prompt: str) -> None:
        self._complete(prompt, f"reply to {prompt}")

    def _slow(self, prompt: str) -> None:
        time.sleep(0.05)
        self._ok(prompt)

    def _json(self, prompt: str) -> None:
        self._complete(prompt, JSON_ANSWER)

    def _fenced(self, prompt: str) -> None:
        self._complete(prompt, f"Certainly:\n```json\n{JSON_ANSWER}\n```")

    def _half(self, prompt: str) -> None:
        self._complete(prompt, JSON_ANSWER[:20])

    def _prose(self, prompt: str) -> None:
        self._complete(prompt, "I would say that it is blue.")

    def _cut(self, prompt: str) -> None:
        self._complete(prompt, "half a", finish_reason="length")

    def _cut_while_thinking(self, prompt: str) -> None:
        self._complete(prompt, None, finish_reason="length")

    def _filtered(self, prompt: str) -> None:
        self._complete(prompt, None, finish_reason="content_filter")

    def _refusal(self, prompt: str) -> None:
        self._complete(prompt, None, refusal="I cannot help with that.")

    def _empty(self, prompt: str) -> None:
        self._complete(prompt, "")

    def _huge(self, prompt: str) -> None:
        self._complete(prompt, "x" * 30_000_000)

    def _surrogate(self, prompt: str) -> None:
        self._complete(prompt, "half a pair: \ud83d")

    def _no_usage(self, prompt: str) -> None:
        self._complete(prompt, "ok", usage=None)

    def _tells_key(self, prompt: str) -> None:
        self._complete(prompt, f"your key is {CANARY}")

    # -- things that are no answer

    def _no_choices(self, prompt: str) -> None:
        self._send(200, json.dumps({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}))

    def _error_with_200(self, prompt: str) -> None:
        self._send(200, json.dumps({"error": {"message": "overloaded", "code": 502}}))

    def _html(self, prompt: str) -> None:
        self._send(200, "<html>a proxy's page</html>", "text/html")

    def _truncated(self, prompt: str) -> None:
        self._send(200, '{"id": "x", "choices": [{"mess')

    def _dropped(self, prompt: str) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _trickle(self, prompt: str) -> None:
        """One byte at a time: each read succeeds, the whole never ends."""
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    # -- refusals

    def _rate_limited(self, prompt: str) -> None:
        self._refuse(429, "slow down", "rate_limit_exceeded")

    def _later(self, prompt: str) -> None:
        self._refuse(429, "slow down", "rate_limit_exceeded", {"retry-after-ms": "300"})

    def _tomorrow(self, prompt: str) -> None:
        self._refuse(429, "daily limit", "rate_limit_exceeded", {"retry-after": "86400"})

    def _broken(self, prompt: str) -> None:
        self._refuse(500, f"internal error with {CANARY}")

    def _refused(self, prompt: str) -> None:
        self._refuse(401, f"the key {CANARY} is unknown", "invalid_api_key")

    def _forbidden(self, prompt: str) -> None:
        self._refuse(403, "not in your country")

    def _unknown_model(self, prompt: str) -> None:
        self._refuse(404, "no such model", "model_not_found")

    def _no_quota(self, prompt: str) -> None:
        self._refuse(429, "pay first", "insufficient_quota")

    def _too_long(self, prompt: str) -> None:
        self._refuse(400, f"context length exceeded, said {CANARY}", "context_length_exceeded")

    def _bad_request(self, prompt: str) -> None:
        self._refuse(400, "I do not like this prompt")

    def _moved(self, prompt: str) -> None:
        self._send(307, "", headers={"location": prompt})

    def _html_key(self, prompt: str) -> None:
        self._send(200, f"<html>{'x' * 45}{CANARY}</html>", "text/html")

    def _at_the_cut(self, prompt: str) -> None:
        self._refuse(400, "x" * 295 + CANARY)

    # -- servers with their own ideas

    def _no_schema(self, prompt: str) -> None:
        """Refuses a JSON schema; takes the rest."""
        kind = self.body.get("response_format", {}).get("type")
        if kind == "json_schema":
            return self._refuse(400, "response_format: json_schema is not supported")
        self._json(prompt)

    def _no_format(self, prompt: str) -> None:
        """Refuses any format, without saying why."""
        if "response_format" in self.body:
            return self._refuse(400, "bad request")
        self._fenced(prompt)

    def _newer(self, prompt: str) -> None:
        """Refuses `max_tokens` and `temperature`, as reasoning models do."""
        if "max_tokens" in self.body:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            return self._refuse(400, said, "unsupported_parameter", param="max_tokens")
        if "temperature" in self.body:
            said = "Unsupported value: 'temperature' does not support 0.7 with this model."
            return self._refuse(400, said, "unsupported_value", param="temperature")
        self._ok(prompt)

    def _searches(self, prompt: str) -> None:
        """Calls `retrieve` once with the question, by a call of the protocol, then answers with what was found."""
        if self.body["messages"][-1]["role"] == "tool":
            return self._ok(prompt)
        function = {"name": "retrieve", "arguments": json.dumps({"query": prompt})}
        calls = [{"id": "c", "type": "function", "function": function}] if "tools" in self.body else None
        self._complete(prompt, None, finish_reason="tool_calls", calls=calls)

    def _searches_in_text(self, prompt: str) -> None:
        """The same without the parameter `tools`, which it refuses."""
        if "tools" in self.body:
            return self._refuse(
                400, "tools is not supported here: leave it out", "unsupported_parameter", param="tools"
            )
        if self.body["messages"][-1]["role"] == "tool":
            return self._ok(prompt)
        call = json.dumps({"name": "retrieve", "arguments": {"query": prompt}})
        self._complete(prompt, f"<tool_call>{call}</tool_call>" if "retrieve" in str(self.body) else None)

    def _complete(
        self,
        prompt: str,
        content: str | None,
        finish_reason: str = "stop",
        usage: Any = "default",
        refusal: str | None = None,
        calls: list[dict[str, Any]] | None = None,
    ) -> None:
        with self.server.lock:
            self.server.completed[prompt] += 1
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8} if usage == "default" else usage
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if "prompt" in self.body:
            choice["text"] = content
        else:
            choice["message"] = {"role": "assistant", "content": content, "refusal": refusal}
            choice["message"] |= {"tool_calls": calls} if calls else {}
        self._send(200, json.dumps({"id": "c", "model": "m-2026", "choices": [choice], "usage": usage}))

    def _refuse(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        param: str | None = None,
    ) -> None:
        error = {"message": message, "type": "x", "param": param, "code": code}
        self._send(status, json.dumps({"error": error}), headers=headers)

    def _send(
        self, status: int, body: str, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, **self.server.headers, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *values: Any) -> None:
        pass


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[MisbehavingServer]:
    with MisbehavingServer(behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def config_for(server: MisbehavingServer, folder: Path, **changes: Any) -> TeacherConfig:
    config = TeacherConfig(
        mode=TeacherMode.openai,
        base_url=server.base_url,
        model="m",
        api_key_env="TEST_TEACHER_KEY",
        store=str(folder / "teacher.sqlite"),
        timeout_seconds=5,
    )
    return replace(config, **changes)


def teacher_for(server: MisbehavingServer, folder: Path, **changes: Any) -> OpenAITeacher:
    return OpenAITeacher(config_for(server, folder, **changes), first_delay_seconds=0.001)


def request(text: str, **changes: Any) -> Request:
    return Request([Message(role="user", content=text)], **changes)


def stored_replies(folder: Path) -> int:
    """How many replies the response store of `config_for` holds."""
    with ResponseStore(folder / "teacher.sqlite") as store:
        return store.count()
