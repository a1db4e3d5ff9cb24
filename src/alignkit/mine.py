"""mine: find hard negatives for queries: passages that a retriever takes for an answer, and that are none.

Each query is searched for by BM25, by a dense encoder, or by both. Of what is found, the positives are removed by id
and by text, passages in which an answer stands, and what scores too near to the positive; the best of the rest become
`neg`. Teacher scores of the old negatives are removed with them. docs/mining.md says which margins to begin with.

Reads:   data.path                 queries with passages: LLM-Embedder's rows, HotpotQA's, or questions over statements
         corpus                    passages to search, {id, title, text} (without: those that stand in the rows)
Writes:  mined.jsonl               the rows with new `neg` and `neg_index`
         passages.jsonl            the passages that were searched, when no corpus was given

Overrides people use:
  'retrievers=[bm25,my_encoder]'   bm25, characters, or folders of sentence-transformers encoders; several are fused
  negatives=7 first_rank=10        so many a query, not the very first ranks
  relative_margin=0.05             score at most 95 % of the best positive's; absolute_margin=0.1 likewise
  at_random=true                   drawn among all that is left, instead of the best
  without_answers=false            keep passages in which an answer stands

Examples:
  python -m alignkit.mine run=mine data.path=hotpotqa.jsonl task=qa
  python -m alignkit.mine data.path=train.jsonl 'retrievers=[bm25,runs/mine/retriever/model]' relative_margin=0.05
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import RowsConfig, StageConfig
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from alignkit.core.records import RetrievalExample
    from alignkit.retrieval.base import Found
    from alignkit.retrieval.corpus import Corpus
    from alignkit.retrieval.mining import Limits

# ruff: noqa: UP045


@dataclass
class MineConfig(StageConfig):
    """Configuration of `mine`."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "corpus", "retrievers")
    incidental: ClassVar[tuple[str, ...]] = (*StageConfig.incidental, "cache")

    data: RowsConfig = field(default_factory=RowsConfig)
    task: Optional[str] = None
    """The task of rows that name none."""
    corpus: Optional[str] = None
    """File of the passages to search; none: the passages that stand in the rows."""
    retrievers: list[str] = field(default_factory=lambda: ["bm25"])
    """`bm25`, `characters` (character n-grams, no model needed), or folders or hub names of sentence-transformers
    encoders. The rankings of several are fused."""
    negatives: int = 15
    """Most negatives a query."""
    first_rank: int = 1
    """Ranks before this one are left out, as the likeliest to be answers; positives do not count."""
    last_rank: int = 100
    absolute_margin: Optional[float] = None
    """A negative scores at most the best positive's score minus this; none: no such limit."""
    relative_margin: Optional[float] = None
    """Likewise, minus this share of that score."""
    without_answers: bool = True
    """Leave out passages in which an answer stands."""
    at_random: bool = False
    """Draw among what is left instead of taking the best."""
    cache: str = "runs/${run}/embeddings.sqlite"
    """Where an encoder's vectors are kept: no passage is embedded twice."""

    def __post_init__(self) -> None:
        """Raise `UserError` for numbers that mean nothing."""
        if self.negatives < 1:
            raise UserError(f"negatives={self.negatives}: must be at least 1")
        if not 1 <= self.first_rank <= self.last_rank:
            raise UserError(f"first_rank={self.first_rank}: must be from 1 to last_rank={self.last_rank}")
        for name in ("absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name}={value}: must be 0 or more")
        if not self.retrievers or len(set(self.retrievers)) < len(self.retrievers):
            raise UserError(f"retrievers={self.retrievers}: name at least one, each once")


