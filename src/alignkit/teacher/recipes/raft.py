"""RAFT (Zhang et al., 2024, arXiv 2403.10131): learning to answer from the one document among several that helps.

For every chunk of the documents, the gold, the teacher writes questions, and answers each from this chunk alone: it
reasons, quotes the chunk, and ends with a final answer. A row shows the question with the gold among distractors, which
are other chunks; in a share of the rows the gold is left out, so that a model also learns not to need it.

A quote that does not stand in the gold word for word makes the answer unusable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any

from pydantic import BaseModel

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Message, Row
from alignkit.data.chunks import Chunk
from alignkit.data.documents import instructs_model
from alignkit.data.sources import raft as form
from alignkit.data.wording import QUESTION_MARKS, script
from alignkit.data.words import words
from alignkit.teacher.client import Answer, Request
from alignkit.teacher.prompts import render
from alignkit.teacher.recipes.asking import Asker, left_open, left_over, round_size, set_aside

CHUNKS_A_ROUND = 200
"""Chunks whose questions are asked for together; their answers are asked for before the next round."""
QUESTION_CHARACTERS = 500
ANSWER_CHARACTERS = 20_000
SPARE = 8
"""Chunks drawn beyond those needed, since some may not serve as distractors of the gold at hand."""


class RaftFormat(Enum):
    """How a row is written.

    `hf` has every part in a field of its own; `chat` is messages, `completion` prompt and completion for training;
    `eval` has the final answer alone.
    """

    hf = "hf"
    chat = "chat"
    completion = "completion"
    eval = "eval"


class RaftType(Enum):
    """What the documents are: texts, or descriptions of an API, about which users' requests are written."""

    general = "general"
    api = "api"


@dataclass
class RaftConfig:
    """Settings of the recipe `raft`."""

    type: RaftType = RaftType.general
    """`api`: each document describes a call, and the questions are what users want done."""
    chunk_size: int = 512
    """Longest chunk, in characters."""
    chunk_overlap: int = 0
    """Characters that a chunk may share with the one before it."""
    questions_per_chunk: int = 5
    """Questions asked for about each chunk."""
    distractors: int = 3
    """Other chunks shown beside the gold; fewer where there are no more."""
    gold_share: float = 0.8
    """Share of the rows that show the gold; in the others one more distractor takes its place."""
    min_characters: int = form.MIN_CHARACTERS
    """Shorter chunks are left out."""
    format: RaftFormat = RaftFormat.hf
    """How the rows are written."""
    stop: str = form.STOP
    """What ends a completion in the format `completion`."""

    def check(self) -> None:
        """Raise `UserError` for numbers that make no sense."""
        for key in ("chunk_size", "questions_per_chunk"):
            if getattr(self, key) < 1:
                raise UserError(f"raft.{key}={getattr(self, key)}: must be at least 1")
        for key in ("distractors", "min_characters"):
            if getattr(self, key) < 0:
                raise UserError(f"raft.{key}={getattr(self, key)}: must not be negative")
        if not 0 <= self.chunk_overlap < self.chunk_size:
            told = f"raft.chunk_overlap={self.chunk_overlap}"
            raise UserError(f"{told}: must not be negative, and must be below raft.chunk_size={self.chunk_size}")
        if self.min_characters > self.chunk_size:
            told = f"raft.min_characters={self.min_characters}"
            raise UserError(f"{told}: no chunk of raft.chunk_size={self.chunk_size} characters is that long")
        if not 0 <= self.gold_share <= 1:
            raise UserError(f"raft.gold_share={self.gold_share}: must lie between 0 and 1")


class NewQuestions(BaseModel):
    """What a teacher is to write about a chunk."""

    questions: list[str]


@dataclass(frozen=True)
class Draft:
    """A question about a chunk, before it has an answer. `number` counts a chunk's questions."""

    id: str
    number: int
    gold: Chunk
    question: str

    @property
    def fields(self) -> dict[str, Any]:
        """The draft as a row of dropped.jsonl."""
        return {"id": self.id, "parents": [self.gold.id], "question": self.question, "oracle_context": self.gold.text}


