"""Run folders: manifests, hashes, atomic outputs, "up to date"."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import pytest

from alignkit.core import hashing
from alignkit.core.artifact import Artifact, input_paths, read_manifest, to_plain
from alignkit.core.config import Quantization, RowsConfig, StageConfig
from alignkit.core.errors import UserError
from alignkit.core.hashing import count_rows, hash_path, hash_text
from alignkit.core.manifest import is_hub_name
from alignkit.core.records import QAExample

if TYPE_CHECKING:
    from house import House

pytest_plugins = ["house"]


@dataclass
class CopyConfig(StageConfig):
    inputs: ClassVar[tuple[str, ...]] = ("data.path", "adapter", "models", "more")

    data: RowsConfig = field(default_factory=RowsConfig)
    adapter: Optional[str] = None  # noqa: UP045
    models: dict[str, str] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)
    quantization: Quantization = Quantization.none


def configure(folder: Path, **changes: Any) -> CopyConfig:
    """A configuration whose input is rows.jsonl and whose output folder is out, both in `folder`."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text('{"id": "a"}\n\n{"id": "b"}\n', encoding="utf-8")
    values: dict[str, Any] = {"name": "copy", "output_dir": str(folder / "out"), "data": RowsConfig(path=str(rows))}
    return CopyConfig(**(values | changes))


def finish(config: CopyConfig, rows: list[dict[str, Any]] | None = None) -> Artifact:
    """Run the smallest stage there is."""
    with Artifact.open("copy", config) as artifact:
        if not artifact.up_to_date:
            artifact.write_rows("rows.jsonl", rows or [{"id": "a"}])
    return artifact


def test_the_manifest_says_what_was_done(house: House) -> None:
    assert house.run("factor=2", "seed=3").code == 0
    manifest = house.manifest()
    rows = (house.folder / "rows.jsonl").read_bytes()
    shouted = (house.folder / "runs/default/toy/shouted.jsonl").read_bytes()
    assert manifest["stage"] == "toy"
    assert manifest["status"] == "complete"
    assert manifest["summary"] == "3 rows"
    assert manifest["command"] == "alignkit toy factor=2 seed=3"
    assert manifest["folder"] == "runs/default/toy"
    assert manifest["inputs"] == [
        {"key": "data.path", "path": "rows.jsonl", "sha256": hashlib.sha256(rows).hexdigest(), "rows": 3}
    ]
    assert manifest["outputs"] == [{"path": "shouted.jsonl", "sha256": hashlib.sha256(shouted).hexdigest(), "rows": 3}]
    assert manifest["metrics"] == {"length": 2.0 * len("onetwothree"), "found": 0}
    assert manifest["versions"]["torch"] != "not installed"
    assert manifest["peak_memory_bytes"] > 10 * 2**20
    assert manifest["seconds"] >= 0
    assert manifest["error"] is None
    assert len(manifest["config_hash"]) == len(manifest["fingerprint"]) == 64
    config = (house.folder / "runs/default/toy/config.yaml").read_text(encoding="utf-8")
    assert "factor: 2.0\n" in config
    assert "output_dir: runs/default/toy\n" in config
    assert "quantization: none\n" in config


def test_done_work_is_not_done_again(house: House) -> None:
    house.run()
    before = house.manifest()
    again = house.run()
    assert again.code == 0
    assert again.out == "toy is up to date: runs/default/toy (force=true does it again)\n"
    assert house.manifest() == before


