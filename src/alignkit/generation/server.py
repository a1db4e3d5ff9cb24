"""An OpenAI-compatible server of several adapters on one base: Starlette behind uvicorn, and an `Engine` behind both.

Nothing that is said is written down: the log has a line a request, with counts. Without a key the server is for this
machine only, and answers only to its loopback names, so that no web page can reach it by a name of its own.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from alignkit.core.errors import UserError
from alignkit.generation.continuous import BusyError, Engine, Part, PromptError, Request, encode_request
from alignkit.generation.openai_protocol import (
    ApiError,
    ChatReply,
    ChatRequest,
    describe_models,
    describe_usage,
    read_chat,
    read_rewards,
)
from alignkit.models.conversations import read_conversation
from alignkit.models.reward_model import RewardModel
from alignkit.models.shared_base import SharedBase

LOG = logging.getLogger("alignkit")

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
LAST_WORDS_SECONDS = 5
"""For replies to get out once the engine is closed."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how long running ones have when the server is to end."""

    max_tokens: int
    max_body_bytes: int
    grace_seconds: float


class Api:
    """The endpoints. `served` counts requests and tokens by model, `refused` replies by status."""

    def __init__(
        self, base: SharedBase, engine: Engine, limits: Limits, reward: tuple[str, RewardModel] | None = None
    ) -> None:
        self.base, self.engine, self.limits = base, engine, limits
        self.reward = reward
        """Name and model of what answers for rewards."""
        self.served: dict[str, Counter[str]] = {}
        self.refused: Counter[int] = Counter()
        self.draining = False
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.list_models),
                Route("/v1/models/{name}", self.show_model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/rewards", self.rewards, methods=["POST"]),
            ],
            exception_handlers={ApiError: self._refuse, HTTPException: self._refuse_path, Exception: self._refuse_bug},
        )

    # -- endpoints ----------------------------------------------------------------------------------------------------

    async def health(self, request: HttpRequest) -> Response:
        """Whether requests are taken."""
        if self.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    async def list_models(self, request: HttpRequest) -> Response:
        """Every adapter under its name."""
        return JSONResponse({"object": "list", "data": describe_models(self.base.names)})

    async def show_model(self, request: HttpRequest) -> Response:
        """One of them."""
        (described,) = describe_models([self._known(request.path_params["name"])])
        return JSONResponse(described)

    async def chat(self, request: HttpRequest) -> Response:
        """Answers to a conversation, at once or as server-sent events."""
        began = time.monotonic()
        asked = read_chat(await self._body(request))
        answer = await self._begin(asked)
        if asked.stream:
            return StreamingResponse(
                self._stream(asked, answer, began),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache"},
            )
        watcher = asyncio.create_task(answer.watch(request))
        try:
            async for _ in answer.parts():
                pass
        finally:
            watcher.cancel()
            self._record(asked, answer, began)
        reply = ChatReply(asked.model, stream=False)
        return JSONResponse(reply.whole(answer.texts, answer.reasons, answer.usage))

    async def rewards(self, request: HttpRequest) -> Response:
        """The reward model's score of each conversation."""
        began = time.monotonic()
        asked = read_rewards(await self._body(request))
        if self.reward is None:
            raise ApiError(404, "this server has no reward model", code="model_not_found")
        name, reward_model = self.reward
        if asked.model not in (None, name):
            raise ApiError(404, f"the reward model {asked.model!r} does not exist; there is {name!r}", param="model")
        try:
            conversations = [read_conversation(row, index) for index, row in enumerate(asked.rows)]
            found = await asyncio.wrap_future(self.engine.call(lambda: reward_model.scores_or_reasons(conversations)))
        except UserError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        except BusyError as error:
            raise busy() from error
        for index, score in enumerate(found):
            if isinstance(score, str):
                raise ApiError(400, f"conversation {index} cannot be scored: {score}", param="messages")
        self._count(name, requests=1, conversations=len(found))
        LOG.info("rewards %s: %d conversations in %.2f s", name, len(found), time.monotonic() - began)
        data = [{"object": "reward", "index": index, "score": score} for index, score in enumerate(found)]
        return JSONResponse({"object": "list", "model": name, "data": data})

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _begin(self, asked: ChatRequest) -> Answer:
        """Hand a request to the engine. Raises `ApiError`."""
        self._known(asked.model)
        if asked.n > self.engine.max_rows:
            raise ApiError(400, f"n={asked.n}: at most {self.engine.max_rows}", param="n", code="invalid_value")
        if (asked.most_tokens or 0) > self.limits.max_tokens:
            name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
            message = f"{name}={asked.most_tokens}: at most {self.limits.max_tokens}"
            raise ApiError(400, message, param=name, code="invalid_value")
        try:
            prompt, most = await asyncio.to_thread(
                encode_request,
                self.base.tokenizer,
                asked.messages,
                asked.most_tokens,
                self.limits.max_tokens,
                self.base.model.max_length,
            )
            answer = Answer(asked.n, len(prompt), asyncio.get_running_loop())
            answer.request = Request(
                asked.model,
                prompt,
                asked.sampling(most),
                asked.drawn_seed(),
                self.base.tokenizer,
                answer.receive,
                asked.stop,
            )
            self.engine.submit(answer.request)
        except PromptError as error:
            code = "context_length_exceeded" if error.tokens else "invalid_value"
            raise ApiError(400, str(error), param="messages", code=code) from error
        except BusyError as error:
            raise busy() from error
        return answer

    async def _stream(self, asked: ChatRequest, answer: Answer, began: float) -> AsyncIterator[str]:
        """The events of an answer. When the client goes, this is cancelled, and so is the request."""
        reply = ChatReply(asked.model, stream=True, usage_wanted=asked.usage_wanted)
        try:
            for index in range(asked.n):
                yield _event(reply.chunk(index, {"role": "assistant", "content": ""}))
            async for part in answer.parts():
                if part.text:
                    yield _event(reply.chunk(part.index, {"content": part.text}))
                if part.finish_reason:
                    yield _event(reply.chunk(part.index, {}, part.finish_reason))
            if asked.usage_wanted:
                yield _event(reply.last(answer.usage))
            yield "data: [DONE]\n\n"
        except ApiError as error:  # too late for a status: clients read it from the stream
            yield _event(error.body)
        finally:
            self._record(asked, answer, began)

    def _record(self, asked: ChatRequest, answer: Answer, began: float) -> None:
        """Count a request that has ended, however it did, and see that nothing more is written for it."""
        answer.request.cancelled = True
        tokens, seconds = answer.request.tokens_written, time.monotonic() - began
        self._count(asked.model, requests=1, prompt_tokens=answer.prompt_tokens, completion_tokens=tokens)
        ended = "/".join(answer.reasons) if all(answer.reasons) else "the client left"
        LOG.info("chat %s: %d + %d tokens in %.2f s, %s", asked.model, answer.prompt_tokens, tokens, seconds, ended)

    def _known(self, model: str) -> str:
        if model not in self.base.names:
            names = ", ".join(self.base.names)
            raise ApiError(
                404, f"the model {model!r} does not exist; there are: {names}", param="model", code="model_not_found"
            )
        return model

    async def _body(self, request: HttpRequest) -> bytes:
        """The body of a request, which must be JSON of no more than so many bytes."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: set the header content-type: application/json")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self.limits.max_body_bytes:
                raise ApiError(413, f"the body has more than {self.limits.max_body_bytes} bytes")
        return bytes(body)

    def _count(self, model: str, **counts: int) -> None:
        self.served.setdefault(model, Counter()).update(counts)

    async def _refuse(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self.refused[error.status] += 1
        LOG.info("%s refused with %d (%s)", request.url.path, error.status, error.body["error"]["code"])
        # What is left of a body that was not read to its end would be taken for the next request
        headers = {"connection": "close"} if error.status in (413, 415) else None
        return JSONResponse(error.body, error.status, headers)

    async def _refuse_path(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail.lower()}"
        return await self._refuse(request, ApiError(error.status_code, message, code="not_found"))

    async def _refuse_bug(self, request: HttpRequest, error: Exception) -> Response:
        return await self._refuse(request, ApiError(500, "the server failed; its log says how", code="internal_error"))


class Answer:
    """The parts of the answers to one request, on their way from the engine's thread to the event loop."""

    request: Request

    def __init__(self, n: int, prompt_tokens: int, loop: asyncio.AbstractEventLoop) -> None:
        self.prompt_tokens = prompt_tokens
        self.texts, self.reasons = [""] * n, [""] * n
        self._loop = loop
        self._queue: asyncio.Queue[Part | None] = asyncio.Queue()

    @property
    def usage(self) -> dict[str, int]:
        """What was read and written."""
        return describe_usage(self.prompt_tokens, self.request.tokens_written)

    def receive(self, part: Part) -> None:
        """Called in the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, part)
        except RuntimeError:
            LOG.debug("the server's loop has ended before an answer had")

    async def parts(self) -> AsyncIterator[Part]:
        """The parts until every answer has ended. Raises `ApiError` when the engine gave up or the client has gone."""
        while not all(self.reasons):
            part = await self._queue.get()
            if part is None:
                raise ApiError(499, "the client closed the connection", code="cancelled")
            if part.finish_reason == "error":
                raise ApiError(500, "the server failed; its log says how", code="internal_error")
            if part.finish_reason == "cancelled":
                raise shutting_down()
            self.texts[part.index] += part.text
            self.reasons[part.index] = part.finish_reason or ""
            yield part

    async def watch(self, request: HttpRequest) -> None:
        """Break off when the client closes the connection."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)


