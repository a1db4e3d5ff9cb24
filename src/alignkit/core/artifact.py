"""Run folders: what a stage reads and writes, hashed, written atomically, and skipped when nothing has changed.

A stage does all its work inside one `with Artifact.open(...)`:

    with Artifact.open("select", config) as artifact:
        if artifact.up_to_date:
            return artifact
        ...
        artifact.write_rows("selected.jsonl", rows)
    return artifact

The manifest says "running" on entry and "complete" or "failed" on exit. Outputs appear by atomic rename, so a stage
killed at any point leaves either nothing or something it can resume from.

Of several processes that train together only the main one writes. The others read the same manifest and so decide alike
about what is up to date; what they would record is dropped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel

from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.hashing import code_hash, count_rows, hash_path, hash_text
from alignkit.core.manifest import (
    MANIFEST,
    describe_inputs,
    input_paths,
    jsonable,
    peak_gpu_memory_bytes,
    peak_memory_bytes,
    read_manifest,
    replace_text,
    to_plain,
    versions,
    write_manifest,
)
from alignkit.core.ranks import is_main
from alignkit.core.records import Dropped

__all__ = ["MANIFEST", "Artifact", "Check", "describe_inputs", "input_paths", "read_manifest", "to_plain"]

LOG = logging.getLogger("alignkit")


@dataclass
class Check:
    """One self-check of a hand-off: a pass/fail line in the manifest and in the report."""

    name: str
    passed: bool
    detail: str


@dataclass
class Artifact:
    """A stage's run folder. The public fields mirror the manifest."""

    stage: str
    folder: Path
    config: dict[str, Any]
    inputs: list[dict[str, Any]]
    config_hash: str
    code: str
    command: str = ""
    up_to_date: bool = False
    status: str = "running"
    started: str = ""
    seconds: float = 0.0
    outputs: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    """The key result in a few words, for one-line listings: "exact match 0.61"."""
    checks: list[Check] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    error: str | None = None
    writes: bool = field(default_factory=is_main)
    """False in the processes of a distributed run that only take part in training: their artifact writes nothing."""
    _clock: float = field(default=0.0, init=False, repr=False)
    _log: logging.FileHandler | None = field(default=None, init=False, repr=False)
    _stale: set[str] = field(default_factory=set, init=False, repr=False)
    """Outputs of earlier runs that this one has not written (yet); in the manifest, so that a kill loses none."""

    # -- life cycle -------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, stage: str, config: StageConfig, *, always: bool = False) -> Artifact:
        """The run folder of `stage` for `config`, its inputs checked and hashed.

        `up_to_date` says that it already holds the complete result of the same inputs, config and code; `always` stages
        are never up to date. Raises `UserError` when an input is missing or unfinished.
        """
        if "${" in config.output_dir or "???" in config.output_dir:
            raise UserError(f"output_dir={config.output_dir} is not a folder: give one, or compose with load_config()")
        resolved = to_plain(config)
        artifact = cls(
            stage=stage,
            folder=Path(config.output_dir),
            config=resolved,
            inputs=describe_inputs(config),
            config_hash=hash_text(json.dumps(_without(resolved, config.incidental), sort_keys=True)),
            code=code_hash(stage),
            command=_COMMAND or f"run_stage({stage!r})",
        )
        previous = read_manifest(artifact.folder)
        if previous and previous["stage"] != stage:
            raise UserError(
                f"{artifact.folder} holds the output of the stage '{previous['stage']}': set name=... or run=..."
            )
        if previous and not always and not config.force and artifact._is_done(previous):
            artifact._restore(previous)
        return artifact

    @property
    def fingerprint(self) -> str:
        """Identifies this piece of work: config, inputs, code. Journals and checkpoints belong to one fingerprint."""
        return hash_text(json.dumps([self.config_hash, [entry["sha256"] for entry in self.inputs], self.code]))

    @property
    def work_folder(self) -> Path:
        """For unfinished work (journals, trainer checkpoints); removed when the stage completes."""
        return self.folder / "unfinished"

    def __enter__(self) -> Artifact:
        if self.up_to_date:
            LOG.info("%s is up to date: %s (force=true does it again)", self.stage, self.folder)
            return self
        if not self.writes:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open_log()
        try:
            self._begin()
        except BaseException:  # `__exit__` is not called now: a full disk must not leave the folder locked
            self._close_log()
            raise
        return self

    def _begin(self) -> None:
        previous = read_manifest(self.folder)
        if previous:
            self._stale = {entry["path"] for entry in previous["outputs"]} | set(previous.get("stale", ()))
        if self.config["force"] or (previous and previous["fingerprint"] != self.fingerprint):
            shutil.rmtree(self.work_folder, ignore_errors=True)  # another piece of work: nothing to resume from
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._clock = time.monotonic()
        (self.folder / "dropped.jsonl").unlink(missing_ok=True)
        self._write_manifest()
        replace_text(self.folder / "config.yaml", _yaml(self.config))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.up_to_date or not self.writes:
            return
        self.seconds = round(time.monotonic() - self._clock, 2)
        try:
            if error is None:
                self._complete()
                return
            self.status = "failed"
            self.error = (
                "interrupted" if kind is KeyboardInterrupt else f"{type(error).__name__}: {error}".splitlines()[0]
            )
            with suppress(OSError):  # on a full disk the first error is the one to report
                self._write_manifest()
        finally:
            self._close_log()

    def _complete(self) -> None:
        dropped = self.folder / "dropped.jsonl"
        if dropped.exists():
            self._record_output(dropped)
        while self._stale:
            _remove(self.folder / self._stale.pop())
        self.status = "complete"
        self._write_manifest()
        shutil.rmtree(self.work_folder, ignore_errors=True)

    # -- what a stage records ---------------------------------------------------------------------------------------

    def check(self, name: str, passed: bool, detail: str) -> None:
        """Record a self-check; a failed one stops the stage."""
        self.checks.append(Check(name, bool(passed), detail))
        LOG.info("check %-28s %s  %s", name, "pass" if passed else "FAIL", detail)
        if not passed:
            raise UserError(f"{self.stage}: check '{name}' failed: {detail}")

    def drop(self, row: BaseModel | Mapping[str, Any], reason: str, detail: str = "") -> None:
        """Set a row aside in dropped.jsonl with its reason."""
        self.dropped[reason] += 1
        if not self.writes:
            return
        dropped = Dropped(reason=reason, row=dict(_row(row)), detail=detail)
        with (self.folder / "dropped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_row(dropped), ensure_ascii=False) + "\n")

    def drop_all(self, dropped: Iterable[Dropped]) -> None:
        """Set aside rows whose reasons are known already."""
        for each in dropped:
            self.drop(each.row, each.reason, each.detail)

    def write_rows(self, name: str, rows: Iterable[BaseModel | Mapping[str, Any]]) -> Path:
        """Write rows as JSON Lines; the file appears whole or not at all."""
        with self.output(name) as path, path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(_row(row), ensure_ascii=False, allow_nan=False, default=jsonable) + "\n")
        return self.folder / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file; it appears whole or not at all."""
        with self.output(name) as path:
            path.write_text(text, encoding="utf-8")
        return self.folder / name

    @contextmanager
    def output(self, name: str) -> Iterator[Path]:
        """A path to write a file or folder to; it becomes `name` in the run folder when the block ends well.

        When the block raises, what it wrote is removed and an output of that name from before stays as it was.
        """
        assert self.writes, "only the main process writes outputs"
        partial, final, old = (self.folder / part for part in (f".{name}.partial", name, f".{name}.old"))
        _remove(partial)
        try:
            yield partial
        except BaseException:
            _remove(partial)
            raise
        if final.is_dir():  # a folder cannot be renamed over another
            _remove(old)
            os.replace(final, old)
        os.replace(partial, final)
        _remove(old)
        self._record_output(final)
        self._write_manifest()  # so that whatever happens next, the file is known

    # -- inside -----------------------------------------------------------------------------------------------------

    def _record_output(self, path: Path) -> None:
        entry = {"path": path.name, "sha256": hash_path(path), "rows": count_rows(path)}
        self.outputs = [other for other in self.outputs if other["path"] != path.name] + [entry]
        self._stale.discard(path.name)

    def _is_done(self, previous: Mapping[str, Any]) -> bool:
        there = all((self.folder / entry["path"]).exists() for entry in previous["outputs"])
        return previous["status"] == "complete" and previous["fingerprint"] == self.fingerprint and there

    def _restore(self, previous: Mapping[str, Any]) -> None:
        self.up_to_date = True
        for name in ("status", "started", "seconds", "command", "outputs", "metrics", "summary"):
            setattr(self, name, previous[name])
        self.checks = [Check(**entry) for entry in previous["checks"]]
        self.dropped = Counter(previous["dropped"])

    def _open_log(self) -> None:
        """Log to log.txt, and hold a lock on it: two processes in one run folder would spoil each other's work."""
        self._log = log = _QuietFileHandler(self.folder / "log.txt", encoding="utf-8")
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        assert log.stream is not None
        try:
            import fcntl

            fcntl.flock(log.stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close_log()
            raise UserError(f"{self.folder}: another process is at work here; wait for it or set name=...") from error
        except (ImportError, OSError):
            pass  # no such locks on this platform or file system
        LOG.addHandler(log)

    def _close_log(self) -> None:
        if self._log is not None:
            LOG.removeHandler(self._log)
            self._log.close()

    def _write_manifest(self) -> None:
        write_manifest(
            self.folder,
            {
                "stage": self.stage,
                "status": self.status,
                "summary": self.summary,
                "command": self.command,
                "folder": str(self.folder),
                "started": self.started,
                "seconds": self.seconds,
                "fingerprint": self.fingerprint,
                "config_hash": self.config_hash,
                "code_hash": self.code,
                "inputs": self.inputs,
                "outputs": self.outputs,
                "stale": sorted(self._stale),
                "metrics": self.metrics,
                "checks": [asdict(check) for check in self.checks],
                "dropped": dict(self.dropped),
                "versions": versions(),
                "peak_memory_bytes": peak_memory_bytes(),
                "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
                "error": self.error,
            },
        )


class _QuietFileHandler(logging.FileHandler):
    """A log that cannot be written (full disk) must not print a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


_COMMAND = ""


@contextmanager
def recorded_command(command: str) -> Iterator[None]:
    """Record this command line in the manifests of the artifacts that are opened in the block."""
    global _COMMAND
    previous, _COMMAND = _COMMAND, command
    try:
        yield
    finally:
        _COMMAND = previous


def _without(config: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A copy of a nested dictionary without these dotted keys."""
    kept = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for key in keys:
        *parents, last = key.split(".")
        inner: Any = kept
        for parent in parents:
            inner = inner.get(parent, {})
        inner.pop(last, None)
    return kept


def _row(row: BaseModel | Mapping[str, Any]) -> Mapping[str, Any]:
    return row.model_dump(mode="json", exclude_none=True) if isinstance(row, BaseModel) else row


def _yaml(plain: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(plain), sort_keys=False, allow_unicode=True))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
