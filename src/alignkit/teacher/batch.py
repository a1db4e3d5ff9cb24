"""A teacher behind OpenAI's Batch API: requests go out as files, and come back within a day at a lower price.

    missing requests ─▶ parts of a file each ─▶ batches ─▶ wait ─▶ results into the response store
           ▲                                                              │
           └────── what expired, failed in passing, or has to be asked again (twice at most) ◀─┘

A batch is written down beside the responses before it is begun, under a mark that the server keeps with it. So a killed
process finds every batch again, even one that began while it died, and nothing is paid for twice.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from alignkit.core.config import Structured, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.teacher.address import server_host
from alignkit.teacher.batch_api import BatchApi
from alignkit.teacher.batch_book import BatchBook, BookedBatch
from alignkit.teacher.client import Answer, OnAnswer, Request
from alignkit.teacher.dialect import Dialect, conforms, first_dialect
from alignkit.teacher.failures import Failure, Kind, no_answer
from alignkit.teacher.ledger import Ledger
from alignkit.teacher.openai_client import check_config
from alignkit.teacher.replay import Pending
from alignkit.teacher.store import Reply, ResponseStore
from alignkit.teacher.tokens import token_counter
from alignkit.teacher.wire import endpoint, request_body

if TYPE_CHECKING:
    from openai.types import Batch

LOG = logging.getLogger("alignkit")

MOST_REQUESTS = 50_000
"""In one batch; the API's own limit, like the next."""
MOST_BYTES = 200 * 10**6
ATTEMPTS = 3
"""Batches that a request may be part of without an answer before it is given up."""
_QUEUE_FULL = "token_limit_exceeded"


class BatchTeacher:
    """Asks in batches; keeps every reply in the response store and consults it first.

    Raises `UserError` for a missing key, an unsafe URL, numbers that make no sense, a refused or cancelled batch, and
    any fatal failure of a row.
    """

    def __init__(self, config: TeacherConfig, *, poll_seconds: float = 5.0) -> None:
        check_config(config)
        for key in ("requests_per_minute", "tokens_per_minute"):
            if getattr(config, key) is not None:
                raise UserError(f"teacher.{key}: has no effect with teacher.mode=batch; leave it out")
        self.config = config
        self.api = BatchApi(config, poll_seconds)
        self.ledger = Ledger(config)
        self.usage = self.ledger.usage
        self.most_requests, self.most_bytes = MOST_REQUESTS, MOST_BYTES
        LOG.info("teacher: %s at %s, in batches", config.model, server_host(config))

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """Answer every request, from the store where it was answered before; equal requests are sent once."""
        with ResponseStore(Path(self.config.store)) as store, BatchBook(Path(self.config.store)) as book:
            answers = _Asking(self, store, book, requests).answer_all()
        for position, answer in enumerate(answers):
            self.usage.count_answer(answer)
            if on_answer:
                on_answer(position, answer)
        return answers


