"""Retrieval: a million passages by words, 200,000 by vectors, against `rank_bm25`, plain `bm25s` and plain numpy.

    python benchmarks/retrieval.py [--passages N] [--vectors N]

Passages are made up: 20 to 40 words drawn by Zipf's law from 100,000. Scores are compared before times are. CPU seconds
are those of this process; they tell more than the clock where others use the machine as well.

1. `EmbeddedIndex`, words alone: N passages into a folder (SQLite and BM25), then 1,000 queries for 100 passages each.
2. The same queries by `BM25Index`, by plain `bm25s`, and by `rank_bm25` (its loop, with Lucene's idf, so that scores
   are the same), on shares that the slower ones can bear.
3. `alignkit mine` as a user types it: a corpus of N passages in a file, 1,000 queries of words of one passage each.
4. `nearest` over N float32 vectors of 384 numbers on disk, against one matrix product and `argpartition` in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from rank_bm25 import BM25Okapi

from alignkit.core.retrieval_config import SearchMode
from alignkit.retrieval.base import Passage
from alignkit.retrieval.bm25 import BM25Index, tokens
from alignkit.retrieval.dense import nearest
from alignkit.retrieval.embedded import EmbeddedIndex

QUERIES, K, WORDS = 1_000, 100, 100_000
BM25S_SHARE, RANK_SHARE, RANK_QUERIES = 100_000, 20_000, 50
DIMENSIONS = 384


class LuceneRank(BM25Okapi):
    """`rank_bm25` with the idf of Lucene; its scores are k1 + 1 times Lucene's."""

    def _calc_idf(self, nd: dict[str, int]) -> None:
        for word, count in nd.items():
            self.idf[word] = np.log(1 + (self.corpus_size - count + 0.5) / (count + 0.5))


def texts(count: int, shortest: int = 20, longest: int = 40, seed: int = 1) -> Iterator[str]:
    """Made-up texts, the same for the same seed."""
    random = np.random.default_rng(seed)
    heights = np.cumsum(1 / np.arange(1, WORDS + 1))
    for start in range(0, count, 10_000):
        lengths = random.integers(shortest, longest + 1, min(10_000, count - start))
        drawn = np.searchsorted(heights, random.random(lengths.sum()) * heights[-1])
        for words in np.split(drawn, np.cumsum(lengths)[:-1]):
            yield " ".join(f"w{word}" for word in words)


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """A result, CPU seconds and seconds."""
    cpu, clock = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - clock


