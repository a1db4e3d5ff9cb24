"""How often tests of a difference reject a true null at 5 %, when questions about one document are correlated.

    OMP_NUM_THREADS=1 python benchmarks/clustered_tests.py [--rounds 500]

Differences of two systems that are equal are drawn as normal numbers with variance 1, of which a share (the intraclass
correlation) belongs to the document. A test that keeps its promise rejects 5 % of them. Also: how often a true
difference of the size that is called detectable is found, which should be 80 %.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

import numpy as np
from scipy.special import stdtrit
from scipy.stats import ttest_1samp

from alignkit.evaluation.comparison import permutation_p
from alignkit.evaluation.statistics import bootstrap_mean

SETTINGS = ((0.0, 20, 10), (0.3, 20, 10), (0.3, 100, 10), (0.3, 8, 10))
"""Intraclass correlation, documents, questions a document."""
TESTS = ("t by question", "flips by question", "bootstrap by document", "flips by document")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    print(f"rejections in % of {rounds} rounds (standard error of 5 %: {100 * math.sqrt(0.05 * 0.95 / rounds):.1f})")
    print(f"{'correlation':>11} {'documents':>9} {'questions':>9}  " + "  ".join(TESTS) + "  power at the MDE")
    for correlation, documents, each in SETTINGS:
        found = simulate(correlation, documents, each, rounds)
        shares = "  ".join(f"{100 * found[test] / rounds:{len(test)}.1f}" for test in (*TESTS, "power at the MDE"))
        print(f"{correlation:11.1f} {documents:9} {documents * each:9}  {shares}")


def simulate(correlation: float, documents: int, each: int, rounds: int) -> Counter[str]:
    """How many of the rounds each test rejects; and how many, with a true difference, the one by document."""
    generator = np.random.default_rng(0)
    names = [f"d{place // each}" for place in range(documents * each)]
    alone = [str(place) for place in range(len(names))]
    error = math.sqrt((correlation + (1 - correlation) / each) / documents)
    detectable = float(stdtrit(documents - 1, [0.975, 0.8]).sum()) * error
    found: Counter[str] = Counter()
    for number in range(rounds):
        shared = np.repeat(generator.normal(scale=math.sqrt(correlation), size=documents), each)
        values = shared + generator.normal(scale=math.sqrt(1 - correlation), size=len(names))
        interval = bootstrap_mean(list(values), names, number)
        found["t by question"] += bool(ttest_1samp(values, 0).pvalue < 0.05)
        found["flips by question"] += permutation_p(list(values), alone, number) < 0.05
        found["bootstrap by document"] += not interval["low"] < 0 < interval["high"]
        found["flips by document"] += permutation_p(list(values), names, number) < 0.05
        found["power at the MDE"] += permutation_p(list(values + detectable), names, number) < 0.05
    return found


if __name__ == "__main__":
    main()
