"""Put rows and their datasheet on the Hugging Face Hub: private unless told otherwise, the token from HF_TOKEN only."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from alignkit.core.errors import UserError

TOKEN_VARIABLE = "HF_TOKEN"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


class HubApi(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> Any:
        """Create a repository unless it exists."""
        ...

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
        """What is known of a repository; `private` among it."""
        ...

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str, repo_type: str) -> Any:
        """Upload files in one step."""
        ...


def check_push(repository: str) -> str:
    """The token that `push_to_hub` will use. Raises `UserError` while there is still nothing to lose."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"push_to_hub={repository}: give <owner>/<name>")
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise UserError(f"push_to_hub={repository}: export a token that may write as {TOKEN_VARIABLE} first")
    return token


def push_to_hub(
    repository: str, rows: Sequence[Path], datasheet: Path, *, private: bool = True, api: HubApi | None = None
) -> str:
    """Upload row files, and the datasheet as the README, to a dataset repository in one commit; returns its address.

    The repository is created when there is none. One that is public is left alone unless `private` is False. Raises
    `UserError` with one message for everything that goes wrong.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    token = check_push(repository)
    api = api or HfApi(token=token)
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.repo_info(repository, repo_type="dataset").private:
            raise UserError(
                f"push_to_hub={repository}: exists and is public. Make it private, name another, or set "
                "hub_private=false to publish."
            )
        files = {path.name: path for path in rows} | {"README.md": datasheet}
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        message = f"{', '.join(path.name for path in rows)}, written by alignkit"
        api.create_commit(repository, operations, commit_message=message, repo_type="dataset")
    except UserError:
        raise
    except Exception as error:  # of several packages, which differ from one version of the client to the next
        what = " ".join(f"{type(error).__name__}: {error}".replace(token, "***").split())
        raise UserError(
            f"push_to_hub={repository}: {what[:300]}. The rows are safe in {rows[0].parent}; the same command goes on."
        ) from None  # the cause may quote the token
    return f"https://huggingface.co/datasets/{repository}"
