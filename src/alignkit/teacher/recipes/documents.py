"""Questions and answers about documents, each from a window of consecutive pages, with distractors in its context.

For every window the teacher writes questions on each topic; scores them on the text of the window (relevance, coverage)
and against the outline of the document (global relevance); and answers those that reach `min_score` from the window
alone. The context of a row is the window's pages, with chunks of other pages of the document that a search finds for
the question put between them at random, so that neither position nor length tells which pages matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from random import Random
from typing import Protocol

from alignkit.core.errors import UserError
from alignkit.core.records import DocumentPage, Dropped
from alignkit.data.chunks import Chunk, chunk_pages
from alignkit.data.documents import instructs_model
from alignkit.data.sources.documents import DocumentQuestion
from alignkit.teacher.client import Answer
from alignkit.teacher.recipes.asking import Asker, left_open, left_over, round_size
from alignkit.teacher.recipes.document_requests import (
    OUTLINE_CHARACTERS,
    answer_problem,
    answer_request,
    clean_question,
    global_request,
    outline,
    question_problem,
    questions_request,
    scores_request,
)

GRADED = ("relevance", "global_relevance", "coverage")
"""What the teacher grades a question by, from 0 to 10; `min_score` holds for each."""


@dataclass
class DocumentsConfig:
    """Settings of the recipe `documents`."""

    topics: list[str] = field(default_factory=list)
    """What the questions are to be about, like "use and maintenance"; none: whatever the pages are about."""
    questions_per_window: int = 5
    """Questions asked for at most, for each window and topic."""
    window_pages: int = 2
    """Consecutive pages that questions are asked about together; windows do not overlap."""
    skip_pages: int = 0
    """Pages left out at the beginning of each document (title, contents)."""
    window_characters: int = 20_000
    """Longer windows are dropped."""
    min_score: int = 6
    """Lowest of the three scores, 1 to 10, with which a question is kept."""
    outline_characters: int = 4000
    """Of the document's outline, by which global relevance is scored."""
    distractors: int = 1
    """Chunks of other pages in the context."""
    distractor_rank: int = 10
    """The distractors are the last of so many best hits: similar, but less likely to hold the answer than the first."""
    chunk_characters: int = 1000
    """Longest chunk that can be a distractor."""
    cite: bool = True
    """Head each passage of the context with `[document, page]`, and end each answer with the pages it rests on."""
    system: str = "Answer the question from the context alone, in the language of the question."
    """System message of the rows."""
    round_windows: int = 128
    """Windows whose requests are sent together."""

    def check(self) -> None:
        """Raise `UserError` for numbers that make no sense."""
        for key in ("questions_per_window", "window_pages", "window_characters", "distractor_rank", "chunk_characters"):
            if getattr(self, key) < 1:
                raise UserError(f"documents.{key}={getattr(self, key)}: must be at least 1")
        for key in ("skip_pages", "distractors"):
            if getattr(self, key) < 0:
                raise UserError(f"documents.{key}={getattr(self, key)}: must not be negative")
        if not 1 <= self.min_score <= 10:
            raise UserError(f"documents.min_score={self.min_score}: must lie between 1 and 10")
        if self.distractors > self.distractor_rank:
            raise UserError(f"documents.distractors={self.distractors}: must not exceed distractor_rank")
        if self.outline_characters < OUTLINE_CHARACTERS:
            raise UserError(
                f"documents.outline_characters={self.outline_characters}: must be at least {OUTLINE_CHARACTERS}"
            )
        if self.round_windows < 1:
            raise UserError(f"documents.round_windows={self.round_windows}: must be at least 1")


class Hit(Protocol):
    """A text that was found, by its position."""

    @property
    def index(self) -> int: ...  # noqa: D102


class Index(Protocol):
    """What the recipe needs of a search index (`alignkit.retrieval.bm25.BM25Index`)."""

    def search(self, queries: Sequence[str], k: int) -> Sequence[Sequence[Hit]]:
        """For each query its best texts, best first."""
        ...


class MakeIndex(Protocol):
    """Makes an index of texts."""

    def __call__(self, texts: Sequence[str], /) -> Index: ...  # noqa: D102