@pytest.mark.parametrize("change", ["config", "input", "force", "output gone", "code"])
def test_changed_work_is_done_again(house: House, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    house.run()
    arguments = {"config": ["factor=2"], "force": ["force=true"]}.get(change, [])
    if change == "input":
        house.write_rows("one", "two", "four")
    elif change == "output gone":
        (house.folder / "runs/default/toy/shouted.jsonl").unlink()
    elif change == "code":
        (house.folder / "src/alignkit/core/journal.py").write_text("# another journal\n", encoding="utf-8")
        hashing.code_hash.cache_clear()
    result = house.run(*arguments)
    assert result.code == 0
    assert "up to date" not in result.out
    assert house.shouted() == ["ONE", "TWO", "FOUR" if change == "input" else "THREE"]


def test_another_stage_s_code_does_not_count(house: House) -> None:
    before = hashing.code_hash("toy")
    (house.folder / "src/alignkit/compare.py").write_text("# mended\n", encoding="utf-8")
    hashing.code_hash.cache_clear()
    assert hashing.code_hash("toy") == before


def test_an_edited_prompt_counts(house: House) -> None:
    before = hashing.code_hash("toy")
    (house.folder / "dataset_optimization/prompts/grade.jinja").write_text("Grade this.", encoding="utf-8")
    hashing.code_hash.cache_clear()
    assert hashing.code_hash("toy") != before


def test_where_and_how_fast_do_not_make_work_out_of_date(tmp_path: Path) -> None:
    finish(configure(tmp_path))
    (tmp_path / "out").rename(tmp_path / "moved")
    assert Artifact.open("copy", configure(tmp_path, run="other", output_dir=str(tmp_path / "moved"))).up_to_date
    assert not Artifact.open("copy", configure(tmp_path, seed=2, output_dir=str(tmp_path / "moved"))).up_to_date


def test_up_to_date_restores_what_the_manifest_says(tmp_path: Path) -> None:
    with Artifact.open("copy", configure(tmp_path)) as first:
        first.check("sane", True, "it is")
        first.drop({"id": "x"}, "empty")
        first.write_rows("rows.jsonl", [{"id": "a"}])
        first.metrics, first.summary = {"loss": 0.5}, "loss 0.5"
    second = Artifact.open("copy", configure(tmp_path))
    assert second.up_to_date
    for name in ("status", "checks", "dropped", "outputs", "metrics", "summary", "seconds", "started"):
        assert getattr(second, name) == getattr(first, name), name


def test_always_stages_are_never_up_to_date(tmp_path: Path) -> None:
    finish(configure(tmp_path))
    assert Artifact.open("copy", configure(tmp_path)).up_to_date
    assert not Artifact.open("copy", configure(tmp_path), always=True).up_to_date


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    finish(configure(tmp_path), [{"id": "old"}])

    def broken() -> Any:
        yield {"id": "new"}
        raise RuntimeError("in the middle")

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        Artifact.open("copy", configure(tmp_path, seed=2)) as artifact,
    ):
        artifact.write_rows("rows.jsonl", broken())
    assert (tmp_path / "out/rows.jsonl").read_text(encoding="utf-8") == '{"id": "old"}\n'
    assert not list((tmp_path / "out").glob(".*"))
    assert (read_manifest(tmp_path / "out") or {})["status"] == "failed"


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for seed, text in ((1, "old"), (2, "new")):
        with Artifact.open("copy", configure(tmp_path, seed=seed)) as artifact, artifact.output("adapter") as folder:
            folder.mkdir()
            (folder / f"{text}.txt").write_text(text, encoding="utf-8")
    assert [path.name for path in (tmp_path / "out/adapter").iterdir()] == ["new.txt"]
    assert artifact.outputs == [{"path": "adapter", "sha256": hash_path(tmp_path / "out/adapter"), "rows": None}]


def test_outputs_of_an_earlier_run_do_not_linger(tmp_path: Path) -> None:
    with Artifact.open("copy", configure(tmp_path)) as artifact:
        artifact.write_text("a.txt", "a")
        artifact.write_text("b.txt", "b")
        artifact.drop({"id": "x"}, "empty")
    with Artifact.open("copy", configure(tmp_path, seed=2)) as artifact:
        artifact.write_text("b.txt", "b")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "b.txt",
        "config.yaml",
        "log.txt",
        "manifest.json",
    ]


@pytest.mark.parametrize("end", ["failed", "running"])
def test_outputs_of_a_run_before_a_failed_or_killed_one_do_not_linger(tmp_path: Path, end: str) -> None:
    manifest = tmp_path / "out/manifest.json"
    with Artifact.open("copy", configure(tmp_path)) as artifact:
        for name in ("a.txt", "b.txt", "c.txt"):
            artifact.write_text(name, "first")
    for seed in (2, 3):  # two in a row: what is stale is handed on from one to the next
        with pytest.raises(RuntimeError), Artifact.open("copy", configure(tmp_path, seed=seed)) as artifact:
            as_a_kill_leaves_it = manifest.read_text(encoding="utf-8")
            artifact.write_text("b.txt", "second")
            raise RuntimeError
        if end == "running":
            manifest.write_text(as_a_kill_leaves_it, encoding="utf-8")
        assert (read_manifest(tmp_path / "out") or {})["status"] == end
        assert (tmp_path / "out/a.txt").exists()
    with Artifact.open("copy", configure(tmp_path, seed=4)) as artifact:
        artifact.write_text("c.txt", "third")
    assert [path.name for path in sorted((tmp_path / "out").glob("?.txt"))] == ["c.txt"]
    assert (read_manifest(tmp_path / "out") or {})["stale"] == []


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml"])
def test_a_run_that_cannot_begin_does_not_keep_its_folder_locked(tmp_path: Path, name: str) -> None:
    obstacle = tmp_path / f"out/.{name}.partial"  # a folder where the file is to be written: stands for a full disk
    obstacle.mkdir(parents=True)
    handlers = list(logging.getLogger("alignkit").handlers)
    with pytest.raises(OSError) as caught:  # held, and with it the frames that hold the log file
        finish(configure(tmp_path))
    assert caught.value.filename == str(obstacle)
    assert logging.getLogger("alignkit").handlers == handlers
    obstacle.rmdir()
    assert finish(configure(tmp_path)).status == "complete"


