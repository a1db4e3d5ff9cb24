"""Hard negatives: passages that a retriever takes for an answer, and that are none.

`sentence_transformers.util.mine_hard_negatives` has the same margins and ranges of ranks, but one encoder's cosines
alone: no BM25, no answers, no ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from alignkit.core.records import RetrievalExample
from alignkit.retrieval.answers import answer_in
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.corpus import Corpus, passage_text
from alignkit.retrieval.fusion import RRF_K

POSITIVE_ID, POSITIVE_TEXT, ANSWER, MARGIN = (
    "positive by id",
    "positive by text",
    "holds an answer",
    "too near a positive",
)
"""Why a passage that was found is no negative."""


@dataclass(frozen=True)
class Limits:
    """Which of the passages found for a query may be its negatives. Ranks count from 1, the positives left out.

    A candidate must score at most the best positive's score p minus `absolute_margin`, and at most
    p - |p| * `relative_margin`. Where that positive is not among what was found, every candidate scores at least as
    much, so that none is left.
    """

    negatives: int
    first_rank: int = 1
    last_rank: int = 100
    absolute_margin: float | None = None
    relative_margin: float | None = None
    without_answers: bool = True
    at_random: bool = False

    def highest(self, positive: float | None) -> float:
        """The highest score that a negative may have."""
        if self.absolute_margin is None and self.relative_margin is None:
            return float("inf")
        if positive is None:
            return float("-inf")
        return min(positive - (self.absolute_margin or 0), positive - abs(positive) * (self.relative_margin or 0))


def mine(
    example: RetrievalExample, corpus: Corpus, rankings: Sequence[Sequence[Found]], limits: Limits, seed: int
) -> tuple[list[Passage], Counter[str]]:
    """The negatives of one query out of what each retriever found, best first; and how many were removed, and why.

    Several rankings are fused by reciprocal ranks, in which what an answer or a margin removes keeps its place.

    `rankings` must reach `limits.last_rank` places beyond the positives. What one retriever's margin removes is
    removed from all.
    """
    by_id, by_text = corpus.positives(example), corpus.with_texts(example.pos)
    has_answer = answer_in(example.answers) if limits.without_answers else None
    removed: dict[str, str] = {}
    sums: dict[str, float] = {}
    for ranking in rankings:
        positives = [each.score for each in ranking if each.passage.id in by_id | by_text]
        highest = limits.highest(max(positives, default=None))
        removed |= {each.passage.id: POSITIVE_ID for each in ranking if each.passage.id in by_id}
        removed |= {each.passage.id: POSITIVE_TEXT for each in ranking if each.passage.id in by_text - by_id}
        others = [each for each in ranking if each.passage.id not in by_id | by_text][: limits.last_rank]
        for rank, each in enumerate(others, 1):
            id = each.passage.id
            if has_answer is not None and has_answer(passage_text(each.passage)):
                removed[id] = ANSWER
            elif each.score > highest:
                removed[id] = MARGIN
            elif rank >= limits.first_rank:
                sums[id] = sums.get(id, 0.0) + 1 / (RRF_K + rank)
    usable = sorted(sums.keys() - removed.keys(), key=lambda id: (-sums[id], id))
    if limits.at_random and len(usable) > limits.negatives:
        chosen = set(Random(f"{seed} {example.id}").sample(usable, limits.negatives))
        usable = [id for id in usable if id in chosen]
    return [corpus[id] for id in usable[: limits.negatives]], Counter(removed.values())


def with_negatives(example: RetrievalExample, corpus: Corpus, negatives: Sequence[Passage]) -> RetrievalExample:
    """The row with these negatives. Teacher scores and other columns of the old negatives are no longer there.

    Scores stay where the passages are the same as before. `pos_index` is filled in where the corpus has each positive.
    """
    texts = [passage_text(passage) for passage in negatives]
    changes: dict[str, object] = {"neg": texts, "neg_index": [passage.id for passage in negatives]}
    scores = example.teacher_scores
    if texts != example.neg or (scores is not None and len(scores) != len(example.pos) + len(texts)):
        changes["teacher_scores"] = None
    if not example.pos_index:
        ids = [min(corpus.with_texts([text]), default="") for text in example.pos]
        changes["pos_index"] = ids if all(ids) else []
    row = example.model_copy(update=changes)
    for column in [name for name in row.model_extra or {} if name.startswith("neg_") and texts != example.neg]:
        assert row.model_extra is not None
        del row.model_extra[column]
    return row
