"""Self-instruct: new examples in the manner of a few seeds, after Wang et al., 2022 (arXiv 2212.10560).

A few old examples are shown, mostly seeds and some that the teacher wrote before, and new ones are asked for. What
repeats a seed or an accepted row is dropped (ROUGE-L), and so is what is too short or too long, holds a word of the
blacklist, or contradicts another row. There are two shapes:

  qa    an example is a statement, a question and an answer, written in one request. The kind of the question,
        judgmental (answered by yes or no) or not, is drawn beforehand, and the answer must be of that kind.
  task  the paper's own road, in `self_instruct_tasks`: instructions, whether each is a classification, its instances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Literal, Optional

from pydantic import BaseModel

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Message, QAExample
from alignkit.data.wording import QUESTION_MARKS, language_problem
from alignkit.data.words import words
from alignkit.teacher.client import Request
from alignkit.teacher.prompts import render
from alignkit.teacher.recipes import self_instruct_tasks as tasks
from alignkit.teacher.recipes.asking import Asker, left_open
from alignkit.teacher.recipes.self_instruct_pool import (
    HOPELESS_REQUESTS,
    Blacklist,
    Novelty,
    length_problem,
    mix,
)

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

STATEMENT_WORDS = (4, 1000)
"""Fewest and most words of a statement; a Chinese character counts as one."""
QUESTION_WORDS = (2, 150)


class Shape(Enum):
    """What an example is: a question about a statement, or a task with its inputs and outputs."""

    qa = "qa"
    task = "task"


@dataclass
class SelfInstructConfig:
    """Settings of the recipe `self_instruct`."""

    shape: Shape = Shape.qa
    """`qa`: statement, question and answer, one request each. `task`: instruction, input and output, step by step."""
    answers: bool = True
    """Whether the new rows are to have answers, or only statements and questions."""
    judgmental_share: float = 0.5
    """Of the shape qa: share of the questions that are to be answered by yes or no."""
    novelty_threshold: float = 0.7
    """Highest ROUGE-L F that a new statement and question, or a new instruction, may have with a seed or an accepted
    row."""
    blacklist: Optional[str] = None
    """File of words, one a line, that a new question or instruction must not hold; none: no such words."""
    seeds_per_prompt: int = 6
    """Seeds shown in each request."""
    machine_per_prompt: int = 2
    """Accepted rows shown beside the seeds; more seeds take their place while there are none."""
    instructions_per_request: int = 8
    """Of the shape task: new instructions asked for at once."""
    instances_per_task: int = 5
    """Of the shape task: most inputs and outputs for one instruction, each of which becomes a row."""
    max_requests: Optional[int] = None
    """Ask at most this often for examples (qa) or instructions (task); none: three times `count`."""
    round_size: int = 32
    """Requests made up from the same accepted rows, and sent together."""

    def check(self) -> None:
        """Raise `UserError` for numbers that make no sense."""
        for key in ("round_size", "seeds_per_prompt", "instructions_per_request", "instances_per_task"):
            if getattr(self, key) < 1:
                raise UserError(f"self_instruct.{key}={getattr(self, key)}: must be at least 1")
        if self.machine_per_prompt < 0:
            raise UserError(f"self_instruct.machine_per_prompt={self.machine_per_prompt}: must not be negative")
        if self.max_requests is not None and self.max_requests < 1:
            raise UserError(
                f"self_instruct.max_requests={self.max_requests}: must be at least 1, or null for three times count"
            )
        if not 0 <= self.judgmental_share <= 1:
            raise UserError(f"self_instruct.judgmental_share={self.judgmental_share}: must lie between 0 and 1")
        if not 0 < self.novelty_threshold <= 1:
            raise UserError(
                f"self_instruct.novelty_threshold={self.novelty_threshold}: must lie above 0 and not above 1"
            )
        if self.shape is Shape.task and not self.answers:
            raise UserError("self_instruct.answers=false: rows of self_instruct.shape=task always have answers")


class NewExample(BaseModel):
    """What a teacher is to write. `answer` is empty when only a question was asked for."""

    statement: str
    question: str
    answer: str = ""


@dataclass(frozen=True)
class Draft:
    """A request by its number, the kind of question it asks for, and the seeds that it shows."""

    number: int
    kind: Literal["judgmental", "non_judgmental"]
    parents: list[str]
    request: Request


def rows(
    seeds: Sequence[QAExample],
    count: int,
    config: SelfInstructConfig,
    ask: Asker,
    pool: Novelty,
    *,
    read_verdict: Callable[[str], str | None],
    name: str,
    seed: int,
    source: str,
) -> Iterator[QAExample | Dropped]:
    """Ask for examples, round by round, until `count` are new.

    `read_verdict` finds the "yes" or "no" in an answer, "undecided" if it says that nobody can tell, else None.
    The same seeds and answers give the same rows. Ids are `<name>-<number>`.
    """
    blacklist = Blacklist(config.blacklist)
    if config.shape is Shape.task:
        yield from tasks.rows(
            *(seeds, count, config, ask, pool, blacklist),
            read_verdict=read_verdict,
            name=name,
            seed=seed,
            source=source,
        )
        return
    usable, dropped = _usable_seeds(seeds, config)
    yield from dropped
    filters = Filters(pool, blacklist, read_verdict)
    for example in usable:
        filters.accept(example)
    accepted: list[QAExample] = []
    asked, pending, most = 0, 0, config.max_requests or 3 * count
    while len(accepted) + pending < count and asked < most and (accepted or pending or asked < HOPELESS_REQUESTS):
        size = min(config.round_size, count - len(accepted) - pending, most - asked)
        drafts = [_draw(config, usable, accepted, seed, number) for number in range(asked + 1, asked + size + 1)]
        answers = ask("examples", [draft.request for draft in drafts])
        asked, pending = asked + size, pending + left_open(answers)
        for draft, answer in zip(drafts, answers, strict=True):
            id = f"{name}-request-{draft.number}"
            if not answer.usable:
                row = {"id": id, "kind": draft.kind, "parents": draft.parents, "answer": answer.text}
                yield Dropped(reason=str(answer.reason), row=row, detail=answer.detail)
                continue
            example = _example(id, draft, answer.value, config.answers, source)
            if problem := filters.problem(example):
                reason, _, detail = problem.partition(": ")
                yield Dropped(reason=reason, row=example.model_dump(), detail=detail)
                continue
            accepted.append(example.model_copy(update={"id": f"{name}-{len(accepted) + 1:05d}"}))
            filters.accept(accepted[-1])
            yield accepted[-1]


class Filters:
    """What a new example must pass, and the seeds and rows that it is compared with."""

    def __init__(self, pool: Novelty, blacklist: Blacklist, read_verdict: Callable[[str], str | None]) -> None:
        self._pool = pool
        self._blacklist = blacklist
        self._read_verdict = read_verdict
        self._answered: dict[tuple[str, ...], QAExample] = {}

    def accept(self, example: QAExample) -> None:
        """Compare what follows with this example too."""
        self._pool.add(_novelty_text(example), example.id)
        self._answered.setdefault(_asked(example), example)

    def problem(self, example: QAExample) -> str | None:
        """What is wrong with a new example, as "reason: detail"; None when nothing is."""
        # What the statement speaks of may be asked about.
        if forbidden := self._blacklist.find(example.input) - self._blacklist.find(example.instruction):
            return f"word of the blacklist: {', '.join(sorted(forbidden))}"
        if example.output and (problem := self._wrong_kind(example)):
            return f"{problem}: {example.output}"
        twin = self._answered.get(_asked(example))
        if twin and example.output and words(twin.output) != words(example.output):
            return f"contradicts another row: {twin.id} answers the same question otherwise"
        if match := self._pool.most_similar(_novelty_text(example)):
            return f"too similar: ROUGE-L {match.similarity:.3f} with {match.label}"
        return None

    def _wrong_kind(self, example: QAExample) -> str | None:
        verdict = self._read_verdict(example.output)
        if example.kind == "judgmental" and verdict is None:
            return "judgmental question without a verdict in its answer"
        if example.kind == "non_judgmental" and verdict in ("yes", "no"):
            return "question of fact answered by yes or no"
        return None


def self_instruct_request(examples: Sequence[QAExample], kind: str, *, answers: bool, sample: int = 0) -> Request:
    """Show `examples` and ask for a new one of `kind`, "judgmental" or "non_judgmental", with or without an answer."""
    shown = [_shown(example, answers) for example in examples]
    prompt = render("self_instruct", examples=shown, kind=kind, answers=answers)
    messages = [
        Message(role="system", content=render("self_instruct_system")),
        Message(role="user", content=prompt),
    ]

    known = [text for example in examples for text in (example.instruction, example.input)]

    def check(found: NewExample) -> str | None:
        problem = _problem(found, answers=answers)
        return problem or language_problem(f"{found.statement} {found.question}", *known)

    return Request(messages, sample=sample, shape=NewExample, check=check)


def _problem(found: NewExample, *, answers: bool) -> str | None:
    """What is wrong with the form of an example, as "reason: detail"; None when nothing is."""
    for part in ("statement", "question", "answer") if answers else ("statement", "question"):
        if not getattr(found, part).strip():
            return f"{part} missing"
    for name, text, limits in (
        ("statement", found.statement, STATEMENT_WORDS),
        ("question", found.question, QUESTION_WORDS),
    ):
        if problem := length_problem(name, text, *limits):
            return problem
    if not found.question.strip().endswith(QUESTION_MARKS):
        return f"question without question mark: {found.question.strip()}"
    return None


def _draw(
    config: SelfInstructConfig, seeds: Sequence[QAExample], accepted: Sequence[QAExample], seed: int, number: int
) -> Draft:
    """Make up request `number` from the random seed, the number and the rows accepted so far, and from nothing else."""
    rng = Random(f"{seed}-{number}")
    judgmental = rng.random() < config.judgmental_share
    shown, parents = mix(seeds, accepted, config.seeds_per_prompt, config.machine_per_prompt, rng)
    kind: Literal["judgmental", "non_judgmental"] = "judgmental" if judgmental else "non_judgmental"
    request = self_instruct_request(shown, kind, answers=config.answers, sample=number)
    return Draft(number, kind, parents, request)


def _example(id: str, draft: Draft, found: NewExample, answers: bool, source: str) -> QAExample:
    return QAExample(
        id=id,
        instruction=found.statement.strip(),
        input=found.question.strip(),
        output=found.answer.strip() if answers else "",
        kind=draft.kind,
        source=source,
        parents=draft.parents,
    )


def _usable_seeds(seeds: Sequence[QAExample], config: SelfInstructConfig) -> tuple[list[QAExample], list[Dropped]]:
    """The seeds that can be shown: with statement and question, and with an answer where answers are wanted."""
    usable, dropped = [], []
    for example in seeds:
        if not (example.instruction.strip() and example.input.strip()):
            dropped.append(Dropped(reason="seed without statement or question", row=example.model_dump()))
        elif config.answers and not example.output.strip():
            dropped.append(Dropped(reason="seed without answer", row=example.model_dump()))
        else:
            usable.append(example)
    if not usable:
        raise UserError(
            "data.path: no row has a statement, a question and an answer. Seeds that are tasks want "
            "self_instruct.shape=task; questions without answers want self_instruct.answers=false."
        )
    return usable, dropped


def _shown(example: QAExample, answers: bool) -> dict[str, str]:
    shown = {"kind": example.kind or "unknown", "statement": example.instruction, "question": example.input}
    return {**shown, "answer": example.output} if answers else shown


def _novelty_text(example: QAExample) -> str:
    """What the novelty of a row is measured on: its statement and question."""
    return f"{example.instruction}\n{example.input}"


def _asked(example: QAExample) -> tuple[str, ...]:
    """The words of statement and question: rows that agree in them ask the same."""
    return (*words(example.instruction), "\n", *words(example.input))
