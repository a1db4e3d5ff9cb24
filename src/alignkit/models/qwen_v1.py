"""Qwen-7B-Chat and its siblings of 2023 (`model_type: qwen`) as the Qwen2 architecture that they are.

The first Qwen models came with Python code of their own, which today's transformers cannot run. Nothing of it is
needed: RMSNorm, rotary positions over the whole head, SwiGLU and a bias in the attention's input projection only are
exactly Qwen2 (Bai et al., 2023, arXiv 2309.16609, section 2.3). What differs is how weights are named and laid out, and
the tokenizer's file. Both are rewritten here, the weights one tensor at a time.

One thing is left behind: log-n attention and dynamic NTK, which act beyond the `seq_length` of the configuration (2,048
or 8,192, by revision). A converted model's context therefore ends there.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignkit.core.errors import UserError
from alignkit.core.hashing import hash_path, hash_text
from alignkit.core.manifest import replace_text
from alignkit.models.qwen_v1_tokenizer import VOCABULARY, load_tokenizer
from alignkit.models.qwen_v1_weights import (
    DTYPES,
    INDEX,
    Piece,
    plan_conversion,
    qwen2_config,
    read_tensor,
    tensor_names,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

__all__ = ["RECORD", "cached_conversion", "convert_checkpoint", "load_tokenizer", "local_checkpoint"]

LOG = logging.getLogger("alignkit")

RECORD = "conversion.json"
"""In a converted checkpoint: hashes of what it was made from and of its files. Only a folder with it is replaced."""

_VERSION = 1  # of the conversion: another version makes other files, so cached ones are made again


# -- conversion --------------------------------------------------------------------------------------------------------


def convert_checkpoint(source: str | Path, target: str | Path) -> Path:
    """Rewrite a first-Qwen checkpoint as a Qwen2 one that transformers loads by itself; returns `target`.

    Reads safetensors, or `.bin` shards of tensors only, and holds one tensor in memory at a time. `target` appears when
    all is written. A conversion that was interrupted goes on where it stopped; a finished one of the same source is
    kept, of a changed source replaced. Several processes may ask for the same target: one works, the others wait.

    Raises `UserError`, before anything is written, for what cannot be mapped and for a `target` that is something else.
    """
    source, target = Path(source), Path(target)
    config, source_hash = qwen2_config(source / "config.json"), _source_hash(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock")):
        if _is_finished(target, source_hash):
            return target
        if target.exists() and not _read_record(target) and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target}: is there and no conversion of ours. Give a folder that is new or empty.")
        plan = plan_conversion(source, config)
        tokenizer = load_tokenizer(source)
        if len(tokenizer) > config["vocab_size"]:
            raise UserError(
                f"{source}: {VOCABULARY} has {len(tokenizer)} tokens with the special ones, more than the "
                f"{config['vocab_size']} rows of the embedding. Vocabulary and weights are of different models."
            )
        LOG.info("Converting %s to Qwen2 (once; %d weight files) in %s", source, len(plan), target)
        partial = target.with_name(f".{target.name}.partial")
        _start(partial, source_hash)
        index = _write_weights(plan, source, partial)
        config["torch_dtype"] = str(next(iter(plan.values()))[0].dtype).removeprefix("torch.")
        _write_small_files(partial, config, index, tokenizer)
        written = {file.name: hash_path(file) for file in sorted(partial.iterdir()) if file.name != RECORD}
        _write_record(partial, {"source": source_hash, "files": written})
        _move_into_place(partial, target)
    return target


def cached_conversion(path: str, revision: str | None) -> Path:
    """The converted form of a first-Qwen checkpoint (a folder or a hub name), made when it is not in the cache yet."""
    source = local_checkpoint(path, revision)
    name = str(source.resolve()) if Path(path).is_dir() else f"{path}@{revision}"
    return convert_checkpoint(source, _cache_folder() / f"{Path(path).name}-{hash_text(name)[:12]}")


def local_checkpoint(path: str, revision: str | None, *, vocabulary_only: bool = False) -> Path:
    """The folder of a first-Qwen checkpoint; a hub name is downloaded, safetensors where there are any, and no code."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise UserError(f"model.path={path}: could not be downloaded ({str(error).splitlines()[0]})") from error

    if vocabulary_only:
        return download(VOCABULARY)
    folder = download("config.json", VOCABULARY, "*.safetensors", "*.index.json")
    return folder if any(folder.glob("*.safetensors")) else download("pytorch_model*.bin")


def _cache_folder() -> Path:
    """`$ALIGNKIT_CACHE`, or alignkit's folder in the user's cache."""
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ALIGNKIT_CACHE") or general / "alignkit") / "qwen_v1"


def _source_hash(source: Path) -> str:
    """Hash of all that the conversion depends on; files above 256 MB count by size and time of change."""
    files = ["config.json", VOCABULARY, *weight_files(source)]
    if not (source / VOCABULARY).is_file():
        raise UserError(f"{source}: there is no {VOCABULARY}, which holds the vocabulary. Download it again.")
    return hash_text(json.dumps([_VERSION, *(hash_path(source / file) for file in files)]))


def _write_weights(plan: dict[str, list[Piece]], source: Path, folder: Path) -> dict[str, Any]:
    """Write a safetensors file for each weight file that is not written yet; returns the index over them."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, (file, pieces) in enumerate(plan.items(), start=1):
        name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        names = {part for piece in pieces for part in piece.names}
        if tensor_names(folder / name) != names:
            _write_shard(folder / name, source / file, pieces)
        weight_map |= dict.fromkeys(sorted(names), name)
        total += sum(piece.part_bytes * len(piece.names) for piece in pieces)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_shard(path: Path, source: Path, pieces: list[Piece]) -> None:
    """Write one safetensors file, a tensor at a time: length of the header, header, bytes.

    The library's own `save_file` wants all tensors of a file at once, which for a 10 GB file is 10 GB.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        for name in piece.names:
            start, end = end, end + piece.part_bytes
            header[name] = {"dtype": DTYPES[piece.dtype], "shape": piece.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            rows = read_tensor(source, piece.source).contiguous()  # one after the other, q, k and v are c_attn
            file.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


# -- folders -----------------------------------------------------------------------------------------------------------


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other process converts to the same target; the lock goes with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of a conversion; empty when there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _is_finished(target: Path, source_hash: str) -> bool:
    """Whether `target` is the whole conversion of this very source, with every file as it was written."""
    record = _read_record(target)
    files = record.get("files", {})
    return (
        record.get("source") == source_hash
        and "config.json" in files
        and all((target / file).is_file() and hash_path(target / file) == written for file, written in files.items())
    )


def _start(partial: Path, source_hash: str) -> None:
    """Make the folder to write to; one that a conversion of another source left is thrown away."""
    if partial.exists() and _read_record(partial).get("source") != source_hash:
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    _write_record(partial, {"source": source_hash})


def _write_small_files(folder: Path, config: dict[str, Any], index: dict[str, Any], tokenizer: Qwen2Tokenizer) -> None:
    """All but the weights. `config.json` comes last: without it nothing takes the folder for a model."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.save_pretrained(str(folder))
    _write_json(folder / INDEX, index)
    _write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})
    _write_json(folder / "config.json", config | {"bos_token_id": None, "eos_token_id": end})


def _move_into_place(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
