"""The passages of a query, scored by how likely they make its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from alignkit.core.records import Message, RetrievalExample
from alignkit.scoring.likelihood import Answered, encode, mean_log_probs, plain_mean_log_prob

_CHECKED = 4
"""Passages that are read by the model's own forward pass as well."""

Scores = list[float | str]
"""For each passage of a row, `pos` first, its score or the reason why it has none."""


class CandidateScorer:
    """Scores passages by a policy: the mean log p of the first answer of a row behind passage and query."""

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        max_length: int,
        template: str,
        templates: Mapping[str, str] | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.template = template
        self.templates = dict(templates or {})
        self.batch_tokens = batch_tokens
        self._some: list[tuple[Answered, float]] = []

    def score(self, rows: Sequence[RetrievalExample]) -> list[Scores]:
        """The scores of each row's passages."""
        encoded = [[self._encode(row, text) for text in (*row.pos, *row.neg)] for row in rows]
        readable = [each for row in encoded for each in row if not isinstance(each, str)]
        values = mean_log_probs(self.policy, self.tokenizer.pad_token_id, readable, self.batch_tokens)
        step = max(1, len(readable) // _CHECKED)
        self._some = list(zip(readable, values, strict=True))[::step][:_CHECKED]
        found = iter(values)
        return [[each if isinstance(each, str) else next(found) for each in row] for row in encoded]

    def difference_to_plain(self) -> tuple[float, int]:
        """Of some passages that were just scored, how far the model's own forward pass is away at most; how many."""
        differences = [abs(plain_mean_log_prob(self.policy, row) - value) for row, value in self._some]
        return max(differences, default=0.0), len(differences)

    @property
    def allowed_difference(self) -> float:
        """What rounding may make of a score, in nats: 1e-4 in float32, 0.1 in 16 bits."""
        import torch

        return 1e-4 if self.policy.dtype == torch.float32 else 0.1

    def _encode(self, row: RetrievalExample, passage: str) -> Answered | str:
        template = self.templates.get(row.task, self.template)
        before, _, after = template.partition("{passage}")
        content = before.replace("{query}", row.query) + passage + after.replace("{query}", row.query)
        answer = next(answer for answer in row.answers if answer.strip())
        return encode(self.tokenizer, [Message(role="user", content=content)], answer, self.max_length)


def with_scores(
    row: RetrievalExample, scores: Scores, drop: Callable[[BaseModel | Mapping[str, Any], str, str], None]
) -> RetrievalExample | None:
    """The row with its teacher scores, without the passages that have none; these are dropped, each with its reason.

    None, and the row dropped, where less than two passages are left, or no positive of those that were there.
    """
    kept: dict[str, list[Any]] = {"pos": [], "neg": [], "pos_index": [], "neg_index": []}
    left: list[float] = []
    for side, first in (("pos", 0), ("neg", len(row.pos))):
        texts, indexes = getattr(row, side), getattr(row, f"{side}_index")
        for place, text in enumerate(texts):
            score = scores[first + place]
            if isinstance(score, str):
                drop({"id": row.id, "query": row.query, side: text}, score, "")
                continue
            left.append(score)
            kept[side].append(text)
            if len(indexes) == len(texts):
                kept[f"{side}_index"].append(indexes[place])
    if len(left) < 2 or (row.pos and not kept["pos"]):
        drop(row, "no positive left" if len(left) >= 2 else "less than two passages left", "")
        return None
    return row.model_copy(update={**kept, "teacher_scores": left})


@dataclass
class Tally:
    """What was scored, counted while rows pass by."""

    rows: int = 0
    passages: int = 0
    with_positives: int = 0
    positive_first: int = 0
    gaps: float = 0.0

    def count(self, rows: Iterable[RetrievalExample]) -> Iterator[RetrievalExample]:
        """The same rows."""
        for row in rows:
            assert row.teacher_scores is not None
            self.rows += 1
            self.passages += len(row.teacher_scores)
            if row.pos and row.neg:
                best, others = max(row.teacher_scores[: len(row.pos)]), row.teacher_scores[len(row.pos) :]
                self.with_positives += 1
                self.positive_first += best > max(others)
                self.gaps += best - sum(others) / len(others)
            yield row

    def describe(self) -> dict[str, Any]:
        """`positive_first_share`: how often a positive has the highest score of all. Nothing, where none has both."""
        found: dict[str, Any] = {"rows": self.rows, "passages": self.passages}
        if self.with_positives:
            found["positive_first_share"] = self.positive_first / self.with_positives
            found["best_positive_over_mean_negative"] = self.gaps / self.with_positives
        return found

    @property
    def summary(self) -> str:
        """The key figures in a few words."""
        text = f"{self.passages} passages of {self.rows} queries scored"
        if not self.with_positives:
            return text
        return f"{text}, a positive first in {self.positive_first / self.with_positives:.0%}"
