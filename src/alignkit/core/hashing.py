"""Content hashes of files, folders and of the code that a stage runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from alignkit.core import stages

LARGE_FILE_BYTES = 256 * 1024 * 1024
"""Files above this size are identified by size and modification time: hashing 15 GB of weights before each stage would
cost a minute and find nothing."""


def hash_text(text: str) -> str:
    """SHA-256 of a text, as hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_path(path: Path, without: Path | None = None) -> str:
    """SHA-256 of a file's bytes, or of a folder's names and contents.

    A run folder counts by its status and the outputs that its manifest lists, so that its log and its timings do not.
    Hidden files and the folder `without` are left out: a stage whose output lies inside its input leaves itself out.
    """
    if not path.is_dir():
        return _hash_file(path)
    manifest = path / "manifest.json"
    if manifest.is_file():
        content = json.loads(manifest.read_text(encoding="utf-8"))
        outputs = sorted(path / entry["path"] for entry in content["outputs"])
        return hash_text(
            json.dumps([content["status"], _hash_all([file for file in outputs if file.exists()], without)])
        )
    return hash_text(json.dumps(_hash_all(sorted(path.iterdir()), without)))


def _hash_all(paths: list[Path], without: Path | None) -> list[tuple[str, str]]:
    wanted = [path for path in paths if not path.name.startswith(".") and path.resolve() != without]
    return [(path.name, hash_path(path, without)) for path in wanted]


def _hash_file(path: Path) -> str:
    status = path.stat()
    if status.st_size > LARGE_FILE_BYTES:
        return hash_text(f"{status.st_size} {status.st_mtime_ns}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def count_rows(path: Path) -> int | None:
    """Lines of a JSON Lines file that are not blank; None for anything else."""
    if path.suffix != ".jsonl":
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


@cache
def code_hash(stage: str) -> str:
    """Hash of what a stage runs besides its configuration: the stage's own file, the whole kit, weights and prompts.

    Other stages' files do not count, nor, but for the report, does what only the report is made with: mending one must
    not make the others' work out of date.
    """
    digest = hashlib.sha256()
    for path in sorted(_code(stage)):
        digest.update(f"{path.name}\0{_hash_file(path)}\0".encode())
    return digest.hexdigest()


def _code(stage: str) -> Iterator[Path]:
    yield from stages.PACKAGE.glob(f"{stage}.py")
    others = {"conf", "dataset_optimization"} | ({"reporting"} if stage != "report" else set())
    for folder in stages.PACKAGE.iterdir():
        if folder.is_dir() and folder.name not in others:
            yield from (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    yield from (stages.recipe_dir() / "prompts").glob("*.*")
