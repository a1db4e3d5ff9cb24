"""What can go wrong with a request, in four kinds.

*Fatal* concerns every request: the run stops, with everything answered stored. *Transient* may pass: it is tried
again. *Per item* concerns this request for good: it is recorded. The fourth is *invalid content*: a reply came, and is
not what was asked for. It is asked for once more with what is wrong with it, and found by `reading`, not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

LONGEST_WAIT_SECONDS = 900.0
"""A server that asks for a longer pause than this is not waited for: some limits are by the day."""
MESSAGE_CHARACTERS = 300
"""What is kept of a server's message."""
_FATAL = {
    401: "the key was refused",
    402: "the account is empty",
    403: "access was refused",
    404: "no such model or address",
    405: "there is no such API at this address",
}
_NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
_NO_MODEL = {"model_not_found", "deploymentnotfound"}
_TRANSIENT = {408, 409, 425, 429}
_TOO_LONG = re.compile(r"context[ _-]?(length|size|window)|too long|maximum.{0,20}tokens", re.IGNORECASE)
_FILTERED = re.compile(r"content[ _-]?(filter|management|policy)|responsibleaipolicy|moderation", re.IGNORECASE)
FILTERED = "withheld by the server's content filter"
REFUSED = "refused by the server"
DECLINED = "refused by the teacher"
"""In words, where an answer was asked for."""


class Kind(Enum):
    """What a failure means for the run."""

    fatal = "fatal"
    transient = "transient"
    per_item = "per item"


@dataclass(frozen=True)
class Failure:
    """A request that got no reply. `reason` is in words to count by, `detail` has the particulars, without any key."""

    kind: Kind
    reason: str
    detail: str = ""
    status: int | None = None
    code: str = ""
    """The server's own word for it."""
    parameter: str = ""
    """The parameter that the server objects to, if it named one."""
    retry_after: float | None = None
    """Seconds that the server asks to wait."""
    prompt_tokens: int | None = None
    """Of a reply that was paid for and cannot be used."""
    completion_tokens: int | None = None

    @property
    def rate_limited(self) -> bool:
        """Whether the server said that there are too many requests."""
        return self.kind is Kind.transient and self.status == 429

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def classify(status: int, body: Any, retry_after: float | None = None) -> Failure:
    """What an answer that is no success means, by its HTTP status and its body (parsed JSON, or text)."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    fields = error if isinstance(error, Mapping) else {}
    code = str(fields.get("code") or fields.get("type") or "")
    words = {str(fields.get(name) or "").lower() for name in ("code", "type")}
    message = short(str(fields.get("message") or (error if isinstance(error, str) else json.dumps(error, default=str))))

    def failure(kind: Kind, reason: str) -> Failure:
        parameter = str(fields.get("param") or "")
        return Failure(kind, reason, f"{status} {message}".strip(), status, code, parameter, retry_after)

    if words & _NO_QUOTA:
        return failure(Kind.fatal, "the quota is used up")
    if words & _NO_MODEL:
        return failure(Kind.fatal, _FATAL[404])
    if status in _FATAL:
        return failure(Kind.fatal, _FATAL[status])
    if 300 <= status < 400:
        return failure(Kind.fatal, "the server redirects to another address, which is not followed")
    if status in _TRANSIENT or status >= 500:
        if retry_after is not None and retry_after > LONGEST_WAIT_SECONDS:
            return failure(Kind.fatal, f"the server asks to wait {retry_after / 60:.0f} minutes")
        return failure(Kind.transient, "too many requests" if status == 429 else "server error")
    said = f"{code} {message}"
    if _TOO_LONG.search(said) or status == 413:
        return failure(Kind.per_item, "prompt too long for the model")
    if _FILTERED.search(said):
        return failure(Kind.per_item, FILTERED)
    return failure(Kind.per_item, REFUSED)


def no_answer(what: str, status: int | None = None) -> Failure:
    """A transient failure of another sort: no connection, nothing in time, or (status 200) something unreadable."""
    return Failure(Kind.transient, "no answer", short(what), status)


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers `retry-after-ms` or `retry-after` ask to wait; None without either."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if (seconds := _seconds(headers.get(name), scale)) is not None:
            return seconds
    return None


def _seconds(value: str | None, scale: float) -> float | None:
    """A number of seconds, or an HTTP date seen from now."""
    if not value:
        return None
    try:
        number = float(value) * scale
        return number if 0 <= number < float("inf") else None
    except ValueError:
        return _until(value)


def _until(date: str) -> float | None:
    try:
        when = parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def short(text: str) -> str:
    """A message on one line, cut to what is worth keeping."""
    return " ".join(text[: 4 * MESSAGE_CHARACTERS].split())[:MESSAGE_CHARACTERS]
