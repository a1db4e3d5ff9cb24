"""Files of any supported format become rows of our types.

The format is recognised from the fields of the first row, and every row of the file must have it. Ids are kept; a row
without one is called `<file stem>-<row number>`. Each reader returns the usable rows and, beside them, the
rows that are well formed but of no use, each with its reason: a stage hands those to `artifact.drop`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import (
    ChatExample,
    CompletionSet,
    Dropped,
    Message,
    PreferencePair,
    QAExample,
    RetrievalExample,
    Row,
    TextExample,
)
from alignkit.data.chat import qa_prompt
from alignkit.data.jsonl import AnyRow, Placed, note_id, read_rows
from alignkit.data.sources import (
    categories,
    conversations,
    documents,
    hotpotqa,
    preferences,
    qa_expert,
    questions,
    raft,
    retrieval,
    short_answer_formats,
)
from alignkit.data.sources.raw import Format, RawRow, detect, row_id
from alignkit.data.sources.short_answers import ShortAnswer


def read_examples(
    rows: RowsConfig, *, hotpotqa_paragraphs: str = "gold"
) -> tuple[list[ChatExample | TextExample], list[Dropped]]:
    """Examples to learn from: all of them prompts with completions, or all of them documents to learn whole.

    Reads chat examples, conversations, RAFT rows, QA-Expert's records as a search in steps, every other format of
    `read_questions` whose rows have answers, pages of documents, and rows with a text.
    """
    return _read(rows, _example_formats(hotpotqa_paragraphs))


def stream_examples(
    rows: RowsConfig, *, hotpotqa_paragraphs: str = "gold"
) -> Iterator[ChatExample | TextExample | Dropped]:
    """The rows of `read_examples` and those it sets aside, one by one in their order; only their ids are kept."""
    return _stream(rows, _example_formats(hotpotqa_paragraphs))


def _example_formats(hotpotqa_paragraphs: str) -> tuple[Format[ChatExample | TextExample], ...]:
    return (
        Format("chat example", ("prompt", "completion"), raft.read_prompt_and_completion),
        Format("conversation", ("messages",), conversations.read_messages),
        Format("ShareGPT", ("conversations",), conversations.read_shared),
        Format("RAFT row", raft.ROW_FIELDS, raft.read_row),
        Format("QA-Expert", qa_expert.FIELDS, qa_expert.read_conversation),
        *(_with_answer(each) for each in _question_formats(hotpotqa_paragraphs, answered=True)),
        Format("document page", ("document", "page", "text"), documents.read_page),
        Format("text", ("text",), documents.read_text),
    )


def read_questions(rows: RowsConfig, *, hotpotqa_paragraphs: str = "gold") -> tuple[list[QAExample], list[Dropped]]:
    """Questions, with or without an answer: QA examples, Alpaca rows, Self-Instruct, HotpotQA, prompts and completions.

    `hotpotqa_paragraphs` says which paragraphs make the statement: `gold`, or `all` with the distractors.
    """
    return _read(rows, _question_formats(hotpotqa_paragraphs))


def read_question_files(files: Sequence[RowsConfig]) -> tuple[list[QAExample], list[Dropped]]:
    """The questions of several files as one pool. Raises `UserError` for an id that stands in two of them."""
    pool: list[QAExample] = []
    dropped: list[Dropped] = []
    where: dict[str, str] = {}
    for file in files:
        rows, unusable = read_questions(file)
        for row in rows:
            if row.id in where:
                raise UserError(f"{file.path}: id '{row.id}' is also in {where[row.id]}; rename the file or the ids")
            where[row.id] = file.path
        pool += rows
        dropped += unusable
    return pool, dropped


def read_preferences(rows: RowsConfig) -> tuple[list[PreferencePair], list[Dropped]]:
    """Preference pairs: ours, TRL's, RewardBench's, or the dialogues of hh-rlhf and full-hh-rlhf as messages."""
    return _read(rows, preferences.FORMATS)


def read_completions(rows: RowsConfig) -> tuple[list[CompletionSet], list[Dropped]]:
    """Prompts with the completions that were sampled for them; a prompt without any is dropped."""
    return _read(rows, (Format(*_COMPLETION_SET, _read_completion_set),))


def read_graded(rows: RowsConfig) -> tuple[list[CompletionSet], list[Dropped]]:
    """Like `read_completions`; raises `UserError` with the place of a score that is no grade from 0 to 10."""
    return _read(rows, (Format(*_COMPLETION_SET, _read_graded_set),))


def read_graded_or_preferences(
    rows: RowsConfig,
) -> tuple[list[CompletionSet], list[PreferencePair], list[Dropped]]:
    """What `read_graded` or `read_preferences` reads, whichever the file holds; the other list is empty."""
    formats: tuple[Format[Row], ...] = (
        Format(*_COMPLETION_SET, _read_graded_set),
        *preferences.FORMATS,
    )
    found, dropped = _read(rows, formats)
    graded = [row for row in found if isinstance(row, CompletionSet)]
    return graded, [row for row in found if isinstance(row, PreferencePair)], dropped


def read_short_answers(
    rows: RowsConfig, *, hotpotqa_paragraphs: str = "gold"
) -> tuple[list[ShortAnswer], list[Dropped]]:
    """Questions with short answers: SQuAD, BoolQ, DROP, MuSiQue, HotpotQA, ours, and QA examples."""
    return _read(rows, short_answer_formats.formats(hotpotqa_paragraphs), short_answer_formats.flat_rows)


def read_comparables(rows: RowsConfig) -> tuple[list[Row], list[Dropped]]:
    """What the recipe `multihop` starts from: categories of things to compare, or QA-Expert's records."""
    formats: tuple[Format[Row], ...] = (
        Format("category", ("category",), categories.read_category),
        Format("QA-Expert", qa_expert.FIELDS, qa_expert.read_record),
    )
    return _read(rows, formats)


