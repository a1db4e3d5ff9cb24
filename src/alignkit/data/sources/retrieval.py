"""Queries with passages: LLM-Embedder's rows (Zhang et al., 2023, arXiv 2310.07554), HotpotQA's and ours as such.

LLM-Embedder's `query_id` may be a number, absent, or called `qid`; a row of its task `chat` has a `history` of earlier
turns in the place of passages.
"""

from __future__ import annotations

from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, QAExample, RetrievalExample
from alignkit.data.sources.hotpotqa import HotpotQA, as_pairs
from alignkit.data.sources.raw import RawRow

FIELDS = ("query",)


def read_row(raw: RawRow, task: str | None = None) -> RetrievalExample | Dropped:
    """A row of LLM-Embedder's format; `task` is that of rows that name none.

    A row without `id` is called `<task>-<query_id>`. One without `query_id` is a query of its own, with the row's id.
    Raises `UserError` with the place for a row without a task when none is given.
    """
    named, fields = _task(raw, task), dict(raw.fields)
    query_id = next((fields[key] for key in ("query_id", "qid") if fields.get(key) not in (None, "")), None)
    if isinstance(query_id, int) and not isinstance(query_id, bool):
        query_id = str(query_id)
    if query_id is not None and not isinstance(query_id, str):
        raise UserError(f"{raw.place}: query_id: must be a text or a whole number, found {query_id!r}. Correct it.")
    has_id = "id" in fields or "_id" in fields
    row_id = raw.id if has_id or query_id is None else f"{named}-{query_id}"
    if "history" in fields and not fields.get("pos") and not fields.get("neg"):
        fields["neg"] = fields.pop("history")
    fields |= {"id": row_id, "task": named, "query_id": query_id or row_id}
    example = RawRow(raw.place, row_id, fields).record(RetrievalExample)
    if not example.query.strip():
        return raw.drop("empty query")
    return example


def read_hotpotqa(raw: RawRow, task: str | None = None) -> RetrievalExample | Dropped:
    """A HotpotQA question: paragraphs with a supporting sentence are positives, the other paragraphs negatives.

    A passage is a paragraph's title and its sentences.
    """
    row = raw.record(HotpotQA, **{name: as_pairs(raw.fields[name]) for name in ("context", "supporting_facts")})
    supporting = {title for title, _ in row.supporting_facts}
    passages = [(title, f"{title} {''.join(sentences).strip()}") for title, sentences in row.context]
    if not row.question.strip():
        return raw.drop("empty question")
    return RetrievalExample(
        id=raw.id,
        query=row.question,
        pos=[text for title, text in passages if title in supporting],
        neg=[text for title, text in passages if title not in supporting],
        answers=[row.answer],
        task=_task(raw, task),
        query_id=raw.id,
    )


def read_question(raw: RawRow, task: str | None = None) -> RetrievalExample | Dropped:
    """A question over a statement segment: the statement is what has to be found, the output the answer.

    Other fields of the row stay.
    """
    example = raw.record(QAExample, id=raw.id)
    others = {name: value for name, value in raw.fields.items() if name not in QAExample.model_fields}
    if example.kind is not None:
        others["kind"] = example.kind
    if not example.instruction.strip() or not example.input.strip():
        return raw.drop("no statement to find" if example.input.strip() else "empty question")
    return RetrievalExample(
        id=raw.id,
        parents=example.parents,
        query=example.input,
        pos=[example.instruction],
        answers=[example.output] if example.output.strip() else [],
        task=_task(raw, task),
        query_id=raw.id,
        **others,
    )


def _task(raw: RawRow, default: str | None) -> str:
    found: Any = raw.fields.get("task") or default
    if not isinstance(found, str):
        said = "missing" if found is None else f"must be a text, found {found!r}"
        raise UserError(
            f"{raw.place}: task: {said}. Add it to the row, or name the task of all rows without one: task=qa"
        )
    return found
