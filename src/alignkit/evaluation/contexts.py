"""What a model is given to read: the row's own statement, that among distractors, or what a retriever finds.

clean       the statement, as in training
noisy       the statement at a random place among passages of other documents
retrieved   the passages that a retriever finds for the question, whether the statement is among them or not
multihop    nothing: the model searches for itself (`evaluation.multihop`)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from random import Random
from statistics import mean
from typing import TYPE_CHECKING, Any, Optional

from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.core.records import Message, QAExample
from alignkit.core.retrieval_config import RetrievalConfig, SearchEngine
from alignkit.data.chat import qa_prompt
from alignkit.evaluation.comparison import document_of
from alignkit.retrieval.base import Passage, Retriever

# ruff: noqa: UP045

if TYPE_CHECKING:
    from alignkit.evaluation.predictions import Prediction
    from alignkit.retrieval.open import FilteringRetriever

LOG = logging.getLogger("alignkit")

SEARCHED_AT_ONCE = 256
"""Questions in one call to the retriever, which is what a kill can cost."""
NONE = "none"
NOT_THERE = "not there"


class ContextKind(Enum):
    """What a model reads before it answers."""

    clean = "clean"
    noisy = "noisy"
    retrieved = "retrieved"
    multihop = "multihop"


@dataclass
class PassagesConfig:
    """Where passages come from, and how many a model reads (not read with contexts=clean)."""

    documents: str = NONE
    """A file or folder of documents; none: the statements of the held-out rows."""
    indexed: bool = False
    """retrieved, multihop: search the index that `retrieval` names, as `alignkit index` made it, instead."""
    chunk_characters: int = 1000
    """Longest passage that a document is cut into."""
    distractors: int = 3
    """noisy: passages beside the row's own statement."""
    distractor_rank: int = 10
    """noisy: the distractors are the last of so many best hits for the question; 0: drawn at random."""
    k: Optional[int] = None
    """Passages that a search finds; none: 3, but 1 at each step of a multi-hop search, as in QA-Expert."""
    hops: int = 4
    """multihop: most searches for one question."""

    def check(self) -> None:
        """Raise `UserError` for numbers that make no sense."""
        for name, lowest in {"chunk_characters": 1, "distractors": 1, "distractor_rank": 0, "hops": 1}.items():
            if getattr(self, name) < lowest:
                raise UserError(f"passages.{name}={getattr(self, name)}: must be at least {lowest}")
        if self.indexed and self.documents != NONE:
            raise UserError("passages.indexed=true: what is searched is in the index already; drop passages.documents")
        if self.k is not None and self.k < 1:
            raise UserError(f"passages.k={self.k}: must be at least 1")
        if 0 < self.distractor_rank < self.distractors:
            raise UserError(
                f"passages.distractors={self.distractors}: must not exceed distractor_rank={self.distractor_rank}"
            )

    def found_at_once(self, kind: ContextKind) -> int:
        """Passages that a search finds."""
        return self.k or (1 if kind is ContextKind.multihop else 3)


@dataclass(frozen=True)
class Question:
    """A held-out row, and what every system is asked about it. `contexts` are empty where it reads its statement."""

    example: QAExample
    prompt: list[Message]
    contexts: list[str]

    @property
    def id(self) -> str:
        """The row's."""
        return self.example.id


@dataclass(frozen=True)
class Library:
    """The passages of an evaluation, and how they are searched."""

    config: PassagesConfig
    retrieval: RetrievalConfig
    folder: Path
    """Holds the index that is made of the passages, where there is none yet."""

    def open(self, passages: Iterable[Passage] | None) -> FilteringRetriever:
        """What finds passages: an index of these, or without any the one that `retrieval` names."""
        from alignkit.retrieval.open import open_retriever

        if passages is None:
            return open_retriever(self.retrieval)
        retriever = open_retriever(replace(self.retrieval, engine=SearchEngine.embedded, path=str(self.folder)))
        retriever.index(passages)
        return retriever