def peak() -> float:
    """Peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure_folder(count: int, queries: list[str]) -> None:
    """The embedded engine, words alone."""
    with tempfile.TemporaryDirectory() as folder:
        index = EmbeddedIndex(Path(folder) / "index", mode=SearchMode.bm25)
        passages = (Passage(id=f"p{number:07d}", text=text) for number, text in enumerate(texts(count)))
        _, cpu, clock = timed(lambda: index.index(passages))
        print(f"1. {count:,} passages indexed: CPU {cpu:.0f} s, {clock:.0f} s; peak memory {peak():.2f} GB")
        found, cpu, clock = timed(lambda: index.search(queries, K))
        print(f"   {len(queries):,} queries for {K}: CPU {cpu:.1f} s, {clock:.1f} s; peak memory {peak():.2f} GB")
        assert all(found)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        print(f"   the folder has {size / 1e9:.2f} GB")


def scores_of_bm25s(corpus: list[list[str]], queries: list[str]) -> tuple[np.ndarray[Any, Any], float, float]:
    """Top scores by plain bm25s; CPU seconds to index and to search."""
    plain = bm25s.BM25(method="lucene")
    _, building, _ = timed(lambda: plain.index(corpus, show_progress=False))
    asked = [tokens(query) for query in queries]
    (_, scores), searching, _ = timed(lambda: plain.retrieve(asked, k=K, show_progress=False))
    return scores, building, searching


def scores_of_rank_bm25(corpus: list[list[str]], queries: list[str]) -> tuple[np.ndarray[Any, Any], float, float]:
    """Top scores by rank_bm25; CPU seconds to index and to search."""
    plain, building, _ = timed(lambda: LuceneRank(corpus, k1=1.5, b=0.75))
    found, searching, _ = timed(lambda: [np.sort(plain.get_scores(tokens(query)))[::-1][:K] for query in queries])
    return np.array(found) / 2.5, building, searching


def compare(name: str, reference: Callable[..., tuple[Any, float, float]], count: int, queries: list[str]) -> None:
    """A reference and BM25Index on the same passages and queries: equal scores, then times."""
    some = list(texts(count))
    theirs, their_building, their_searching = reference([tokens(text) for text in some], queries)
    ours, building, _ = timed(lambda: BM25Index(some))
    found, searching, _ = timed(lambda: ours.search(queries, K))
    for hits, scores in zip(found, theirs, strict=True):
        scores = scores[scores > 0]
        np.testing.assert_allclose([hit.score for hit in hits], scores[: len(hits)], rtol=1e-4)
        assert len(hits) == min(K, len(scores))
    print(f"2. {name}, {count:,} passages, {len(queries):,} queries, equal scores:")
    print(f"   a query {1e3 * their_searching / len(queries):.2f} CPU ms, here {1e3 * searching / len(queries):.2f} ms")
    print(
        f"   ({their_searching / searching:.1f}x); index {their_building:.1f} CPU s, here, words made, {building:.1f} s"
    )


def measure_mining(count: int) -> None:
    """The command `mine` by BM25, in a process of its own."""
    random = np.random.default_rng(4)
    asked = set(random.choice(count, QUERIES, replace=False).tolist())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "passages.jsonl").open("w") as corpus, (folder / "rows.jsonl").open("w") as rows:
            for number, text in enumerate(texts(count)):
                corpus.write(json.dumps({"id": f"p{number:07d}", "text": text}) + "\n")
                if number in asked:
                    query = " ".join(random.choice(text.split(), 6, replace=False))
                    row = {"query_id": str(number), "query": query, "pos": [text], "answers": [], "task": "made_up"}
                    rows.write(json.dumps(row) + "\n")
        given = [f"data.path={folder / 'rows.jsonl'}", f"corpus={folder / 'passages.jsonl'}"]
        command = [sys.executable, "-m", "alignkit.mine", f"output_dir={folder / 'mine'}", *given]
        done, _, clock = timed(lambda: subprocess.run(command, capture_output=True, text=True, check=False))
        assert done.returncode == 0, done.stderr
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"3. {done.stdout.strip().splitlines()[-1].split(' -> ')[0]}:")
        print(f"   CPU {used.ru_utime + used.ru_stime:.0f} s, {clock:.0f} s; peak memory {used.ru_maxrss / 1e6:.2f} GB")


def measure_vectors(count: int) -> None:
    """Exact neighbours on disk and in memory."""
    random = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.bin"
        with path.open("wb") as file:
            for start in range(0, count, 10_000):
                block = random.standard_normal((min(10_000, count - start), DIMENSIONS), np.float32)
                file.write((block / np.linalg.norm(block, axis=1, keepdims=True)).tobytes())
        queries = random.standard_normal((QUERIES, DIMENSIONS), np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        vectors = np.memmap(path, np.float32, "r", shape=(count, DIMENSIONS))
        order, among = np.arange(count), np.ones(count, bool)
        before = peak()
        found, cpu, _ = timed(lambda: nearest(queries, vectors, K, order, among))
        print(
            f"4. {count:,} vectors, {QUERIES:,} queries for {K}: CPU {cpu:.1f} s; {peak() - before:.2f} GB more memory,"
        )
        loaded = np.array(vectors)

        def plain() -> list[Any]:
            scores = [queries[start : start + 250] @ loaded.T for start in range(0, QUERIES, 250)]
            best = [np.argpartition(-some, K, axis=1)[:, :K] for some in scores]
            return [np.sort(np.take_along_axis(s, b, 1), axis=1)[:, ::-1] for s, b in zip(scores, best, strict=True)]

        expected, plain_cpu, _ = timed(plain)
        np.testing.assert_allclose(
            [[score for _, score in hits] for hits in found], np.concatenate(expected), atol=2e-6
        )
        print(f"   of which {count * DIMENSIONS * 4 / 1e9:.2f} GB are the file. Plain numpy, equal scores:")
        print(f"   CPU {plain_cpu:.1f} s ({plain_cpu / cpu:.2f}x); {peak() - before:.2f} GB more memory")


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--vectors", type=int, default=200_000)
    arguments = parser.parse_args()
    queries = list(texts(QUERIES, 4, 12, seed=3))
    measure_folder(arguments.passages, queries)
    compare("bm25s", scores_of_bm25s, min(BM25S_SHARE, arguments.passages), queries)
    compare("rank_bm25", scores_of_rank_bm25, min(RANK_SHARE, arguments.passages), queries[:RANK_QUERIES])
    measure_mining(arguments.passages)
    measure_vectors(arguments.vectors)


if __name__ == "__main__":
    main()
