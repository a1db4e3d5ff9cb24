"""Does training a retriever pay? Held-out HotpotQA questions: BM25, an encoder made from nothing, the same one trained.

    python benchmarks/retriever.py --data hotpotqa.jsonl [--seeds 3] [--held-out 0.3] [--folder runs/retriever]

`--data` is a file of HotpotQA's distractor setting, or a folder that holds one. For each seed the stage `retriever`
makes an encoder from nothing (a vector for each word piece of the training questions and paragraphs), measures it,
trains it on the other questions and measures it again. Each held-out question is searched in the paragraphs of all
held-out questions. Intervals are paired 95 % bootstrap intervals, in which what the seeds say about a question stays
together. Run again with the same options, it prints what it found. A minute a seed on an idle core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from alignkit.core.app import run_command
from alignkit.core.config import RowsConfig
from alignkit.core.records import RetrievalExample
from alignkit.data.sources import read_retrieval
from alignkit.evaluation.retrieval_metrics import ndcg
from alignkit.evaluation.retriever_gain import CUT_OFF
from alignkit.evaluation.statistics import bootstrap_mean
from alignkit.retrieval.bm25 import BM25Index


def main() -> None:
    """Train with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=float, default=0.3)
    parser.add_argument("--folder", type=Path, default=Path("runs/retriever"))
    options, overrides = parser.parse_known_args()
    data = options.data
    if data.is_dir():
        data = next(path for path in sorted(data.rglob("*.json*")) if "hotpot" in str(path).lower())
    examples = {example.id: example for example in read_retrieval(RowsConfig(path=str(data)), "qa")[0]}
    found: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        folder = options.folder / f"seed{seed}"
        given = [f"output_dir={folder}", f"data.path={data}", "task=qa", f"held_out_share={options.held_out}"]
        if code := run_command("retriever", [*given, f"seed={seed}", *overrides]):
            sys.exit(code)
        rows = [json.loads(line) for line in (folder / "held_out_ndcg.jsonl").read_text(encoding="utf-8").splitlines()]
        lexical = by_bm25([examples[row["id"]] for row in rows])
        found += [{**row, "bm25": score} for row, score in zip(rows, lexical, strict=True)]
    print(table(found))


def by_bm25(examples: list[RetrievalExample]) -> list[float]:
    """nDCG@10 of each question by BM25, in the same paragraphs."""
    texts = list(dict.fromkeys(text for example in examples for text in (*example.pos, *example.neg)))
    hits = BM25Index(texts).search([example.query for example in examples], CUT_OFF)
    ranked = ([texts[hit.index] for hit in found] for found in hits)
    return [ndcg(found, set(example.pos), CUT_OFF) for found, example in zip(ranked, examples, strict=True)]


def table(rows: list[dict[str, Any]]) -> str:
    """The means, and the differences with their intervals."""
    ids = [row["id"] for row in rows]
    lines = [f"nDCG@{CUT_OFF}, {len(rows)} held-out questions ({len(set(ids))} different)"]

    def line(name: str, values: list[float], sign: str = "") -> str:
        estimate = bootstrap_mean(values, ids)
        return f"  {name:28s} {estimate['mean']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"

    for name, key in (("made from nothing", "before"), ("trained", "after"), ("BM25", "bm25")):
        lines.append(line(name, [row[key] for row in rows]))
    for name, new, old in (("trained over nothing", "after", "before"), ("trained over BM25", "after", "bm25")):
        lines.append(line(name, [row[new] - row[old] for row in rows], "+"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
