"""A teacher behind an OpenAI-compatible server, through the `openai` package with its own retries switched off.

The package retries while it holds a connection slot, gives up on truncated bodies, takes an HTML page for an answer and
has no deadline for a request as a whole. Here a request waits for its next attempt in one queue, outside the slots
(`retry_queue`), and each failure is of one of four kinds (`failures`). Bodies go out and come back as plain JSON
(`wire`): building and checking the package's own objects for them took as long as everything else together.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from alignkit.core.config import Structured, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.teacher.address import TEACHER, Keys, checked_url, is_loopback, read_key, server_host, without_key
from alignkit.teacher.call import Call
from alignkit.teacher.client import Answer, OnAnswer, Request
from alignkit.teacher.dialect import Dialect, conforms, first_dialect
from alignkit.teacher.failures import REFUSED, Failure, Kind, classify, no_answer, read_retry_after
from alignkit.teacher.ledger import Ledger
from alignkit.teacher.limits import Limits
from alignkit.teacher.live import LiveLine
from alignkit.teacher.replay import Pending
from alignkit.teacher.retry_queue import RetryQueue
from alignkit.teacher.store import Reply, ResponseStore
from alignkit.teacher.tokens import ESTIMATE_MARGIN
from alignkit.teacher.wire import endpoint, read_completion, request_body

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LOG = logging.getLogger("alignkit")

LONGEST_DELAY_SECONDS = 30.0
POOL_SLOTS = 16
"""Requests under way that share a connection pool. For each request a pool looks at all of its connections, so with 64
under way four pools take a fifth less CPU time than one."""
PATIENCE = 5
"""So many times as many attempts are made while the server only says that there are too many requests."""
OUTAGE_REQUESTS = 8
"""So many requests in a row whose attempts were all in vain are taken for a server that is down, and so many refused
ones before the first reply for a mistake in the configuration: fatal."""


class OpenAITeacher:
    """Asks a server; keeps every reply in the response store and consults it first.

    Raises `UserError` for a missing key, an unsafe URL, numbers that make no sense, and any fatal failure; `keys` are
    the settings that it names.
    """

    def __init__(
        self, config: TeacherConfig, keys: Keys = TEACHER, *, attempts: int = 6, first_delay_seconds: float = 0.5
    ) -> None:
        check_config(config, keys)
        self.config, self.keys = config, keys
        self.attempts = attempts
        self.first_delay_seconds = first_delay_seconds
        self.base_url = checked_url(config, keys)
        self.key = read_key(config.api_key_env, keys.api_key_env)
        self.ledger = Ledger(config)
        self.usage = self.ledger.usage
        self.limits = Limits(config.concurrency, config.requests_per_minute, config.tokens_per_minute)
        self.answered = False
        """Whether there was any reply."""
        self.in_vain = 0
        """Requests in a row that got none."""
        LOG.info("%s: %s at %s", keys.who, config.model, server_host(config))

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer every request, from the store where it was answered before; equal requests are sent once."""
        with ResponseStore(Path(self.config.store)) as store:
            return _Asking(self, store, requests, on_answer).answer_all()


