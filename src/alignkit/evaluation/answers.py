"""What a system answered, or why it did not; and files of answers that were written elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from alignkit.core.errors import UserError
from alignkit.core.records import CompletionSet
from alignkit.data.jsonl import note_id, read_rows, to_record
from alignkit.data.sources.raw import row_id
from alignkit.evaluation.predictions import Prediction

NOT_IN_FILE = "not in the file of answers"


@dataclass(frozen=True)
class Answer:
    """A system's answer to one row. `finished` is False when a length limit cut it.

    `contexts` and `queries` are what the system read and searched for, `scores` what is known of it before it is
    compared with anything (`hops`).
    """

    text: str
    finished: bool = True
    contexts: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """Why a system has no answer to a row: in words to count by, and the particulars."""

    reason: str
    detail: str = ""


Outcomes = dict[str, Answer | Missing]
"""What came of each row, by its id."""


class _WrittenAnswer(BaseModel):
    text: str
    finished: bool = True
    contexts: list[str] = []


def read_answers(setting: str, path: str, ids: Iterable[str]) -> tuple[Outcomes, int]:
    """The answers that a file has for these rows, and how many it has for others.

    Reads rows with `id` and `text` (and `finished`, `contexts`), completions with one completion a row, and the
    predictions of another evaluation, of which the system of the same name counts. `setting` is the key that names the
    file, `models.<name>`. Raises `UserError` with the line of a row that is none of these, and when no row fits.
    """
    name, seen, written = setting.rpartition(".")[2], dict[str, str](), dict[str, Answer]()
    for place, fields in read_rows(path):
        id = row_id(place, fields, "")
        if not id:
            raise UserError(f"{place}: no id; an answer belongs to the held-out row of the same id")
        note_id(seen, id, place)
        answer = _read_answer(place, fields, name)
        if answer is not None:
            written[id] = answer
    outcomes: Outcomes = {id: written.get(id, Missing(NOT_IN_FILE)) for id in ids}
    fitting = sum(isinstance(outcome, Answer) for outcome in outcomes.values())
    if not fitting:
        example = f", its first id is '{next(iter(seen))}'" if seen else ""
        raise UserError(
            f"{setting}={path}: answers none of the {len(outcomes)} held-out rows{example}, theirs is "
            f"'{next(iter(outcomes))}'. Give answers the ids of the rows in data.path."
        )
    return outcomes, len(written) - fitting


def _read_answer(place: str, fields: Mapping[str, Any], name: str) -> Answer | None:
    """The answer in a row; None when it has none (of that system)."""
    if "answers" in fields:
        found = to_record(place, fields, Prediction).answers.get(name)
        return None if found is None else Answer(found.text, found.finished, found.contexts, found.queries)
    if "completions" in fields:
        completions = to_record(
            place, {"prompt": [{"role": "user", "content": ""}], **fields}, CompletionSet
        ).completions
        if len(completions) > 1:
            raise UserError(f"{place}: {len(completions)} completions; give one answer a row")
        return Answer(completions[0].text, completions[0].finished) if completions else None
    row = to_record(place, fields, _WrittenAnswer)
    return Answer(row.text, row.finished, row.contexts)
