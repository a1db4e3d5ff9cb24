"""The metrics there are: what each is called, its scale, which way is better, and when an answer has no such score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from alignkit.core.errors import UserError
from alignkit.core.stages import nearest

# ruff: noqa: UP045

NEVER = "never"
SHARE, PERCENT = "0 to 1", "0 to 100"


@dataclass(frozen=True)
class Metric:
    """A score of one answer."""

    title: str
    scale: str
    """From where to where, or the unit."""
    absent: str
    """When an answer has no such score; it is then not there, rather than 0."""
    higher_is_better: bool | None = True
    """None: neither way is better."""


_WITHOUT_WORDS = "the reference has no word"
_ONE_WORD = "the reference has fewer than two words"
_EMPTY = "the reference is empty"

METRICS: dict[str, Metric] = {
    "exact_match": Metric("Exact match", SHARE, NEVER),
    "token_f1": Metric("Word F1", SHARE, NEVER),
    "verdict_right": Metric("Right verdict", SHARE, "the reference says neither yes nor no"),
    "words": Metric("Words", "words", NEVER, None),
    "tokens": Metric("Tokens", "tokens", NEVER, None),
    "squad_exact_match": Metric("Exact match (SQuAD)", SHARE, NEVER),
    "squad_f1": Metric("F1 (SQuAD)", SHARE, NEVER),
    "rouge_1": Metric("ROUGE-1", SHARE, _WITHOUT_WORDS),
    "rouge_2": Metric("ROUGE-2", SHARE, _ONE_WORD),
    "rouge_l": Metric("ROUGE-L", SHARE, _WITHOUT_WORDS),
    "english_rouge_1": Metric("ROUGE-1 (rouge_score)", SHARE, NEVER),
    "english_rouge_2": Metric("ROUGE-2 (rouge_score)", SHARE, NEVER),
    "english_rouge_l": Metric("ROUGE-L (rouge_score)", SHARE, NEVER),
    "stemmed_rouge_1": Metric("ROUGE-1 (rouge_score, stemmed)", SHARE, NEVER),
    "stemmed_rouge_2": Metric("ROUGE-2 (rouge_score, stemmed)", SHARE, NEVER),
    "stemmed_rouge_l": Metric("ROUGE-L (rouge_score, stemmed)", SHARE, NEVER),
    "bleu": Metric("BLEU", PERCENT, _EMPTY),
    "chrf": Metric("chrF", PERCENT, _EMPTY),
    "edit_similarity": Metric("Edit similarity", SHARE, "both texts are too long for it"),
    "keyword_share": Metric("Keywords", SHARE, "the row has no keywords, and none are given"),
    "quote_faithfulness": Metric("Faithful quotes", SHARE, "the answer quotes nothing"),
    "refusal": Metric("Refused, rightly", SHARE, "the question can be answered"),
    "over_refusal": Metric("Refused, wrongly", SHARE, "the question cannot be answered", False),
    "embedding_cosine": Metric("Embedding cosine", "-1 to 1", _EMPTY),
    "log_perplexity": Metric("Log-perplexity", "nats a token", "the model is not here, or the row too long", False),
    "reward": Metric("Reward", "standard deviations", "the reward model cannot read the answer"),
    "judge": Metric("Judge", "0 to 10", "no grade was asked for, or the reply held none"),
}  # fmt: skip
"""Name -> what it is, in the order of tables. The first four are always taken; `judge` is asked for by judge=true."""

ALWAYS = ("exact_match", "token_f1", "verdict_right", "words")
"""Scores that cost nothing, and that reports and rounds rest on."""
DEFAULT = (*ALWAYS, "rouge_l", "keyword_share", "quote_faithfulness", "refusal", "over_refusal")


@dataclass
class MeasuringConfig:
    """What some metrics need besides the texts."""

    keywords: list[str] = field(default_factory=list)
    """For keyword_share: what every answer should hold, where the row has no `keywords` of its own."""
    embedding: str = "characters"
    """For embedding_cosine: `characters` (n-grams, no model), or a sentence-transformers model's folder or hub name."""
    reward: Optional[str] = None
    """For reward: folder of a RewardModel."""


def check_metrics(metrics: Sequence[str], measuring: MeasuringConfig) -> None:
    """Raise `UserError` for a metric that there is not, or that lacks what it needs."""
    known = [name for name in METRICS if name != "judge"]
    for name in metrics:
        if name == "judge":
            raise UserError("metrics: the judge's grade is asked for by judge=true; take judge out of metrics")
        if name not in METRICS:
            raise UserError(f"metrics: no metric {name!r}{nearest(name, known)}. There are: {', '.join(known)}")
    if "reward" in metrics:
        from alignkit.scoring.reward import require_reward_model

        if measuring.reward is None:
            raise UserError("metrics: reward needs a reward model: measuring.reward=runs/demo/reward")
        try:
            require_reward_model(measuring.reward)
        except UserError as error:
            raise UserError(f"measuring.{error}") from error
