"""evaluate_retriever: how well retrievers find what answers a query, each figure with its 95 % interval, and compared.

All retrievers look for the same queries in the same passages. Scores are MRR, recall, nDCG and precision by the
passages that a row names as positives, and hit: whether an answer stands in a passage; at each cut-off, of all queries
and of each task. Differences are paired: the same queries, before and after. docs/mining.md says how to read them.

Reads:   data.path                 queries with positives: LLM-Embedder's rows, HotpotQA's, or questions over statements
         corpus                    passages to search, {id, title, text} (without: those that stand in the rows)
         retrievers                by name: bm25, characters, or a folder of a sentence-transformers encoder
Writes:  rankings.jsonl            for each query what every retriever found
         retrieval.txt             the table of all scores and differences
         contexts_<name>.jsonl     with contexts=1: questions with the passages found as their statement, for `evaluate`
         manifest.json             metrics.retrievers: scores; metrics.retrieval_comparisons: differences

Overrides people use:
  'retrievers={before: my_encoder, after: runs/mine/retriever/model}'   besides bm25 (retrievers.bm25=null: without)
  'comparisons=["after>before"]'   which pairs to compare (default: each with the one before)
  cutoffs=[1,5,20]                 at which ranks
  contexts=2                       put the two best passages into each question's statement

Examples:
  python -m alignkit.evaluate_retriever run=mine data.path=hotpotqa.jsonl task=qa
  python -m alignkit.evaluate_retriever data.path=test.jsonl 'retrievers={after: runs/mine/retriever/model}' contexts=1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig
from alignkit.core.errors import UserError
from alignkit.core.names import check_names, read_comparisons

if TYPE_CHECKING:
    from alignkit.core.records import RetrievalExample
    from alignkit.evaluation.retrieval_metrics import RankedQuery
    from alignkit.retrieval.base import Found
    from alignkit.retrieval.corpus import Corpus

# ruff: noqa: UP045


@dataclass
class EvaluateRetrieverConfig(StageConfig):
    """Configuration of `evaluate_retriever`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "corpus", "retrievers")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "cache")

    data: RowsConfig = field(default_factory=RowsConfig)
    task: Optional[str] = None
    """The task of rows that name none."""
    corpus: Optional[str] = None
    """File of the passages to search; none: the passages that stand in the rows."""
    retrievers: dict[str, Optional[str]] = field(default_factory=dict)
    """Name -> `bm25`, `characters`, or folder or hub name of an encoder; null leaves a retriever out."""
    comparisons: list[str] = field(default_factory=list)
    """"new>old": names of two retrievers; none given: each with the one before it."""
    cutoffs: list[int] = field(default_factory=lambda: [1, 3, 10, 100])
    contexts: int = 0
    """Passages to put into each question's statement, best first; 0: no such files are written."""
    cache: str = "runs/${run}/embeddings.sqlite"
    """Where an encoder's vectors are kept: no passage is embedded twice."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        if not self.cutoffs or min(self.cutoffs) < 1 or len(set(self.cutoffs)) < len(self.cutoffs):
            raise UserError(f"cutoffs={self.cutoffs}: give ranks of at least 1, each once")
        if self.contexts < 0:
            raise UserError(f"contexts={self.contexts}: must be 0 or more")


def run(config: EvaluateRetrieverConfig) -> Artifact:
    """Let every retriever look for every query, and estimate scores and differences."""
    retrievers = {name: kind for name, kind in config.retrievers.items() if kind is not None}
    check_retrievers(list(retrievers))
    comparisons = read_comparisons("retrievers", list(retrievers), config.comparisons)
    with Artifact.open("evaluate_retriever", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.evaluation.retrieval_metrics import compare, summarise
        from alignkit.reporting.retrieval import headline, retrieval_text

        examples, corpus = read_queries(config, artifact)
        found = search_all(config, retrievers, corpus, examples)
        ranked = {name: rank(examples, corpus, hits) for name, hits in found.items()}
        artifact.write_rows("rankings.jsonl", rankings(examples, corpus, found))
        if config.contexts:
            for name, hits in found.items():
                artifact.write_rows(f"contexts_{name}.jsonl", contexts(examples, hits, config.contexts))
        artifact.metrics |= {
            "queries": len(examples),
            "passages": len(corpus),
            "cutoffs": sorted(config.cutoffs),
            "retrievers": {name: summarise(rows, config.cutoffs, config.seed) for name, rows in ranked.items()},
            "retrieval_comparisons": [
                {"new": new, "old": old, **compare(ranked[new], ranked[old], config.cutoffs, config.seed)}
                for new, old in comparisons
            ],
        }
        artifact.write_text("retrieval.txt", retrieval_text(artifact.metrics))
        artifact.summary = headline(artifact.metrics)
    return artifact


def check_retrievers(names: Sequence[str]) -> None:
    """Raise `UserError` when there is no retriever, or one whose name no file could hold."""
    if not names:
        raise UserError("retrievers: name at least one, e.g. 'retrievers={before: my_encoder}'")
    check_names("retrievers", names)


def read_queries(config: EvaluateRetrieverConfig, artifact: Artifact) -> tuple[list[RetrievalExample], Corpus]:
    """The queries one of whose positives is in the corpus, and the corpus."""
    from alignkit.data.sources import read_retrieval
    from alignkit.retrieval.corpus import open_corpus

    examples, unusable = read_retrieval(config.data, config.task)
    artifact.drop_all(unusable)
    corpus = open_corpus(config.corpus, examples)
    usable = []
    for example in examples:
        if not example.pos and not example.pos_index:
            artifact.drop(example, "no positive")
        elif not corpus.positives(example):
            artifact.drop(example, "no positive is in the corpus")
        else:
            usable.append(example)
    if not usable:
        raise UserError(f"data.path={config.data.path}: no query has a positive in the corpus; see dropped.jsonl")
    return usable, corpus


def search_all(
    config: EvaluateRetrieverConfig, retrievers: Mapping[str, str], corpus: Corpus, examples: Sequence[RetrievalExample]
) -> dict[str, list[list[Found]]]:
    """What every retriever finds for every query, as far as the last cut-off."""
    from alignkit.retrieval.corpus_search import Query, search_corpus

    queries = [Query(example.task, example.query) for example in examples]
    k = max(*config.cutoffs, config.contexts)
    return {name: search_corpus(kind, corpus, queries, k, config.cache) for name, kind in retrievers.items()}


def rank(examples: Sequence[RetrievalExample], corpus: Corpus, found: Sequence[Sequence[Found]]) -> list[RankedQuery]:
    """What was found, beside what should have been. A positive that the corpus has not counts as never found."""
    from alignkit.evaluation.retrieval_metrics import RankedQuery
    from alignkit.retrieval.answers import answer_in
    from alignkit.retrieval.corpus import passage_text

    ranked = []
    for example, hits in zip(examples, found, strict=True):
        holds = answer_in(example.answers)
        missing = {f"missing {id}" for id in map(str, example.pos_index) if id not in corpus}
        ranked.append(
            RankedQuery(
                id=example.id,
                task=example.task,
                found=tuple(hit.passage.id for hit in hits),
                relevant=corpus.positives(example) | missing,
                holds_answer=None if holds is None else tuple(holds(passage_text(hit.passage)) for hit in hits),
            )
        )
    return ranked


def rankings(
    examples: Sequence[RetrievalExample], corpus: Corpus, found: Mapping[str, Sequence[Sequence[Found]]]
) -> list[dict[str, Any]]:
    """For each query the ids and scores of what every retriever found."""
    return [
        {
            "id": example.id,
            "query": example.query,
            "task": example.task,
            "relevant": sorted(corpus.positives(example)),
            "found": {
                name: [{"id": hit.passage.id, "score": hit.score} for hit in hits[place]]
                for name, hits in found.items()
            },
        }
        for place, example in enumerate(examples)
    ]


def contexts(
    examples: Sequence[RetrievalExample], found: Sequence[Sequence[Found]], count: int
) -> list[dict[str, Any]]:
    """Each question with the passages found as its statement. Further columns of the row stay, `kind` and `form` among
    them."""
    from alignkit.retrieval.corpus import passage_text

    return [
        {
            "id": example.id,
            "parents": example.parents,
            "instruction": "\n\n".join(passage_text(hit.passage) for hit in hits[:count]),
            "input": example.query,
            "output": next(iter(example.answers), ""),
            **{name: value for name, value in (example.model_extra or {}).items() if not name.startswith("neg_")},
        }
        for example, hits in zip(examples, found, strict=True)
    ]


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("evaluate_retriever")