class _Asking:
    """One `ask`: rounds of batches until every request is answered or given up."""

    def __init__(
        self, teacher: BatchTeacher, store: ResponseStore, book: BatchBook, requests: Sequence[Request]
    ) -> None:
        self.teacher, self.config, self.ledger = teacher, teacher.config, teacher.ledger
        self.store, self.book, self.requests = store, book, requests
        self.server = f"{teacher.api.base_url} {self.config.model}"
        self.dialect = first_dialect(self.config, store.get_dialect(self.server))
        self.attempts: Counter[str] = Counter()
        self.failures: dict[str, Failure] = {}
        """The last failure of each key that was tried in vain."""
        self.rungs: dict[str, Structured] = {}
        """Where a request stands below the dialect's rung of the ladder, because it was refused above."""
        self.reserved = 0.0
        self.fresh: set[int] = set()
        """Positions of the requests that the store could not answer at first."""

    def answer_all(self) -> list[Answer]:
        """The answers in the order of the requests."""
        outcomes, missing = self._look_up()
        self.fresh = {position for position, outcome in enumerate(outcomes) if isinstance(outcome, Pending)}
        if missing:
            with self.teacher.api as api:
                while missing:
                    running = self._take_up(api, missing)
                    if not running or self.config.max_cost is None:  # what those cost is known when they are over
                        sent = {key for batch in running for key in batch.requests}
                        running += self._submit(api, [each for key, each in missing.items() if key not in sent])
                    self._collect(api, running, missing)
                    outcomes, missing = self._look_up()
        return [self._answer(position, outcome) for position, outcome in enumerate(outcomes)]

    def _look_up(self) -> tuple[list[Answer | Pending], dict[str, Pending]]:
        """What each request has come to, and what is to be sent by its key, without what was given up."""
        outcomes = [self.ledger.look_up(self.store, request) for request in self.requests]
        pending = {outcome.key: outcome for outcome in outcomes if isinstance(outcome, Pending)}
        return outcomes, {key: each for key, each in pending.items() if self.attempts[key] < ATTEMPTS}

    def _answer(self, position: int, outcome: Answer | Pending) -> Answer:
        if isinstance(outcome, Answer):
            return replace(outcome, stored=position not in self.fresh)
        failure = self.failures[outcome.key]
        return Answer(None, reason=failure.reason, detail=f"in {ATTEMPTS} batches; the last: {failure.detail}")

    def _take_up(self, api: BatchApi, missing: Mapping[str, Pending]) -> list[BookedBatch]:
        """The batches that an earlier process began and that some of the requests wait for."""
        running = []
        for batch in self.book.batches(self.server):
            if not batch.requests.keys() & missing.keys():
                continue
            if batch.id is None:
                found = api.find(batch.mark)
                if found is None:  # it was written down, but not begun
                    self.book.remove(batch.mark)
                    continue
                batch = self.book.name(batch, found)
            LOG.info("teacher: taking up batch %s of %d requests", batch.id, len(batch.requests))
            running.append(batch)
        return running

    def _submit(self, api: BatchApi, pending: Sequence[Pending]) -> list[BookedBatch]:
        """Begin batches for what is in none yet."""
        begun: list[BookedBatch] = []
        for part, lines in self._parts(pending):
            self._reserve(part)
            batch = self.book.add(self.server, uuid4().hex, {each.key: each.parts for each in part})
            id = api.begin(b"".join(lines), batch.mark)
            begun.append(self.book.name(batch, id))
            self.ledger.usage.sent += len(part)
            LOG.info("teacher: batch %s of %d requests begun", id, len(part))
        return begun

    def _parts(self, pending: Sequence[Pending]) -> Iterator[tuple[list[Pending], list[bytes]]]:
        """Requests and their lines, in parts that a file may hold."""
        part: list[Pending] = []
        lines: list[bytes] = []
        size = 0
        for each in pending:
            body = self._body(each, self.dialect)
            row = {"custom_id": each.key, "method": "POST", "url": f"/v1{endpoint(self.config)}", "body": body}
            line = json.dumps(row).encode() + b"\n"
            if part and (len(part) >= self.teacher.most_requests or size + len(line) > self.teacher.most_bytes):
                yield part, lines
                part, lines, size = [], [], 0
            part.append(each)
            lines.append(line)
            size += len(line)
        if part:
            yield part, lines

    def _reserve(self, part: Sequence[Pending]) -> None:
        """Make sure that a part cannot cost more than is left: a batch cannot be stopped half-way at its price."""
        if self.config.max_cost is None:
            return
        counter = token_counter(self.config.model)
        prompts = sum(counter.count_messages(each.request.messages) for each in part)
        highest = round(prompts * (1 + counter.margin))
        reserved = self.ledger.reserve(highest, sum(each.parts["max_tokens"] for each in part))
        if reserved is None:
            raise self.ledger.exhausted(len(part))
        self.reserved += reserved

    def _rung(self, pending: Pending, dialect: Dialect) -> Structured | None:
        return None if pending.request.shape is None else self.rungs.get(pending.key, dialect.structured)

    def _body(self, pending: Pending, dialect: Dialect) -> dict[str, Any]:
        return request_body(pending.parts, pending.request, dialect, self._rung(pending, dialect))

    def _collect(self, api: BatchApi, running: Sequence[BookedBatch], missing: Mapping[str, Pending]) -> None:
        """Wait for batches, and store what came of each."""
        for booked in running:
            batch = api.wait(booked)
            if batch.status == "failed":
                self._refused(api, booked, batch)
                continue
            fatal = self._store(booked, api.rows(batch), missing)
            self.book.remove(booked.mark)
            if fatal is not None:
                raise api.error(str(fatal))
            if batch.status == "cancelled":
                raise api.error(f"batch {batch.id} was cancelled; what it had done is stored")
        self.ledger.release(self.reserved, unreported=False)
        self.reserved = 0.0

    def _refused(self, api: BatchApi, booked: BookedBatch, batch: Batch) -> None:
        """A batch that the server did not take: smaller ones where its queue is full, else that is that."""
        self.book.remove(booked.mark)
        problems = (batch.errors.data if batch.errors else None) or []
        if any(problem.code == _QUEUE_FULL for problem in problems) and len(booked.requests) > 1:
            self.teacher.most_requests = -(-len(booked.requests) // 2)
            LOG.info("teacher: the server's queue is full; going on with %d a batch", self.teacher.most_requests)
            return
        said = "; ".join(f"{problem.code}: {problem.message}" for problem in problems[:3]) or "without a reason"
        raise api.error(f"batch {batch.id} was refused: {said}")

    def _store(
        self, booked: BookedBatch, rows: Iterable[tuple[str, Reply | Failure]], missing: Mapping[str, Pending]
    ) -> Failure | None:
        """Keep the replies of a batch; a fatal failure among its rows, if any."""
        fatal = None
        sent_as = replace(self.dialect)
        failures: dict[str, Failure] = {}
        for key, outcome in rows:
            parts, pending = booked.requests.get(key), missing.get(key)
            if parts is None:
                continue
            if isinstance(outcome, Reply):
                self._put(key, parts, outcome)
                if pending is not None:
                    self._observe(pending, sent_as, outcome)
            elif outcome.kind is Kind.fatal:
                fatal = outcome
            elif outcome.kind is Kind.transient or (pending and self._adapts(pending, sent_as, outcome)):
                failures[key] = outcome
            else:
                self._put(key, parts, Reply(None, reason=outcome.reason, detail=outcome.detail))
        for key in booked.requests:
            if self.store.get(key) is None:
                self.attempts[key] += 1
                self.failures[key] = failures.get(key) or no_answer("the batch ended without a word about it")
        return fatal

    def _put(self, key: str, parts: Mapping[str, Any], reply: Reply) -> None:
        self.store.put(key, parts, replace(reply, attempts=self.attempts[key] + 1))
        self.ledger.receive(key)

    def _adapts(self, pending: Pending, sent_as: Dialect, failure: Failure) -> bool:
        """Whether a refused row says that it should have been written in another way, which is tried next."""
        change = self.dialect.correct(self._body(pending, sent_as), failure)
        lower = self.dialect.next_rung(self._rung(pending, sent_as), failure)
        self._learn(change)
        if change is None and lower is not None:
            self.rungs[pending.key] = lower
        return change is not None or lower is not None

    def _observe(self, pending: Pending, sent_as: Dialect, reply: Reply) -> None:
        rung, shape = self._rung(pending, sent_as), pending.request.shape
        if rung and shape and reply.reason is None:
            self._learn(self.dialect.observe(rung, conforms(reply.text or "", shape, rung)))

    def _learn(self, change: str | None) -> None:
        """Remember what was learnt of the server, and say it once."""
        if change is None or (dialect := self.dialect.dump()) == self.store.get_dialect(self.server):
            return
        self.store.put_dialect(self.server, dialect)
        LOG.info("teacher: %s %s", self.config.model, change)
