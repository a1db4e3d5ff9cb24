"""How scores are called and written: shares of 1 in percent, all others as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.templating import MINUS, NO_BREAK

_TITLES = {
    "exact_match": "Exact match",
    "token_f1": "Word F1",
    "judge": "Grade",
    "preference": "Preferred by the judge",
    "balanced_verdict_accuracy": "Verdicts, balanced",
    "words": "Words",
    "finished": "Ended by itself",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
}
_GRADES = ("judge", "reward", "words", "bleu", "chrf", "perplexity")
"""Scores that are no shares of 1; so is any that has values outside 0 to 1."""
FULL_MARKS = {"judge": 10.0}
"""The most that an answer can get, where that is not 1."""


def is_estimate(value: Any) -> TypeGuard[Estimate]:
    """Whether an entry of a manifest's metrics is a mean with its interval."""
    return isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys()


def estimated(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every key that holds an estimate in any of the entries, in order of appearance."""
    return list(dict.fromkeys(name for each in entries for name, value in each.items() if is_estimate(value)))


def title(score: str) -> str:
    """What a score is called in tables."""
    return _TITLES.get(score, score.replace("_", " ").capitalize())


def is_share(score: str, value: Estimate | None = None) -> bool:
    """Whether a score is written in percent."""
    outside = value is not None and not (value["low"] >= -1 and value["high"] <= 1)
    return score not in _GRADES and not outside


def figure(score: str, value: float, *, sign: bool = False, of: Estimate | None = None) -> str:
    """One number of a score: "63.7", "7.92", with `sign` "+5.4"."""
    plus = "+" if sign else ""
    text = f"{100 * value:{plus}.1f}" if is_share(score, of) else f"{value:{plus}.2f}"
    return text.replace("-", MINUS)


def interval(score: str, estimate: Estimate, *, sign: bool = False, with_n: bool = False) -> str:
    """A mean with its interval, and, if it is wanted, the rows behind it: "63.7 [60.4, 67.0] (n 800)"."""
    mean, low, high = (figure(score, estimate[key], sign=sign, of=estimate) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" + (f" (n {estimate['n']:,})" if with_n else "")


def rows_behind(estimates: Iterable[Estimate | None], questions: int) -> int | bool:
    """What a table has to say of the rows behind the scores of one column.

    False: nothing, all stand on all questions. A number: all stand on so many, which the heading says. True: they stand
    on different rows, and each cell says on how many.
    """
    found = {each["n"] for each in estimates if each}
    if len(found) > 1:
        return True
    return False if found <= {questions} else found.pop()


def heading(score: str, behind: int | bool) -> str:
    """What a column is called, with the rows behind it where `rows_behind` says so."""
    return title(score) if isinstance(behind, bool) else f"{title(score)} (n {behind:,})"


def unit(score: str, estimate: Estimate | None = None) -> str:
    """What to write behind a score's number."""
    return f"{NO_BREAK}%" if is_share(score, estimate) else ""


def p_value(value: float) -> str:
    """A p-value as one reads it."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