# -- passages ----------------------------------------------------------------------------------------------------------


def read_passages(config: PassagesConfig, examples: Sequence[QAExample]) -> Iterator[Passage]:
    """The chunks of the documents, or else each different statement of the held-out rows."""
    if config.documents == NONE:
        for text, example in {example.instruction: example for example in reversed(examples)}.items():
            if example.input.strip() and text.strip():
                yield Passage(id=example.id, text=text, document=_document(example))
        return
    from alignkit.data.chunks import chunk_pages
    from alignkit.data.documents import read_documents

    pages, dropped = read_documents(config.documents)
    for each in dropped:
        LOG.warning("passages.documents: %s: %s", each.reason, each.detail)
    for chunk in chunk_pages(pages, config.chunk_characters, 0):
        yield Passage(id=chunk.id, text=chunk.text, document=chunk.document, page=chunk.page)


def statement_and_question(example: QAExample) -> tuple[str, str]:
    """The two parts of a row; one without an input is a question without a statement."""
    return (example.instruction, example.input) if example.input.strip() else ("", example.instruction)


def _document(example: QAExample) -> str:
    """What a row is about: the document that it names, or else its statement."""
    return document_of(example) or example.instruction


# -- questions ---------------------------------------------------------------------------------------------------------


def pose(
    kind: ContextKind, library: Library, examples: Sequence[QAExample], seed: int, journal: Journal
) -> tuple[list[Question], FilteringRetriever | None, dict[str, Any]]:
    """What every system is asked, what it may search in itself, and a description for the manifest."""
    if kind is ContextKind.clean:
        return ask_clean(examples), None, {"kind": kind.name}
    config = library.config
    passages = None if config.indexed else list(read_passages(config, examples))
    if kind is ContextKind.noisy:
        assert passages is not None
        questions = ask_noisy(examples, passages, library, seed)
        return questions, None, describe_contexts(kind, questions, len(passages))
    retriever = library.open(passages)
    if kind is ContextKind.multihop:
        return ask_openly(examples), retriever, {"kind": kind.name, "passages": len(retriever)}
    with closing(retriever):
        questions = ask_retrieved(examples, retriever, config.found_at_once(kind), journal)
        description = describe_contexts(kind, questions, len(retriever))
    alone = [question.id for question in questions if not question.contexts]
    if alone:
        LOG.warning(
            "contexts=retrieved: nothing is found for %d of %d questions, which are asked alone; the first: %s",
            len(alone), len(questions), alone[0],
        )  # fmt: skip
    return questions, None, description | {"nothing_found": len(alone)}


def ask_clean(examples: Sequence[QAExample]) -> list[Question]:
    """Each row as training has it."""
    return [Question(example, qa_prompt(example), []) for example in examples]


def ask_noisy(
    examples: Sequence[QAExample], passages: Sequence[Passage], library: Library, seed: int
) -> list[Question]:
    """Each row with distractors, and its statement at a place of its own among them, drawn by `seed` and the row's id.

    A distractor is of another document than the row, and shares no text with its statement. Where the search finds too
    few, others are drawn at random. Raises `UserError` where there are not enough passages.
    """
    config = library.config
    queries = [statement_and_question(example)[1] for example in examples]
    hits = _ranked(library, passages, queries) if config.distractor_rank else [[] for _ in queries]
    questions = []
    for example, found in zip(examples, hits, strict=True):
        random = Random(f"{seed}/{example.id}")
        statement, _ = statement_and_question(example)
        similar = [passage for passage in found if _is_distractor(passage, example)]
        chosen = similar[: config.distractor_rank][-config.distractors :]
        taken = {passage.id for passage in chosen}
        others = _in_random_order(passages, random)
        while len(chosen) < config.distractors:
            other = next((each for each in others if each.id not in taken and _is_distractor(each, example)), None)
            if other is None:
                raise UserError(
                    f"passages.distractors={config.distractors}: row '{example.id}' has only {len(chosen)} passages of "
                    "other documents. Name more documents with passages.documents, or take fewer distractors."
                )
            chosen.append(other)
        shown = [passage.text for passage in chosen]
        random.shuffle(shown)
        if statement:
            shown.insert(random.randrange(len(shown) + 1), statement)
        questions.append(_read(example, shown))
    return questions


