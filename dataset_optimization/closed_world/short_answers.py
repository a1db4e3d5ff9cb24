"""Write the closed-world inputs of two recipes: `python dataset_optimization/closed_world/short_answers.py`.

short_answers.jsonl  questions with short answers for `complete_answers`: values, verdicts, differences, and open ones
categories.jsonl     the kinds of things that `multihop` compares

The rows are drawn from a random stream of their own; the held-out names of the world are never answers in them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from alignkit.data.closed_world import RELATIONS, SUBJECTS, Fact, World, lexicon
from alignkit.teacher.scripted.comparisons import TwoFactQuestion, conclude, number

FORMS = ("value", "yes", "no", "unanswerable", "difference")
SIZE = 100
STREAM = 21


def short_answers() -> list[dict[str, Any]]:
    """The questions, every form as often as the others."""
    world = World(STREAM)
    written = []
    for index in range(SIZE):
        form = FORMS[index % len(FORMS)]
        row = difference(world) if form == "difference" else one_fact(world, form)
        written.append({"id": f"short-{index:04d}", "dataset": "closed-world", **row})
    return written


def one_fact(world: World, form: str) -> dict[str, Any]:
    """A question about one fact of a passage."""
    passage = world.passage(3)
    question = world.ask(passage, form)
    asked = (question.entity, question.relation)
    value = next((fact.value for fact in passage.facts if (fact.entity, fact.relation) == asked), None)
    row = {"question": question.text, "paragraphs": [passage.statement]}
    if value is None:
        return {**row, "answers": [], "unanswerable": True}
    if question.proposed is None:
        return {**row, "answers": [value]}
    return {**row, "answers": ["yes" if value == question.proposed else "no"], "reasoning": "thought"}


def difference(world: World) -> dict[str, Any]:
    """A question about the difference of two numbers."""
    relation = world.rng.choice([each for each in RELATIONS if number(lexicon()[each.value][0]) is not None])
    low, high = sorted(world.rng.sample(world.values(relation.value), 2), key=lambda word: number(word) or 0)
    first, second = world.rng.sample(lexicon()[relation.subject], 2)
    facts = [Fact(first, relation, high), Fact(second, relation, low)]
    question = TwoFactQuestion("difference", relation, first, second)
    conclusion = conclude(question, facts)
    assert conclusion is not None
    world.rng.shuffle(facts)
    sentences = [world.rng.choice(relation.sentences).format(e=fact.entity, v=fact.value) for fact in facts]
    return {
        "question": question.text,
        "paragraphs": ["Notes: " + " ".join(sentences)],
        "answers": [conclusion.short],
        "reasoning": "arithmetic",
    }


def categories() -> list[dict[str, Any]]:
    """The kinds of things in the world."""
    return [{"id": f"category-{subject}", "category": subject, "sub_categories": [subject]} for subject in SUBJECTS]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    folder = parser.parse_args().output
    for name, rows in (("short_answers", short_answers()), ("categories", categories())):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