def run(config: MineConfig) -> Artifact:
    """Search for every query, remove what is no negative, and write the rows with the negatives that are left."""
    from alignkit.retrieval.corpus import open_corpus
    from alignkit.retrieval.mining import Limits

    with Artifact.open("mine", config) as artifact:
        if artifact.up_to_date:
            return artifact
        examples = read(config, artifact)
        corpus = open_corpus(config.corpus, examples)
        examples = [found for example in examples if (found := with_positives(example, corpus, artifact))]
        if not examples:
            raise UserError(f"data.path={config.data.path}: no row has a positive; see dropped.jsonl")
        limits = Limits(
            negatives=config.negatives,
            first_rank=config.first_rank,
            last_rank=config.last_rank,
            absolute_margin=config.absolute_margin,
            relative_margin=config.relative_margin,
            without_answers=config.without_answers,
            at_random=config.at_random,
        )
        rankings = search_all(config, corpus, examples)
        mined = mine_all(examples, corpus, rankings, limits, config.seed, artifact)
        if not mined:
            raise UserError("no query has a negative left: lower the margins, or raise last_rank; see dropped.jsonl")
        artifact.write_rows("mined.jsonl", mined)
        if config.corpus is None:
            artifact.write_rows("passages.jsonl", corpus.passages)
        artifact.metrics |= {"rows": len(mined), "passages": len(corpus)}
        artifact.summary = summary(artifact.metrics)
    return artifact


def read(config: MineConfig, artifact: Artifact) -> list[RetrievalExample]:
    """The rows that can be read."""
    from alignkit.data.sources import read_retrieval

    examples, unusable = read_retrieval(config.data, config.task)
    artifact.drop_all(unusable)
    return examples


def with_positives(example: RetrievalExample, corpus: Corpus, artifact: Artifact) -> RetrievalExample | None:
    """The row with its positives as texts, from the corpus where it has only their ids; None when there are none."""
    from alignkit.retrieval.corpus import passage_text

    if example.pos:
        return example
    ids = [str(id) for id in example.pos_index]
    if not ids:
        artifact.drop(example, "no positive")
    elif missing := [id for id in ids if id not in corpus]:
        artifact.drop(example, "a positive is not in the corpus", f"pos_index {missing[0]}")
    else:
        return example.model_copy(update={"pos": [passage_text(corpus[id]) for id in ids]})
    return None


def search_all(config: MineConfig, corpus: Corpus, examples: list[RetrievalExample]) -> list[tuple[list[Found], ...]]:
    """For each query what every retriever finds, as far as `last_rank` beyond the query's positives."""
    from alignkit.retrieval.corpus_search import Query, search_corpus

    queries = [Query(example.task, example.query) for example in examples]
    most = max(len(corpus.positives(example) | corpus.with_texts(example.pos)) for example in examples)
    found = [search_corpus(name, corpus, queries, config.last_rank + most, config.cache) for name in config.retrievers]
    return list(zip(*found, strict=True))


def mine_all(
    examples: list[RetrievalExample],
    corpus: Corpus,
    rankings: list[tuple[list[Found], ...]],
    limits: Limits,
    seed: int,
    artifact: Artifact,
) -> list[RetrievalExample]:
    """The rows that have a negative; the metrics say how many passages were removed, and from how many rows scores."""
    from alignkit.retrieval.mining import mine, with_negatives

    mined: list[RetrievalExample] = []
    removed: Counter[str] = Counter()
    stale = fewer = 0
    for example, found in zip(examples, rankings, strict=True):
        negatives, reasons = mine(example, corpus, found, limits, seed)
        removed += reasons
        if not negatives:
            artifact.drop(example, "no negative left", "; ".join(f"{count} x {why}" for why, count in reasons.items()))
            continue
        row = with_negatives(example, corpus, negatives)
        stale += example.teacher_scores is not None and row.teacher_scores is None
        fewer += len(negatives) < limits.negatives
        mined.append(row)
    artifact.metrics |= {
        "removed": dict(removed),
        "teacher_scores_removed": stale,
        "rows_with_fewer_negatives": fewer,
        "negatives_per_row": sum(len(row.neg) for row in mined) / max(1, len(mined)),
    }
    return mined


def summary(metrics: dict[str, Any]) -> str:
    """The key figures in a few words."""
    text = (
        f"{metrics['rows']} rows, {metrics['negatives_per_row']:.1f} negatives each of {metrics['passages']} passages"
    )
    stale = metrics["teacher_scores_removed"]
    return f"{text}, teacher scores removed from {stale} rows" if stale else text


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("mine")
