"""What metrics cost: 1,000 rows with six of them against generating the answers, and ROUGE-L against `rouge_score`.

    python benchmarks/evaluation.py [--questions 1000]

1. The embedded model answers the questions greedily, as `evaluate` has it do, in batches of 64. Then six metrics of
   every answer, without and with BLEU and chrF, are taken and summarised, with intervals from 2,000 resamples and
   broken down by form, level and kind. All on one thread; CPU seconds. The embedded model is small: with any other,
   generating takes longer and the metrics do not.
2. ROUGE-L of the same answers and references by `rouge_score` (pip install rouge-score) and by ours, equal to the last
   digit, and of texts of some 300 words.
3. What a text of a megabyte costs against an ordinary reference, and two of them against each other.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable
from random import Random
from typing import Any

from alignkit.core.config import ModelConfig, SamplingConfig
from alignkit.core.records import QAExample
from alignkit.data.chat import qa_prompt
from alignkit.data.closed_world import World, answer
from alignkit.evaluation.metrics import corpus
from alignkit.evaluation.metrics.measure import text_scores
from alignkit.evaluation.metrics.overlap import edit_similarity, rouge_l
from alignkit.evaluation.predictions import Prediction, score_answer, summarise

PLAIN = ("exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "edit_similarity")
HEAVY = ("exact_match", "token_f1", "rouge_1", "rouge_l", "bleu", "chrf")
"""Six metrics each. The first two are always taken, together with words and verdicts."""
NEW_TOKENS = 48


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    rows = compare_with_generating(parser.parse_args().questions)
    compare_with_rouge_score([(row.answers["tiny"].text, row.reference) for row in rows])
    measure_megabytes()


def compare_with_generating(count: int) -> list[Prediction]:
    """Answer and score, and print the shares; of each the faster of two tries."""
    from alignkit.core.app import load_config
    from alignkit.generation.hf import HFGenerator
    from alignkit.models.loading import load_policy, load_tokenizer

    model: ModelConfig = load_config("evaluate", ["data.path=none"]).model
    generator = HFGenerator(load_policy(model, None), load_tokenizer(model), "tiny")
    sampling = SamplingConfig(n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0], max_new_tokens=NEW_TOKENS, batch_size=64)
    examples = make_examples(count)
    prompts = [qa_prompt(example) for example in examples]
    summarise([scored(examples[0], examples[0].output, HEAVY)], "tiny")  # what is imported is imported once
    written, generating = fastest(lambda: generator.generate(prompts, sampling, seed=1))
    texts = [each[0].text for each in written]
    print(f"{count} questions; CPU seconds on one thread, the faster of two tries\n  generating    {generating:8.2f}")
    for metrics in (PLAIN, HEAVY):
        rows, scoring = fastest(lambda metrics=metrics: score_all(examples, texts, metrics))
        summary, summarising = fastest(lambda rows=rows: summarise(rows, "tiny"))
        print(f"  {', '.join(metrics)}: exact match {summary['exact_match']['mean']:.3f}")
        for name, seconds in (("scores", scoring), ("intervals", summarising), ("together", scoring + summarising)):
            print(f"    {name:12s}{seconds:8.2f} {100 * seconds / generating:7.1f} % of generating")
    return rows


def score_all(examples: list[QAExample], texts: list[str], metrics: tuple[str, ...]) -> list[Prediction]:
    """Rows as `evaluate` makes them. What sacrebleu has counted before is forgotten first."""
    corpus._sentence_bleu.cache_clear()
    corpus._chrf_counts.cache_clear()
    return [scored(example, text, metrics) for example, text in zip(examples, texts, strict=True)]


def scored(example: QAExample, text: str, metrics: tuple[str, ...]) -> Prediction:
    """A row with the scores that are always taken, and `metrics`."""
    fields = {"id": example.id, "instruction": example.instruction, "input": example.input, "reference": example.output}
    found = score_answer(text, example.output, finished=True)
    extra = {**(example.model_extra or {}), "kind": example.kind}
    row = Prediction.model_validate({**fields, **extra, "answers": {"tiny": found}})
    row.answers["tiny"].scores |= text_scores(row, row.answers["tiny"], metrics)
    return row


def make_examples(count: int) -> list[QAExample]:
    """Questions about the closed world, as the demo's held-out ones."""
    world = World(5, split="held_out")
    examples = []
    for number in range(count):
        passage = world.passage()
        question = world.ask(passage)
        row = {
            "id": f"q{number}",
            "instruction": passage.statement,
            "input": question.text,
            "output": answer(passage.facts, question),
            "kind": question.kind,
            "form": "value" if question.proposed is None else "verdict",
            "level": "hard" if passage.hard else "easy",
        }
        examples.append(QAExample.model_validate(row))
    return examples


def compare_with_rouge_score(pairs: list[tuple[str, str]]) -> None:
    """Time both on short answers and on long ones."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, rng = RougeScorer(["rougeL"]), Random(1)
    stock = [word for pair in pairs for text in pair for word in text.split()]
    long = [(" ".join(rng.choices(stock, k=300)), " ".join(rng.choices(stock, k=300))) for _ in range(20)]
    print("ROUGE-L, ms a pair")
    for name, some in ((f"{len(pairs)} answers", pairs), (f"{len(long)} texts of 300 words", long)):
        theirs, reference = timed(lambda some=some: [scorer.score(b, a)["rougeL"].fmeasure for a, b in some])
        ours, own = timed(lambda some=some: [rouge_l(a, b) for a, b in some])
        differ = sum(one != other for one, other in zip(theirs, ours, strict=True))
        shown = f"rouge_score {1000 * reference / len(some):8.3f}  ours {1000 * own / len(some):8.3f}"
        print(f"  {name:24s} {shown}  {reference / own:6.0f}x  {differ} differ")


def measure_megabytes() -> None:
    """Texts of a million characters: words of a small vocabulary, and none that repeats the other."""
    rng = Random(1)
    stock = [f"w{number}" for number in range(5000)]
    weights = [1 / (number + 1) for number in range(5000)]
    first, second = (" ".join(rng.choices(stock, weights, k=260_000))[:1_000_000] for _ in range(2))
    print("a megabyte, CPU seconds")
    for name, work in {
        "six metrics against an ordinary reference": lambda: scored(make_examples(1)[0], first, HEAVY),
        "ROUGE-L against another megabyte": lambda: rouge_l(first, second),
        "edit similarity against 100,000 characters": lambda: edit_similarity(first, second[:100_000]),
    }.items():
        print(f"  {name:44s}{timed(work)[1]:8.2f}")


def fastest(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the CPU seconds of the faster of two tries."""
    (_, first), (found, second) = timed(work), timed(work)
    return found, min(first, second)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and its CPU seconds."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


if __name__ == "__main__":
    main()
