"""What a run folder's manifest says, and how its parts are found: inputs, versions, memory."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.hashing import count_rows, hash_path

MANIFEST = "manifest.json"
_VERSIONED = (
    *("alignkit", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "sentence-transformers"),
    *("openai", "hydra-core"),
)
_NO_PATH = ("", "embedded", "none", "sft_adapter", "base", "characters", "new", "bm25")
"""Values of input keys that name something built in rather than a path."""
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".yaml", ".safetensors", ".gguf")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run folder; None when there is none. Raises `UserError` when it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"stage", "status", "fingerprint", "inputs", "outputs"} - manifest.keys()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest ({error}). Delete the folder to start it anew.") from error
    if missing:
        raise UserError(f"{path}: not a manifest of alignkit (no {', '.join(sorted(missing))}). Choose another folder.")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace a run folder's manifest in one step."""
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False, default=jsonable) + "\n")


def input_paths(config: StageConfig) -> Iterator[tuple[str, str]]:
    """Key and path of every input that `config.inputs` names; entries of lists and dictionaries one by one.

    Values that are empty or name something built in ("embedded") are no paths and are left out.
    """
    for key in config.inputs:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if isinstance(value, Mapping):
            entries = [(f"{key}.{name}", path) for name, path in value.items()]
        elif isinstance(value, list):
            entries = [(f"{key}[{number}]", path) for number, path in enumerate(value)]
        else:
            entries = [(key, value)]
        yield from ((name, str(path)) for name, path in entries if path is not None and path not in _NO_PATH)


def describe_inputs(config: StageConfig) -> list[dict[str, Any]]:
    """The inputs of a stage: key, path, sha256, rows. Raises `UserError` for a path that is not there or not finished.

    A value that is not on disk and looks like `owner/name` is taken for a hub name; it has no hash, nor has the
    address of a server.
    """
    home = Path(config.output_dir).resolve()
    described: list[dict[str, Any]] = []
    for key, path in input_paths(config):
        if Path(path).exists():
            refuse_unfinished(key, Path(path))
            entry = {"sha256": hash_path(Path(path), without=home), "rows": count_rows(Path(path))}
        elif is_hub_name(path) or is_address(path):
            entry = {"sha256": None, "rows": None}
        else:
            raise UserError(f"{key}={path}: no such file or folder. Run the stage that writes it, or set {key}.")
        described.append({"key": key, "path": path, **entry})
    return described


def refuse_unfinished(key: str, path: Path) -> None:
    """Raise `UserError` when an input lies in a run folder whose stage has not completed."""
    for folder in (path, path.parent):
        manifest = read_manifest(folder)
        if manifest is not None and manifest["status"] != "complete":
            raise UserError(
                f"{key}={path}: the stage '{manifest['stage']}' that writes it is {manifest['status']}, not complete. "
                f"Run it again first: {manifest.get('command', manifest['stage'])}"
            )


def is_hub_name(text: str) -> bool:
    """Whether a value that is not on disk looks like `owner/name` on a hub rather than a mistyped path."""
    is_path = text.startswith((".", "/", "~", "runs/")) or Path(text).suffix in _FILE_SUFFIXES
    return text.count("/") == 1 and not is_path


def is_address(text: str) -> bool:
    """Whether a value names a server rather than a path."""
    return text.startswith(("http://", "https://"))


def to_plain(config: Any) -> Any:
    """A dataclass tree as JSON-ready values: enums by name."""
    if isinstance(config, Enum):
        return config.name
    if is_dataclass(config):
        return {field.name: to_plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(value) for value in config]
    return config


def jsonable(value: Any) -> Any:
    """Turn a numpy or torch scalar into the number it is, for `json.dumps(default=...)`."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} has no place in a JSON file")


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far; 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes() -> int:
    """Peak memory that torch has allocated on the current GPU; 0 without one. Does not import torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


@cache
def versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that decide a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
