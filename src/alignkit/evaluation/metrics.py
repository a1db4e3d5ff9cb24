"""Scores of one answer against its reference: pure functions of two texts, in any language."""

from __future__ import annotations

from collections import Counter

from alignkit.data.words import words
from alignkit.scoring.rules import read_verdict


def exact_match(answer: str, reference: str) -> bool:
    """Whether the two texts are equal once runs of white space count as one space; case and punctuation count."""
    return answer.split() == reference.split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of the answer's words (Rajpurkar et al., 2016, arXiv 1606.05250).

    With overlap o, counted as multisets: 2o / (words of the answer + words of the reference). Two empty texts score 1.
    Unlike SQuAD's own script it reads every script, those without spaces by character, and keeps the articles.
    """
    written, wanted = Counter(words(answer)), Counter(words(reference))
    total = written.total() + wanted.total()
    return 2 * (written & wanted).total() / total if total else 1.0


def verdict_is_right(answer: str, reference: str) -> bool | None:
    """Whether the answer carries the reference's yes or no; None when the reference carries neither."""
    wanted = read_verdict(reference)
    return None if wanted not in ("yes", "no") else read_verdict(answer) == wanted
