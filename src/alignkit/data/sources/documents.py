"""Documents: pages and plain texts to learn whole, and rows of the recipe `documents`, questions about passages."""

from __future__ import annotations

from pydantic import BaseModel

from alignkit.core.records import DocumentPage, Dropped, QAExample, Row, TextExample
from alignkit.data.sources.raw import RawRow

FIELDS = ("question", "context", "answer", "chunks_rag")
"""What a row of the recipe has."""


class DocumentQuestion(Row):
    """A question about a window of a document, its answer, and the context in which it is to be found."""

    system: str
    question: str
    context: str
    """The passages that are shown: the window's pages and the distractors."""
    answer: str
    chunks_rag: str
    """The distractors alone."""
    document: str
    first_page: int
    input_pages: int
    """Pages of the window."""
    machine_code: str
    chunks: str
    """The window's pages alone."""
    relevance: int
    global_relevance: int
    coverage: int
    gold_position: list[int]
    """Which passages of `context`, counted from 0, are the window's pages."""
    cited: list[int]
    """Pages that the answer rests on."""
    flags: list[str]
    metadata: dict[str, str]
    source: str


class _Fields(BaseModel):
    question: str
    context: str
    answer: str
    parents: list[str] = []
    source: str = ""
    document: str | None = None


def read_question(raw: RawRow) -> QAExample | Dropped:
    """The context as the statement, with the document's name. The system message is left to whoever trains on it."""
    row = raw.record(_Fields)
    if not row.question.strip():
        return raw.drop("no question")
    example = QAExample(
        id=raw.id,
        parents=row.parents,
        instruction=row.context,
        input=row.question,
        output=row.answer,
        source=row.source,
    )
    return example if row.document is None else example.model_copy(update={"document": row.document})


def read_page(raw: RawRow) -> TextExample | Dropped:
    """A page of a document, a text of its own."""
    page = raw.record(DocumentPage)
    return _with_text(raw, TextExample(id=page.id, parents=page.parents, text=page.text, source=page.document))


def read_text(raw: RawRow) -> TextExample | Dropped:
    """A row with a text; whatever else it has is kept, but not learned."""
    return _with_text(raw, raw.record(TextExample, id=raw.id))


def _with_text(raw: RawRow, example: TextExample) -> TextExample | Dropped:
    return example if example.text.strip() else raw.drop("empty document")
