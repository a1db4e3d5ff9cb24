"""Questions that compare two things, each answered by way of two sub-questions and two paragraphs.

After the data generation of QA-Expert: one request at temperature 1 makes up the whole comparison step by step, in the
order of the fields of `Comparison`; what is not exactly of that form is dropped. Then every answer is written anew at
temperature 0. In a share of the comparisons one paragraph or both are first replaced by such as leave their question
open, so that a model learns to say so. Existing records may be given in place of categories: they are answered anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Optional

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Row
from alignkit.data.documents import instructs_model
from alignkit.data.sources.categories import Category
from alignkit.data.sources.qa_expert import MultihopExample, SubQuestion
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.recipes.asking import Asker, left_open
from alignkit.teacher.recipes.multihop_answers import answered
from alignkit.teacher.recipes.multihop_comparison import (
    Comparison,
    Negative,
    Other,
    QuestionType,
    Replacement,
    comparison_request,
    negative_request,
)

# All configurations write Optional[...]; omegaconf takes `... | None` just as well.
# ruff: noqa: UP045

HOPELESS_REQUESTS = 50
"""A teacher that has given nothing usable in as many comparisons is not asked further."""


Compared = tuple[frozenset[str], str]
"""Two things and the attribute in which they are compared."""


@dataclass
class MultihopConfig:
    """Settings of the recipe `multihop`."""

    yes_no_share: float = 0.5
    """Share of the questions that are to be answered by yes or no."""
    negative_share: float = 0.25
    """Share of the comparisons in which a paragraph, or both, is replaced by one that leaves its question open."""
    max_requests: Optional[int] = None
    """Ask for at most this many comparisons; none: three times `count`."""
    round_size: int = 128
    """Comparisons asked for together."""

    def check(self) -> None:
        """Raise `UserError` for numbers that make no sense."""
        for key in ("yes_no_share", "negative_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"multihop.{key}={getattr(self, key)}: must lie between 0 and 1")
        if self.round_size < 1:
            raise UserError(f"multihop.round_size={self.round_size}: must be at least 1")
        if self.max_requests is not None and self.max_requests < 1:
            raise UserError(
                f"multihop.max_requests={self.max_requests}: must be at least 1, or null for three times count"
            )


@dataclass(frozen=True)
class Draft:
    """A request by its number, and what was drawn for it."""

    number: int
    category: Category
    sub_category: str
    popularity: int
    question_type: QuestionType
    request: Request


def rows(
    given: Sequence[Row],
    count: int | None,
    config: MultihopConfig,
    ask: Asker,
    *,
    name: str,
    seed: int,
    source: str,
) -> Iterator[MultihopExample | Dropped]:
    """Make `count` comparisons of the `given` categories, or answer the first `count` of the `given` records anew.

    The same input and answers give the same rows. Ids are `<name>-<number>`.
    """
    categories = [row for row in given if isinstance(row, Category)]
    records = [row for row in given if isinstance(row, MultihopExample)]
    if records:
        found = _records_answered(records[:count], config, ask)
    elif categories and count is not None:
        found = _comparisons(categories, count, config, ask, seed)
    else:
        raise UserError("recipe=multihop needs categories and a count, or records of questions to answer anew")
    number = 0
    for row in found:
        if isinstance(row, MultihopExample):
            number += 1
            update: dict[str, object] = {"id": f"{name}-{number:05d}", "src": source}
            update["meta_info"] = {**row.meta_info, "llm": source.removeprefix("teacher:")}
            if any(instructs_model(sub.paragraph) for sub in row.sub_questions):
                update["flags"] = ["instructs the model"]
            row = row.model_copy(update=update)
        yield row


def _records_answered(
    records: Sequence[MultihopExample], config: MultihopConfig, ask: Asker
) -> Iterator[MultihopExample | Dropped]:
    for start in range(0, len(records), config.round_size):
        batch = records[start : start + config.round_size]
        yield from answered([record.model_copy(update={"parents": [record.id]}) for record in batch], ask)


def _comparisons(
    categories: Sequence[Category], count: int, config: MultihopConfig, ask: Asker, seed: int
) -> Iterator[MultihopExample | Dropped]:
    """Round by round: make comparisons up, replace some paragraphs, answer everything anew."""
    kept, asked, pending, most = 0, 0, 0, config.max_requests or 3 * count
    seen: set[Compared] = set()
    while kept + pending < count and asked < most and (kept or pending or asked < HOPELESS_REQUESTS):
        size = min(config.round_size, count - kept - pending, most - asked)
        drafts = [_draw(categories, config, seed, number) for number in range(asked + 1, asked + size + 1)]
        asked += size
        answers = ask("comparisons", [draft.request for draft in drafts])
        pending += left_open(answers)
        new, unusable = _read(zip(drafts, answers, strict=True), seen)
        questions, failed = _with_negatives(new, config, ask, seed)
        yield from (*unusable, *failed)
        for question in answered(questions, ask):
            kept += isinstance(question, MultihopExample)
            yield question


# -- making a comparison up --------------------------------------------------------------------------------------------


def _draw(categories: Sequence[Category], config: MultihopConfig, seed: int, number: int) -> Draft:
    """Make up request `number` from the random seed and the number, and from nothing else."""
    rng = Random(f"{seed}-multihop-{number}")
    category = rng.choice(categories)
    sub_category = rng.choice(category.sub_categories or [category.category])
    popularity = rng.randint(1, 5)
    question_type: QuestionType = "yes-no" if rng.random() < config.yes_no_share else "wh"
    request = comparison_request(
        category.category,
        sub_category,
        popularity,
        question_type,
        attribute_number=rng.randint(1, 10),
        other_attributes=rng.randint(1, 3),
        sample=number,
    )
    return Draft(number, category, sub_category, popularity, question_type, request)


def _read(
    drafted: Iterable[tuple[Draft, Answer]], seen: set[Compared]
) -> tuple[list[tuple[Draft, Comparison]], list[Dropped]]:
    """The usable comparisons that are not in `seen`, to which they are added."""
    new, dropped = [], []
    for draft, answer in drafted:
        row = {**_draft_row(draft), "answer": answer.text}
        if not answer.usable:
            dropped.append(Dropped(reason=str(answer.reason), row=row, detail=answer.detail))
            continue
        found: Comparison = answer.value
        things = frozenset({found.entity_1.strip().casefold(), found.entity_2.strip().casefold()})
        compared = (things, found.attribute.strip().casefold())
        if compared in seen:
            detail = f"{', '.join(sorted(things))}: {found.attribute}"
            dropped.append(Dropped(reason="compared before", row=row, detail=detail))
            continue
        seen.add(compared)
        new.append((draft, found))
    return new, dropped


# -- negatives ---------------------------------------------------------------------------------------------------------


def _with_negatives(
    new: Sequence[tuple[Draft, Comparison]], config: MultihopConfig, ask: Asker, seed: int
) -> tuple[list[MultihopExample], list[Dropped]]:
    """The comparisons as questions still to be answered, some of their paragraphs replaced."""
    plans = [_replacements(draft, config, seed) for draft, _ in new]
    requests = [
        negative_request(draft.sub_category, found, each)
        for (draft, found), plan in zip(new, plans, strict=True)
        for each in plan
    ]
    answers = iter(ask("negatives", requests))
    questions, dropped = [], []
    for (draft, found), plan in zip(new, plans, strict=True):
        replaced = [(each, next(answers)) for each in plan]
        failed = next((answer for _, answer in replaced if not answer.usable), None)
        if failed is None:
            questions.append(_question(draft, found, {each: answer.value for each, answer in replaced}))
        else:
            row = {**_draft_row(draft), **found.model_dump(), "answer": failed.text}
            dropped.append(Dropped(reason=str(failed.reason), row=row, detail=f"negative: {failed.detail}"))
    return questions, dropped


def _replacements(draft: Draft, config: MultihopConfig, seed: int) -> list[Replacement]:
    """Which paragraphs of a comparison to replace, and how; none in most."""
    rng = Random(f"{seed}-negative-{draft.number}")
    if rng.random() >= config.negative_share:
        return []
    others: tuple[Other, ...] = ("entity", "attribute", "both")
    return [Replacement(paragraph, rng.choice(others)) for paragraph in rng.choice([(1,), (2,), (1, 2)])]


# -- rows --------------------------------------------------------------------------------------------------------------


def _question(draft: Draft, found: Comparison, negatives: dict[Replacement, Negative]) -> MultihopExample:
    """The comparison in QA-Expert's format; the answers are those of the comparison, still to be written anew."""
    replaced = {each.paragraph: negative for each, negative in negatives.items()}
    parts = (
        (found.sub_question_1, found.paragraph_1, found.answer_1),
        (found.sub_question_2, found.paragraph_2, found.answer_2),
    )
    subs = []
    for number, (question, paragraph, answer) in enumerate(parts, 1):
        sub = SubQuestion(question=question.strip(), paragraph=paragraph.strip(), long_answer="", answer=answer.strip())
        if number in replaced:
            text = replaced[number].paragraph.strip()
            sub = sub.model_copy(update={"paragraph": text, "unanswerable": True, "answer": None})
        subs.append(sub)
    meta = {
        "src": "comparison",
        "category": draft.category.category,
        "sub_category": draft.sub_category,
        "popularity": draft.popularity,
        "question_type": draft.question_type,
        "entity_1": found.entity_1.strip(),
        "entity_2": found.entity_2.strip(),
        "comparison_attribute": found.attribute.strip(),
        "list_of_attributes": found.attributes,
        "negatives": [
            {"sub_question": each.paragraph, "other": each.other, **negative.model_dump(exclude={"paragraph"})}
            for each, negative in negatives.items()
        ],
    }
    return MultihopExample(
        id=f"request-{draft.number}",
        parents=[draft.category.id],
        question=found.question.strip(),
        sub_questions=subs,
        final_answer=found.final_answer.strip(),
        multihop=True,
        tag="comparison",
        meta_info=meta,
    )


def _draft_row(draft: Draft) -> dict[str, object]:
    """What is known of a request, for dropped.jsonl."""
    row: dict[str, object] = {"id": f"request-{draft.number}", "parents": [draft.category.id]}
    return {**row, "sub_category": draft.sub_category, "question_type": draft.question_type}
