"""Checkpoints that a killed run continues from, and how a torn one is told from a whole one.

The trainer writes a checkpoint file by file under its final name, so a kill can leave half of one. Each whole
checkpoint is therefore sealed with the hashes of its files as the last step, and only sealed ones whose files still
have these hashes are resumed from. They are this project's own working state and are deleted when the stage completes.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from alignkit.core.artifact import Artifact, read_manifest
from alignkit.core.errors import UserError
from alignkit.core.hashing import hash_path

LOG = logging.getLogger("alignkit")

SEAL = "seal.json"


def checkpoint_folder(artifact: Artifact) -> Path:
    """Where a stage's trainer writes its checkpoints."""
    return artifact.work_folder / "checkpoints"


def seal(checkpoint: Path) -> None:
    """Write the hashes of a finished checkpoint's files beside them."""
    hashes = {str(file.relative_to(checkpoint)): hash_path(file) for file in _files(checkpoint)}
    partial = checkpoint / f".{SEAL}.partial"
    partial.write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    partial.replace(checkpoint / SEAL)


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed and its files have not changed since."""
    try:
        hashes: dict[str, str] = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a disk that cannot be read just now is no torn file
        return False
    return all((checkpoint / name).is_file() and hash_path(checkpoint / name) == sha for name, sha in hashes.items())


def newest_intact(folder: Path) -> Path | None:
    """The intact checkpoint with the highest step in a folder of checkpoints; None when there is none.

    Newer ones that are torn or changed are named in the log.
    """
    for checkpoint in _newest_first(folder):
        if is_intact(checkpoint):
            return checkpoint
        LOG.warning("%s is skipped: it is incomplete, or its files are not those that were written", checkpoint)
    return None


def remove_newer(folder: Path, than: Path | None) -> None:
    """Remove the checkpoints with higher steps than one's, or all of them: torn ones that a run has passed over.

    The trainer, which keeps the newest few, may otherwise take them for newer than the one that it has just written.
    """
    for checkpoint in _newest_first(folder):
        if checkpoint == than:
            return
        LOG.warning("%s is removed", checkpoint)
        shutil.rmtree(checkpoint)


def require_checkpoint(artifact: Artifact) -> None:
    """Raise `UserError` unless an interrupted run of exactly this work can be continued. Deletes nothing."""
    if artifact.up_to_date:
        return
    if artifact.config["force"]:
        raise UserError("resume=true continues and force=true begins anew: give one of them")
    previous = read_manifest(artifact.folder)
    folder = checkpoint_folder(artifact)
    if previous is None or not _newest_first(folder):
        raise UserError(f"resume=true: {artifact.folder} holds no checkpoint to resume from. Run without resume=true.")
    if newest_intact(folder) is None:
        raise UserError(
            f"resume=true: every checkpoint in {folder} is incomplete, or its files are not those that were written. "
            "Run without resume=true to begin anew."
        )
    if previous["fingerprint"] != artifact.fingerprint:
        raise UserError(
            f"resume=true: the checkpoints in {artifact.folder} belong to another configuration, input or version of "
            "alignkit. Restore those, choose another name=..., or run without resume=true to start anew."
        )


def _newest_first(folder: Path) -> list[Path]:
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _files(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file() and SEAL not in file.name)