def rows(
    chunks: Sequence[Chunk],
    config: RaftConfig,
    ask: Asker,
    *,
    name: str,
    seed: int,
    source: str,
    count: int | None = None,
) -> Iterator[Row | Dropped]:
    """Ask for questions about every chunk and for their answers, and show each among distractors.

    Only as many chunks are asked about as `count` rows take. The same chunks and answers give the same rows. Ids are
    `<name>-<number>`, the questions being counted.
    """
    if config.type is RaftType.api:
        _must_be_whole(chunks, config)
    golds = yield from set_aside(usable_chunks(chunks, config))
    if not golds:
        raise UserError(f"data.path: none of its {len(chunks)} chunks can be used; dropped.jsonl has the reasons")
    instructing = {chunk.id for chunk in golds if instructs_model(chunk.text)}
    asked: dict[str, str] = {}
    start = kept = pending = 0
    while start < len(golds) and (count is None or kept + pending < count):
        missing = None if count is None else count - kept - pending
        end = start + round_size(CHUNKS_A_ROUND, missing, config.questions_per_chunk)
        questions = ask("questions", [questions_request(chunk.text, config) for chunk in golds[start:end]])
        drafts = yield from set_aside(new_questions(golds[start:end], questions, config, asked, name))
        answers = ask("answers", [answer_request(draft.gold.text, draft.question, config) for draft in drafts])
        start, pending = end, pending + config.questions_per_chunk * left_open(questions) + left_open(answers)
        made: list[Row] = []
        for draft, answer in zip(drafts, answers, strict=True):
            if not answer.usable:
                row = {**draft.fields, "answer": answer.text}
                yield Dropped(reason=str(answer.reason), row=row, detail=answer.detail)
                continue
            rng = Random(f"{seed}-{draft.gold.id}-{draft.number}")
            row = written(draft, answer.value.strip(), golds, config, rng)
            flags = [*row["flags"], "instructs the model"] if instructing & set(row["parents"]) else row["flags"]
            made.append(Row.model_validate({**row, "flags": flags, "source": source}))
        if missing is not None:  # before the last row, after which nobody listens
            yield from left_over(made[missing:])
        yield from made[:missing]
        kept += len(made)


def usable_chunks(chunks: Sequence[Chunk], config: RaftConfig) -> Iterator[Chunk | Dropped]:
    """The chunks that can be asked about and shown: long enough, each text once, without the marks of RAFT's format."""
    seen: dict[str, str] = {}
    for chunk in chunks:
        text = form.without_space(chunk.text)
        row = {"id": chunk.id, "document": chunk.document, "page": chunk.page, "text": chunk.text}
        if len(chunk.text.strip()) < config.min_characters or not text:
            detail = f"{len(chunk.text.strip())} characters, raft.min_characters={config.min_characters}"
            yield Dropped(reason="chunk too short", row=row, detail=detail)
        elif mark := _mark_in(chunk.text, config):
            yield Dropped(reason="the chunk holds a mark of the row format", row=row, detail=mark)
        elif text in seen:
            yield Dropped(reason="duplicate chunk", row=row, detail=f"the same text as {seen[text]}")
        else:
            seen[text] = chunk.id
            yield chunk


