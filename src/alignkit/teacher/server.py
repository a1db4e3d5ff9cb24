"""`alignkit teacher-server`: the scripted teacher behind the interface of an OpenAI-compatible server, on loopback.

It lets every client of such a server be tried offline; with `teacher.mode=openai teacher.model=scripted
teacher.base_url=http://127.0.0.1:8123/v1 teacher.api_key_env=''` alignkit itself takes it for a real one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.teacher.client import Request
from alignkit.teacher.scripted import NAME, ScriptedTeacher

HOST = "127.0.0.1"
LARGEST_BODY_BYTES = 16 * 2**20


class ChatRequest(BaseModel):
    """What is read of a request; sampling parameters are accepted and mean nothing to rules."""

    model: str
    messages: list[Message] = Field(min_length=1)
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False


class TeacherServer(ThreadingHTTPServer):
    """Serves a scripted teacher on 127.0.0.1; port 0 takes any free one. `requests` counts completions asked for."""

    daemon_threads = True

    def __init__(self, teacher: ScriptedTeacher, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.teacher = teacher
        self.requests = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong with a request, unless it is only that the client has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def base_url(self) -> str:
        """What a client is given as `base_url`."""
        return f"http://{HOST}:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: TeacherServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": NAME, "object": "model", "owned_by": "alignkit"}]})
        else:
            self._refuse(404, "there are only /v1/models and /v1/chat/completions")

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY_BYTES:
            self.close_connection = True
            return self._refuse(413, f"the body must have a length of at most {LARGEST_BODY_BYTES} bytes")
        body = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            return self._refuse(404, "there are only /v1/models and /v1/chat/completions")
        self.server.requests += 1
        try:
            request = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            return self._refuse(400, str(error))
        if request.model != NAME:
            return self._refuse(
                404, f"the model {request.model!r} does not exist; there is {NAME!r}", "model_not_found"
            )
        if request.stream:
            return self._refuse(400, "stream is not supported")
        self._send(200, self._complete(request))

    def _complete(self, request: ChatRequest) -> dict[str, Any]:
        answers = self.server.teacher.ask([Request(request.messages, sample=sample) for sample in range(request.n)])
        choices = [
            {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": answer.text}}
            for index, answer in enumerate(answers)
        ]
        prompt = answers[0].prompt_tokens or 0
        completion = sum(answer.completion_tokens or 0 for answer in answers)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {
            "id": f"chatcmpl-{NAME}-{self.server.requests}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": NAME,
            "choices": choices,
            "usage": usage,
        }

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self._send(status, {"error": error})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        """Say nothing: there is a request for every example."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(prog="alignkit teacher-server", description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--mistake-rate", type=float, default=0.15, help="share of written answers that are wrong")
    chosen = parser.parse_args(arguments)
    try:
        server = TeacherServer(ScriptedTeacher(chosen.mistake_rate), chosen.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {chosen.port}: {error}. Choose another port.") from error
    with server:
        print(
            f"the scripted teacher of the closed world listens at {server.base_url} (model {NAME!r}, no key)",
            flush=True,
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0
