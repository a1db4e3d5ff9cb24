"""Answering questions of several steps at temperature 0: each sub-question from its paragraph, the question from those.

Whatever was answered before is answered anew, because one call at temperature 1 that makes up everything at once
answers carelessly. What comes out are rows in QA-Expert's format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from alignkit.core.records import Dropped, Message
from alignkit.data.sources.qa_expert import MultihopExample, SubQuestion
from alignkit.data.wording import contains, language_problem, leaves_open, verdict
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.prompts import render
from alignkit.teacher.recipes.asking import Asker


class SubAnswer(BaseModel):
    """The answer to a sub-question from its paragraph."""

    evidence: str
    answerable: bool
    short_answer: str
    answer: str


class FinalAnswer(BaseModel):
    """The answer to a question from the answers to its sub-questions."""

    summary: str
    answerable: bool
    short_answer: str
    answer: str


@dataclass(frozen=True)
class Step:
    """One sub-question as it was answered."""

    question: SubQuestion
    answer: Answer


def answered(questions: Sequence[MultihopExample], ask: Asker) -> Iterator[MultihopExample | Dropped]:
    """Every question with new answers, in order; dropped where an answer is unusable or contradicts `unanswerable`."""
    asked = [sub for question in questions for sub in question.sub_questions]
    answers = iter(ask("answers", [answer_request(sub.question, sub.paragraph) for sub in asked]))
    steps = [[Step(sub, next(answers)) for sub in question.sub_questions] for question in questions]
    results = [_with_sub_answers(question, each) for question, each in zip(questions, steps, strict=True)]
    open_ends = [each for each in results if isinstance(each, MultihopExample) and each.takes_several_steps]
    finals = iter(ask("final answers", [final_request(each.question, _facts(each)) for each in open_ends]))
    for result in results:
        if isinstance(result, MultihopExample) and result.takes_several_steps:
            yield _with_final_answer(result, next(finals))
        else:
            yield result


def answer_request(question: str, paragraph: str) -> Request:
    """Ask a sub-question about its paragraph."""
    prompt = render("multihop_answer", question=question, paragraph=paragraph)

    def check(found: SubAnswer) -> str | None:
        problem = _answer_problem(found) or language_problem(found.answer, question, paragraph)
        if problem is None and found.answerable and not verdict(found.short_answer):
            grounded = contains(paragraph, found.short_answer)
            return None if grounded else f"short answer is not in the paragraph: {found.short_answer}"
        return problem

    return Request(_messages(prompt), temperature=0.0, shape=SubAnswer, check=check)


def final_request(question: str, facts: Sequence[str]) -> Request:
    """Ask the question about the answers to its sub-questions."""
    prompt = render("multihop_final", question=question, facts=list(facts))

    def check(found: FinalAnswer) -> str | None:
        return _answer_problem(found) or language_problem(found.answer, question, *facts)

    return Request(_messages(prompt), temperature=0.0, shape=FinalAnswer, check=check)


def _messages(prompt: str) -> list[Message]:
    return [Message(role="system", content=render("multihop_system")), Message(role="user", content=prompt)]


def _answer_problem(found: SubAnswer | FinalAnswer) -> str | None:
    """What is wrong with an answer, as "reason: detail"; None when nothing is."""
    explained = found.evidence if isinstance(found, SubAnswer) else found.summary
    if not explained.strip():
        return "evidence missing" if isinstance(found, SubAnswer) else "summary missing"
    if not found.answer.strip():
        return "answer missing"
    if not found.answerable:
        if found.short_answer.strip():
            return f"short answer to a question left open: {found.short_answer}"
        return None if leaves_open(found.answer) else f"answer does not say that the question is open: {found.answer}"
    if not found.short_answer.strip():
        return "short answer missing"
    if not contains(found.answer, found.short_answer):
        return f"answer does not contain the short answer: {found.short_answer}"
    return None


def _with_sub_answers(question: MultihopExample, steps: Sequence[Step]) -> MultihopExample | Dropped:
    """The question with the answers to its sub-questions; a question of one step is answered by its only one."""
    for number, step in enumerate(steps, 1):
        problem = _contradiction(step)
        if problem is not None:
            reason, detail = problem
            return Dropped(reason=reason, row=question.model_dump(), detail=f"sub-question {number}: {detail}")
    subs = [_sub_answered(step) for step in steps]
    update: dict[str, object] = {"sub_questions": subs}
    if not question.takes_several_steps:
        update |= {"final_answer": subs[-1].long_answer, "answer": subs[-1].answer}
    return question.model_copy(update=update)


def _contradiction(step: Step) -> tuple[str, str] | None:
    """Why an answer is of no use, as reason and detail."""
    if not step.answer.usable:
        return str(step.answer.reason), step.answer.detail
    found: SubAnswer = step.answer.value
    if found.answerable and step.question.unanswerable:
        return "negative paragraph answers its sub-question", found.answer
    if not found.answerable and not step.question.unanswerable:
        return "paragraph does not answer its sub-question", found.answer
    return None


def _sub_answered(step: Step) -> SubQuestion:
    found: SubAnswer = step.answer.value
    short = found.short_answer.strip() if found.answerable else None
    update = {"answer": short, "long_answer": _whole(found.evidence, found.answer)}
    return step.question.model_copy(update=update)


def _with_final_answer(question: MultihopExample, answer: Answer) -> MultihopExample | Dropped:
    if not answer.usable:
        return Dropped(reason=str(answer.reason), row=question.model_dump(), detail=f"final answer: {answer.detail}")
    found: FinalAnswer = answer.value
    is_open = any(sub.unanswerable for sub in question.sub_questions)
    if found.answerable == is_open:
        reason = "final answer although a fact is missing" if is_open else "final answer does not follow from its facts"
        return Dropped(reason=reason, row=question.model_dump(), detail=found.answer)
    final = f"Summary: {_whole(found.summary, found.answer)}"
    short = found.short_answer.strip() if found.answerable else None
    return question.model_copy(update={"final_answer": final, "answer": short})


def _whole(explained: str, answer: str) -> str:
    """Evidence and answer in one text, in QA-Expert's way."""
    return f"{explained.strip()}\nAnswer: {answer.strip()}"


def _facts(question: MultihopExample) -> list[str]:
    """The answers to the sub-questions, without their evidence."""
    return [sub.long_answer.rpartition("\nAnswer: ")[2] for sub in question.sub_questions]
