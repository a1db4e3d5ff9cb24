"""How new a text is: ROUGE-L against everything accepted before, as in Self-Instruct, for text of any script.

The original compares words of [a-z0-9] only: two equal Chinese texts have no words in common there, and the filter
never fires. Here words are Unicode words, and each Chinese or Japanese character is a word of its own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz import process
from rapidfuzz.distance import Indel, LCSseq

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_FIRST_CODE, _SURROGATES, _SURROGATE_COUNT = 0x100, 0xD800, 0x800
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Match:
    """A text in the index, by its label, and how similar it is (ROUGE-L F, 0 to 1)."""

    label: str
    similarity: float


@dataclass(frozen=True)
class Decision:
    """Whether a text is new, and if not, the text it repeats most."""

    novel: bool
    blocked_by: Match | None = None


def words(text: str) -> list[str]:
    """The words of a text, case and Unicode width folded; punctuation is left out."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def rouge_l_f(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F of two word sequences (Lin, 2004, equation 4 with beta = 1): F = 2PR / (P + R), P = L/|b|, R = L/|a|.

    L is the length of the longest common subsequence. Equal to 2L / (|a| + |b|) but for the last digit, which decides
    at the threshold: it is computed in this order because `rouge_score` does.
    """
    common = LCSseq.similarity(a, b)
    if not common:
        return 0.0
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall)


class NoveltyIndex:
    """Texts accepted so far. A text is not new when its ROUGE-L F with one of them exceeds `threshold`.

    Self-Instruct uses 0.7. The surprise: an exact repetition is never new, whatever the threshold, and even if it holds
    no word.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie above 0 and not above 1")
        self.threshold = threshold
        self._labels: list[str] = []
        self._encoded: list[str] = []
        self._exact: dict[str, int] = {}
        self._codes: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, text: str, label: str) -> None:
        """Accept a text under a label by which matches name it."""
        self._exact.setdefault(text.strip(), len(self._labels))
        self._labels.append(label)
        self._encoded.append(self._encode(text))

    def most_similar(self, text: str) -> Match | None:
        """The text that blocks `text`, the most similar one if there are several; None when `text` is new."""
        if (exact := self._exact.get(text.strip())) is not None:
            return Match(self._labels[exact], 1.0)
        query = self._encode(text)
        # Indel similarity is 2L / (|a| + |b|), so nothing above the threshold is missed; it skips by length itself.
        near = process.extract(
            query,
            self._encoded,
            scorer=Indel.normalized_similarity,
            score_cutoff=self.threshold - _ROUNDING,
            limit=None,
        )
        matches = [Match(self._labels[position], rouge_l_f(query, encoded)) for encoded, _, position in near]
        best = max(matches, key=lambda match: match.similarity, default=None)
        return best if best and best.similarity > self.threshold else None

    def _encode(self, text: str) -> str:
        """The text with each word as one character, which is what makes comparing fast."""
        return "".join(self._codes.get(word) or self._codes.setdefault(word, self._next_code()) for word in words(text))

    def _next_code(self) -> str:
        code = _FIRST_CODE + len(self._codes)
        return chr(code if code < _SURROGATES else code + _SURROGATE_COUNT)


def filter_novel(texts: Sequence[str], threshold: float = 0.7) -> list[Decision]:
    """Go through texts in order and accept each that is new against those accepted before; labels are positions."""
    index = NoveltyIndex(threshold)
    decisions = []
    for position, text in enumerate(texts):
        blocked_by = index.most_similar(text)
        if blocked_by is None:
            index.add(text, str(position))
        decisions.append(Decision(blocked_by is None, blocked_by))
    return decisions
