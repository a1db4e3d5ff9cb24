"""Rows through all rules of hygiene, in the order of their cost. Every row that is dropped has one reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, QAExample
from alignkit.data.hygiene.config import FLAGGED, HygieneConfig, PersonalData
from alignkit.data.hygiene.contamination import contaminated
from alignkit.data.hygiene.duplicates import exact_duplicates, near_duplicates
from alignkit.data.hygiene.language import language, languages
from alignkit.data.hygiene.personal_data import personal_data
from alignkit.data.words import words

Problem: TypeAlias = tuple[str, str] | None
"""The reason why a row is dropped, and the particulars."""


def clean(
    rows: Sequence[QAExample], config: HygieneConfig, evaluation: Sequence[QAExample] = ()
) -> tuple[list[QAExample], list[Dropped]]:
    """The rows that keep all rules, and the others with the first rule that they break.

    Duplicates are rows of which statement, question and answer are each the same or similar; the first one stays. A row
    is contaminated when it holds both the statement and the question of one of `evaluation`: many questions may be
    asked about one statement, and one question ("Is it true?") of many. With `personal_data: flag` a row that holds
    some gets the field `personal_data`, a list of the kinds found.
    """
    kept, dropped = list(rows), list[Dropped]()
    if config.empty_answer:
        kept = _passing(kept, [None if row.output.strip() else ("empty answer", "") for row in kept], dropped)
    kept = _passing(kept, [_length_problem(row, config) for row in kept], dropped)
    if config.languages:
        kept = _passing(kept, _language_problems(kept, config.languages), dropped)
    if config.personal_data is not PersonalData.ignore:
        found = [personal_data(_whole(row)) for row in kept]
        if config.personal_data is PersonalData.drop:
            problems: list[Problem] = [("personal data", ", ".join(kinds)) if kinds else None for kinds in found]
            kept = _passing(kept, problems, dropped)
        else:
            kept = [_flagged(row, kinds) for row, kinds in zip(kept, found, strict=True)]
    if config.exact_duplicates:
        kept = _passing(kept, _exact(kept), dropped)
    if config.near_duplicates is not None:
        kept = _passing(kept, _near(kept, config.near_duplicates), dropped)
    if config.contamination_words is not None and evaluation:
        problems = _contaminated(kept, evaluation, config.contamination_words, config.contamination_share)
        kept = _passing(kept, problems, dropped)
    return kept, dropped


def _passing(rows: Sequence[QAExample], problems: Sequence[Problem], dropped: list[Dropped]) -> list[QAExample]:
    """The rows without a problem; the others are added to `dropped`."""
    for row, problem in zip(rows, problems, strict=True):
        if problem is not None:
            dropped.append(Dropped(reason=problem[0], row=row.model_dump(), detail=problem[1]))
    return [row for row, problem in zip(rows, problems, strict=True) if problem is None]


def _whole(row: QAExample) -> str:
    return "\n".join((row.instruction, row.input, row.output))


def _length_problem(row: QAExample, config: HygieneConfig) -> Problem:
    texts = {"question": f"{row.instruction}\n{row.input}", "answer": row.output}
    for name, text in texts.items():
        least, most = getattr(config, f"min_{name}_words"), getattr(config, f"max_{name}_words")
        if not least and most is None:
            continue
        if (length := len(words(text))) < least:
            return f"{name} too short", f"{length} words, fewer than {least}"
        if most is not None and length > most:
            return f"{name} too long", f"{length} words, more than {most}"
    if config.max_characters is not None and (length := len(_whole(row))) > config.max_characters:
        return "row too long", f"{length} characters, more than {config.max_characters}"
    return None


def _language_problems(rows: Sequence[QAExample], wanted: Sequence[str]) -> list[Problem]:
    if unknown := set(wanted) - set(languages()):
        raise UserError(
            f"hygiene.languages: {', '.join(sorted(unknown))} is not known; give ISO 639-1 codes out of "
            f"{', '.join(languages())}"
        )
    found = [language(_whole(row)) for row in rows]
    return [("language not wanted", code) if code is not None and code not in wanted else None for code in found]


def _flagged(row: QAExample, kinds: list[str]) -> QAExample:
    if not kinds:
        return row
    return row.model_copy(update={FLAGGED: kinds})


def _parts(rows: Iterable[QAExample]) -> list[tuple[str, str, str]]:
    return [(row.instruction, row.input, row.output) for row in rows]


def _exact(rows: Sequence[QAExample]) -> list[Problem]:
    copies = exact_duplicates(_parts(rows))
    return [None if first is None else ("exact duplicate", f"of {rows[first].id}") for first in copies]


def _near(rows: Sequence[QAExample], threshold: float) -> list[Problem]:
    matches = near_duplicates(_parts(rows), threshold)
    return [
        None if match is None else ("near duplicate", f"of {rows[match.row].id}: {match.similarity:.3f} alike")
        for match in matches
    ]


def _contaminated(
    rows: Sequence[QAExample], evaluation: Sequence[QAExample], length: int, share: float
) -> list[Problem]:
    questions = [(row.instruction, row.input) for row in evaluation]
    matches = contaminated(_parts(rows), questions, length, share)
    return [
        None
        if match is None
        else ("in the evaluation data", f"holds {match.similarity:.0%} of evaluation row {evaluation[match.row].id}")
        for match in matches
    ]
