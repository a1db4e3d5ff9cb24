"""BLEU and chrF by sacrebleu: of single answers, and of all answers together, which is what papers report.

Each answer is cut into words by the script of its reference: `13a` for scripts with spaces, `zh` where there are
Chinese characters, and every character for itself in text of other scripts without spaces, Japanese among them, whose
own tokenizer in sacrebleu wants a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, TypedDict

from alignkit.data.words import HAN, WITHOUT_SPACES

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Signature
    from sacrebleu.metrics.bleu import BLEU, BLEUScore
    from sacrebleu.metrics.chrf import CHRF


class CorpusScore(TypedDict):
    """A score of all answers together, from 0 to 100, and sacrebleu's signature, which says how it was taken."""

    score: float
    signature: str


def bleu_tokenizer(text: str) -> str:
    """Name of the sacrebleu tokenizer for the script of a text."""
    chinese = len(HAN.findall(text))
    others = len(WITHOUT_SPACES.findall(text)) - chinese
    if others and 2 * (chinese + others) > sum(map(str.isalpha, text)):
        return "char"
    return "zh" if chinese else "13a"


def bleu(answer: str, reference: str) -> float:
    """Sentence BLEU from 0 to 100 (Papineni et al., 2002): 4-grams, or as many as the answer has words; case counts.

    An order without a match is smoothed exponentially (Chen and Cherry, 2014, method 3), as sacrebleu does by default.
    """
    return float(_sentence_bleu(answer, reference, bleu_tokenizer(reference)).score)


def chrf(answer: str, reference: str) -> float:
    """Sentence chrF from 0 to 100 (Popović, 2015): F of character n-grams up to 6, recall counting twice as much."""
    return float(_chrf()._compute_score_from_stats(_chrf_counts(answer, reference)).score)


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """BLEU of all answers together: matches and lengths are summed before they are divided.

    Where references are of several scripts, each is cut into words by its own.
    """
    from sacrebleu.metrics.bleu import BLEU

    tokenizers = [bleu_tokenizer(reference) for reference in references]
    found = [_sentence_bleu(*each) for each in zip(answers, references, tokenizers, strict=True)]
    together = BLEU.compute_bleu(
        correct=[sum(order) for order in zip(*(each.counts for each in found), strict=True)],
        total=[sum(order) for order in zip(*(each.totals for each in found), strict=True)],
        sys_len=sum(each.sys_len for each in found),
        ref_len=sum(each.ref_len for each in found),
        smooth_method="exp",
    )
    signatures = [str(_signature(name)) for name in dict.fromkeys(tokenizers)]
    return CorpusScore(score=float(together.score), signature=" and ".join(signatures))


def corpus_chrf(answers: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """chrF of all answers together: n-grams are summed before they are divided."""
    counts = [_chrf_counts(*each) for each in zip(answers, references, strict=True)]
    score = _chrf()._aggregate_and_compute(counts).score
    return CorpusScore(score=float(score), signature=_chrf_signature())


@lru_cache(maxsize=1 << 14)
def _sentence_bleu(answer: str, reference: str, tokenizer: str) -> BLEUScore:
    """A sentence's score with its counts, which a corpus score sums; what is scored twice is counted once."""
    return _bleu(tokenizer).sentence_score(answer, [reference])


@cache
def _bleu(tokenizer: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True, force=True)


def _signature(tokenizer: str) -> Signature:
    """Of the corpus score, whose order is not the effective one."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize=tokenizer, force=True)
    bleu.corpus_score(["a"], [["a"]])
    return bleu.get_signature()


@lru_cache(maxsize=1 << 14)
def _chrf_counts(answer: str, reference: str) -> list[int]:
    """How many n-grams answer and reference have and share; sacrebleu gives them to nobody but its own scores."""
    counts: list[int] = _chrf()._extract_corpus_statistics([answer], [[reference]])[0]
    return counts


@cache
def _chrf() -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _chrf_signature() -> str:
    """It names the number of references, which only a public call notices."""
    _chrf().corpus_score(["a"], [["a"]])
    return str(_chrf().get_signature())