def new_questions(
    chunks: Sequence[Chunk], answers: Sequence[Answer], config: RaftConfig, asked: dict[str, str], name: str
) -> Iterator[Draft | Dropped]:
    """The questions about `chunks` in the teacher's answers. `asked` holds all so far with their ids, and grows."""
    for chunk, answer in zip(chunks, answers, strict=True):
        if not answer.usable:
            row = {"parents": [chunk.id], "oracle_context": chunk.text, "answer": answer.text}
            yield Dropped(reason=str(answer.reason), row=row, detail=answer.detail)
            continue
        for number, text in enumerate(answer.value.questions, 1):
            draft = Draft(f"{name}-{len(asked) + 1:05d}", number, chunk, text.strip())
            key = " ".join(words(draft.question))
            problem = question_problem(draft.question, chunk.text, config)
            if not problem and key in asked:
                problem = f"duplicate question: the same as {asked[key]}"
            if not problem and number > config.questions_per_chunk:
                problem = f"more questions than asked for: number {number} of {config.questions_per_chunk}"
            if problem:
                reason, _, detail = problem.partition(": ")
                yield Dropped(reason=reason, row={**draft.fields, "id": f"{chunk.id}-{number}"}, detail=detail)
                continue
            asked[key] = draft.id
            yield draft


def written(draft: Draft, answer: str, pool: Sequence[Chunk], config: RaftConfig, rng: Random) -> dict[str, Any]:
    """The row of an answered question: its gold among distractors, or in `1 - gold_share` of the rows without it.

    `distractors` says how many there are, `gold_shown` whether the gold is among the documents. Where there is no
    other chunk at all, the gold is shown.
    """
    gold_shown = rng.random() < config.gold_share
    others = draw_distractors(draft.gold, pool, config.distractors + (not gold_shown), rng)
    gold_shown = gold_shown or not others
    documents = [*others, draft.gold] if gold_shown else others
    rng.shuffle(documents)
    return {
        "id": draft.id,
        "parents": [draft.gold.id, *sorted(chunk.id for chunk in others)],
        **_formatted(draft, answer, documents, config),
        "gold_shown": gold_shown,
        "distractors": len(others),
        "flags": ["fewer documents than asked for"] if len(documents) <= config.distractors else [],
    }


def draw_distractors(gold: Chunk, pool: Sequence[Chunk], wanted: int, rng: Random) -> list[Chunk]:
    """Draw `wanted` chunks without replacement, or as many as there are. All texts in `pool` differ.

    None of them has the gold's text, a part of it or more than it, nor overlaps with it on the page.
    """
    bare = form.without_space(gold.text)

    def serves(other: Chunk) -> bool:
        same_page = (other.document, other.page) == (gold.document, gold.page)
        if same_page and other.start < gold.end and gold.start < other.end:
            return False
        text = form.without_space(other.text)
        return text not in bare and bare not in text

    few = rng.sample(pool, min(len(pool), wanted + SPARE))
    found = [chunk for chunk in few if serves(chunk)]
    if len(found) < wanted:  # a small collection, or one with much in common
        found = [chunk for chunk in rng.sample(pool, len(pool)) if serves(chunk)]
    return found[:wanted]


def _formatted(draft: Draft, answer: str, documents: Sequence[Chunk], config: RaftConfig) -> dict[str, Any]:
    """The fields of the chosen format, named as in the reference."""
    texts = [chunk.text for chunk in documents]
    prompt = form.instruction(texts, draft.question)
    match config.format:
        case RaftFormat.chat:
            return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        case RaftFormat.completion:
            return {"prompt": prompt, "completion": answer + config.stop}
        case RaftFormat.eval:
            context, final = form.tagged(texts), form.final_answer(answer)
            return {"question": draft.question, "context": context, "gold_final_answer": final}
    return {
        "type": config.type.name,
        "question": draft.question,
        "context": {"title": [[chunk.document for chunk in documents]], "sentences": [texts]},
        "oracle_context": draft.gold.text,
        "cot_answer": answer,
        "instruction": prompt,
    }


# -- what is asked, and what is wrong with the answers -----------------------------------------------------------------


def questions_request(document: str, config: RaftConfig) -> Request:
    """Ask for questions about a document."""
    api = config.type is RaftType.api
    prompt = render("raft_questions", document=document, count=config.questions_per_chunk, api=api)

    def check(found: NewQuestions) -> str | None:
        problems = [question_problem(question.strip(), document, config) for question in found.questions]
        return None if None in problems else next(iter(problems), "no question")

    return Request(_messages(prompt), shape=NewQuestions, check=check)


