"""`alignkit teacher-server`: the scripted teacher behind the interface of an OpenAI-compatible server, on loopback.

It lets every client of such a server be tried offline: chat completions, completions, and batches of chat completions.
With `teacher.mode=openai teacher.model=scripted teacher.base_url=http://127.0.0.1:8123/v1 teacher.api_key_env=''`
alignkit itself takes it for a real one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.teacher.client import Request
from alignkit.teacher.scripted import NAME, ScriptedTeacher

Form = TypeVar("Form", bound=BaseModel)

HOST = "127.0.0.1"
LARGEST_BODY_BYTES = 16 * 2**20
LARGEST_FILE_BYTES = 200 * 2**20
PATHS = "/v1/models, /v1/chat/completions, /v1/completions, /v1/files and /v1/batches"


class ChatRequest(BaseModel):
    """What is read of a request; the rest is accepted and means nothing to rules: they answer JSON where it is due."""

    model: str
    messages: list[Message] = Field(min_length=1)
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False


class CompletionRequest(BaseModel):
    """The same for a plain prompt, which is taken for what a user says."""

    model: str
    prompt: str = Field(min_length=1)
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False


class BatchRequest(BaseModel):
    """What a batch is made of."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


class Refused(Exception):  # noqa: N818
    """A request that gets no answer: a status and the error's fields."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}


class Batches:
    """Uploaded files and batches, in memory. A batch is answered at its `polls`-th look; its rows come in reverse."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]], polls: int = 1) -> None:
        self.answer = answer
        """From the body of a row to a status and a reply."""
        self.polls = polls
        self.expire_after: int | None = None
        """Rows that the next batch answers before it expires; None: all."""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self._looks: dict[str, int] = {}
        self._lock = threading.Lock()

    def add_file(self, content: bytes) -> dict[str, Any]:
        """Keep a file."""
        with self._lock:
            id = f"file-{len(self.files) + 1}"
            self.files[id] = content
        size, now = len(content), int(time.time())
        described = {"id": id, "object": "file", "bytes": size, "created_at": now, "filename": f"{id}.jsonl"}
        return {**described, "purpose": "batch", "status": "processed"}

    def add_batch(self, request: BatchRequest) -> dict[str, Any]:
        """Begin a batch."""
        if request.endpoint != "/v1/chat/completions" or request.input_file_id not in self.files:
            raise Refused(400, "the endpoint must be /v1/chat/completions, and the file must have been uploaded")
        with self._lock:
            id = f"batch-{len(self.batches) + 1}"
            self._looks[id] = 0
            self.batches[id] = {
                "id": id,
                "object": "batch",
                "created_at": int(time.time()),
                "status": "in_progress",
                "output_file_id": None,
                "error_file_id": None,
                **request.model_dump(),
            }
        return self.batches[id]

    def look(self, id: str) -> dict[str, Any]:
        """The state of a batch, which ends by being looked at often enough."""
        if id not in self.batches:
            raise Refused(404, f"there is no batch {id!r}")
        batch = self.batches[id]
        self._looks[id] += 1
        if batch["status"] == "in_progress" and self._looks[id] >= self.polls:
            self._finish(batch)
        return batch

    def _finish(self, batch: dict[str, Any]) -> None:
        rows = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        answered, self.expire_after = rows[: self.expire_after], None
        output: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        for row in reversed(answered):
            status, body = self.answer(row["body"])
            reply = {"custom_id": row["custom_id"], "response": {"status_code": status, "body": body}, "error": None}
            (output if status == 200 else errors).append(reply)
        expired = {"code": "batch_expired", "message": "not done before the completion window had passed"}
        late = rows[len(answered) :]
        errors += [{"custom_id": row["custom_id"], "response": None, "error": expired} for row in late]
        for name, replies in (("output_file_id", output), ("error_file_id", errors)):
            if replies:
                batch[name] = self.add_file("".join(json.dumps(reply) + "\n" for reply in replies).encode())["id"]
        batch["request_counts"] = {"total": len(rows), "completed": len(output), "failed": len(errors)}
        batch["status"] = "expired" if late else "completed"


