"""Something that is being sent, and what has been tried for it so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

from alignkit.core.config import Structured
from alignkit.teacher.failures import Failure
from alignkit.teacher.replay import Pending
from alignkit.teacher.store import Reply
from alignkit.teacher.tokens import TOKENS_BEFORE_REPLY, TOKENS_PER_MESSAGE, estimate_tokens


@dataclass(eq=False)
class Call:
    """Something that is being sent until there is a reply to it, or none to be hoped for."""

    pending: Pending
    rung: Structured | None = None
    """Where it stands below the dialect's rung of the ladder, because it was refused above."""
    attempts: int = 0
    failures: int = 0
    refusals: int = 0
    """For too many requests."""
    reserved: float = 0.0
    """Money set aside for the attempt under way."""
    expected_tokens: int | None = None
    """Estimate for the prompt, made when it is first needed."""
    prompt_tokens: int | None = None
    """Of replies that could not be read; None while there are none."""
    completion_tokens: int | None = None

    @property
    def longest_answer(self) -> int:
        """In tokens."""
        return int(self.pending.parts["max_tokens"])

    def expect_tokens(self) -> int:
        """An estimate of the prompt's tokens."""
        if self.expected_tokens is None:
            messages = self.pending.request.messages
            self.expected_tokens = TOKENS_BEFORE_REPLY + sum(
                estimate_tokens(message.content) + TOKENS_PER_MESSAGE for message in messages
            )
        return self.expected_tokens

    def waste(self, failure: Failure) -> None:
        """Remember the tokens of a reply that could not be read."""
        if failure.prompt_tokens is not None:
            self.prompt_tokens = (self.prompt_tokens or 0) + failure.prompt_tokens
            self.completion_tokens = (self.completion_tokens or 0) + (failure.completion_tokens or 0)

    def complete(self, reply: Reply) -> Reply:
        """A reply with the attempts and the tokens of all that was tried for it."""
        if self.prompt_tokens is None:
            return replace(reply, attempts=self.attempts)
        prompt_tokens = self.prompt_tokens + (reply.prompt_tokens or 0)
        completion_tokens = (self.completion_tokens or 0) + (reply.completion_tokens or 0)
        return replace(reply, attempts=self.attempts, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
