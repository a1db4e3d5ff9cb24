"""Write the closed-world files of the demo: `python dataset_optimization/closed_world/generate.py`.

seeds.jsonl         the few dozen questions that a user would write over their own documents
development.jsonl   decides every setting of the demo; never shown in the report
test.jsonl          the report's split; never used to decide anything

Each file is drawn from its own random stream and no statement stands in two of them (a test checks both). In
development and test the held-out names of the world may be answers; in the seeds they never are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from alignkit.data.closed_world import World, answer, held_out_names

FORMS = ("value", "yes", "no", "unanswerable")
SIZES = {"seeds": 48, "development": 400, "test": 800}
STREAMS = {"seeds": 11, "development": 12, "test": 13}


def rows(split: str) -> list[dict[str, Any]]:
    """The rows of one split: forms 40/20/20/20, a quarter of the passages hard."""
    world = World(STREAMS[split], split="train" if split == "seeds" else "held_out")
    written: list[dict[str, Any]] = []
    for index in range(SIZES[split]):
        world.hard_share = float(index % 4 == 3)
        form = (*FORMS, "value")[index // 4 % 5]
        passage = world.passage(3)
        question = world.ask(passage, form)
        output = answer(passage.facts, question)
        stated = next(
            (f.value for f in passage.facts if (f.entity, f.relation) == (question.entity, question.relation)), ""
        )
        written.append(
            {
                "id": f"{split}-{index:04d}",
                "instruction": passage.statement,
                "input": question.text,
                "output": output,
                "kind": question.kind,
                "source": "closed-world",
                "form": form,
                "level": "hard" if passage.hard else "easy",
                "held_out_name": stated in held_out_names(),
            }
        )
    return written


def main() -> None:
    """Write all splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    folder = parser.parse_args().output
    for split in SIZES:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(split)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
