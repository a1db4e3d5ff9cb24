"""How far the response store answers a request already.

A request whose reply cannot be used is asked once more, with what is wrong with it; that repetition is a request of its
own. So a request is a short chain of stored replies, and where the chain ends there is an answer or one thing to send.
Everybody walks it in the same way: the client, the Batch API, the dry run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignkit.core.config import TeacherConfig
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.reading import MOST_REPEATS, ask_again, read_reply
from alignkit.teacher.store import Reply
from alignkit.teacher.wire import request_parts, store_key


@dataclass(frozen=True)
class Pending:
    """What has to be sent to get on with a request: itself, or a repetition of it."""

    request: Request
    key: str
    parts: dict[str, Any]
    """What `key` was made of."""


def replay(config: TeacherConfig, request: Request, lookup: Callable[[str], Reply | None]) -> Answer | Pending:
    """The answer as far as `lookup` (usually `ResponseStore.get`) has it, else what is to be sent next.

    An answer's tokens are those of all replies of the chain; it is marked as stored.
    """
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    for repeat in range(MOST_REPEATS + 1):
        parts = request_parts(config, request)
        key = store_key(parts)
        reply = lookup(key)
        if reply is None:
            return Pending(request, key, parts)
        if reply.prompt_tokens is not None:
            prompt_tokens = (prompt_tokens or 0) + reply.prompt_tokens
            completion_tokens = (completion_tokens or 0) + (reply.completion_tokens or 0)
        answer = read_stored(request, reply)
        if answer.usable or reply.reason is not None or repeat == MOST_REPEATS:
            break
        request = ask_again(request, answer)
    return Answer(
        answer.text, answer.value, answer.reason, answer.detail, prompt_tokens, completion_tokens, stored=True
    )


def read_stored(request: Request, reply: Reply) -> Answer:
    """What one reply is worth as the answer to a request."""
    if reply.reason is not None:
        return Answer(reply.text, reason=reply.reason, detail=reply.detail)
    return read_reply(request, reply.text or "")
