"""Where stages and their configuration files are: a stage is a file of the package that has a `conf/<stage>.yaml`."""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """The configuration folder: inside an installed package, else beside `src` in a clone. Absolute."""
    for folder in (PACKAGE / "conf", PACKAGE.parent.parent / "conf"):
        if folder.is_dir():
            return folder
    raise UserError(f"conf/ was found neither in {PACKAGE} nor in {PACKAGE.parent.parent}; reinstall alignkit")


def recipe_dir() -> Path:
    """The folder dataset_optimization/: inside an installed package, else beside `src` in a clone. Absolute."""
    for folder in (PACKAGE / "dataset_optimization", PACKAGE.parent.parent / "dataset_optimization"):
        if folder.is_dir():
            return folder
    raise UserError(f"dataset_optimization/ was found neither in {PACKAGE} nor in {PACKAGE.parent.parent}; reinstall")


def recipe_file(name: str) -> str:
    """A file of dataset_optimization/, as seen from the working directory when it lies below that."""
    path = recipe_dir() / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def stages() -> list[str]:
    """Names of all stages, alphabetically."""
    return sorted(path.stem for path in PACKAGE.glob("[a-z]*.py") if (conf_dir() / f"{path.stem}.yaml").is_file())


def require_stage(stage: str, also: Sequence[str] = ()) -> None:
    """Raise `UserError` with the nearest name when there is no such stage; `also` are other words that are commands."""
    known = [*stages(), *also]
    if stage not in known:
        raise UserError(f"unknown command '{stage}'{nearest(stage, known)}. There are: {', '.join(known)}")


def stage_module(stage: str) -> ModuleType:
    """The stage's module, imported under its package name so that its classes have one identity."""
    require_stage(stage)
    return importlib.import_module(f"alignkit.{stage}")


def config_class(stage: str) -> type[StageConfig]:
    """The one configuration dataclass that a stage's file defines."""
    module = stage_module(stage)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, StageConfig) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one StageConfig"
    return found[0]


def purpose(stage: str) -> str:
    """The first line of a stage's docstring, read without importing it."""
    text = ast.get_docstring(ast.parse((PACKAGE / f"{stage}.py").read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0].removeprefix(f"{stage}: ")


@cache
def default_groups(stage: str) -> dict[str, str | None]:
    """Config groups in the defaults list of conf/<stage>.yaml, with the option that each defaults to."""
    import yaml

    require_stage(stage)
    content: dict[str, Any] = yaml.safe_load((conf_dir() / f"{stage}.yaml").read_text(encoding="utf-8")) or {}
    entries = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    return {
        group.removeprefix("optional ").removeprefix("override "): option
        for entry in entries
        for group, option in entry.items()
    }


def group_options(group: str) -> list[str]:
    """Options of a config group; empty when there is no such group."""
    if not group:
        return []
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def nearest(word: str, known: Sequence[str]) -> str:
    """ " (did you mean 'x'?)" for the known word nearest to `word`, or nothing when none is near.

    A dotted key is looked for among its siblings first, and a key may be meant by its last part alone.
    """
    group, _, last = word.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if group and key.rpartition(".")[0] == group}
    found = [siblings[name] for name in difflib.get_close_matches(last, list(siblings), n=1, cutoff=0.0)]
    if not found:
        meant = {key.rpartition(".")[2]: key for key in reversed(known)} | {key: key for key in known}
        found = [meant[name] for name in difflib.get_close_matches(word, list(meant), n=1, cutoff=0.6)]
    return f" (did you mean '{found[0]}'?)" if found else ""
