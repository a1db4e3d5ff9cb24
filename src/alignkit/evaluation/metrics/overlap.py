"""How much of a reference an answer has: exact match, F1, ROUGE and edit similarity, pure functions of two texts.

Each reads text of any script. Beside them stand the modes that agree with the usual scripts to the last digits, which
know English only: `squad_*` (SQuAD 1.1) and the functions with `tokenize=english_words` or `stemmed_words`
(`rouge_score`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from rapidfuzz.distance import Levenshtein

from alignkit.core.errors import UserError
from alignkit.data.words import english_words, words
from alignkit.scoring.novelty import rouge_l_f, word_code

Tokenize = Callable[[str], list[str]]

MOST_CELLS = 10**11
"""Product of two lengths above which an edit distance takes minutes rather than seconds."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_STEMMED_FROM = 4


# -- exact match and F1 ------------------------------------------------------------------------------------------------


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


def squad_normalise(text: str) -> str:
    """A text as SQuAD 1.1's script compares it: lower case, without ASCII punctuation, English articles, more spaces.

    In this order, so that "a.m." loses its full stops and stays "am".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(answer: str, reference: str) -> bool:
    """Whether SQuAD 1.1's script takes the answer for the reference."""
    return squad_normalise(answer) == squad_normalise(reference)


def squad_f1(answer: str, reference: str) -> float:
    """F1 of SQuAD 1.1's script: over the words between spaces. Without a common word, and so for two empty texts, 0."""
    written, wanted = squad_normalise(answer).split(), squad_normalise(reference).split()
    return _f_measure((Counter(written) & Counter(wanted)).total(), len(written), len(wanted))


# -- ROUGE -------------------------------------------------------------------------------------------------------------


def rouge_n(answer: str, reference: str, n: int, tokenize: Tokenize = words) -> float:
    """ROUGE-N F of two texts (Lin, 2004): the harmonic mean of precision and recall of n-grams, as multisets.

    0 where one of the two has fewer than n words.
    """
    written, wanted = _ngrams(tokenize(answer), n), _ngrams(tokenize(reference), n)
    return _f_measure((written & wanted).total(), written.total(), wanted.total())


def rouge_l(answer: str, reference: str, tokenize: Tokenize = words) -> float:
    """ROUGE-L F of two texts: of the longest common subsequence of their words. See `scoring.novelty.rouge_l_f`.

    Words become characters before they are compared, which halves the time on texts of a megabyte (seconds).
    """
    codes: dict[str, str] = {}
    written, wanted = (
        "".join(codes.setdefault(word, word_code(len(codes))) for word in tokenize(text))
        for text in (answer, reference)
    )
    return rouge_l_f(wanted, written)


def stemmed_words(text: str) -> list[str]:
    """`english_words`, those of more than three letters stemmed as `rouge_score` does: by NLTK's Porter stemmer."""
    stem = _stemmer()
    return [stem(word) if len(word) >= _STEMMED_FROM else word for word in english_words(text)]


# -- edits -------------------------------------------------------------------------------------------------------------


def edit_similarity(answer: str, reference: str) -> float | None:
    """1 - Levenshtein distance in characters / length of the longer text: 1 for equal texts, 0 for unlike ones.

    None for two texts that are so long (`MOST_CELLS`) that it would take minutes.
    """
    if len(answer) * len(reference) > MOST_CELLS:
        return None
    return Levenshtein.normalized_similarity(answer, reference)


def _f_measure(common: int, written: int, wanted: int) -> float:
    """2PR / (P + R) with P = common / written and R = common / wanted, in this order as the references compute it."""
    if not common:
        return 0.0
    precision, recall = common / written, common / wanted
    return 2 * precision * recall / (precision + recall)


def _ngrams(tokens: Sequence[str], n: int) -> Counter[Any]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


@cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise UserError("metrics: stemmed_rouge_* need NLTK's stemmer: pip install nltk") from error
    stem: Callable[[str], str] = cache(PorterStemmer().stem)
    return stem
