"""The dataset card: metadata that huggingface_hub reads back, true to the manifest, harmless whatever the rows hold."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCardData, constants
from huggingface_hub.repocard import RepoCard, metadata_load

from alignkit import dataset_card
from alignkit.core.app import load_config, run_command
from alignkit.core.artifact import Artifact
from alignkit.core.config import StageConfig
from alignkit.core.records import Message, PreferencePair, QAExample
from alignkit.reporting.model_card import read_back

EVIL = "</td><script>alert(1)</script> ![x](http://a/b.png) [y](javascript:z) | `a` \x1b[2J\n---\nlicense: mit\n# line"


def write_rows(folder: Path, name: str, stage: str, rows: dict[str, list[Any]], **metrics: Any) -> Path:
    """A complete run of a stage that wrote these files, and dropped a row of an odd reason."""
    with Artifact.open(stage, StageConfig(name=name, output_dir=str(folder / name))) as artifact:
        for file, content in rows.items():
            artifact.write_rows(file, content)
        artifact.drop({"id": "d"}, f"too long {EVIL}")
        artifact.metrics |= metrics
    return folder / name


def questions(count: int) -> list[QAExample]:
    first = QAExample(id="q0", parents=["seed-1"], instruction=EVIL, input="Is it?", output="Yes.")
    return [first, *(QAExample(id=f"q{n}", instruction="s", output="o") for n in range(1, count))]


def pairs() -> list[PreferencePair]:
    turns = [[Message(role="assistant", content=text)] for text in ("yes", "no")]
    return [PreferencePair(id="p", prompt=[Message(role="user", content="?")], chosen=turns[0], rejected=turns[1])]


def card_of(rows: Path, *more: str) -> tuple[Any, Artifact]:
    home = rows.parent / "card"
    artifact = dataset_card.run(load_config("dataset_card", [f"rows={rows}", f"output_dir={home}", *more]))
    return DatasetCard.load(home / "README.md"), artifact


def test_the_metadata_is_what_the_hub_needs(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "select", "select", {"selected.jsonl": questions(1200)})
    card, artifact = card_of(rows, "license=cc-by-4.0", "language=[en,no]", "title=Pumps")
    assert card.data.to_dict() == {
        "language": ["en", "no"],
        "license": "cc-by-4.0",
        "pretty_name": "Pumps",
        "size_categories": "1K<n<10K",
        "task_categories": ["question-answering", "text-generation"],
        "annotations_creators": "machine-generated",
        "language_creators": "machine-generated",
        "configs": [{"config_name": "selected", "data_files": "selected.jsonl", "default": True}],
        "tags": ["alignkit", "qa", "select"],
    }
    assert {entry["path"] for entry in artifact.outputs} == {"selected.jsonl", "README.md"}
    assert (artifact.folder / "selected.jsonl").read_bytes() == (rows / "selected.jsonl").read_bytes()
    assert card_of(rows, "license=cc-by-4.0", "language=[en,no]", "title=Pumps")[1].up_to_date


def test_files_of_different_columns_are_configurations_of_their_own(tmp_path: Path) -> None:
    from datasets import load_dataset

    best = [{"id": "b", "prompt": [], "completion": [], "reference": "x"}]
    files: dict[str, list[Any]] = {"best.jsonl": best, "pairs.jsonl": pairs()}
    card, artifact = card_of(write_rows(tmp_path, "rejection_sampling", "rejection_sampling", files))
    assert [config["config_name"] for config in card.data.configs] == ["best", "pairs"]
    assert card.data.task_categories == ["text-generation"]
    assert card.data.tags == ["alignkit", "sft", "preference", "dpo", "rejection_sampling"]
    loaded = load_dataset(str(artifact.folder), "pairs", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["id", "parents", "prompt", "chosen", "rejected", "source"]
    assert "preference pairs" in card.text and "| `best.jsonl` | `prompts with answers` | `1` |" in card.text


def test_the_text_says_what_the_manifest_says(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "expand", "expand", {"expanded.jsonl": questions(3)}, teacher="Owner/Model-X")
    (rows / "DATASHEET.md").write_text("# Datasheet")
    card, artifact = card_of(rows)
    manifest = json.loads((rows / "manifest.json").read_text())
    assert manifest["outputs"][0]["sha256"] in card.text
    assert "A teacher was asked: `Owner/Model-X`" in card.text
    assert "| `output` | `3 of 3` | `str` | `Yes.` |" in card.text
    assert "`other`, as given when this card was made" in card.text
    assert (artifact.folder / "DATASHEET.md").read_text() == "# Datasheet"


def test_nothing_of_a_row_a_reason_or_a_title_becomes_markup_or_metadata(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "select", "select", {"selected.jsonl": questions(2)}, teacher=EVIL)
    config = load_config("dataset_card", [f"rows={rows}", f"output_dir={tmp_path / 'card'}", "license=other"])
    config.title = EVIL
    dataset_card.run(config)
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    card: Any = DatasetCard(text)
    assert card.data.license == "other" and "license: mit" in card.data.pretty_name
    body = "\n".join(line for line in card.text.splitlines() if not line.startswith("    "))
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body)
    for piece in ("<", "![", "](", "javascript", "\x1b", "alert"):
        assert piece not in outside
    assert not any(line.startswith(("---", "# line", "license")) for line in card.text.splitlines()[1:])
    assert metadata_load(tmp_path / "card" / "README.md") == yaml.safe_load(card.data.to_yaml())


def test_metadata_that_would_come_back_otherwise_is_refused() -> None:
    from huggingface_hub import EvalResult, ModelCard

    result = EvalResult("text-generation", "custom", "a\n---\nb", "exact_match", 0.5)
    good = ModelCardData(model_name="m", eval_results=[result], license="other")
    back: Any = read_back(ModelCard, good, "text")
    assert back.data.eval_results == [result]
    twice = ModelCardData(license="other")
    twice.tags = ["a", "a"]
    with pytest.raises(ValueError, match="does not survive"):
        read_back(ModelCard, twice, "text")


class Hub(BaseHTTPRequestHandler):
    """What the Hub does with a card before a push: refuse YAML without a licence or of unknown sizes."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body | {"path": self.path})
        metadata = RepoCard(body["content"]).data
        self.send_response(200 if metadata.get("license") and metadata.get("size_categories") else 400)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        Hub.seen.clear()
        yield Hub.seen
        server.shutdown()
        thread.join()


