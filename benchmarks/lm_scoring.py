"""LM scoring against a loop over pairs: how likely an answer is behind each passage, the same scores.

    OMP_NUM_THREADS=1 python benchmarks/lm_scoring.py [--hotpotqa FILE.jsonl] [--passages 24] [--questions 16]

Rows of four kinds are scored by the embedded model in float32:

- notes of the closed world, one question about each, with seven negatives that BM25 finds among all notes;
- HotpotQA's questions with the paragraphs they come with, nearly each beside one question only (needs --hotpotqa);
- the same questions with fifteen negatives that BM25 finds among all paragraphs;
- documents: few passages with many questions about each, which is what a retriever for one's own documents learns from.

Of as many rows as the stage scores at once, the pairs of `--passages` passages are taken, all in which these stand, so
that as much is shared as in the whole. `loop` reads one pair after the other as one would write it:
`model(input_ids, labels=labels).loss`. `alignkit, apart` computes logits of answers alone, in batches of similar
length; `alignkit` also reads rows that begin alike as one. Seconds are CPU seconds, the lowest of three runs, in which
the engines take turns; all read the same token ids. At the end: in how many tokens the pairs could at least be read.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

MAX_LENGTH, RUNS = 2048, 3


def main() -> None:
    """Print a table for each kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hotpotqa", type=Path, help="HotpotQA as JSON Lines")
    parser.add_argument("--passages", type=int, default=24, help="whose pairs are scored, of each kind of rows")
    parser.add_argument("--questions", type=int, default=16, help="about each document")
    arguments = parser.parse_args()

    from alignkit.core.app import load_config
    from alignkit.lm_score import ROWS_A_BLOCK
    from alignkit.models.loading import load_base, load_tokenizer

    model = load_config("lm_score", [f"model.max_length={MAX_LENGTH}", "model.dtype=float32"]).model
    policy, tokenizer = load_base(model), load_tokenizer(model)
    kinds = {"closed-world notes, mined by BM25": mined(notes(ROWS_A_BLOCK), 7)}
    if arguments.hotpotqa:
        given = hotpotqa(arguments.hotpotqa)
        kinds["HotpotQA's own paragraphs"] = given[:ROWS_A_BLOCK]
        kinds["HotpotQA, mined by BM25"] = mined(given, 15)[:ROWS_A_BLOCK]
    kinds[f"documents, {arguments.questions} questions each"] = documents(12, arguments.questions)
    for title, rows in kinds.items():
        compare(title, rows, arguments.passages, policy, tokenizer)


def compare(title: str, rows: Sequence[Any], passages: int, policy: Any, tokenizer: Any) -> None:
    """Score all pairs of some passages in every way."""
    from alignkit.scoring.candidates import CandidateScorer
    from alignkit.scoring.likelihood import mean_log_probs

    scorer = CandidateScorer(policy, tokenizer, MAX_LENGTH, "{passage}\n\n{query}")
    texts = sorted({text for row in rows for text in (*row.pos, *row.neg)})
    some = set(Random(1).sample(texts, min(passages, len(texts))))
    encoded = [scorer._encode(row, text) for row in rows for text in (*row.pos, *row.neg) if text in some]
    pairs = [each for each in encoded if not isinstance(each, str)]
    tokens, pad = sum(map(len, pairs)), tokenizer.pad_token_id
    print(f"\n{title}: {len(pairs)} pairs of {len(some)} passages, {tokens:,} tokens, {least(pairs):,} at least")
    print(f"{'':20s}{'seconds':>9s}{'tokens/s':>10s}{'x loop':>8s}{'difference':>12s}", flush=True)
    engines: dict[str, Callable[[], list[float]]] = {
        "loop": lambda: [loop_score(policy, pair) for pair in pairs],
        "alignkit, apart": lambda: mean_log_probs(policy, pad, pairs, share=False),
        "alignkit": lambda: mean_log_probs(policy, pad, pairs),
    }
    taken, found = timed(engines)
    for name in engines:
        apart = max(abs(a - b) for a, b in zip(found[name], found["loop"], strict=True))
        ratio = taken["loop"] / taken[name]
        print(f"{name:20s}{taken[name]:9.2f}{tokens / taken[name]:10,.0f}{ratio:8.2f}{apart:12.1e}", flush=True)


def loop_score(policy: Any, pair: Any) -> float:
    """The mean log p of one pair's answer by the model's own loss: all logits, batch 1, everything as it comes."""
    import torch

    ids = torch.tensor([[*pair.prompt, *pair.answer]])
    labels = ids.clone()
    labels[:, : len(pair.prompt)] = -100
    with torch.inference_mode():
        return -float(policy(input_ids=ids, labels=labels).loss)


def least(pairs: Sequence[Any]) -> int:
    """Tokens that are left when each beginning that several pairs have in common is read once: a trie's nodes."""
    return len({(pair.prompt + pair.answer)[:end] for pair in pairs for end in range(1, len(pair) + 1)})


def timed(engines: dict[str, Callable[[], list[float]]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """CPU seconds of the fastest run of each, and what it found; they take turns."""
    seconds: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for name, work in engines.items():
            before = time.process_time()
            found[name] = work()
            taken = time.process_time() - before
            seconds[name] = min(seconds.get(name, taken), taken)
    return seconds, found


def mined(rows: Sequence[Any], negatives: int) -> list[Any]:
    """The rows with negatives that BM25 finds among the passages of all of them."""
    from alignkit.retrieval.corpus import Corpus, gather
    from alignkit.retrieval.corpus_search import Query, search_corpus
    from alignkit.retrieval.mining import Limits, mine, with_negatives

    corpus = Corpus(gather(rows))
    found = search_corpus("bm25", corpus, [Query("qa", row.query) for row in rows], 110)
    limits = Limits(negatives=negatives, without_answers=False)
    return [
        with_negatives(row, corpus, mine(row, corpus, [hits], limits, 1)[0])
        for row, hits in zip(rows, found, strict=True)
    ]


def hotpotqa(path: Path) -> list[Any]:
    """Questions with the paragraphs they come with."""
    from alignkit.core.config import RowsConfig
    from alignkit.data.sources import read_retrieval

    return list(read_retrieval(RowsConfig(path=str(path)), "qa")[0])


def notes(count: int) -> list[Any]:
    """Notes of the closed world, with one question about each."""
    from alignkit.core.records import RetrievalExample
    from alignkit.data.closed_world import World, answer

    world, rows = World(1), []
    for number in range(count):
        part = world.passage()
        question = world.ask(part)
        rows.append(
            RetrievalExample(
                id=str(number),
                query=question.text,
                pos=[part.statement],
                neg=[],
                answers=[answer(part.facts, question)],
                task="qa",
                query_id=str(number),
            )
        )
    return rows


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
