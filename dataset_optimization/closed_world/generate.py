"""Write the closed-world files of the demo: `python dataset_optimization/closed_world/generate.py`.

seeds.jsonl         the few dozen questions that a user would write over their own documents
development.jsonl   decides every setting of the demo; never shown in the report
test.jsonl          the report's split; never used to decide anything
retrieval_train.jsonl, retrieval_test.jsonl
                    questions over a library each: two notes about every name, which agree, so that there is always
                    one right note
documents/          three short documents, one of each kind: JSON by page, text with form feeds, Markdown
documents.csv       the machine that each of them is about, by file name

Each file is drawn from its own random stream and no statement stands in two of them (a test checks both). In
development, test and retrieval_test the held-out names of the world may be answers; in all else they never are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from alignkit.data.closed_world import Passage, World, answer, held_out_names, lexicon

FORMS = ("value", "yes", "no", "unanswerable")
SIZES = {"seeds": 48, "development": 400, "test": 800}
STREAMS = {"seeds": 11, "development": 12, "test": 13, "documents": 14, "retrieval_train": 15, "retrieval_test": 16}
LIBRARIES = {"retrieval_train": "train", "retrieval_test": "held_out"}
DOCUMENTS = {"manual.json": 4, "handbook.txt": 3, "notes.md": 3}
"""Pages of each document."""
PASSAGES = 8
"""On a page, of three sentences each."""


def rows(split: str) -> list[dict[str, Any]]:
    """The rows of one split: forms 40/20/20/20, a quarter of the passages hard."""
    world = World(STREAMS[split], split="train" if split == "seeds" else "held_out")
    written: list[dict[str, Any]] = []
    for index in range(SIZES[split]):
        world.hard_share = float(index % 4 == 3)
        form = (*FORMS, "value")[index // 4 % 5]
        passage = world.passage(3)
        written.append(row(f"{split}-{index:04d}", world, passage, form))
    return written


def library_rows(split: str) -> list[dict[str, Any]]:
    """A question about each note of a library: forms 50/25/25; `document` is the name that the note is about."""
    world = World(STREAMS[split], split=LIBRARIES[split])
    return [
        row(f"{split}-{index:04d}", world, passage, ("value", "yes", "value", "no")[index % 4])
        | {"document": passage.entities[0]}
        for index, passage in enumerate(world.library())
    ]


def row(id: str, world: World, passage: Passage, form: str) -> dict[str, Any]:
    """A question of this form about the passage, with its answer."""
    question = world.ask(passage, form)
    stated = next(
        (f.value for f in passage.facts if (f.entity, f.relation) == (question.entity, question.relation)), ""
    )
    return {
        "id": id,
        "instruction": passage.statement,
        "input": question.text,
        "output": answer(passage.facts, question),
        "kind": question.kind,
        "source": "closed-world",
        "form": form,
        "level": "hard" if passage.hard else "easy",
        "held_out_name": stated in held_out_names(),
    }


def documents() -> dict[str, str]:
    """The files of the documents by their names. Nothing is written about in two of their passages."""
    world = World(STREAMS["documents"], hard_share=0.0)
    written: set[str] = set()
    files = {}
    for name, count in DOCUMENTS.items():
        pages = ["\n".join(new_statement(world, written) for _ in range(PASSAGES)) for _ in range(count)]
        if name.endswith(".json"):
            by_page = {f"page_{number}": page for number, page in enumerate(pages, 1)}
            files[name] = json.dumps(by_page, ensure_ascii=False, indent=1) + "\n"
        elif name.endswith(".txt"):
            files[name] = "\n\f".join(pages) + "\n"
        else:
            sections = [f"## Part {number}\n\n{page}" for number, page in enumerate(pages, 1)]
            files[name] = "# Notes\n\n" + "\n\n".join(sections) + "\n"
    return files


def new_statement(world: World, written: set[str]) -> str:
    """The sentences of a passage about something that is not in `written`, which grows."""
    while (passage := world.passage(3)).entities[0] in written:
        pass
    written.add(passage.entities[0])
    return passage.statement.removeprefix("Notes: ")


def metadata() -> str:
    """The CSV file with one row a document, under the name of the PDF it could have been made from."""
    names = [f"{Path(name).stem}.pdf" for name in DOCUMENTS]
    machines = zip(names, lexicon()["machine"], strict=False)
    lines = [f"{name},{machine},M-{number:03d}" for number, (name, machine) in enumerate(machines, 1)]
    return "\n".join(["filename,machine_name,machine_code", *lines]) + "\n"


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    folder = parser.parse_args().output
    splits = {**{split: rows(split) for split in SIZES}, **{split: library_rows(split) for split in LIBRARIES}}
    for split, written in splits.items():
        lines = [json.dumps(each, ensure_ascii=False) for each in written]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(lines)} rows")
    (folder / "documents").mkdir(exist_ok=True)
    for name, text in documents().items():
        (folder / "documents" / name).write_text(text, encoding="utf-8")
        print(f"{folder / 'documents' / name}: {DOCUMENTS[name]} pages")
    (folder / "documents.csv").write_text(metadata(), encoding="utf-8")


if __name__ == "__main__":
    main()