class Guard:
    """Stands before the endpoints: checks host and key, turns new requests away at the end, counts running ones."""

    def __init__(self, api: Api, key: str | None) -> None:
        self.api, self.key = api, key
        self.app: ASGIApp = api.app
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        if error := self._problem(scope["path"], Headers(scope=scope)):
            self.api.refused[error.status] += 1
            headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(error.status, {})
            response = JSONResponse(error.body, error.status, {"connection": "close", **headers})
            await response(scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1

    def _problem(self, path: str, headers: Headers) -> ApiError | None:
        """Why a request is not let in."""
        if self.key is None and _host_name(headers.get("host", "")) not in LOOPBACK_NAMES:
            return ApiError(421, "this server answers only to the names of this machine's loopback", code="wrong_host")
        if path == "/health":
            return None
        given = headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            return ApiError(401, "the key is missing or wrong: send it as a bearer token", code="invalid_api_key")
        return shutting_down() if self.api.draining else None


class Server(uvicorn.Server):
    """Ends in order: at the first signal new requests are turned away and running ones get time, at the second none."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(
            uvicorn.Config(
                guard,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
            )
        )
        self.guard, self.api = guard, guard.api
        self._deadline = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal, or whoever wants the server to end. Unlike uvicorn's, it ends the process with 0."""
        grace = 0.0 if self.api.draining else self.api.limits.grace_seconds
        self.api.draining = True
        self._deadline = time.monotonic() + grace

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        if self.api.draining and (not self.guard.running or time.monotonic() >= self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Break off what still runs, telling its clients, and close."""
        await asyncio.to_thread(self.api.engine.close)
        await super().shutdown(sockets)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises `UserError` where there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"host={host} port={port}: {error}. Choose another port.") from error


def busy() -> ApiError:
    """Too many requests wait already."""
    return ApiError(503, "too many requests are waiting; try again", code="overloaded")


def shutting_down() -> ApiError:
    """The server is about to end."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def _host_name(header: str) -> str:
    """The name in a host header, without the port."""
    name, colon, port = header.rpartition(":")
    return (name if colon and port.isdecimal() else header).lower()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