def ask_retrieved(examples: Sequence[QAExample], retriever: Retriever, k: int, journal: Journal) -> list[Question]:
    """Each row with the `k` passages that are found for its question in place of its statement.

    What was found is journalled: a search that is made again after a kill could find something else.
    """
    missing = [example for example in examples if example.id not in journal.done]
    for start in range(0, len(missing), SEARCHED_AT_ONCE):
        some = missing[start : start + SEARCHED_AT_ONCE]
        found = retriever.search([statement_and_question(example)[1] for example in some], k)
        for example, hits in zip(some, found, strict=True):
            journal.add(example.id, [hit.passage.text for hit in hits])
    return [_read(example, journal.done[example.id]) for example in examples]


def ask_openly(examples: Sequence[QAExample]) -> list[Question]:
    """Each row's question alone."""
    return [
        Question(example, [Message(role="user", content=statement_and_question(example)[1])], [])
        for example in examples
    ]


def describe_contexts(kind: ContextKind, questions: Sequence[Question], passages: int) -> dict[str, Any]:
    """How many passages there are to choose from, where the statement stood, and how often it was there at all."""
    places = Counter(place_of_statement(question) for question in questions)
    return {
        "kind": kind.name,
        "passages": passages,
        "statement_found": 1 - places[NOT_THERE] / len(questions),
        "place_of_statement": dict(sorted(places.items())),
    }


def place_of_statement(question: Question) -> str:
    """Which passage, from 1, is the row's statement, a part of it, or holds it; or that none does."""
    statement, _ = statement_and_question(question.example)
    held = (number for number, text in enumerate(question.contexts, 1) if statement and _share(text, statement))
    return str(next(held, NOT_THERE))


def exact_match_by_place(
    questions: Sequence[Question], rows: Sequence[Prediction], system: str
) -> dict[str, dict[str, float]]:
    """A system's exact match, and the number of rows behind it, for each place where the statement stood."""
    found: dict[str, list[float]] = {}
    for question, row in zip(questions, rows, strict=True):
        if (score := row.score(system, "exact_match")) is not None:
            found.setdefault(place_of_statement(question), []).append(score)
    return {place: {"mean": mean(scores), "n": len(scores)} for place, scores in sorted(found.items())}


def _read(example: QAExample, shown: list[str]) -> Question:
    question = statement_and_question(example)[1]
    return Question(example, qa_prompt(QAExample(id=example.id, instruction="\n\n".join(shown), input=question)), shown)


def _ranked(library: Library, passages: Sequence[Passage], queries: Sequence[str]) -> list[list[Passage]]:
    """More hits a query than are needed, since some will be of the row's own document."""
    with closing(library.open(passages)) as retriever:
        found = retriever.search(queries, 2 * library.config.distractor_rank + 10)
    return [[hit.passage for hit in hits] for hits in found]


def _in_random_order(passages: Sequence[Passage], random: Random) -> Iterator[Passage]:
    """Each passage once; only as many are drawn as are asked for."""
    drawn: set[int] = set()
    while len(drawn) < len(passages):
        place = random.randrange(len(passages))
        if place not in drawn:
            drawn.add(place)
            yield passages[place]


def _is_distractor(passage: Passage, example: QAExample) -> bool:
    return passage.document != _document(example) and not _share(passage.text, statement_and_question(example)[0])


def _share(one: str, other: str) -> bool:
    """Whether one text stands in the other; white space counts as one space."""
    shorter, longer = sorted((" ".join(one.split()), " ".join(other.split())), key=len)
    return bool(shorter) and shorter in longer
