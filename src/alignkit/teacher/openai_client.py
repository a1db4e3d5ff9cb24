"""A teacher behind an OpenAI-compatible server, through the `openai` package with its own retries switched off.

The package retries while it holds a connection slot, gives up on truncated bodies, takes an HTML page for an answer and
has no deadline for a request as a whole. Here a request waits for its next attempt outside the slots, and each failure
is one of three kinds: *fatal* ends the run with everything answered stored, *transient* is tried again, and anything
else is the error of that one request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError
from alignkit.teacher.client import Answer, OnAnswer, Request
from alignkit.teacher.store import ResponseStore, store_key

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LOG = logging.getLogger("alignkit")

DEFAULT_BASE_URL = "https://api.openai.com/v1"
"""Always passed explicitly: the package would otherwise follow OPENAI_BASE_URL and send key and documents there."""
NO_KEY = "none"
"""What a server that asks for no key is sent: the package insists on one."""
LONGEST_DELAY_SECONDS = 30.0
OUTAGE_REQUESTS = 8
"""So many requests in a row whose attempts were all in vain are taken for a server that is down: fatal."""
_FATAL = {
    401: "the key was refused",
    402: "the account is empty",
    403: "access was refused",
    404: "no such model or address",
}
_TRANSIENT = {408, 409, 429}


@dataclass(frozen=True)
class Transient:
    """A failure that may pass: what happened, and how many seconds the server asked to wait, if it did."""

    message: str
    retry_after: float | None = None


@dataclass(frozen=True)
class _Batch:
    """What the requests of one `ask` share. `stop` is set by the first fatal failure: nothing is sent after it."""

    client: AsyncOpenAI
    store: ResponseStore
    slots: asyncio.Semaphore
    stop: asyncio.Event


class OpenAITeacher:
    """Asks a server; keeps every answer in the response store and consults it first.

    Raises `UserError` for a missing key, an unsafe URL, and any fatal failure.
    """

    def __init__(self, config: TeacherConfig, *, attempts: int = 6, first_delay_seconds: float = 0.5) -> None:
        if config.concurrency < 1 or config.timeout_seconds <= 0:
            raise UserError("teacher.concurrency must be at least 1, and teacher.timeout_seconds more than 0")
        self.config = config
        self.attempts = attempts
        self.first_delay_seconds = first_delay_seconds
        self.base_url = checked_url(config)
        self._key = read_key(config.api_key_env)
        self._in_vain = 0
        LOG.info("teacher: %s at %s", config.model, urlsplit(self.base_url).netloc)

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer every request, from the store where it was answered before; equal requests are sent once."""
        bodies = [self._body(request) for request in requests]
        positions: dict[str, list[int]] = defaultdict(list)
        for position, body in enumerate(bodies):
            positions[store_key(body)].append(position)
        answers: dict[int, Answer] = {}

        def settle(key: str, answer: Answer) -> None:
            for position in positions[key]:
                answers[position] = answer
                if on_answer:
                    on_answer(position, answer)

        with ResponseStore(Path(self.config.store)) as store:
            missing: dict[str, dict[str, Any]] = {}
            for key, (first, *_) in positions.items():
                if (stored := store.get(key)) is not None:
                    settle(key, stored)
                else:
                    missing[key] = bodies[first]
            if missing:
                asyncio.run(self._ask_server(missing, store, settle))
        return [answers[position] for position in range(len(bodies))]

    def _body(self, request: Request) -> dict[str, Any]:
        """Everything that decides the answer to a request."""
        temperature = self.config.temperature if request.temperature is None else request.temperature
        return {
            "host": self.base_url,
            "model": self.config.model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": temperature,
            "max_tokens": self.config.max_tokens,
            "sample": request.sample,
        }

    async def _ask_server(
        self, bodies: Mapping[str, Mapping[str, Any]], store: ResponseStore, settle: Callable[[str, Answer], None]
    ) -> None:
        """Send all bodies, `concurrency` at a time; what is under way at a fatal failure is waited for and stored."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        # Redirects are not followed: they would carry the documents to a host that nobody named.
        http = DefaultAsyncHttpxClient(follow_redirects=False, timeout=self.config.timeout_seconds)
        async with AsyncOpenAI(api_key=self._key, base_url=self.base_url, max_retries=0, http_client=http) as client:
            batch = _Batch(client, store, asyncio.Semaphore(self.config.concurrency), asyncio.Event())

            async def work(key: str, body: Mapping[str, Any]) -> None:
                try:
                    answer = await self._persist(batch, body)
                    if answer is not None:
                        settle(key, answer)
                except BaseException:
                    batch.stop.set()
                    raise

            all_work = (work(key, body) for key, body in bodies.items())
            for failure in await asyncio.gather(*all_work, return_exceptions=True):
                if failure is not None:
                    raise failure

    async def _persist(self, batch: _Batch, body: Mapping[str, Any]) -> Answer | None:
        """Try until there is an answer or the attempts are used up; None when the run was stopped meanwhile."""
        last = ""
        for attempt in range(self.attempts):
            async with batch.slots:
                if batch.stop.is_set():
                    return None
                outcome = await self._send(batch, body)
            if isinstance(outcome, Answer):
                self._in_vain = 0
                return outcome
            last = outcome.message
            if attempt + 1 < self.attempts:
                await self._pause(batch, attempt, outcome.retry_after)
        self._in_vain += 1
        if self._in_vain >= OUTAGE_REQUESTS:
            raise self._fatal(f"{OUTAGE_REQUESTS} requests in a row, or more, were in vain ({last})")
        return Answer(None, f"no answer in {self.attempts} attempts; the last: {last}")

    async def _send(self, batch: _Batch, body: Mapping[str, Any]) -> Answer | Transient:
        """One attempt, within the deadline. A completion is stored before it is returned: it was paid for."""
        from openai import OpenAIError

        sent: Any = {name: value for name, value in body.items() if name not in ("host", "sample")}
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                reply = await batch.client.chat.completions.create(**sent)
        except (OpenAIError, TimeoutError, json.JSONDecodeError, UnicodeDecodeError) as error:
            return self._classify(error)
        answer = read_completion(reply)
        if isinstance(answer, Answer):
            batch.store.put(body, answer)
        return answer

    def _classify(self, error: Exception) -> Answer | Transient:
        """What a failed attempt means. Raises `UserError` when it is fatal."""
        from openai import APIStatusError

        if isinstance(error, TimeoutError):
            return Transient(f"nothing within {self.config.timeout_seconds:g} s")
        message = self._describe(error)
        if not isinstance(error, APIStatusError):
            return Transient(f"{type(error).__name__}: {message}")
        status = error.status_code
        no_quota = "insufficient_quota" in (error.code, error.type)
        if status in _FATAL or no_quota:
            what = "the quota is used up" if no_quota else _FATAL[status]
            raise self._fatal(f"{what} ({message})")
        if status in _TRANSIENT or status >= 500:
            return Transient(message, _seconds(error.response.headers.get("retry-after")))
        return Answer(None, message)

    def _fatal(self, what: str) -> UserError:
        where = f"teacher {self.config.model} at {urlsplit(self.base_url).netloc}"
        key = self.config.api_key_env or "(none)"
        return UserError(
            f"{where}: {what}. Nothing is lost: mend teacher.model, teacher.base_url or the key in {key}, and the same "
            "command goes on from here."
        )

    def _describe(self, error: Exception) -> str:
        """An error's message on one line, with its cause, without the key (some servers quote it)."""
        message = f"{error} {error.__cause__ or ''}"
        if self._key != NO_KEY:
            message = message.replace(self._key, "***")
        return " ".join(message.split())[:300]

    async def _pause(self, batch: _Batch, attempt: int, retry_after: float | None) -> None:
        """Wait as long as the server asks, and a random part of a delay that doubles each time ("full jitter")."""
        delay = random.uniform(0, min(LONGEST_DELAY_SECONDS, self.first_delay_seconds * 2**attempt))
        delay += min(retry_after or 0.0, LONGEST_DELAY_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await batch.stop.wait()


def read_completion(reply: Any) -> Answer | Transient:
    """The answer in what the package returned, which may be no completion at all: an HTML page comes as a `str`."""
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if not choices or message is None:
        return Transient("the server replied with something that is no completion")
    finish, text = getattr(choices[0], "finish_reason", None), getattr(message, "content", None)
    error = None
    if finish == "length":
        error = "cut at teacher.max_tokens"
    elif finish == "content_filter":
        error = "withheld by the server's content filter"
    elif not isinstance(text, str) or not text.strip():
        error = "empty answer"
    usage = getattr(reply, "usage", None)
    prompt_tokens, completion_tokens = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return Answer(None if error else text, error, prompt_tokens, completion_tokens)


def checked_url(config: TeacherConfig) -> str:
    """The server's base URL. Raises `UserError` where it holds a secret, or would send the key in the clear."""
    url = config.base_url or DEFAULT_BASE_URL
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise UserError("teacher.base_url must hold no user, password or query: the key comes from teacher.api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"teacher.base_url={url}: not a URL; write it like https://host/v1")
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and not config.allow_http:
        raise UserError(
            f"teacher.base_url={url}: key and documents would cross the network in the clear. Use https, or allow it "
            "with teacher.allow_http=true"
        )
    return url.rstrip("/")


def read_key(variable: str) -> str:
    """The key in an environment variable; an empty name stands for a server that asks for none."""
    if not variable:
        return NO_KEY
    if not variable.isidentifier():
        raise UserError("teacher.api_key_env must be the NAME of an environment variable, e.g. OPENAI_API_KEY")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"teacher.api_key_env={variable}: the environment variable {variable} is not set. Export it with your key, "
            "or name another; teacher.api_key_env='' is for a server that asks for none."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"teacher.api_key_env={variable}: the value of {variable} holds characters that no key has")
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:
        return None
