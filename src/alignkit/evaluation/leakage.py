"""Did a model train on the questions it is examined with? Manifests know what every adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.core.manifest import read_manifest
from alignkit.core.records import QAExample
from alignkit.data.chat import qa_prompt
from alignkit.data.jsonl import read_rows


@dataclass
class Leakage:
    """Held-out rows that some model was trained on, and the training files in which that was looked up."""

    rows: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    """Adapters and files of which it cannot be said: no manifest, no longer there, or rows whose question cannot be
    told. What is found in the other rows of such a file counts nevertheless."""


def find_leakage(examples: Sequence[QAExample], adapters: Iterable[str]) -> Leakage:
    """Look up every held-out question in the training data of the adapters and of those they were started from."""
    wanted = {qa_prompt(example)[-1].content: example.id for example in examples}
    found = Leakage()
    for adapter in adapters:
        for path in training_files(Path(adapter), found.unknown):
            if path in found.files or path in found.unknown:
                continue
            asked = {_question(row) for _, row in read_rows(path)}
            (found.unknown if None in asked else found.files).add(path)
            found.rows |= {wanted[question] for question in asked if question in wanted}
    return found


def training_files(adapter: Path, unknown: set[str]) -> Iterator[str]:
    """Files whose rows an adapter, or the one it was started from, learnt; what cannot be told goes to `unknown`."""
    manifest = read_manifest(adapter.parent)
    if manifest is None:
        unknown.add(str(adapter))
        return
    for entry in manifest["inputs"]:
        path = Path(entry["path"])
        if path.is_file():
            yield str(path)
        elif path.is_dir():
            yield from training_files(path, unknown)
        else:
            unknown.add(entry["path"])


def _question(row: Mapping[str, Any]) -> str | None:
    """The text a row asks: its last user turn, or the statement and question of a QA row; None in other formats."""
    if isinstance(row.get("prompt"), list) and row["prompt"]:
        return str(row["prompt"][-1].get("content", ""))
    if isinstance(row.get("messages"), list):
        return next((str(turn["content"]) for turn in reversed(row["messages"]) if turn.get("role") == "user"), None)
    if "instruction" in row and "instances" not in row:
        parts = (str(row["instruction"]), str(row.get("input") or ""))
        return qa_prompt(QAExample(id="-", instruction=parts[0], input=parts[1]))[-1].content
    return None