def test_huggingface_hubs_validation_takes_the_card(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    rows = write_rows(tmp_path, "select", "select", {"selected.jsonl": questions(2)})
    card, artifact = card_of(rows)
    card.validate()
    assert [(each["path"], each["repoType"]) for each in hub] == [("/api/validate-yaml", "dataset")]
    assert hub[0]["content"] == (artifact.folder / "README.md").read_text(encoding="utf-8")
    del card.data.size_categories
    with pytest.raises(ValueError):
        card.validate()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["license=my own"], "license=my own: give a licence's short name"),
        (["language=[English]"], "give codes of two or three letters"),
        (["files=[pairs.jsonl]"], "has no rows in pairs.jsonl, but in selected.jsonl"),
        (["rows=runs/nowhere"], "no such file or folder"),
        (["push_to_hub=name"], "give <owner>/<name>"),
    ],
)
def test_bad_settings_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    rows = write_rows(tmp_path, "select", "select", {"selected.jsonl": questions(2)})
    assert run_command("dataset_card", [f"rows={rows}", f"output_dir={tmp_path / 'card'}", *more]) == 2
    assert message in capsys.readouterr().err


def test_rows_that_changed_since_are_not_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path, "select", "select", {"selected.jsonl": questions(2)})
    with (rows / "selected.jsonl").open("a") as file:
        file.write('{"id": "late"}\n')
    command = [f"rows={rows}", f"output_dir={tmp_path / 'card'}"]
    assert run_command("dataset_card", command) == 2
    assert "selected.jsonl has changed since it was written" in capsys.readouterr().err
    command[0] = f"rows={rows / 'selected.jsonl'}"
    assert run_command("dataset_card", command) == 2
    assert "not the run folder of a stage" in capsys.readouterr().err