def test_unfinished_work_is_kept_for_the_same_work_only(tmp_path: Path) -> None:
    def attempt(config: CopyConfig) -> bool:
        with pytest.raises(RuntimeError), Artifact.open("copy", config) as artifact:
            found = (artifact.work_folder / "checkpoint").exists()
            artifact.work_folder.mkdir(exist_ok=True)
            (artifact.work_folder / "checkpoint").write_text("half", encoding="utf-8")
            raise RuntimeError
        return found

    assert [attempt(configure(tmp_path)) for _ in range(2)] == [False, True]
    assert attempt(configure(tmp_path, seed=2)) is False
    assert attempt(configure(tmp_path, seed=2, force=True)) is False
    finish(configure(tmp_path, seed=2))
    assert not (tmp_path / "out/unfinished").exists()


def test_dropped_rows_are_set_aside_and_counted(tmp_path: Path) -> None:
    with Artifact.open("copy", configure(tmp_path)) as artifact:
        artifact.drop({"id": "a", "text": "é"}, "empty")
        artifact.drop(QAExample(id="b", instruction="", input="why?"), "empty", "no statement")
        artifact.drop({"id": "c"}, "too long")
    lines = (tmp_path / "out/dropped.jsonl").read_text(encoding="utf-8").splitlines()
    dropped = [json.loads(line) for line in lines]
    assert dropped[0] == {"reason": "empty", "row": {"id": "a", "text": "é"}, "detail": ""}
    assert dropped[1]["row"]["input"] == "why?"
    assert dropped[1]["detail"] == "no statement"
    manifest = read_manifest(tmp_path / "out") or {}
    assert manifest["dropped"] == {"empty": 2, "too long": 1}
    assert manifest["outputs"] == [
        {"path": "dropped.jsonl", "sha256": hash_path(tmp_path / "out/dropped.jsonl"), "rows": 3}
    ]


def test_a_failed_check_stops_the_stage_and_is_recorded(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="check 'labels' failed: none"),
        Artifact.open("copy", configure(tmp_path)) as artifact,
    ):
        artifact.check("trainable", True, "12 parameters")
        artifact.check("labels", False, "none")
    manifest = read_manifest(tmp_path / "out") or {}
    assert manifest["status"] == "failed"
    assert manifest["checks"] == [
        {"name": "trainable", "passed": True, "detail": "12 parameters"},
        {"name": "labels", "passed": False, "detail": "none"},
    ]


def test_numbers_of_other_libraries_are_numbers_in_the_manifest(tmp_path: Path) -> None:
    import numpy as np

    with Artifact.open("copy", configure(tmp_path)) as artifact:
        artifact.metrics = {"loss": np.float32(0.5), "steps": np.int64(3)}
    assert (read_manifest(tmp_path / "out") or {})["metrics"] == {"loss": 0.5, "steps": 3}


def test_a_row_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        finish(configure(tmp_path), [{"id": "a", "score": float("nan")}])


def test_another_stage_s_folder_is_not_overwritten(tmp_path: Path) -> None:
    finish(configure(tmp_path))
    with pytest.raises(UserError, match="holds the output of the stage 'copy'"):
        Artifact.open("sft", configure(tmp_path))


