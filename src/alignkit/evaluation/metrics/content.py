"""What an answer says, beside its reference: verdicts, refusals, keywords, and quotes of what was read."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from alignkit.data.sources.raft import quotations, refuses, stands_in
from alignkit.scoring.rules import read_verdict


def verdict_is_right(answer: str, reference: str) -> bool | None:
    """Whether the answer carries the reference's yes or no; None when the reference carries neither."""
    wanted = read_verdict(reference)
    return None if wanted not in ("yes", "no") else read_verdict(answer) == wanted


def refused(text: str) -> bool:
    """Whether a text says that the question cannot be answered, in English, German or Chinese: a list of phrases.

    A text with a verdict of yes or no is none, whatever else it says.
    """
    verdict = read_verdict(text)
    return verdict == "undecided" or (verdict is None and refuses(text))


def keyword_share(answer: str, keywords: Sequence[str]) -> float | None:
    """Share of the keywords that stand in the answer, be it inside a longer word; None without keywords.

    Case, Unicode's compatibility forms (NFKC) and the amount of white space do not count.
    """
    wanted = [folded for keyword in keywords if (folded := _folded(keyword))]
    text = _folded(answer)
    return sum(keyword in text for keyword in wanted) / len(wanted) if wanted else None


def quote_faithfulness(answer: str, read: Sequence[str]) -> float | None:
    """Share of the answer's quotes that stand word for word in one of the texts that were read; None without a quote.

    A quote is what stands between RAFT's ##begin_quote## and ##end_quote## (Zhang et al., 2024, arXiv 2403.10131). An
    empty one stands nowhere. White space and quotation marks around it do not count.
    """
    quotes = quotations(answer)
    return sum(any(stands_in(quote, text) for text in read) for quote in quotes) / len(quotes) if quotes else None


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
