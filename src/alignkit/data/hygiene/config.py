"""What `clean` lets pass. Nothing heavy is imported here: stages show this configuration in their help."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from alignkit.core.errors import UserError

# ruff: noqa: UP045


FLAGGED = "personal_data"
"""The field of a row that says which kinds of personal data are in it."""


class PersonalData(Enum):
    """What becomes of a row that holds personal data or a secret key.

    `ignore`: it is not looked at. `flag`: it stays, and its field `personal_data` says what was found. `drop`: it is
    dropped.
    """

    ignore = "ignore"
    flag = "flag"
    drop = "drop"


@dataclass
class HygieneConfig:
    """The rules that a row must keep. As they stand, only useless, repeated and contaminated rows are dropped."""

    empty_answer: bool = True
    """Drop rows without an answer."""
    min_question_words: int = 0
    """Fewest words of statement and question together; in Chinese and Japanese each character counts as one."""
    max_question_words: Optional[int] = None
    """Most words of statement and question together; null: any number."""
    min_answer_words: int = 0
    """Fewest words of the answer."""
    max_answer_words: Optional[int] = None
    """Most words of the answer; null: any number."""
    max_characters: Optional[int] = None
    """Most characters of the whole row, which also bounds text that has no words; null: any number."""
    languages: list[str] = field(default_factory=list)
    """ISO 639-1 codes, like [en, zh]: rows in others are dropped, those too short to tell are kept. Empty: any."""
    personal_data: PersonalData = PersonalData.flag
    """E-mail addresses, phone and card numbers, secret keys, ...: ignore, flag or drop the row."""
    exact_duplicates: bool = True
    """Drop a row that says the same as an earlier one, but for case, spaces and the width of characters."""
    near_duplicates: Optional[float] = 0.8
    """Drop a row whose statement, question and answer are each so similar to an earlier row's (0 to 1); null: none."""
    contamination_words: Optional[int] = 13
    """How long a run of words must be to count as taken over from the evaluation rows; null: do not look."""
    contamination_share: float = 0.5
    """Share of the runs in an evaluation question, and in its statement, that a row must hold to be dropped."""

    def __post_init__(self) -> None:
        for name in ("near_duplicates", "contamination_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"hygiene.{name}={value}: must lie above 0 and not above 1")
        if self.contamination_words is not None and self.contamination_words < 1:
            raise UserError(f"hygiene.contamination_words={self.contamination_words}: must be at least 1, or null")
        for name in ("question_words", "answer_words"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if most is not None and most < least:
                raise UserError(f"hygiene.max_{name}={most} is less than hygiene.min_{name}={least}: no row can pass")
