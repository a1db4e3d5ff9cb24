"""The language of a text, by py3langid: a naive Bayes classifier over bytes that comes with its model."""

from __future__ import annotations

from functools import cache
from typing import Any

LEAST_PROBABILITY = 0.7
"""Below it a language is not named: mostly texts of one or two words, and code."""
MOST_CHARACTERS = 5000
"""Only the beginning of a longer text is looked at."""


def language(text: str) -> str | None:
    """The ISO 639-1 code of the language most of the text is in; None when that is not certain.

    The dialects and creoles that py3langid tells apart beyond ISO 639-1 are left out: with them, short Chinese text is
    Wu or Cantonese. What is no language ("zxx", like a list of numbers) gives None.
    """
    code, probability = _identifier().classify(text[:MOST_CHARACTERS])
    return str(code) if probability >= LEAST_PROBABILITY and len(code) == 2 else None


def languages() -> list[str]:
    """The codes that `language` can give."""
    return sorted(code for code in _identifier().labels if len(code) == 2)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([code for code in identifier.labels if len(code) == 2 or code == "zxx"])
    return identifier
