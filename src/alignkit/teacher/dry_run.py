"""What a run would ask and what that would cost, without asking: a teacher that answers from the response store only.

The rest is refused with the reason "dry run". Where a step is made from the answers of the one before it, its requests
cannot be known, and are missing from the account; so are repetitions of answers that turn out not to be usable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from alignkit.core.config import TeacherConfig, TeacherMode
from alignkit.teacher.client import Answer, OnAnswer, Request, Usage
from alignkit.teacher.prices import cost, show_cost
from alignkit.teacher.replay import Pending, replay
from alignkit.teacher.store import Reply, ResponseStore
from alignkit.teacher.tokens import TokenCounter, token_counter

DRY_RUN = "dry run"
"""The reason of every answer that is not given."""


@dataclass
class Estimate:
    """What a step would send. Tokens are for `to_send`; what the store holds costs nothing."""

    requests: int = 0
    stored: int = 0
    """Answered by the response store."""
    equal: int = 0
    """Equal to another request of the run, and sent once with it."""
    to_send: int = 0
    prompt_tokens: int = 0
    most_completion_tokens: int = 0
    """The limits on the answers' lengths, summed: no more than this."""

    def add(self, other: Estimate) -> None:
        """Sum up."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class DryRunTeacher:
    """Counts instead of asking; nothing is sent or stored. `steps` has the estimates, in the order they were asked in.

    `begin` names the step that the next requests are counted under.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.counter: TokenCounter = token_counter(config.model)
        self.step = "requests"
        self.steps: dict[str, Estimate] = {}
        self.usage = Usage()
        self._sent: set[str] = set()

    def begin(self, step: str) -> None:
        """Count the next requests under this name."""
        self.step = step

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        """What the store holds, and a refusal for the rest."""
        with ExitStack() as stack:
            lookup = self._lookup(stack)
            answers = [self._count(request, lookup) for request in requests]
        self.usage.count(answers)
        for position, answer in enumerate(answers):
            if on_answer:
                on_answer(position, answer)
        return answers

    def report(self) -> str:
        """The account as a table, and what it leaves out."""
        lines = [f"{'dry run':24s} {'requests':>9s} {'stored':>7s} {'to send':>8s} {'tokens sent':>12s}  cost"]
        total = Estimate()
        for name, step in self.steps.items():
            lines.append(self._row(name, step))
            total.add(step)
        if len(self.steps) > 1:
            lines.append(self._row("total", total))
        lines.append(f"Tokens: {self.counter.how}. Cost: from answers without a word to answers of teacher.max_tokens.")
        lines.append(
            "Nothing was sent. Steps that are made from the answers of earlier ones, and repetitions, are missing."
        )
        return "\n".join(lines)

    def cost_range(self, step: Estimate) -> tuple[float | None, float | None]:
        """The lowest and the highest cost of a step; None where a price is not known."""
        lowest = round(step.prompt_tokens * (1 - self.counter.margin))
        highest = round(step.prompt_tokens * (1 + self.counter.margin))
        prices = self.config.prices
        return cost(prices, lowest, 0), cost(prices, highest, step.most_completion_tokens)

    def _row(self, name: str, step: Estimate) -> str:
        lowest, highest = self.cost_range(step)
        prices = self.config.prices
        shown = show_cost(highest, prices) if lowest is None else f"{lowest:,.4f} to {show_cost(highest, prices)}"
        numbers = f"{step.requests:9,d} {step.stored:7,d} {step.to_send:8,d} {step.prompt_tokens:12,d}"
        return f"{name:24s} {numbers}  {shown}"

    def _lookup(self, stack: ExitStack) -> Callable[[str], Reply | None]:
        """The store's, where there is a store; it is not created."""
        path = Path(self.config.store)
        if self.config.mode is TeacherMode.scripted or not path.exists():
            return lambda key: None
        return stack.enter_context(ResponseStore(path)).get

    def _count(self, request: Request, lookup: Callable[[str], Reply | None]) -> Answer:
        step = self.steps.setdefault(self.step, Estimate())
        step.requests += 1
        found = replay(self.config, request, lookup)
        if self.config.retry_failed and isinstance(found, Answer) and not found.usable:
            found = replay(self.config, request, lambda key: None)
        if not isinstance(found, Pending):
            step.stored += 1
            return found
        if found.key in self._sent:
            step.equal += 1
        else:
            self._sent.add(found.key)
            step.to_send += 1
            step.prompt_tokens += self.counter.count_messages(found.request.messages)
            step.most_completion_tokens += found.parts["max_tokens"]
        return Answer(None, reason=DRY_RUN, detail="nothing was sent")
