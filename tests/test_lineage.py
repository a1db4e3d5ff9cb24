"""Lineage: from a model, a file or a row back to the seeds."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from alignkit.core.artifact import Artifact
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.lineage import lineage

if TYPE_CHECKING:
    from house import House

pytest_plugins = ["house"]


@dataclass
class StepConfig(StageConfig):
    inputs: ClassVar[tuple[str, ...]] = ("data", "adapter")

    data: str = ""
    adapter: str = ""
    model: dict[str, str] = field(default_factory=lambda: {"name": "tiny", "path": "embedded"})


def step(name: str, output: str, rows: list[dict[str, Any]] | None = None, data: str = "", adapter: str = "") -> None:
    """A stage that writes rows, or an adapter folder when there are none, to runs/demo/<name>/<output>."""
    with Artifact.open(
        name, StepConfig(name=name, output_dir=f"runs/demo/{name}", data=data, adapter=adapter)
    ) as artifact:
        if rows is not None:
            artifact.write_rows(output, rows)
            return
        with artifact.output(output) as folder:
            folder.mkdir()
            (folder / "weights").write_text(name, encoding="utf-8")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """seeds -> expand -> sft -> pairs -> dpo, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    seeds = [{"id": f"s{number}", "input": f"Is {number} even?"} for number in range(3)]
    Path("seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds), encoding="utf-8")
    rows = [{"id": "e1", "input": "Is 7 even?", "parents": ["s0", "s2"]}, {"id": "e2", "input": "?", "parents": ["s1"]}]
    step("expand", "expanded.jsonl", rows, data="seeds.jsonl")
    step("sft", "adapter", data="runs/demo/expand/expanded.jsonl")
    pairs = [{"id": "e1", "prompt": [{"role": "user", "content": "Is 7 even? " * 20}]}]
    step("pairs", "pairs.jsonl", pairs, data="runs/demo/expand/expanded.jsonl", adapter="runs/demo/sft/adapter")
    step("dpo", "adapter", data="runs/demo/pairs/pairs.jsonl", adapter="runs/demo/sft/adapter")
    return tmp_path


def names(target: str) -> list[tuple[int, str]]:
    """Depth and name of each line that is not a remark."""
    lines = [(len(line) - len(line.lstrip()), line.split()) for line in lineage(target)]
    return [(indent // 2, words[0]) for indent, words in lines if words[0] not in ("!", "?", "base", "with")]


def test_a_model_goes_back_to_the_seeds(runs: Path) -> None:
    assert names("runs/demo/dpo/adapter") == [
        (0, "runs/demo/dpo/adapter"),
        (1, "runs/demo/pairs/pairs.jsonl"),
        (2, "runs/demo/expand/expanded.jsonl"),
        (3, "seeds.jsonl"),
        (2, "runs/demo/sft/adapter"),
        (3, "runs/demo/expand/expanded.jsonl"),
        (1, "runs/demo/sft/adapter"),
    ]
    lines = lineage("runs/demo/dpo/adapter")
    assert "<- dpo: run_stage('dpo')" in lines[0]
    assert lines[1].strip() == "base model tiny (embedded)"
    assert sum("(see above)" in line for line in lines) == 2
    (seeds,) = [line for line in lines if "seeds.jsonl" in line]
    assert seeds.endswith("  3 rows  source")
    assert not any("!" in line for line in lines)


@pytest.mark.parametrize("target", ["runs/demo/dpo", "runs/demo/dpo/adapter/weights"])
def test_a_run_folder_and_a_file_in_an_output_are_traced_alike(runs: Path, target: str) -> None:
    assert names(target)[1:] == names("runs/demo/dpo/adapter")[1:]


def test_a_row_goes_back_to_its_seeds(runs: Path) -> None:
    assert names("runs/demo/pairs/pairs.jsonl#e1") == [
        (0, "runs/demo/pairs/pairs.jsonl#e1"),
        (1, "runs/demo/expand/expanded.jsonl#e1"),
        (2, "seeds.jsonl#s0"),
        (2, "seeds.jsonl#s2"),
    ]
    lines = lineage("runs/demo/pairs/pairs.jsonl#e1")
    assert '"Is 7 even?' in lines[0]
    assert '…"' in lines[0]
    assert any(line.strip().startswith("with adapter runs/demo/sft/adapter") for line in lines)


def test_a_parent_that_is_nowhere_is_said(runs: Path) -> None:
    step("select", "selected.jsonl", [{"id": "x", "parents": ["s1", "gone"]}], data="seeds.jsonl")
    lines = [line.strip() for line in lineage("runs/demo/select/selected.jsonl#x")]
    assert lines[1].startswith("seeds.jsonl#s1")
    assert lines[2] == "? parent gone is in none of the inputs"


def test_rows_without_ids_are_known_by_file_and_line(runs: Path) -> None:
    Path("plain.jsonl").write_text('{"input": "a"}\n{"input": "b"}\n', encoding="utf-8")
    step("select", "selected.jsonl", [{"id": "plain-2", "input": "b"}], data="plain.jsonl")
    assert names("runs/demo/select/selected.jsonl#plain-2")[1] == (1, "plain.jsonl#plain-2")


def test_a_changed_output_is_marked(runs: Path) -> None:
    Path("runs/demo/expand/expanded.jsonl").write_text('{"id": "e1"}\n', encoding="utf-8")
    text = "\n".join(lineage("runs/demo/dpo/adapter"))
    assert "! expanded.jsonl has changed since it was written" in text
    assert "! has changed since sft read it" in text
    assert "! has changed since pairs read it" in text
    assert "! has changed since dpo read it" not in text


def test_a_changed_source_is_marked(runs: Path) -> None:
    with Path("seeds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "s9"}\n')
    text = "\n".join(lineage("runs/demo/sft"))
    assert "! has changed since expand read it" in text
    assert "since it was written" not in text


def test_what_is_gone_or_unfinished_is_marked(runs: Path) -> None:
    Path("seeds.jsonl").unlink()
    assert any("seeds.jsonl" in line and line.endswith("! is gone") for line in lineage("runs/demo/sft"))
    manifest = Path("runs/demo/sft/manifest.json")
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"complete"', '"failed"'), encoding="utf-8")
    assert any("! the stage is failed, not complete" in line for line in lineage("runs/demo/sft/adapter"))
    assert any("! its manifest does not list it" in line for line in lineage("runs/demo/sft/log.txt"))


def test_runs_may_be_moved_and_read_from_anywhere(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    here = names("runs/demo/dpo")
    moved = tmp_path_factory.mktemp("moved") / "project"
    shutil.copytree(runs, moved)
    os.chdir(moved.parent)
    shutil.rmtree(runs / "runs")
    assert names("project/runs/demo/dpo")[1:] == here[1:]
    assert not any("!" in line for line in lineage("project/runs/demo/dpo"))


def test_hub_names_are_leaves(runs: Path) -> None:
    step("judge", "scored.jsonl", [{"id": "a"}], data="Anthropic/hh-rlhf")
    assert any(line.strip() == "Anthropic/hh-rlhf  (from the hub)" for line in lineage("runs/demo/judge"))


def test_a_source_is_its_own_lineage(runs: Path) -> None:
    (line,) = lineage("seeds.jsonl")
    assert line.startswith("seeds.jsonl  ")
    assert line.endswith("3 rows  source")


@pytest.mark.parametrize(
    ("target", "message"), [("nowhere", "nowhere: no such file"), ("seeds.jsonl#s7", "no row with the id 's7'")]
)
def test_what_does_not_exist_is_named(runs: Path, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lineage(target)


def test_the_command_prints_it(house: House) -> None:
    house.run()
    result = house.call("-m", "alignkit", "lineage", "runs/default/toy/shouted.jsonl#r2")
    assert result.code == 0, result.err
    assert result.out.splitlines()[1].startswith("  rows.jsonl#r2")
    assert house.call("-m", "alignkit", "lineage", "nowhere").code == 2
    assert house.call("-m", "alignkit", "lineage").code == 2