class _Asking:
    """One `ask`: which requests wait for which call, and what came of each attempt."""

    def __init__(
        self, teacher: OpenAITeacher, store: ResponseStore, requests: Sequence[Request], on_answer: OnAnswer | None
    ) -> None:
        self.teacher, self.config, self.ledger = teacher, teacher.config, teacher.ledger
        self.store, self.requests, self.on_answer = store, requests, on_answer
        self.answers: dict[int, Answer] = {}
        self.waiting: dict[str, list[int]] = defaultdict(list)
        """Positions of the requests that wait for the reply to a key."""
        self.server = f"{teacher.base_url} {self.config.model}"
        self.dialect: Dialect = first_dialect(self.config, store.get_dialect(self.server))
        limits = teacher.limits
        self.queue: RetryQueue[Call] = RetryQueue(self._attempt, self._admit, lambda: limits.concurrency.now)

    def answer_all(self) -> list[Answer]:
        """The answers in the order of the requests."""
        calls = []
        for position, request in enumerate(self.requests):
            outcome = self.ledger.look_up(self.store, request)
            if isinstance(outcome, Answer):
                self._settle(position, outcome)
            elif (call := self._wait_for(position, outcome)) is not None:
                calls.append(call)
        if calls:
            self.line = LiveLine(
                len(self.requests) - len(self.answers), self.ledger.usage, self.config.prices, self.teacher.keys.who
            )
            with self.line:
                asyncio.run(self._send_all(calls))
        return [self.answers[position] for position in range(len(self.requests))]

    async def _send_all(self, calls: Sequence[Call]) -> None:
        async with AsyncExitStack() as stack:
            pools = math.ceil(min(self.config.concurrency, len(calls)) / POOL_SLOTS)
            self.clients = itertools.cycle([await stack.enter_async_context(self._client()) for _ in range(pools)])
            await self.queue.run(calls)

    def _client(self) -> AsyncOpenAI:
        """The package's client, with a connection pool of its own."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        async def read_headers(response: Any) -> None:
            self.teacher.limits.learn(response.headers)

        # Redirects would carry the documents to a host that nobody named, and a proxy has no business on loopback.
        http = DefaultAsyncHttpxClient(
            follow_redirects=False,
            timeout=self.config.timeout_seconds,
            trust_env=not is_loopback(urlsplit(self.teacher.base_url).hostname or ""),
            event_hooks={"response": [read_headers]},
        )
        return AsyncOpenAI(api_key=self.teacher.key, base_url=self.teacher.base_url, max_retries=0, http_client=http)

    def _wait_for(self, position: int, pending: Pending) -> Call | None:
        """Let a request wait for a reply; the call that is to bring it, unless there is one already."""
        self.waiting[pending.key].append(position)
        return Call(pending) if len(self.waiting[pending.key]) == 1 else None

    def _settle(self, position: int, answer: Answer) -> None:
        self.answers[position] = answer
        self.ledger.usage.count_answer(answer)
        if self.on_answer:
            self.on_answer(position, answer)

    def _admit(self, call: Call) -> float:
        """Seconds until the limits let a call go; 0 when it goes now, infinity when only money is missing."""
        limits = self.teacher.limits
        prompt = call.expect_tokens() if limits.count_tokens or self.config.max_cost is not None else 0
        if (wait := limits.wait(prompt + call.longest_answer)) > 0:
            return wait
        reserved = self.ledger.reserve(round(prompt * (1 + ESTIMATE_MARGIN)), call.longest_answer)
        if reserved is None:
            if self.queue.under_way:
                return math.inf
            raise self.ledger.exhausted(len(self.requests) - len(self.answers))
        call.reserved = reserved
        limits.take(prompt + call.longest_answer)
        return 0.0

    async def _attempt(self, call: Call) -> float | None:
        """One attempt; None when the call is done with, else the seconds to wait before the next."""
        call.attempts += 1
        self.ledger.usage.sent += 1
        self.line.repeated += call.attempts > 1
        request = call.pending.request
        rung = None if request.shape is None else call.rung or self.dialect.structured
        body = request_body(call.pending.parts, request, self.dialect, rung)
        outcome = await self._post(body)
        came = isinstance(outcome, Reply) or outcome.status == 200
        self.ledger.release(call.reserved, unreported=came and outcome.prompt_tokens is None)
        self.teacher.limits.concurrency.record(refused=isinstance(outcome, Failure) and outcome.rate_limited)
        if isinstance(outcome, Failure):
            return self._fail(call, body, rung, outcome)
        if outcome.prompt_tokens is not None:
            used = outcome.prompt_tokens + (outcome.completion_tokens or 0)
            self.teacher.limits.correct((call.expected_tokens or 0) + call.longest_answer, used)
        self._learn(self.dialect.observe_tools(body))
        if rung and request.shape and outcome.reason is None:
            self._learn(self.dialect.observe(rung, conforms(outcome.text or "", request.shape, rung)))
        self.teacher.answered, self.teacher.in_vain = True, 0
        self._receive(call, outcome)
        return None

    async def _post(self, body: dict[str, Any]) -> Reply | Failure:
        """Send a body, and read what comes back within the deadline; the key is blotted out before anything is cut."""
        from openai import APIStatusError, APITimeoutError, OpenAIError

        key = self.teacher.key
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                raw = await next(self.clients).post(endpoint(self.config), cast_to=bytes, body=body)
        except (TimeoutError, APITimeoutError):
            return no_answer(f"nothing within {self.config.timeout_seconds:g} s")
        except APIStatusError as error:
            retry_after = read_retry_after(error.response.headers)
            return classify(error.status_code, without_key(error.body, key), retry_after)
        except OpenAIError as error:
            return no_answer(without_key(f"{type(error).__name__}: {error} {error.__cause__ or ''}", key))
        try:
            return read_completion(without_key(json.loads(raw), key))
        except (ValueError, RecursionError):
            beginning = without_key(raw[:2000].decode("utf-8", "replace"), key)[:60]
            return no_answer(f"the server replied with something that is no JSON: {beginning}", 200)

    def _receive(self, call: Call, reply: Reply) -> None:
        """Store a reply, before it is returned: it was paid for. Then see what the requests make of it."""
        key = call.pending.key
        self.store.put(key, call.pending.parts, call.complete(reply))
        self.ledger.receive(key)
        for position in self.waiting.pop(key):
            outcome = self.ledger.look_up(self.store, self.requests[position])
            if isinstance(outcome, Answer):
                self._show(position, replace(outcome, stored=False))
            elif (repetition := self._wait_for(position, outcome)) is not None:
                self.queue.add(repetition)

    def _fail(self, call: Call, body: dict[str, Any], rung: Structured | None, failure: Failure) -> float | None:
        """Do what the kind of a failure asks for; returns like `_attempt`."""
        call.waste(failure)
        self.ledger.usage.unreported += failure.status == 200 and failure.prompt_tokens is None
        if (change := self.dialect.correct(body, failure)) is not None:
            self._learn(change)
            return 0.0
        if failure.kind is Kind.fatal:
            raise self._fatal(str(failure))
        if (lower := self.dialect.next_rung(rung, failure)) is not None:
            call.rung = lower
            return 0.0
        if failure.kind is Kind.per_item:
            self._receive(call, Reply(None, reason=failure.reason, detail=failure.detail))
            self.teacher.in_vain += failure.reason == REFUSED
            if self.teacher.in_vain >= OUTAGE_REQUESTS and not self.teacher.answered:
                raise self._fatal(
                    f"every request is refused ({failure.detail}); ask again with {self.teacher.keys.ask_again}"
                )
            return None
        return self._retry(call, failure)

    def _retry(self, call: Call, failure: Failure) -> float | None:
        """Seconds to wait after a failure that may pass, or None after the last attempt.

        As long as the server asks, and a random part of a delay that doubles each time ("full jitter": Brooker, 2015,
        "Exponential backoff and jitter").
        """
        most = self.teacher.attempts
        call.refusals += failure.rate_limited
        call.failures += not failure.rate_limited
        if call.failures < most and call.refusals < PATIENCE * most:
            doubled = self.teacher.first_delay_seconds * 2.0 ** (call.failures + call.refusals - 1)
            return (failure.retry_after or 0.0) + random.uniform(0, min(LONGEST_DELAY_SECONDS, doubled))
        self.teacher.in_vain += 1
        if self.teacher.in_vain >= OUTAGE_REQUESTS:
            raise self._fatal(f"{OUTAGE_REQUESTS} requests in a row, or more, were in vain ({failure})")
        self.ledger.count_tokens(call.prompt_tokens, call.completion_tokens, now=True)
        detail = f"{call.attempts} attempts; the last: {failure}"
        for position in self.waiting.pop(call.pending.key):
            self._show(position, Answer(None, reason="no answer", detail=detail))
        return None

    def _show(self, position: int, answer: Answer) -> None:
        self._settle(position, answer)
        self.line.update(failed=not answer.usable)

    def _learn(self, change: str | None) -> None:
        """Remember what was learnt of the server, and say it once."""
        if change is None or (dialect := self.dialect.dump()) == self.store.get_dialect(self.server):
            return
        self.store.put_dialect(self.server, dialect)
        LOG.info("%s: %s %s", self.teacher.keys.who, self.config.model, change)

    def _fatal(self, what: str) -> UserError:
        keys = self.teacher.keys
        where = f"{keys.who} {self.config.model} at {server_host(self.config)}"
        mend = ", ".join(dict.fromkeys(["the server", keys.model, keys.base_url]))
        key = f"the key in {self.config.api_key_env}" if self.config.api_key_env else keys.api_key_env
        return UserError(
            f"{where}: {what}. Nothing is lost: mend {mend} or {key}, and the same command goes on from here."
        )


def check_config(config: TeacherConfig, keys: Keys = TEACHER) -> None:
    """Raise `UserError` for numbers that make no sense."""
    if config.concurrency < 1 or config.timeout_seconds <= 0:
        raise UserError(f"{keys.concurrency} must be at least 1, and {keys.timeout_seconds} more than 0")
    if config.max_tokens < 1:
        raise UserError(f"teacher.max_tokens={config.max_tokens}: must be at least 1")
    for key in ("requests_per_minute", "tokens_per_minute", "max_cost"):
        value = getattr(config, key)
        if value is not None and not value > 0:
            raise UserError(f"teacher.{key}={value}: must be more than 0, or null for no limit")