class Document:
    """The pages of a document, and what is made of them once."""

    def __init__(self, pages: Sequence[DocumentPage], config: DocumentsConfig, index: MakeIndex) -> None:
        self.name, self.pages = pages[0].document, pages
        self.outline = outline(pages, config.outline_characters)
        self.asked: set[str] = set()
        self._size, self._make_index = config.chunk_characters, index

    @cached_property
    def chunks(self) -> list[Chunk]:
        """All that can be a distractor."""
        return chunk_pages(self.pages, self._size, 0)

    @cached_property
    def chunks_on(self) -> Counter[int]:
        """How many of `chunks` are on each page."""
        return Counter(chunk.page for chunk in self.chunks)

    @cached_property
    def index(self) -> Index:
        """Of the texts of `chunks`."""
        return self._make_index([chunk.text for chunk in self.chunks])


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive pages of a document."""

    document: Document
    pages: Sequence[DocumentPage]

    @property
    def text(self) -> str:
        """All pages."""
        return "\n\n".join(page.text.strip() for page in self.pages)

    @property
    def row(self) -> dict[str, object]:
        """How a dropped row names the window."""
        return {"document": self.document.name, "first_page": self.pages[0].page, "input_pages": len(self.pages)}


@dataclass
class Candidate:
    """A question on its way, with the scores it has so far."""

    window: Window
    question: str
    scores: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, detail: str = "", **more: object) -> Dropped:
        """The question, set aside."""
        return Dropped(
            reason=reason, row={**self.window.row, "question": self.question, **self.scores, **more}, detail=detail
        )


def rows(
    pages: Sequence[DocumentPage],
    config: DocumentsConfig,
    ask: Asker,
    index: MakeIndex,
    *,
    name: str,
    seed: int,
    source: str,
    count: int | None = None,
) -> Iterator[DocumentQuestion | Dropped]:
    """Ask about the windows, round by round, about no more of them than `count` rows take.

    Ids are `<name>-<number>`; the same pages and answers give the same rows. Raises `UserError` when the index is of a
    library that is missing.
    """
    windows, dropped = cut_windows(pages, config, index)
    yield from dropped
    start = number = pending = 0
    rows_each = config.questions_per_window * max(1, len(config.topics))
    while start < len(windows) and (count is None or number + pending < count):
        missing = None if count is None else count - number - pending
        end = start + round_size(config.round_windows, missing, rows_each)
        candidates, unasked = ask_questions(windows[start:end], config, ask)
        yield from unasked
        candidates, low = score(candidates, config, ask)
        yield from low
        candidates, dropped = leave_out_repeats(candidates)
        yield from dropped
        answers = ask("answers", [answer_request(each.window.pages, each.question) for each in candidates])
        start, pending = end, pending + config.questions_per_window * left_open(unasked) + left_open((*low, *answers))
        made: list[DocumentQuestion] = []
        for candidate, answer in zip(candidates, answers, strict=True):
            if (refused := _refused(candidate, answer)) is not None:
                yield refused
                continue
            number += 1
            rng = Random(f"{seed}-{number}")
            made.append(_row(candidate, answer, config, rng, id=f"{name}-{number:05d}", source=source))
        if missing is not None:  # before the last row, after which nobody listens
            yield from left_over(made[missing:])
        yield from made[:missing]


def cut_windows(
    pages: Sequence[DocumentPage], config: DocumentsConfig, index: MakeIndex
) -> tuple[list[Window], list[Dropped]]:
    """The windows of all documents, and the documents and windows that are not asked about."""
    windows, dropped = [], []
    in_order = sorted(pages, key=lambda page: (page.document, page.page))
    for _, group in groupby(in_order, key=lambda page: page.document):
        document = Document(list(group), config, index)
        if len(document.pages) <= config.skip_pages:
            row = {"document": document.name, "pages": len(document.pages)}
            dropped.append(Dropped(reason="no page left", row=row, detail=f"skip_pages={config.skip_pages}"))
        for start in range(config.skip_pages, len(document.pages), config.window_pages):
            window = Window(document, document.pages[start : start + config.window_pages])
            if (length := len(window.text)) > config.window_characters:
                detail = f"{length} characters, window_characters={config.window_characters}"
                dropped.append(Dropped(reason="window too long", row=window.row, detail=detail))
            else:
                windows.append(window)
    return windows, dropped


def ask_questions(
    windows: Sequence[Window], config: DocumentsConfig, ask: Asker
) -> tuple[list[Candidate], list[Dropped]]:
    """Questions about the windows, and what is no question or not about its window."""
    asked = [(window, topic) for window in windows for topic in config.topics or [""]]
    most = config.questions_per_window
    answers = ask("questions", [questions_request(window.pages, topic, most) for window, topic in asked])
    candidates: list[Candidate] = []
    dropped: list[Dropped] = []
    for (window, topic), answer in zip(asked, answers, strict=True):
        if not answer.usable:
            row = {**window.row, "topic": topic, "answer": answer.text}
            dropped.append(Dropped(reason=str(answer.reason), row=row, detail=answer.detail))
            continue
        if not answer.value.questions:
            dropped.append(Dropped(reason="no questions about this window", row={**window.row, "topic": topic}))
        for position, text in enumerate(answer.value.questions):
            candidate = Candidate(window, clean_question(text))
            problem = "more questions than asked for" if position >= most else None
            problem = problem or question_problem(candidate.question, window.text)
            if problem:
                dropped.append(candidate.drop(problem))
            else:
                candidates.append(candidate)
    return candidates, dropped


def score(
    candidates: Sequence[Candidate], config: DocumentsConfig, ask: Asker
) -> tuple[list[Candidate], list[Dropped]]:
    """The questions whose scores all reach `min_score`. Questions of one window are scored in one request.

    Global relevance takes a request a question, so that it is asked last, and only for those that got so far.
    """
    kept, dropped = [], []
    windows = [(window, list(group)) for window, group in groupby(candidates, key=lambda each: each.window)]
    requests = [scores_request(window.pages, [each.question for each in group]) for window, group in windows]
    for (_, group), answer in zip(windows, ask("scores", requests), strict=True):
        for position, candidate in enumerate(group):
            if answer.usable:
                candidate.scores |= answer.value.scores[position].model_dump()
            refused = _score_problem(candidate, answer, config.min_score)
            dropped.append(refused) if refused else kept.append(candidate)
    requests = [global_request(each.window.document.name, each.window.document.outline, each.question) for each in kept]
    relevant = []
    for candidate, answer in zip(kept, ask("global relevance", requests), strict=True):
        if answer.usable:
            candidate.scores |= answer.value.model_dump()
        refused = _score_problem(candidate, answer, config.min_score)
        dropped.append(refused) if refused else relevant.append(candidate)
    return relevant, dropped


def leave_out_repeats(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Dropped]]:
    """The questions that were not asked about the same document before, but for punctuation and capitals."""
    kept, dropped = [], []
    for candidate in candidates:
        asked, question = candidate.window.document.asked, re.sub(r"\W+", " ", candidate.question).strip().casefold()
        if question in asked:
            dropped.append(candidate.drop("question asked twice"))
        else:
            asked.add(question)
            kept.append(candidate)
    return kept, dropped


def find_distractors(candidate: Candidate, config: DocumentsConfig) -> list[Chunk]:
    """Chunks of other pages that a search finds for the question; none repeats a page of the window or another one."""
    if not config.distractors:
        return []
    window, document = candidate.window, candidate.window.document
    gold = {page.page for page in window.pages}
    shown = [" ".join(page.text.split()) for page in window.pages]
    of_the_window = sum(document.chunks_on[page] for page in gold)
    [hits] = document.index.search([candidate.question], of_the_window + 2 * config.distractor_rank)
    found: list[Chunk] = []
    for hit in hits:
        chunk = document.chunks[hit.index]
        text = " ".join(chunk.text.split())
        if chunk.page not in gold and not any(text in other or other in text for other in shown):
            found.append(chunk)
            shown.append(text)
        if len(found) == config.distractor_rank:
            break
    return found[-config.distractors :]


def _score_problem(candidate: Candidate, answer: Answer, least: int) -> Dropped | None:
    if not answer.usable:
        return candidate.drop(str(answer.reason), answer.detail, answer=answer.text)
    for name in GRADED:
        if candidate.scores.get(name, least) < least:
            return candidate.drop(f"{name} below min_score", f"{candidate.scores[name]} of 10, min_score={least}")
    return None


def _refused(candidate: Candidate, answer: Answer) -> Dropped | None:
    if not answer.usable:
        return candidate.drop(str(answer.reason), answer.detail, answer=answer.text)
    problem = answer_problem(answer.value.answer.strip(), candidate.window.text)
    return candidate.drop(problem, answer=answer.value.answer) if problem else None


def _row(
    candidate: Candidate, answer: Answer, config: DocumentsConfig, rng: Random, *, id: str, source: str
) -> DocumentQuestion:
    window = candidate.window
    distractors = find_distractors(candidate, config)
    passages: list[tuple[int, str]] = [(page.page, page.text.strip()) for page in window.pages]
    gold = [True] * len(passages)
    for chunk in distractors:
        place = rng.randint(0, len(passages))
        passages.insert(place, (chunk.page, chunk.text))
        gold.insert(place, False)
    cited = sorted(set(answer.value.cited))
    marks = "".join(f" [{window.document.name}, {page}]" for page in cited) if config.cite else ""
    heads = [f"[{window.document.name}, {page}]\n" if config.cite else "" for page, _ in passages]
    context = "\n\n".join(head + text for head, (_, text) in zip(heads, passages, strict=True))
    metadata = window.pages[0].metadata
    flags = ["instructs the model"] * instructs_model(context)
    if len(distractors) < config.distractors:
        flags.append("fewer distractors than asked for" if distractors else "no distractor")
    return DocumentQuestion(
        id=id,
        parents=[*(page.id for page in window.pages), *(chunk.id for chunk in distractors)],
        system=config.system,
        question=candidate.question,
        context=context,
        answer=answer.value.answer.strip() + marks,
        chunks_rag="\n\n".join(chunk.text for chunk in distractors),
        document=window.document.name,
        first_page=window.pages[0].page,
        input_pages=len(window.pages),
        machine_code=metadata.get("machine_code", ""),
        chunks=window.text,
        gold_position=[position for position, is_gold in enumerate(gold) if is_gold],
        cited=cited,
        flags=flags,
        metadata=metadata,
        source=source,
        **candidate.scores,
    )
