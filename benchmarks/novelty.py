"""The novelty filter against `rouge_score`, as Self-Instruct uses it: the same decisions, and the time of one.

    python benchmarks/novelty.py [--data FOLDER]

FOLDER holds JSON or JSON Lines with English text; each line of each string in it counts as one instruction. Without it
the text is made up by a small grammar. Needs `pip install rouge-score`.

1. 10,000 instructions go through the filter one after the other. All pairs are compared by brute force beside it, and
   `rouge_score` itself decides on every pair whose F may reach the threshold.
2. For pools of 5,000 and 20,000: candidates, half of them pool texts with some words changed and half unseen, are
   scored against the whole pool by both, with equal results to the last digit. CPU seconds of one process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from rapidfuzz import process
from rapidfuzz.distance import Indel

from alignkit.scoring.novelty import NoveltyFilter

THRESHOLD = 0.7
DECIDED, POOLS, CANDIDATES, ROUGE_CANDIDATES = 10_000, (5_000, 20_000), 1_000, 6
FEWEST_WORDS, MOST_WORDS = 4, 150


def main() -> None:
    """Print what was compared, and the table."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with JSON or JSON Lines of English text")
    folder = parser.parse_args().data
    scorer, tokenize = RougeScorer(["rougeL"], use_stemmer=False), DefaultTokenizer(False).tokenize
    rng = Random(1)
    texts = list(dict.fromkeys(read_texts(folder) if folder else made_up_texts(rng)))
    rng.shuffle(texts)
    lengths = sorted(len(text.split()) for text in texts)
    print(f"{len(texts)} different English texts, median {lengths[len(lengths) // 2]} words")

    def rouge(candidate: str, other: str) -> float:
        return float(scorer.score(other, candidate)["rougeL"].fmeasure)

    compare_decisions(texts[:DECIDED], tokenize, rouge)
    for size in POOLS:
        compare_times(texts, size, rouge, rng)


def compare_decisions(
    texts: Sequence[str], tokenize: Callable[[str], list[str]], rouge: Callable[[str, str], float]
) -> None:
    """Let both go through `texts`, and count where they disagree."""
    novelty, codes = NoveltyFilter(THRESHOLD), dict[str, str]()
    kept: list[str] = []
    encoded: list[str] = []
    differing = asked = 0
    for text in texts:
        code = "".join(codes.setdefault(word, chr(0x10000 + len(codes))) for word in tokenize(text))
        near = process.extract(
            code, encoded, scorer=Indel.normalized_similarity, score_cutoff=THRESHOLD - 1e-5, limit=None
        )
        scores = [rouge(text, kept[position]) for _, _, position in near]
        asked += len(scores)
        novel = not any(score > THRESHOLD for score in scores)
        ours = novelty.max_similarity(text)
        differing += (ours <= THRESHOLD) != novel or (novelty.most_similar(text) is None) != novel
        differing += not novel and ours != max(scores)
        if novel:
            novelty.add(text)
            kept.append(text)
            encoded.append(code)
    print(f"{len(texts)} decisions, {len(kept)} kept, {asked} pairs by rouge_score: {differing} differ")


def compare_times(texts: Sequence[str], size: int, rouge: Callable[[str, str], float], rng: Random) -> None:
    """Score candidates against a pool of `size` texts, and print the time of one and the ratios."""
    pool = list(texts[:size])
    while len(pool) < size:
        pool.append(changed(rng.choice(texts), texts, rng))
    unseen = list(texts[size:]) or [changed(rng.choice(texts), texts, rng, share=0.6) for _ in range(CANDIDATES)]
    candidates = [rng.choice(unseen) if n % 2 else changed(rng.choice(pool), texts, rng) for n in range(CANDIDATES)]
    novelty = NoveltyFilter(THRESHOLD)
    adding = cpu_seconds(lambda: deque(map(novelty.add, pool), maxlen=0)) / size
    scores: list[float] = []
    few = candidates[:ROUGE_CANDIDATES]
    reference = cpu_seconds(lambda: scores.extend(max(rouge(text, other) for other in pool) for text in few)) / len(few)
    decision = cpu_seconds(lambda: [novelty.most_similar(text) for text in candidates]) / len(candidates)
    highest = cpu_seconds(lambda: [novelty.max_similarity(text) for text in candidates]) / len(candidates)
    equal = sum(novelty.max_similarity(text) == score for text, score in zip(few, scores, strict=True))
    print(f"pool of {size}: highest F equal to the last digit for {equal} of {len(few)} candidates")
    print(f"  {'rouge_score, serial':24s}{1000 * reference:12.3f} ms a candidate")
    for name, seconds in (("most_similar (decision)", decision), ("max_similarity", highest)):
        print(f"  {name:24s}{1000 * seconds:12.3f} ms {reference / seconds:14,.0f} x")
    print(f"  {'add':24s}{1000 * adding:12.3f} ms")


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def read_texts(folder: Path) -> Iterator[str]:
    """Every line of every string in a folder's JSON files that is English and of a sensible length."""
    for path in sorted(path for path in folder.rglob("*.json*") if path.is_file()):
        content = path.read_text(encoding="utf-8")
        rows = [content] if path.suffix == ".json" else content.splitlines()
        for text in (text for row in rows if row.strip() for text in strings(json.loads(row))):
            for line in map(str.strip, text.splitlines()):
                english = not any(letter.isalpha() for letter in line if letter > "\x7f")
                if english and FEWEST_WORDS <= len(line.split()) <= MOST_WORDS:
                    yield line


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def made_up_texts(rng: Random) -> list[str]:
    """Instructions of a small grammar, with repetitions in other words here and there."""
    verbs = "Write Describe Explain List Compare Summarise Translate Rewrite Classify Name".split()
    nouns = [
        f"{first}{second}" for first in "ba ce di fo gu ha ki lo".split() for second in "ron lin tas mer dol".split()
    ]
    links = "about of for with without between before after against under".split()

    def phrase() -> str:
        return " ".join(
            f"{rng.choice(links)} the {rng.choice(nouns)} {rng.choice(nouns)}" for _ in range(rng.randint(2, 7))
        )

    texts = [f"{rng.choice(verbs)} a {rng.choice(nouns)} {phrase()}." for _ in range(max(POOLS) + CANDIDATES)]
    return [changed(rng.choice(texts), texts, rng) if rng.random() < 0.1 else text for text in texts]


def changed(text: str, texts: Sequence[str], rng: Random, share: float = 0.3) -> str:
    """The text with up to `share` of its words replaced by words of other texts."""
    words = text.split()
    for _ in range(rng.randint(1, max(1, round(share * len(words))))):
        words[rng.randrange(len(words))] = rng.choice(rng.choice(texts).split())
    return " ".join(words)


if __name__ == "__main__":
    main()
