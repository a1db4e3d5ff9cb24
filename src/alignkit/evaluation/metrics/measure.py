"""Take the scores that a configuration asks for, of every answer of every system."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig
from alignkit.core.hashing import hash_text
from alignkit.core.journal import Journal
from alignkit.core.records import Message, QAExample
from alignkit.data.chat import qa_prompt
from alignkit.data.words import english_words, words
from alignkit.evaluation.metrics import content, corpus, overlap
from alignkit.evaluation.metrics.catalogue import ALWAYS, METRICS, MeasuringConfig
from alignkit.evaluation.predictions import ModelAnswer, Prediction

LOG = logging.getLogger("alignkit")

Policies = Mapping[str, Callable[[], tuple[Any, Any]]]
"""System -> what loads its model and tokenizer, for the systems that have a model on this machine."""


def score_rows(
    rows: Sequence[Prediction],
    metrics: Sequence[str],
    measuring: MeasuringConfig,
    model: ModelConfig,
    policies: Policies,
    artifact: Artifact,
) -> None:
    """Add the scores of `metrics` to the answers of `rows`; the log says how many could not be taken, and why.

    `model` is the base: its tokenizer counts tokens and its max_length bounds what is read. What needs a model is
    journalled in the artifact's work folder.
    """
    wanted = [name for name in METRICS if name in metrics and name not in ALWAYS]
    for row in rows:
        for answer in row.answers.values():
            answer.scores |= text_scores(row, answer, wanted, measuring.keywords)
    if "tokens" in wanted:
        _count_tokens(rows, model)
    if "embedding_cosine" in wanted:
        _compare_embeddings(rows, measuring.embedding, artifact)
    if "reward" in wanted:
        assert measuring.reward is not None
        _reward(rows, measuring.reward, artifact)
    if "log_perplexity" in wanted:
        _read_references(rows, model, policies, artifact)


# -- from the texts alone ----------------------------------------------------------------------------------------------

_SCORES: dict[str, Callable[[str, str], float | None]] = {
    "squad_exact_match": overlap.squad_exact_match,
    "squad_f1": overlap.squad_f1,
    "rouge_1": lambda answer, reference: overlap.rouge_n(answer, reference, 1) if words(reference) else None,
    "rouge_2": lambda answer, reference: overlap.rouge_n(answer, reference, 2) if words(reference)[1:] else None,
    "rouge_l": lambda answer, reference: overlap.rouge_l(answer, reference) if words(reference) else None,
    "english_rouge_1": partial(overlap.rouge_n, n=1, tokenize=english_words),
    "english_rouge_2": partial(overlap.rouge_n, n=2, tokenize=english_words),
    "english_rouge_l": partial(overlap.rouge_l, tokenize=english_words),
    "stemmed_rouge_1": partial(overlap.rouge_n, n=1, tokenize=overlap.stemmed_words),
    "stemmed_rouge_2": partial(overlap.rouge_n, n=2, tokenize=overlap.stemmed_words),
    "stemmed_rouge_l": partial(overlap.rouge_l, tokenize=overlap.stemmed_words),
    "bleu": lambda answer, reference: corpus.bleu(answer, reference) if reference.strip() else None,
    "chrf": lambda answer, reference: corpus.chrf(answer, reference) if reference.strip() else None,
    "edit_similarity": overlap.edit_similarity,
}
"""Metrics of an answer and a reference. None: there is no such score."""


def text_scores(
    row: Prediction, answer: ModelAnswer, metrics: Sequence[str], keywords: Sequence[str] = ()
) -> dict[str, float]:
    """Those of `metrics` that the texts suffice for, without what cannot be taken."""
    found: dict[str, float | None] = {
        name: _SCORES[name](answer.text, row.reference) for name in metrics if name in _SCORES
    }
    if "keyword_share" in metrics:
        found["keyword_share"] = content.keyword_share(answer.text, row.keywords or keywords)
    if "quote_faithfulness" in metrics:
        found["quote_faithfulness"] = content.quote_faithfulness(answer.text, answer.contexts or [row.instruction])
    if "refusal" in metrics and row.cannot_be_answered:
        found["refusal"] = content.refused(answer.text)
    if "over_refusal" in metrics and not row.cannot_be_answered:
        found["over_refusal"] = content.refused(answer.text)
    return {name: float(value) for name, value in found.items() if value is not None}


# -- with a model ------------------------------------------------------------------------------------------------------


def _count_tokens(rows: Sequence[Prediction], model: ModelConfig) -> None:
    """Each answer's length in tokens of the base's tokenizer, the same for all systems."""
    from alignkit.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    for row in rows:
        for answer in row.answers.values():
            answer.scores["tokens"] = float(len(tokenizer.encode(answer.text, add_special_tokens=False, verbose=False)))


def _compare_embeddings(rows: Sequence[Prediction], model: str, artifact: Artifact) -> None:
    """The cosine of each answer and its reference; a text without characters is similar to nothing, 0."""
    import numpy as np

    from alignkit.scoring.row_embedding import EmbeddingConfig, embed_texts

    pairs = [(answer, row.reference) for row in rows if row.reference.strip() for answer in row.answers.values()]
    texts = [text for answer, reference in pairs for text in (answer.text, reference)]
    cache = str(artifact.work_folder / "embeddings.sqlite")
    vectors = embed_texts(texts, EmbeddingConfig(model=model, cache=cache)).astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(lengths > 0, lengths, 1)
    for (answer, _), cosine in zip(pairs, (vectors[::2] * vectors[1::2]).sum(axis=1).tolist(), strict=True):
        answer.scores["embedding_cosine"] = min(1.0, max(-1.0, cosine))


def _reward(rows: Sequence[Prediction], folder: str, artifact: Artifact) -> None:
    """The reward model's score of each different answer to the row's own prompt."""
    from alignkit.scoring.resumable import score_all
    from alignkit.scoring.reward import RewardScorer

    keys = list(dict.fromkeys((row.id, answer.text) for row in rows for answer in row.answers.values()))
    prompts = {row.id: _prompt(row) for row in rows}
    asked = [
        (str(number), [*prompts[id], Message(role="assistant", content=text)]) for number, (id, text) in enumerate(keys)
    ]
    with Journal(artifact.work_folder / "rewards.jsonl", _fingerprint(artifact, keys)) as journal:
        scores = dict(zip(keys, score_all(RewardScorer(folder), asked, journal), strict=True))
    missing = [reason for _, reason in scores.values() if reason]
    if missing:
        LOG.warning("no reward for %d of %d answers, the first because: %s", len(missing), len(keys), missing[0])
    for row in rows:
        for answer in row.answers.values():
            if (score := scores[row.id, answer.text][0]) is not None:
                answer.scores["reward"] = score


def _read_references(rows: Sequence[Prediction], model: ModelConfig, policies: Policies, artifact: Artifact) -> None:
    """Each system's log-perplexity of the references, one system after the other."""
    from alignkit.evaluation.metrics.perplexity import log_perplexities

    systems = list(dict.fromkeys(name for row in rows for name in row.answers))
    for name in systems:
        if name not in policies:
            LOG.warning("no log-perplexity for %s: it has no model on this machine", name)
            continue
        answered = [row for row in rows if name in row.answers]
        references = [(row.id, _prompt(row), row.reference) for row in answered]
        path = artifact.work_folder / "references" / f"{name}.jsonl"
        with Journal(path, _fingerprint(artifact, [row.id for row in answered])) as journal:
            if any(row.id not in journal.done for row in answered):
                found = log_perplexities(*policies[name](), references, model.max_length, journal)
            else:
                found = journal.done
        for row in answered:
            if row.id in found:
                row.answers[name].scores["log_perplexity"] = found[row.id]


def _prompt(row: Prediction) -> list[Message]:
    return qa_prompt(QAExample(id=row.id, instruction=row.instruction, input=row.input))


def _fingerprint(artifact: Artifact, keys: Sequence[Any]) -> str:
    """Names the work and what it is about: a server's answers may be others the next time."""
    return hash_text(json.dumps([artifact.fingerprint, keys]))
