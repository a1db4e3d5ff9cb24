"""What a teacher's answers cost: tokens, money, and how much may still be spent."""

from __future__ import annotations

from alignkit.core.config import TeacherConfig
from alignkit.core.errors import UserError
from alignkit.teacher.client import Answer, Request, Usage
from alignkit.teacher.prices import cost, show_cost
from alignkit.teacher.replay import Pending, replay
from alignkit.teacher.store import Reply, ResponseStore


class Ledger:
    """The account of one teacher. Every reply is counted once, however often its request is asked.

    Raises `UserError` when `teacher.max_cost` is set and the prices are not.
    """

    def __init__(self, config: TeacherConfig) -> None:
        if config.max_cost is not None and cost(config.prices, 1, 1) is None:
            raise UserError(
                "teacher.max_cost needs teacher.prices.input_per_million and teacher.prices.output_per_million: what "
                "has no price cannot be limited by cost"
            )
        self.config = config
        self.usage = Usage()
        self._counted: set[str] = set()
        self._received: set[str] = set()
        self._reserved = 0.0
        self._guessed = 0.0

    def look_up(self, store: ResponseStore, request: Request) -> Answer | Pending:
        """The answer to a request as far as the store has it, else what is to be sent.

        With `teacher.retry_failed`, a stored failure is forgotten, unless it came to this very teacher.
        """
        found: dict[str, Reply] = {}

        def get(key: str) -> Reply | None:
            if (reply := store.get(key)) is not None:
                found[key] = reply
            return reply

        outcome = replay(self.config, request, get)
        unusable = isinstance(outcome, Answer) and not outcome.usable
        if self.config.retry_failed and unusable and not self._received & found.keys():
            store.remove(found)
            return self.look_up(store, request)
        for key, reply in found.items():
            if key not in self._counted:
                self._counted.add(key)
                self.usage.unreported += reply.text is not None and reply.prompt_tokens is None
                self.count_tokens(reply.prompt_tokens, reply.completion_tokens, now=key in self._received)
        return outcome

    def receive(self, key: str) -> None:
        """Note that the reply to `key` came just now; its tokens are counted when it is looked up."""
        self._received.add(key)

    def count_tokens(self, prompt_tokens: int | None, completion_tokens: int | None, *, now: bool) -> None:
        """Add the tokens of a reply; None where they were not reported."""
        self.usage.count_tokens(prompt_tokens, completion_tokens)
        if (amount := cost(self.config.prices, prompt_tokens, completion_tokens)) is not None:
            self.usage.cost = (self.usage.cost or 0.0) + amount
            if now:
                self.usage.paid_now = (self.usage.paid_now or 0.0) + amount

    @property
    def spent(self) -> float:
        """What all replies cost; where no usage was reported, what they may have cost at most."""
        return (self.usage.cost or 0.0) + self._guessed

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Set aside what an attempt may cost at most; None when that is more than is left of `teacher.max_cost`."""
        if self.config.max_cost is None:
            return 0.0
        amount = cost(self.config.prices, prompt_tokens, completion_tokens) or 0.0
        if self.spent + self._reserved + amount > self.config.max_cost:
            return None
        self._reserved += amount
        return amount

    def release(self, reserved: float, *, unreported: bool) -> None:
        """Give back what was set aside for an attempt; it counts as spent when nobody said what the reply cost."""
        self._reserved -= reserved
        self._guessed += reserved if unreported else 0.0

    def exhausted(self, unanswered: int) -> UserError:
        """What to say when nothing more may be sent."""
        return UserError(
            f"teacher.max_cost={self.config.max_cost:g}: {show_cost(self.spent, self.config.prices)} spent, and the "
            f"next request may cost more than is left. {unanswered} requests are unanswered; everything answered is "
            "stored: raise teacher.max_cost, and the same command goes on from here."
        )
