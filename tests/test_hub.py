"""push_to_hub: one commit, private by default, the token nowhere, and one message for whatever goes wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignkit.core.errors import UserError
from alignkit.data.hub import check_push, push_files, push_to_hub

TOKEN = "hf_canary0123456789"


class Hub:
    """A hub with at most one repository."""

    def __init__(self, *, public: bool = False, error: Exception | None = None) -> None:
        self.public, self.error = public, error
        self.created: list[tuple[str, str, bool]] = []
        self.commits: list[tuple[str, dict[str, Path], str]] = []

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.created.append((repo_id, repo_type, private))

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
        return SimpleNamespace(private=not self.public)

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str, repo_type: str) -> None:
        if self.error:
            raise self.error
        files = {operation.path_in_repo: Path(operation.path_or_fileobj) for operation in operations}
        self.commits.append((repo_id, files, commit_message))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], Path]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rows, datasheet = tmp_path / "expanded.jsonl", tmp_path / "DATASHEET.md"
    rows.write_text('{"id": "1"}\n', encoding="utf-8")
    datasheet.write_text("# Datasheet\n", encoding="utf-8")
    return [rows], datasheet


def test_rows_and_datasheet_go_up_in_one_private_commit(files: tuple[list[Path], Path]) -> None:
    hub = Hub()
    assert push_to_hub("me/mine", *files, api=hub) == "https://huggingface.co/datasets/me/mine"
    assert hub.created == [("me/mine", "dataset", True)]
    ((repository, uploaded, message),) = hub.commits
    assert repository == "me/mine" and message == "expanded.jsonl, written by alignkit"
    assert uploaded == {"expanded.jsonl": files[0][0], "README.md": files[1]}


def test_a_model_goes_to_a_model_repository(files: tuple[list[Path], Path]) -> None:
    hub = Hub()
    there = {"sub/weights": files[0][0]}
    assert push_files("me/mine", there, "A model", repo_type="model", api=hub) == "https://huggingface.co/me/mine"
    assert hub.created == [("me/mine", "model", True)]
    assert hub.commits == [("me/mine", there, "A model, written by alignkit")]


def test_a_public_repository_is_left_alone_unless_told_otherwise(files: tuple[list[Path], Path]) -> None:
    hub = Hub(public=True)
    with pytest.raises(UserError, match="exists and is public"):
        push_to_hub("me/mine", *files, api=hub)
    assert hub.commits == []
    push_to_hub("me/mine", *files, private=False, api=hub)
    assert len(hub.commits) == 1 and hub.created[-1] == ("me/mine", "dataset", False)


def test_what_goes_wrong_is_one_message_without_the_token(files: tuple[list[Path], Path]) -> None:
    hub = Hub(error=ConnectionError(f"Bearer {TOKEN} refused\nby the server"))
    with pytest.raises(UserError) as caught:
        push_to_hub("me/mine", *files, api=hub)
    message = str(caught.value)
    assert "ConnectionError: Bearer *** refused by the server" in message and "\n" not in message
    assert TOKEN not in message and caught.value.__cause__ is None and caught.value.__suppress_context__
    assert str(files[1].parent) in message


def test_the_real_client_is_one_message_offline(files: tuple[list[Path], Path]) -> None:
    with pytest.raises(UserError, match=r"push_to_hub=me/mine: OfflineModeIsEnabled"):
        push_to_hub("me/mine", *files)


@pytest.mark.parametrize("name", ["mine", "me/mine/x", "/mine", "me/", "me/m ine", "../x", "https://host/me"])
def test_a_name_that_is_none_is_refused_before_anything_is_paid_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="give <owner>/<name>"):
        check_push(name)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_a_token_nothing_starts(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_TOKEN", value)
    with pytest.raises(UserError, match="as HF_TOKEN first"):
        check_push("me/mine")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert check_push("me/mine") == TOKEN