class TeacherServer(ThreadingHTTPServer):
    """Serves a scripted teacher on 127.0.0.1; port 0 takes any free one. `requests` counts completions asked for."""

    daemon_threads = True

    def __init__(self, teacher: ScriptedTeacher, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.teacher = teacher
        self.requests = 0
        self.batches = Batches(self.answer_row)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong with a request, unless it is only that the client has gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def base_url(self) -> str:
        """What a client is given as `base_url`."""
        return f"http://{HOST}:{self.server_port}/v1"

    def chat(self, body: bytes) -> dict[str, Any]:
        """The reply to a chat completion request. Raises `Refused`."""
        request = _read(ChatRequest, body)
        texts, usage = self._complete(request, request.messages)
        choices = [
            {"index": index, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            for index, text in enumerate(texts)
        ]
        return self._reply("chat.completion", "chatcmpl", choices, usage)

    def completion(self, body: bytes) -> dict[str, Any]:
        """The reply to a completion request. Raises `Refused`."""
        request = _read(CompletionRequest, body)
        texts, usage = self._complete(request, [Message(role="user", content=request.prompt)])
        choices = [{"index": index, "finish_reason": "stop", "text": text} for index, text in enumerate(texts)]
        return self._reply("text_completion", "cmpl", choices, usage)

    def answer_row(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A row of a batch, as a request of its own would be answered."""
        try:
            return 200, self.chat(json.dumps(body).encode())
        except Refused as refused:
            return refused.status, {"error": refused.error}

    def _complete(
        self, request: ChatRequest | CompletionRequest, messages: list[Message]
    ) -> tuple[list[str | None], dict[str, int]]:
        if request.model != NAME:
            raise Refused(404, f"the model {request.model!r} does not exist; there is {NAME!r}", "model_not_found")
        if request.stream:
            raise Refused(400, "stream is not supported")
        self.requests += 1
        answers = self.teacher.ask([Request(messages, sample=sample) for sample in range(request.n)])
        prompt = answers[0].prompt_tokens or 0
        completion = sum(answer.completion_tokens or 0 for answer in answers)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return [answer.text for answer in answers], usage

    def _reply(self, kind: str, prefix: str, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        head = {"id": f"{prefix}-{NAME}-{self.requests}", "object": kind, "created": int(time.time()), "model": NAME}
        return {**head, "choices": choices, "usage": usage}


def _read(form: type[Form], body: bytes) -> Form:
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        raise Refused(400, str(error)) from error


def read_upload(content_type: str, body: bytes) -> bytes:
    """The file in a multipart/form-data body. Raises `Refused`."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    for part in body.split(b"--" + boundary[1].encode()) if boundary else []:
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content.removesuffix(b"\r\n")
    raise Refused(400, "an upload must be multipart/form-data with a part named file")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: TeacherServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        most = LARGEST_FILE_BYTES if self.path == "/v1/files" else LARGEST_BODY_BYTES
        if not length.isdecimal() or int(length) > most:
            self.close_connection = True
            return self._send(
                413, {"error": Refused(413, f"the body must have a length of at most {most} bytes").error}
            )
        body = self.rfile.read(int(length))
        self._answer(lambda: self._post(body))

    def _get(self) -> dict[str, Any] | bytes:
        batches = self.server.batches
        if self.path == "/v1/models":
            return {"object": "list", "data": [{"id": NAME, "object": "model", "owned_by": "alignkit"}]}
        if found := re.fullmatch(r"/v1/files/([\w-]+)/content", self.path):
            if found[1] not in batches.files:
                raise Refused(404, f"there is no file {found[1]!r}")
            return batches.files[found[1]]
        if self.path.partition("?")[0] == "/v1/batches":
            return {"object": "list", "data": list(reversed(batches.batches.values())), "has_more": False}
        if found := re.fullmatch(r"/v1/batches/([\w-]+)", self.path):
            return batches.look(found[1])
        raise Refused(404, f"there are only {PATHS}")

    def _post(self, body: bytes) -> dict[str, Any]:
        match self.path:
            case "/v1/chat/completions":
                return self.server.chat(body)
            case "/v1/completions":
                return self.server.completion(body)
            case "/v1/files":
                return self.server.batches.add_file(read_upload(self.headers.get("content-type", ""), body))
            case "/v1/batches":
                return self.server.batches.add_batch(_read(BatchRequest, body))
        raise Refused(404, f"there are only {PATHS}")

    def _answer(self, reply: Callable[[], dict[str, Any] | bytes]) -> None:
        try:
            self._send(200, reply())
        except Refused as refused:
            self._send(refused.status, {"error": refused.error})

    def _send(self, status: int, value: dict[str, Any] | bytes) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
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
        try:
            print(
                f"the scripted teacher of the closed world listens at {server.base_url} (model {NAME!r}, no key)",
                flush=True,
            )
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0
