"""The datasheet: it says what the manifest says, and nothing of a row can become markup."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from alignkit.core.artifact import Artifact
from alignkit.core.config import PricesConfig, RowsConfig, StageConfig, TeacherConfig, TeacherMode
from alignkit.core.hashing import hash_path
from alignkit.core.manifest import read_manifest
from alignkit.core.records import QAExample
from alignkit.reporting.datasheet import LICENCE, NAME, write_datasheet
from alignkit.reporting.yields import Yields
from alignkit.teacher.client import Usage
from alignkit.teacher.recipes.asking import Step


@dataclass
class Config(StageConfig):
    inputs: ClassVar[tuple[str, ...]] = ("data.path",)

    data: RowsConfig = field(default_factory=RowsConfig)
    self_instruct: dict[str, float] = field(default_factory=lambda: {"novelty_threshold": 0.7})


EVIL = "</td><script>alert(1)</script> ![x](http://a/b.png) [y](javascript:z) | `a` \x1b[2J\nnext # line"


def datasheet(folder: Path, teacher: TeacherConfig, rows: list[QAExample] | None = None) -> str:
    seeds = folder / "seeds.jsonl"
    seeds.write_text('{"id": "seed-1"}\n', encoding="utf-8")
    config = Config(name="expand", output_dir=str(folder / "out"), seed=7, data=RowsConfig(path=str(seeds)))
    rows = rows or [
        QAExample(id="row-1", parents=["seed-1"], instruction=EVIL, input="Is it?", source="teacher:x"),
        QAExample.model_validate({"id": "row-2", "instruction": "Short.", "flags": ["instructs the model"]}),
    ]
    steps, dropped = {"examples": Step(5, 3)}, Counter({"too | similar": 3})
    yields = Yields(steps, len(rows), dropped, Usage(cost=1.0), PricesConfig())
    with Artifact.open("expand", config) as artifact:
        artifact.write_rows("expanded.jsonl", rows)
        path = write_datasheet(artifact, "expanded.jsonl", rows, yields, recipe="self_instruct", teacher=teacher)
    assert path == folder / "out" / NAME
    return path.read_text(encoding="utf-8")


def served() -> TeacherConfig:
    return TeacherConfig(mode=TeacherMode.openai, model="model-x", base_url="https://host.example/v1")


def test_it_says_what_the_manifest_says(tmp_path: Path) -> None:
    text = datasheet(tmp_path, served())
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert {entry["path"] for entry in manifest["outputs"]} == {"expanded.jsonl", NAME}
    assert f"sha256 `{hash_path(tmp_path / 'out' / 'expanded.jsonl')}`" in text
    source = manifest["inputs"][0]
    assert f"| `data.path` | `{source['path']}` | `1` | `{source['sha256']}` |" in text
    assert "model `model-x` at `host.example`" in text
    assert f"\n    {manifest['command']}\n" in text
    for line in (
        "- seed: `7`",
        "- cost: `1.00 USD`",
        "- novelty_threshold: `0.7`",
        f"- started: `{manifest['started']}`",
    ):
        assert f"\n{line}\n" in text
    assert "| `examples` | 5 | 3 | 0 |" in text and "- dropped: `3: too \\| similar 3`" in text
    assert "| `input` | `1 of 2` | `str` | `Is it?` |" in text
    assert "1 rows are flagged" in text
    assert text.rstrip().splitlines()[-1].startswith(LICENCE)


def test_the_text_of_a_row_cannot_become_markup(tmp_path: Path) -> None:
    text = datasheet(tmp_path, served())
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)  # without its code spans
    for piece in ("<", "![", "](", "javascript", "\x1b", "alert"):
        assert piece not in outside
    tables = [line for line in text.splitlines() if line.startswith("| `instruction`")]
    assert len(tables) == 1 and len(re.findall(r"(?<!\\)\|", tables[0])) == 5
    assert not any(line.startswith("next # line") for line in text.splitlines())


def test_the_scripted_teacher_is_called_what_it_is(tmp_path: Path) -> None:
    text = datasheet(tmp_path, TeacherConfig(model="scripted", mistake_rate=0.15))
    assert "not a language model. 15 % of the answers it writes are wrong on purpose." in text
    assert "a closed world that does not exist" in text and "host" not in text


@pytest.mark.parametrize("count", [1, 500])
def test_every_field_is_a_column(tmp_path: Path, count: int) -> None:
    rows = [QAExample(id=str(n), instruction="s", output="o" * (n % 2), scores={"q": 1.0}) for n in range(count)]
    text = datasheet(tmp_path, served(), rows)
    columns = re.findall(r"^\| `(\w+)` \| `([\d,]+ of [\d,]+)`", text, re.MULTILINE)
    written = json.loads((tmp_path / "out" / "expanded.jsonl").read_text().splitlines()[0])
    assert [name for name, _ in columns] == list(written)
    assert dict(columns)["output"] == f"{count // 2} of {count}"
