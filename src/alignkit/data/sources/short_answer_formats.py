"""The formats in which questions with short answers come, and how their nested files are laid flat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, QAExample
from alignkit.data.jsonl import Placed, read_rows
from alignkit.data.sources import boolq, drop, hotpotqa, musique, questions, squad
from alignkit.data.sources.raw import Format, RawRow
from alignkit.data.sources.short_answers import ShortAnswer, usable


def read_short_answer(raw: RawRow) -> ShortAnswer | Dropped:
    """A row of our own."""
    return usable(raw, raw.record(ShortAnswer, id=raw.id))


def read_answered_question(raw: RawRow) -> ShortAnswer | Dropped:
    """A QA example, whose answer is taken for a short one."""
    return _from_question(raw, questions.read_question(raw))


def read_hotpotqa(raw: RawRow, paragraphs: str = "gold") -> ShortAnswer | Dropped:
    """A row of HotpotQA, with its `gold` paragraphs or `all`."""
    return _from_question(raw, hotpotqa.read_question(raw, paragraphs))


def _from_question(raw: RawRow, example: QAExample | Dropped) -> ShortAnswer | Dropped:
    if isinstance(example, Dropped):
        return example
    row = ShortAnswer(
        id=example.id,
        parents=example.parents,
        question=example.input,
        paragraphs=[example.instruction],
        answers=[example.output] if example.output.strip() else [],
        dataset=example.source,
    )
    return usable(raw, row.model_copy(update={"reasoning": "thought" if row.verdict else "none"}))


def formats(hotpotqa_paragraphs: str = "gold") -> tuple[Format[ShortAnswer], ...]:
    """All formats of questions with short answers, those with the most particular fields first."""
    return (
        *(*squad.FORMATS, *musique.FORMATS, *drop.FORMATS, *boolq.FORMATS),
        Format("HotpotQA", hotpotqa.FIELDS, partial(read_hotpotqa, paragraphs=hotpotqa_paragraphs)),
        Format("short answer", ("question", "paragraphs"), read_short_answer),
        Format("QA example", ("instruction", "input", "output"), read_answered_question),
    )


def flat_rows(path: str, skip: int = 0, limit: int | None = None) -> Iterator[Placed]:
    """`read_rows`, but a row is a question with an id of its own, as it is not in every file of these data sets.

    The files of SQuAD and DROP are one nested object, and in MuSiQue-Full two rows share an id.
    """
    whole = _whole_object(path)
    if whole is not None and squad.is_nested(whole):
        rows = squad.flatten(path, whole)
    elif whole is not None and drop.is_nested(whole):
        rows = drop.flatten(path, whole)
    else:
        yield from ((place, musique.with_own_id(fields)) for place, fields in read_rows(path, skip, limit))
        return
    if skip < 0 or (limit is not None and limit < 1):
        raise UserError(f"{path}: skip={skip} must not be negative, and limit={limit} must be at least 1 or null")
    chosen = islice(rows, skip, None if limit is None else skip + limit)
    first = next(chosen, None)
    if first is None:
        raise UserError(f"{path}: holds no question, or none after skip={skip}. Give another file.")
    yield first
    yield from chosen


def _whole_object(path: str) -> dict[str, Any] | None:
    """The object that a .json file is; None when it is anything else, which `read_rows` reads or complains about."""
    file = Path(path)
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        with file.open(encoding="utf-8-sig") as opened:
            if not opened.read(4096).lstrip().startswith("{"):
                return None
            opened.seek(0)
            whole = json.load(opened)
    except (OSError, ValueError, RecursionError):
        return None
    return whole if isinstance(whole, dict) else None
