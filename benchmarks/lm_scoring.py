"""LM scoring against a loop over pairs: how likely an answer is behind each passage, the same scores.

    OMP_NUM_THREADS=1 python benchmarks/lm_scoring.py [--hotpotqa FILE.jsonl] [--queries 24] [--questions 16]

Rows of three kinds are scored by the embedded model in float32: the paragraphs that HotpotQA gives with each of its
questions (each stands beside one question only; needs --hotpotqa), the negatives that BM25 finds for these questions
in all paragraphs, and `documents`: few passages with many questions about each, which is what a retriever for one's own
documents is trained on. `loop` reads one pair after the other with the model's own forward pass and all of its logits.
`alignkit, apart` computes logits of answers alone, in batches of similar length; `alignkit` also reads rows that begin
alike as one. Seconds are CPU seconds, the lowest of three runs, of passes alone; all engines read the same token ids.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_LENGTH, RUNS = 2048, 3


def main() -> None:
    """Print a table for each kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hotpotqa", type=Path, help="HotpotQA as JSON Lines")
    parser.add_argument("--queries", type=int, default=24, help="of HotpotQA")
    parser.add_argument("--questions", type=int, default=16, help="about each document")
    arguments = parser.parse_args()

    from alignkit.core.app import load_config
    from alignkit.models.loading import load_base, load_tokenizer

    model = load_config("lm_score", [f"model.max_length={MAX_LENGTH}", "model.dtype=float32"]).model
    policy, tokenizer = load_base(model), load_tokenizer(model)
    if arguments.hotpotqa:
        given, mined = hotpotqa(arguments.hotpotqa, arguments.queries)
        compare("HotpotQA's own paragraphs", given, policy, tokenizer)
        compare("HotpotQA, mined by BM25", mined, policy, tokenizer)
    compare(f"documents, {arguments.questions} questions each", documents(12, arguments.questions), policy, tokenizer)


def compare(title: str, rows: Sequence[Any], policy: Any, tokenizer: Any) -> None:
    """Score all pairs in every way."""
    from alignkit.scoring.candidates import CandidateScorer
    from alignkit.scoring.likelihood import mean_log_probs, plain_mean_log_prob

    scorer = CandidateScorer(policy, tokenizer, MAX_LENGTH, "{passage}\n\n{query}")
    encoded = [scorer._encode(row, text) for row in rows for text in (*row.pos, *row.neg)]
    pairs = [each for each in encoded if not isinstance(each, str)]
    tokens = sum(map(len, pairs))
    print(f"\n{title}: {len(pairs)} pairs, {tokens:,} tokens")
    print(f"{'':20s}{'seconds':>9s}{'tokens/s':>10s}{'x loop':>8s}{'difference':>12s}", flush=True)
    pad = tokenizer.pad_token_id
    engines: dict[str, Callable[[], list[float]]] = {
        "loop": lambda: [plain_mean_log_prob(policy, pair) for pair in pairs],
        "alignkit, apart": lambda: mean_log_probs(policy, pad, pairs, share=False),
        "alignkit": lambda: mean_log_probs(policy, pad, pairs),
    }
    expected: list[float] = []
    slowest = 0.0
    for name, work in engines.items():
        taken, found = timed(work)
        expected, slowest = expected or found, slowest or taken
        apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        print(f"{name:20s}{taken:9.2f}{tokens / taken:10,.0f}{slowest / taken:8.2f}{apart:12.1e}", flush=True)


def timed(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """CPU seconds of the fastest run, and what it found."""
    seconds, found = [], []
    for _ in range(RUNS):
        before = time.process_time()
        found = work()
        seconds.append(time.process_time() - before)
    return min(seconds), found


def hotpotqa(path: Path, queries: int) -> tuple[list[Any], list[Any]]:
    """Questions with the paragraphs they come with, and with fifteen that BM25 finds among all."""
    from alignkit.core.config import RowsConfig
    from alignkit.data.sources import read_retrieval
    from alignkit.retrieval.corpus import Corpus, gather
    from alignkit.retrieval.mining import Limits, mine, with_negatives
    from alignkit.retrieval.searching import Query, search

    given, _ = read_retrieval(RowsConfig(path=str(path)), "qa")
    corpus, some = Corpus(gather(given)), given[:queries]
    found = search("bm25", corpus, [Query("qa", row.query) for row in some], 110)
    limits = Limits(negatives=15)
    mined = [
        with_negatives(row, corpus, mine(row, corpus, [hits], limits, 1)[0])
        for row, hits in zip(some, found, strict=True)
    ]
    return some, mined


def documents(passages: int, questions: int) -> list[Any]:
    """Questions about passages of the closed world, each with four of the passages, of twelve sentences each."""
    from alignkit.core.records import RetrievalExample
    from alignkit.data.closed_world import World, answer

    world, rows = World(1), []
    drawn = [[world.passage() for _ in range(4)] for _ in range(passages)]
    texts = [" ".join(part.statement for part in parts) for parts in drawn]
    for number, parts in enumerate(drawn):
        others = [texts[(number + step) % passages] for step in (1, 2, 3)]
        for place in range(questions):
            part = parts[place % len(parts)]
            question = world.ask(part, "value")
            rows.append(
                RetrievalExample(
                    id=f"{number}-{place}",
                    query=question.text,
                    pos=[texts[number]],
                    neg=others,
                    answers=[answer(part.facts, question)],
                    task="qa",
                    query_id=f"{number}-{place}",
                )
            )
    return rows


if __name__ == "__main__":
    main()
