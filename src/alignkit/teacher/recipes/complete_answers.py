"""Short answers become full ones: SQuAD, BoolQ, DROP, MuSiQue, HotpotQA, or rows of the same form.

After the data generation of QA-Expert. The teacher is shown the text, the question and the short answer, and writes a
whole sentence around it; to yes/no questions it writes a thought first, to questions that take calculating the
operation as well. Questions of several steps are answered step by step, and then from those answers alone; they come
out in QA-Expert's format. A share of questions that their text leaves open is kept on purpose, with an answer that says
so. A full answer without the short one in it is of no use, nor is one that invents what an open question lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from pydantic import BaseModel

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Message, QAExample
from alignkit.data.documents import instructs_model
from alignkit.data.sources.qa_expert import MultihopExample, SubQuestion
from alignkit.data.sources.short_answers import ShortAnswer, ShortSubQuestion
from alignkit.data.wording import contains, invented, language_problem, leaves_open, verdict
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.prompts import render
from alignkit.teacher.recipes.asking import Asker, left_open, round_size
from alignkit.teacher.recipes.operations import operation_problem


@dataclass
class CompleteAnswersConfig:
    """Settings of the recipe `complete_answers`."""

    unanswerable_share: float = 0.375
    """Largest share of the questions that may be unanswerable; the rest of those, drawn by the seed, are dropped."""
    round_size: int = 512
    """Questions asked together."""

    def check(self) -> None:
        """Raise `UserError` for numbers that make no sense."""
        if not 0 <= self.unanswerable_share <= 1:
            raise UserError(f"complete_answers.unanswerable_share={self.unanswerable_share}: must lie between 0 and 1")
        if self.round_size < 1:
            raise UserError(f"complete_answers.round_size={self.round_size}: must be at least 1")


class FullAnswer(BaseModel):
    """A full answer."""

    answer: str


class ReasonedAnswer(BaseModel):
    """A thought and the full answer that follows."""

    thought: str
    final_answer: str


class CalculatedAnswer(BaseModel):
    """A thought, the operation that gives the answer (empty where there is none), and the full answer."""

    thought: str
    operation: str
    final_answer: str


Completed = QAExample | MultihopExample | Dropped


def rows(
    examples: Sequence[ShortAnswer],
    config: CompleteAnswersConfig,
    ask: Asker,
    *,
    name: str,
    seed: int,
    source: str,
    count: int | None = None,
) -> Iterator[Completed]:
    """One row with a full answer for each example, or the reason why there is none. Ids are `<name>-<number>`.

    No more examples are asked about than `count` rows take.
    """
    kept, dropped = _with_few_unanswerable(examples, config.unanswerable_share, seed)
    yield from dropped
    start = number = pending = 0
    while start < len(kept) and (count is None or number + pending < count):
        end = start + round_size(config.round_size, None if count is None else count - number - pending)
        found = list(_completed(kept[start:end], ask, source))
        start, pending = end, pending + left_open(found)
        for row in found:
            if not isinstance(row, Dropped):
                number += 1
                row = row.model_copy(update={"id": f"{name}-{number:05d}"})
            yield row


def _with_few_unanswerable(
    examples: Sequence[ShortAnswer], share: float, seed: int
) -> tuple[list[ShortAnswer], list[Dropped]]:
    """All answerable examples, and as many of the others as make up at most `share` of all."""
    positions = [index for index, example in enumerate(examples) if example.unanswerable]
    answerable = len(examples) - len(positions)
    most = len(positions) if share == 1 else int(share * answerable / (1 - share) + 1e-9)
    superfluous = set(positions)
    if most < len(positions):
        superfluous -= set(Random(f"{seed}-unanswerable").sample(positions, most))
    else:
        superfluous = set()
    kept = [example for index, example in enumerate(examples) if index not in superfluous]
    reason = "unanswerable, beyond complete_answers.unanswerable_share"
    return kept, [Dropped(reason=reason, row=examples[index].model_dump()) for index in sorted(superfluous)]


def _completed(examples: Sequence[ShortAnswer], ask: Asker, source: str) -> Iterator[Completed]:
    """The examples with full answers, in order: those of one step, and those of several."""
    simple = [example for example in examples if not example.sub_questions]
    stepwise = [example for example in examples if example.sub_questions]
    answers = iter(ask("full answers", [full_answer_request(example) for example in simple]))
    results = iter(_stepwise_completed(stepwise, ask, source))
    for example in examples:
        row = next(results) if example.sub_questions else _simple_row(example, next(answers), source)
        if not isinstance(row, Dropped) and any(map(instructs_model, example.paragraphs)):
            row = row.model_copy(update={"flags": ["instructs the model"]})
        yield row


# -- questions of one step ---------------------------------------------------------------------------------------------


def full_answer_request(example: ShortAnswer) -> Request:
    """Ask for the full answer to a question, with the reasoning that the example asks for."""
    prompt: dict[str, Any] = {"context": _context(example), "question": example.question}
    prompt["short_answer"] = example.answers
    if not example.unanswerable and example.reasoning == "arithmetic":
        text = render("complete_answers_arithmetic", **prompt)
        return _request(text, CalculatedAnswer, lambda found: _calculated_problem(found, example))
    if example.verdict and example.reasoning == "thought":
        text = render("complete_answers_thought", **prompt)
        return _request(text, ReasonedAnswer, lambda found: _reasoned_problem(found, example))
    text = render("complete_answers_span", **prompt, every=example.every)
    return _request(text, FullAnswer, lambda found: answer_problem(found.answer, example))


def answer_problem(answer: str, example: ShortAnswer) -> str | None:
    """What is wrong with a full answer, as "reason: detail"; None when nothing is."""
    if not answer.strip():
        return "full answer missing"
    if problem := language_problem(answer, _context(example), example.question, *example.answers):
        return problem
    if example.unanswerable:
        return _open_answer_problem(answer, example)
    if example.verdict:
        return None if verdict(answer) == example.verdict else f"verdict missing: {example.verdict}"
    present = [short for short in example.answers if contains(answer, short)]
    if len(present) == len(example.answers) or (present and not example.every):
        return None
    absent = [short for short in example.answers if short not in present]
    return f"short answer missing: {' | '.join(absent)}"


def _open_answer_problem(answer: str, example: ShortAnswer) -> str | None:
    if not leaves_open(answer):
        return f"does not say that the question is open: {answer}"
    guesses = [each for each in example.plausible if contains(answer, each) and not contains(example.question, each)]
    if guesses:
        return f"guesses at an open question: {guesses[0]}"
    strange = invented(answer, f"{example.question}\n{_context(example)}")
    return f"invented: {', '.join(strange)}" if strange else None


def _reasoned_problem(found: ReasonedAnswer | CalculatedAnswer, example: ShortAnswer) -> str | None:
    return "thought missing" if not found.thought.strip() else answer_problem(found.final_answer, example)


def _calculated_problem(found: CalculatedAnswer, example: ShortAnswer) -> str | None:
    return operation_problem(found.operation, example.answers) or _reasoned_problem(found, example)


def _simple_row(example: ShortAnswer, answer: Answer, source: str) -> QAExample | Dropped:
    if not answer.usable:
        return _refused(example, answer)
    row = {
        "id": example.id,
        "parents": [example.id],
        "instruction": _context(example),
        "input": example.question,
        "output": _output(answer.value),
        "kind": "judgmental" if example.verdict else "non_judgmental",
        "source": source,
        "dataset": example.dataset,
        "short_answers": example.answers,
        "unanswerable": example.unanswerable,
    }
    return QAExample.model_validate(row)


def _output(found: FullAnswer | ReasonedAnswer | CalculatedAnswer) -> str:
    """Thought, operation and answer in one text, the answer in the way of QA-Expert."""
    if isinstance(found, FullAnswer):
        return found.answer.strip()
    operation = found.operation.strip() if isinstance(found, CalculatedAnswer) else ""
    parts = [found.thought.strip(), operation, f"Answer: {found.final_answer.strip()}"]
    return "\n".join(part for part in parts if part)


# -- questions of several steps ----------------------------------------------------------------------------------------


def _stepwise_completed(examples: Sequence[ShortAnswer], ask: Asker, source: str) -> list[MultihopExample | Dropped]:
    """Answer the sub-questions first, then the question from their answers."""
    requests = [full_answer_request(_step(example, sub)) for example in examples for sub in example.sub_questions]
    answers = iter(ask("sub-answers", requests))
    steps = [[next(answers) for _ in example.sub_questions] for example in examples]
    facts = [_facts(example, each) for example, each in zip(examples, steps, strict=True)]
    requests = [
        final_answer_request(example, each)
        for example, each in zip(examples, facts, strict=True)
        if not isinstance(each, Dropped)
    ]
    finals = iter(ask("final answers", requests))
    return [
        each if isinstance(each, Dropped) else _stepwise_row(example, each, next(finals), source)
        for example, each in zip(examples, facts, strict=True)
    ]


def final_answer_request(example: ShortAnswer, facts: Sequence[str]) -> Request:
    """Ask for the final answer to a question, from the full answers to its sub-questions."""
    text = render("complete_answers_facts", facts=list(facts), question=example.question, short_answer=example.answers)
    return _request(text, ReasonedAnswer, lambda found: _reasoned_problem(found, example))


def _step(example: ShortAnswer, sub: ShortSubQuestion) -> ShortAnswer:
    """A sub-question as an example of its own."""
    return ShortAnswer(
        id=example.id,
        question=sub.question,
        paragraphs=[sub.paragraph],
        answers=[] if sub.unanswerable else [sub.answer],
        unanswerable=sub.unanswerable,
        dataset=example.dataset,
    )


def _facts(example: ShortAnswer, answers: Sequence[Answer]) -> list[str] | Dropped:
    for number, answer in enumerate(answers, 1):
        if not answer.usable:
            return _refused(example, answer, f"sub-question {number}: ")
    return [answer.value.answer.strip() for answer in answers]


def _stepwise_row(example: ShortAnswer, facts: Sequence[str], answer: Answer, source: str) -> MultihopExample | Dropped:
    if not answer.usable:
        return _refused(example, answer, "final answer: ")
    found: ReasonedAnswer = answer.value
    subs = [
        SubQuestion(
            question=sub.question,
            paragraph=sub.paragraph,
            long_answer=fact,
            answer=None if sub.unanswerable else sub.answer,
            unanswerable=True if sub.unanswerable else None,
        )
        for sub, fact in zip(example.sub_questions, facts, strict=True)
    ]
    return MultihopExample(
        id=example.id,
        parents=[example.id],
        question=example.question,
        sub_questions=subs,
        final_answer=f"Summary: {found.thought.strip()}\nAnswer: {found.final_answer.strip()}",
        answer=None if example.unanswerable else example.answers[0],
        multihop=True,
        src=source,
        tag=example.dataset,
        meta_info={"src": example.dataset, "llm": source.removeprefix("teacher:")},
    )


# -- both --------------------------------------------------------------------------------------------------------------


def _request(prompt: str, shape: type[BaseModel], check: Callable[[Any], str | None]) -> Request:
    messages = [
        Message(role="system", content=render("complete_answers_system")),
        Message(role="user", content=prompt),
    ]
    return Request(messages, temperature=0.0, shape=shape, check=check)


def _context(example: ShortAnswer) -> str:
    return "\n".join(example.paragraphs)


def _refused(example: ShortAnswer, answer: Answer, place: str = "") -> Dropped:
    row = {**example.model_dump(), "full_answer": answer.text}
    return Dropped(reason=str(answer.reason), row=row, detail=f"{place}{answer.detail}")
