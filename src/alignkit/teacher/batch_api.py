"""The few calls that batches need: upload, begin, find, look, download."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError
from alignkit.teacher.address import checked_url, is_loopback, read_key, server_host, without_key
from alignkit.teacher.batch_book import BookedBatch
from alignkit.teacher.failures import Failure, classify, no_answer
from alignkit.teacher.store import Reply
from alignkit.teacher.wire import endpoint, read_completion

if TYPE_CHECKING:
    from openai.types import Batch

LOG = logging.getLogger("alignkit")

MARK = "alignkit"
"""The field of a batch's metadata that holds its mark."""
OVER = ("completed", "failed", "expired", "cancelled")
CONTROL_RETRIES = 5
"""By the `openai` package; only beginning a batch is not left to it, because that must not happen twice."""
LONGEST_POLL_SECONDS = 120.0
MOST_MISSES = 30
"""Looks in vain, one after the other, before a server that is out of reach is given up: about an hour."""
POLL_GROWTH = 1.5


class BatchApi:
    """The few calls that batches need. Raises `UserError` when one of them fails for good; the batches go on."""

    def __init__(self, config: TeacherConfig, poll_seconds: float) -> None:
        self.config = config
        self.base_url = checked_url(config)
        self.key = read_key(config.api_key_env)
        self.poll_seconds = poll_seconds

    def __enter__(self) -> BatchApi:
        from openai import DefaultHttpxClient, OpenAI

        trusted = not is_loopback(urlsplit(self.base_url).hostname or "")
        http = DefaultHttpxClient(follow_redirects=False, timeout=self.config.timeout_seconds, trust_env=trusted)
        self._client = OpenAI(api_key=self.key, base_url=self.base_url, max_retries=CONTROL_RETRIES, http_client=http)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def begin(self, content: bytes, mark: str) -> str:
        """Upload a part and begin its batch, once: after a failure without an answer it is looked for first."""
        from openai import APIConnectionError, InternalServerError

        with self._explained():
            file = self._client.files.create(file=(f"{mark}.jsonl", content), purpose="batch")
        url: Any = f"/v1{endpoint(self.config)}"
        once = self._client.with_options(max_retries=0)
        for attempt in range(CONTROL_RETRIES):
            try:
                with self._explained(APIConnectionError, InternalServerError):
                    return once.batches.create(
                        completion_window="24h", endpoint=url, input_file_id=file.id, metadata={MARK: mark}
                    ).id
            except (APIConnectionError, InternalServerError) as error:
                reason = error
            time.sleep(self.poll_seconds * 2**attempt)
            if (found := self.find(mark)) is not None:
                return found
        raise self.error(f"no batch could be begun: {reason}") from reason

    def find(self, mark: str) -> str | None:
        """The newest batch under a mark, if the server has begun one."""
        with self._explained():
            for batch in self._client.batches.list(limit=100):  # page by page, from the newest
                if (batch.metadata or {}).get(MARK) == mark:
                    return batch.id
        return None

    def wait(self, booked: BookedBatch) -> Batch:
        """Look at a batch, ever more seldom, until it is over. A server out of reach is no reason to give up soon."""
        from openai import APIConnectionError, InternalServerError

        assert booked.id is not None
        told, poll_seconds, misses = "", self.poll_seconds, 0
        while True:
            try:
                with self._explained(APIConnectionError, InternalServerError):
                    batch = self._client.batches.retrieve(booked.id)
            except (APIConnectionError, InternalServerError) as error:
                misses += 1
                if misses == MOST_MISSES:
                    raise self.error(f"out of reach: {error}") from error
                news = "out of reach for now"
            else:
                misses = 0
                counts = batch.request_counts
                done = f", {counts.completed} done, {counts.failed} failed" if counts else ""
                news = f"{batch.status}{done} of {len(booked.requests)}"
                if batch.status in OVER:
                    LOG.info("teacher: batch %s: %s", booked.id, news)
                    return batch
            if news != told:
                LOG.info("teacher: batch %s: %s", booked.id, news)
                told = news
            time.sleep(poll_seconds)
            poll_seconds = min(LONGEST_POLL_SECONDS, POLL_GROWTH * poll_seconds)

    def rows(self, batch: Batch) -> Iterator[tuple[str, Reply | Failure]]:
        """Keys and what came of them, in no order, with the API key blotted out."""
        for file in (batch.output_file_id, batch.error_file_id):
            if file is None:
                continue
            with self._explained():
                content = self._client.files.content(file).read()
            for line in content.splitlines():
                if (row := read_row(line)) is None:
                    continue
                key, outcome = row
                if isinstance(outcome, Reply) and outcome.text is not None:
                    outcome = replace(outcome, text=without_key(outcome.text, self.key))
                yield key, replace(outcome, detail=without_key(outcome.detail, self.key))

    def error(self, what: str) -> UserError:
        """What to say when going on is pointless."""
        return UserError(
            f"teacher {self.config.model} at {server_host(self.config)}: {without_key(what, self.key)}. Nothing is "
            "lost: every batch begun is written down, and the same command goes on from here."
        )

    @contextmanager
    def _explained(self, *own: type[Exception]) -> Iterator[None]:
        """Turn the package's errors, but for the caller's `own`, into the user's."""
        from openai import APIStatusError, OpenAIError

        try:
            yield
        except own:
            raise
        except APIStatusError as error:
            raise self.error(str(classify(error.status_code, error.body))) from error
        except OpenAIError as error:
            raise self.error(str(error)) from error


def read_row(line: bytes) -> tuple[str, Reply | Failure] | None:
    """A row of a batch's results: the key, and the reply or why there is none. None for a line that is no row."""
    try:
        row = json.loads(line)
        key = str(row["custom_id"])
    except (ValueError, KeyError, TypeError):
        return None
    response, error = row.get("response"), row.get("error")
    if isinstance(response, Mapping) and isinstance(status := response.get("status_code"), int):
        return key, read_completion(response.get("body")) if status == 200 else classify(status, response.get("body"))
    said = error if isinstance(error, Mapping) else {}
    return key, no_answer(f"{said.get('code') or 'no response'}: {said.get('message') or 'without a reason'}")