def read_retrieval(rows: RowsConfig, task: str | None = None) -> tuple[list[RetrievalExample], list[Dropped]]:
    """Queries with passages: LLM-Embedder's rows, HotpotQA's, or questions over statements.

    `task` is that of rows that name none.
    """
    return _read(rows, _retrieval_formats(task))


def stream_retrieval(rows: RowsConfig, task: str | None = None) -> Iterator[RetrievalExample | Dropped]:
    """The rows of `read_retrieval` and those it sets aside, one by one in their order; only their ids are kept."""
    return _stream(rows, _retrieval_formats(task))


def _retrieval_formats(task: str | None) -> tuple[Format[RetrievalExample], ...]:
    return (
        Format("LLM-Embedder", retrieval.FIELDS, partial(retrieval.read_row, task=task)),
        Format("HotpotQA", hotpotqa.FIELDS, partial(retrieval.read_hotpotqa, task=task)),
        Format("QA example", ("instruction", "input"), partial(retrieval.read_question, task=task)),
    )


def _read(
    rows: RowsConfig,
    formats: tuple[Format[AnyRow], ...],
    read: Callable[[str, int, int | None], Iterator[Placed]] = read_rows,
) -> tuple[list[AnyRow], list[Dropped]]:
    """Read all rows in the format of the first. Raises `UserError` when no usable row is left."""
    records: list[AnyRow] = []
    dropped: list[Dropped] = []
    for row in _stream(rows, formats, read):
        if isinstance(row, Dropped):
            dropped.append(row)
        else:
            records.append(row)
    if not records:
        reasons = "; ".join(sorted({each.reason for each in dropped}))
        raise UserError(f"{rows.path}: none of its {len(dropped)} rows can be used ({reasons}). Give another file.")
    return records, dropped


def _stream(
    rows: RowsConfig,
    formats: tuple[Format[AnyRow], ...],
    read: Callable[[str, int, int | None], Iterator[Placed]] = read_rows,
) -> Iterator[AnyRow | Dropped]:
    """Each row in the format of the first, or set aside with its reason. No id may stand there twice."""
    seen: dict[str, str] = {}
    format: Format[AnyRow] | None = None
    stem = Path(rows.path.partition(":")[0]).stem
    for number, (place, fields) in enumerate(read(rows.path, rows.skip, rows.limit), rows.skip + 1):
        raw = RawRow(place, row_id(place, fields, f"{stem}-{number}"), fields)
        format = format or detect(raw, formats)
        if not format.matches(fields):
            missing = [field for field in format.fields if field not in fields]
            raise UserError(
                f"{place}: {', '.join(missing)}: missing, although the file began with rows of the format {format}. "
                f"The row has the fields {', '.join(fields) or '(none)'}. Correct it or remove it."
            )
        row = format.read(raw)
        if not isinstance(row, Dropped):
            note_id(seen, row.id, place)
        yield row


def _question_formats(hotpotqa_paragraphs: str, *, answered: bool = False) -> tuple[Format[QAExample], ...]:
    if hotpotqa_paragraphs not in ("gold", "all"):
        raise ValueError(f"hotpotqa_paragraphs must be 'gold' or 'all', not {hotpotqa_paragraphs!r}")
    needed = ("instruction", "output") if answered else ("instruction",)
    return (
        Format("RAFT row", raft.ROW_FIELDS, raft.read_question),
        Format("RAFT evaluation", raft.EVALUATION_FIELDS, raft.read_evaluation),
        Format("Self-Instruct seed task", ("instruction", "instances"), questions.read_seed_task),
        Format("Self-Instruct prediction", ("instruction", "response"), questions.read_prediction),
        Format("QA example or Alpaca row", needed, questions.read_question),
        Format("QA-Expert", qa_expert.FIELDS, qa_expert.read_question),
        Format("question about a document", documents.FIELDS, documents.read_question),
        Format("HotpotQA", hotpotqa.FIELDS, partial(hotpotqa.read_question, paragraphs=hotpotqa_paragraphs)),
        Format("prompt and completion", ("prompt", "completion"), questions.read_prompt_and_completion),
    )


def _with_answer(questions_format: Format[QAExample]) -> Format[ChatExample | TextExample]:
    """The format of the same rows where the answer is to be learnt: it must be there."""

    def read(raw: RawRow) -> ChatExample | Dropped:
        example = questions_format.read(raw)
        if isinstance(example, Dropped):
            return example
        if not example.output.strip():
            return raw.drop("empty answer")
        return ChatExample(
            id=example.id,
            parents=example.parents,
            prompt=qa_prompt(example),
            completion=[Message(role="assistant", content=example.output)],
            source=example.source,
        )

    return Format(questions_format.name, questions_format.fields, read)


_COMPLETION_SET = ("completion set", ("prompt", "completions"))


def _read_completion_set(raw: RawRow) -> CompletionSet | Dropped:
    row = raw.record(CompletionSet, id=raw.id)
    return row if row.completions else raw.drop("no completions")


def _read_graded_set(raw: RawRow) -> CompletionSet | Dropped:
    row = _read_completion_set(raw)
    if isinstance(row, CompletionSet):
        for number, completion in enumerate(row.completions):
            if completion.score is not None and not 0 <= completion.score <= 10:
                raise UserError(
                    f"{raw.place}: completions.{number}.score: {completion.score:g} is no grade from 0 to 10. Give the "
                    "scored.jsonl of judge, or bring the grades to that scale."
                )
    return row