def test_a_hand_made_config_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir="):
        Artifact.open("copy", CopyConfig(data=RowsConfig(path=str(tmp_path))))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not a manifest"), ("[]", "not a manifest"), ('{"a": 1}', "alignkit")]
)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str, message: str) -> None:
    config = configure(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Artifact.open("copy", config)


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_are_found_in_nested_fields_lists_and_dictionaries(tmp_path: Path) -> None:
    config = configure(tmp_path, adapter="a/adapter", models={"base": "", "sft": "b/adapter"}, more=["c", "none", "d"])
    assert list(input_paths(config)) == [
        ("data.path", str(tmp_path / "rows.jsonl")),
        ("adapter", "a/adapter"),
        ("models.sft", "b/adapter"),
        ("more[0]", "c"),
        ("more[2]", "d"),
    ]


def test_a_missing_input_is_named_and_a_hub_name_is_taken_as_such(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter=runs/a/sft/adapter: no such file or folder"):
        Artifact.open("copy", configure(tmp_path, adapter="runs/a/sft/adapter"))
    artifact = Artifact.open("copy", configure(tmp_path, adapter="Qwen/Qwen2.5-7B-Instruct"))
    assert artifact.inputs[1] == {"key": "adapter", "path": "Qwen/Qwen2.5-7B-Instruct", "sha256": None, "rows": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen-1_8B-Chat", True),
        ("mistralai/Mistral-7B-Instruct-v0.3", True),
        ("data/rows.jsonl", False),
        ("runs/demo", False),
        ("./a/b", False),
        ("../a", False),
        ("a/b/c", False),
        ("rows", False),
    ],
)
def test_what_looks_like_a_hub_name(text: str, expected: bool) -> None:
    assert is_hub_name(text) is expected


@pytest.mark.parametrize("inside", ["", "/rows.jsonl"])
def test_an_unfinished_input_is_refused(tmp_path: Path, inside: str) -> None:
    with pytest.raises(RuntimeError), Artifact.open("copy", configure(tmp_path)) as artifact:
        artifact.write_rows("rows.jsonl", [{"id": "a"}])
        raise RuntimeError
    config = configure(tmp_path, adapter=str(tmp_path / "out") + inside, output_dir=str(tmp_path / "next"))
    with pytest.raises(UserError, match="the stage 'copy' that writes it is failed, not complete"):
        Artifact.open("copy", config)


# -- hashes -----------------------------------------------------------------------------------------------------------


def test_a_file_s_hash_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert hash_path(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_text("abc") == hash_path(tmp_path / "a")


def test_a_folder_s_hash_sees_names_contents_and_depth(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("1", encoding="utf-8")
    (folder / "deep/b").write_text("2", encoding="utf-8")
    seen = {hash_path(folder)}
    for change in (
        lambda: (folder / "a").write_text("3", encoding="utf-8"),
        lambda: (folder / "deep/b").write_text("3", encoding="utf-8"),
        lambda: (folder / "a").rename(folder / "c"),
        lambda: (folder / "c").rename(folder / "deep/c"),
    ):
        change()
        seen.add(hash_path(folder))
    assert len(seen) == 5
    before = hash_path(folder)
    (folder / ".partial").write_text("hidden", encoding="utf-8")
    assert hash_path(folder) == before


def test_a_run_folder_s_hash_is_that_of_its_outputs(tmp_path: Path) -> None:
    finish(configure(tmp_path))
    before = hash_path(tmp_path / "out")
    finish(configure(tmp_path, force=True))
    assert hash_path(tmp_path / "out") == before
    assert hash_path(tmp_path, without=tmp_path / "out") != hash_path(tmp_path)
    (tmp_path / "out/rows.jsonl").write_text('{"id": "edited"}\n', encoding="utf-8")
    assert hash_path(tmp_path / "out") != before


def test_a_stage_may_write_inside_what_it_reads(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "one.txt").write_text("1", encoding="utf-8")
    config = configure(tmp_path, more=[str(runs)], output_dir=str(runs / "report"))
    finish(config)
    assert finish(config).up_to_date
    (runs / "one.txt").write_text("2", encoding="utf-8")
    assert not Artifact.open("copy", config).up_to_date


def test_rows_are_lines_that_are_not_blank(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n\n{}", encoding="utf-8")
    assert count_rows(tmp_path / "a.jsonl") == 2
    assert count_rows(tmp_path / "a.txt") is None


def test_plain_configurations_are_json(tmp_path: Path) -> None:
    plain = to_plain(configure(tmp_path, quantization=Quantization.nf4))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["quantization"] == "nf4"
    assert plain["data"]["limit"] is None
