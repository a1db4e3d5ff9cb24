"""Near-duplicates in a million short rows, against brute force and against MinHash.

    python benchmarks/near_duplicates.py [--rows 1000000]

The rows are made up: 12 to 28 words, drawn from 50,000 by Zipf's law; every tenth row repeats an earlier one with none
to two of its words changed. CPU seconds of one process, which is meant to have one thread (OMP_NUM_THREADS=1).

1. 10,000 rows: every pair of them is compared by brute force, and the decisions must be the same.
2. 20,000 rows: datasketch's MinHashLSH, greedy as ours, if it is installed (`pip install datasketch`).
3. All rows: how long, how much memory, and how long the n-gram check against 10,000 evaluation rows takes.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import TypeVar

import numpy as np

from alignkit.data.hygiene.contamination import contaminated
from alignkit.data.hygiene.duplicates import near_duplicates
from alignkit.data.words import words

THRESHOLD, PERMUTATIONS = 0.8, 128
ROWS, BRUTE_FORCE_ROWS, MINHASH_ROWS, EVALUATION_ROWS = 1_000_000, 10_000, 20_000, 10_000
VOCABULARY, FEWEST_WORDS, MOST_WORDS, REPEATED = 50_000, 12, 28, 0.1

T = TypeVar("T")


def main() -> None:
    """Print what was compared, and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows in the last step (default {ROWS:,})")
    count = parser.parse_args().rows
    texts = made_up_texts(max(count, MINHASH_ROWS))

    found, seconds = timed(lambda: decisions(texts[:BRUTE_FORCE_ROWS]))
    expected, slow = timed(lambda: brute_force(texts[:BRUTE_FORCE_ROWS]))
    print(f"{BRUTE_FORCE_ROWS:,} rows, {sum(expected):,} near-duplicates: {differ(found, expected)}")
    print(f"  brute force {slow:8.2f} s\n  ours        {seconds:8.2f} s {slow / seconds:8.1f} x")

    try:
        import datasketch  # noqa: F401
    except ImportError:
        print("datasketch is not installed: not compared")
    else:
        expected, seconds = timed(lambda: decisions(texts[:MINHASH_ROWS]))
        sketched, slow = timed(lambda: minhash(texts[:MINHASH_ROWS]))
        print(f"{MINHASH_ROWS:,} rows, {sum(expected):,} near-duplicates, MinHash: {differ(sketched, expected)}")
        print(f"  datasketch  {slow:8.2f} s\n  ours        {seconds:8.2f} s {slow / seconds:8.1f} x")

    texts = texts[:count]
    held = peak_gigabytes()
    found, seconds = timed(lambda: decisions(texts))
    print(f"{count:,} rows, {sum(found):,} near-duplicates")
    print(f"  ours        {seconds:8.2f} s, peak memory {peak_gigabytes():.2f} GB ({held:.2f} before)")
    evaluation = texts[:: max(1, count // EVALUATION_ROWS)]
    matches, seconds = timed(lambda: contaminated(texts, evaluation))
    print(
        f"  n-grams of {len(evaluation):,} evaluation rows {seconds:.2f} s, {sum(map(bool, matches)):,} rows hold one"
    )


def decisions(texts: Sequence[str]) -> list[bool]:
    """Whether each text is a near-duplicate."""
    return [match is not None for match in near_duplicates(texts, THRESHOLD)]


def pairs_of(text: str) -> list[str]:
    """The neighbouring words of a text of at least two."""
    return [f"{first} {second}" for first, second in pairwise(words(text))]


def brute_force(texts: Sequence[str]) -> list[bool]:
    """The same decisions, by the number of word pairs that each two texts share: a product of sparse matrices."""
    from scipy.sparse import csr_array

    numbers: dict[str, int] = {}
    sets = [sorted({numbers.setdefault(pair, len(numbers)) for pair in pairs_of(text)}) for text in texts]
    sizes = np.array([len(each) for each in sets])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    held = csr_array((np.ones(starts[-1], np.int32), np.concatenate(sets), starts), shape=(len(texts), len(numbers)))
    shared = (held @ held.T).tocsr()
    duplicate = np.zeros(len(texts), dtype=bool)
    for row in range(len(texts)):
        cells = slice(shared.indptr[row], shared.indptr[row + 1])
        others, counts = shared.indices[cells], shared.data[cells]
        similar = others[counts / (sizes[row] + sizes[others] - counts) >= THRESHOLD]
        duplicate[row] = np.any(~duplicate[similar[similar < row]])
    decided: list[bool] = duplicate.tolist()
    return decided


def minhash(texts: Sequence[str]) -> list[bool]:
    """The decisions of MinHash with locality-sensitive hashing, the candidates taken for near-duplicates."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    found = []
    for row, text in enumerate(texts):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([pair.encode() for pair in pairs_of(text)])
        found.append(bool(index.query(sketch)))
        if not found[-1]:
            index.insert(row, sketch)
    return found


def differ(found: Sequence[bool], expected: Sequence[bool]) -> str:
    """How many decisions are not as expected, in words."""
    missed = sum(theirs and not ours for ours, theirs in zip(found, expected, strict=True))
    wrong = sum(ours and not theirs for ours, theirs in zip(found, expected, strict=True))
    recall = 1 - missed / max(1, sum(expected))
    return f"{missed} missed (recall {recall:.4f}), {wrong} dropped without cause"


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its CPU seconds."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


def peak_gigabytes() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def made_up_texts(count: int) -> list[str]:
    """Rows of words by Zipf's law, with repetitions in between."""
    generator, rng = np.random.default_rng(0), Random(0)
    share = 1 / np.arange(1, VOCABULARY + 1)
    lengths = generator.integers(FEWEST_WORDS, MOST_WORDS + 1, count)
    drawn = iter(generator.choice(VOCABULARY, size=int(lengths.sum()), p=share / share.sum()).tolist())
    texts: list[str] = []
    for length in lengths.tolist():
        row = [f"w{next(drawn)}" for _ in range(length)]
        if texts and rng.random() < REPEATED:
            row = rng.choice(texts).split()
            for _ in range(rng.randint(0, 2)):
                row[rng.randrange(len(row))] = f"w{rng.randrange(VOCABULARY)}"
        texts.append(" ".join(row))
    return texts


if __name__ == "__main__":
    main()
