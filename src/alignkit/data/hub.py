"""Put rows or models on the Hugging Face Hub: private unless told otherwise, the token from HF_TOKEN only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
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
    """Upload row files, and the datasheet as the README, to a dataset repository; see `push_files`."""
    files = {path.name: path for path in rows} | {"README.md": datasheet}
    what = ", ".join(path.name for path in rows)
    return push_files(repository, files, what, repo_type="dataset", private=private, api=api)


def push_files(
    repository: str,
    files: Mapping[str, Path],
    what: str,
    *,
    repo_type: str,
    private: bool = True,
    api: HubApi | None = None,
) -> str:
    """Upload files (path in the repository -> path here) in one commit; returns the repository's address.

    The repository (`repo_type` model or dataset) is created when there is none. One that is public is left alone unless
    `private` is False. Raises `UserError` with one message for everything that goes wrong.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    token = check_push(repository)
    api = api or HfApi(token=token)
    try:
        api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True)
        if private and not api.repo_info(repository, repo_type=repo_type).private:
            raise UserError(
                f"push_to_hub={repository}: exists and is public. Make it private, name another, or set "
                "hub_private=false to publish."
            )
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        api.create_commit(repository, operations, commit_message=f"{what}, written by alignkit", repo_type=repo_type)
    except UserError:
        raise
    except Exception as error:  # of several packages, which differ from one version of the client to the next
        message = " ".join(f"{type(error).__name__}: {error}".replace(token, "***").split())
        folder = next(iter(files.values())).parent
        raise UserError(
            f"push_to_hub={repository}: {message[:300]}. The files are safe in {folder}; the same command goes on."
        ) from None  # the cause may quote the token
    return f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repository}"