def answer_request(document: str, question: str, config: RaftConfig) -> Request:
    """Ask for a question's answer from a document, at temperature 0."""
    api = config.type is RaftType.api
    prompt = render("raft_answer", document=document, question=question, api=api)

    def check(answer: str) -> str | None:
        return answer_problem(answer, document, config)

    return Request(_messages(prompt), temperature=0.0, check=check)


def question_problem(question: str, document: str, config: RaftConfig) -> str | None:
    """What is wrong with a question, as "reason: detail"; None when nothing is."""
    if not words(question):
        return "empty question"
    if len(question) > QUESTION_CHARACTERS:
        return f"question too long: {len(question)} characters"
    if form.refuses(question):
        return f"the question is a refusal: {question}"
    if config.type is RaftType.general and not question.endswith(QUESTION_MARKS):
        return f"question without question mark: {question}"
    if mark := _mark_in(question, config):
        return f"the question holds a mark of the row format: {mark}"
    return _language_problem(question, document)


def answer_problem(answer: str, document: str, config: RaftConfig) -> str | None:
    """What is wrong with an answer, as "reason: detail"; None when nothing is."""
    if len(answer) > ANSWER_CHARACTERS:
        return f"answer too long: {len(answer)} characters"
    final = form.final_answer(answer)
    if form.refuses(answer if final is None else final):
        return f"the answer is a refusal: {(final or answer)[:200]}"
    if final is None:
        return f"no final answer: '{form.FINAL_ANSWER}' is missing"
    if not final:
        return f"no final answer: nothing stands behind '{form.FINAL_ANSWER}'"
    if config.stop and config.stop in answer:
        return f"the answer holds the stop text: {config.stop}"
    begun = answer.split(form.BEGIN_QUOTE)
    if form.END_QUOTE in begun[0] or any(part.count(form.END_QUOTE) != 1 for part in begun[1:]):
        return f"quote marks not in pairs: every {form.BEGIN_QUOTE} needs one {form.END_QUOTE}"
    quoted = form.quotations(answer)
    if not quoted or not all(quoted):
        return f"no quote: copy the evidence between {form.BEGIN_QUOTE} and {form.END_QUOTE}"
    for quote in quoted:
        if not form.stands_in(quote, document):
            return f"quote not verbatim: {quote[:200]}"
    own_words = "".join([begun[0], *(part.partition(form.END_QUOTE)[2] for part in begun[1:])])
    return _language_problem(own_words, document)


def _language_problem(text: str, document: str) -> str | None:
    found, wanted = script(text), script(document)
    if found is None or wanted is None or found == wanted:
        return None
    return f"another language than the document's: {found} script instead of {wanted}"


def _must_be_whole(chunks: Sequence[Chunk], config: RaftConfig) -> None:
    """Raise `UserError` when a description of an API was cut: half a call is of no use."""
    pages = Counter((chunk.document, chunk.page) for chunk in chunks)
    for (document, page), pieces in pages.items():
        if pieces > 1:
            told = f"raft.chunk_size={config.chunk_size} cuts page {page} of {document} in {pieces} pieces"
            raise UserError(f"{told}; with raft.type=api each page must be one chunk. Give a larger raft.chunk_size.")


def _mark_in(text: str, config: RaftConfig) -> str | None:
    """The first mark of the row format in a text: beside it, the parts of a row could not be told apart."""
    marks = (form.BEGIN_DOCUMENT, form.END_DOCUMENT, form.BEGIN_QUOTE, form.END_QUOTE, form.FINAL_ANSWER, config.stop)
    return next((mark for mark in marks if mark and mark in text), None)


def _messages(prompt: str) -> list[Message]:
    return [Message(role="system", content=render("raft_system")), Message(role="user", content=prompt)]
