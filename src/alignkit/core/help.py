"""Help for people: what a stage is for, and every key with its default and its meaning."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any

from alignkit.core.stages import config_class, default_groups, group_options, stage_module


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key: its dotted name, the schema's default, and the first sentence about it."""

    name: str
    default: Any
    meaning: str
    is_mapping: bool
    """Whether it holds entries whose names the user chooses."""


@cache
def stage_keys(stage: str) -> tuple[Key, ...]:
    """Every key of a stage's configuration."""
    return tuple(keys(config_class(stage)))


def keys(schema: type[Any], prefix: str = "") -> Iterator[Key]:
    """Every leaf key of a tree of configuration dataclasses."""
    hints = typing.get_type_hints(schema)
    meanings = field_meanings(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        choices = "|".join(kind.__members__) if isinstance(kind, type) and issubclass(kind, Enum) else ""
        meaning = "  ".join(part for part in (choices, meanings.get(field.name, "")) if part)
        yield Key(f"{prefix}{field.name}", default, meaning, is_mapping=typing.get_origin(kind) is dict)


def field_meanings(schema: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and of its parents, shortened to its first sentence."""
    meanings: dict[str, str] = {}
    for owner in reversed(schema.__mro__[:-1]):
        body = ast.parse(inspect.cleandoc(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                text = " ".join(ast.literal_eval(below.value).split())
                meanings[field.target.id] = text.split(". ")[0].rstrip(".")
    return meanings


def help_text(stage: str, composed: dict[str, Any]) -> str:
    """The stage's docstring, the options of its groups, and its keys with the values of `composed`."""
    doc = inspect.cleandoc(stage_module(stage).__doc__ or "")
    groups = [
        f"  {group}={'|'.join(group_options(group))}" + (f"   (default: {option})" if option else "")
        for group, option in default_groups(stage).items()
    ]
    lines = [_line(key, _lookup(composed, key)) for key in stage_keys(stage)]
    parts = [doc]
    if groups:
        parts.append("\n".join(["Options of groups (+group=option works as well):", *groups]))
    parts.append("\n".join(["Keys with their defaults:", *lines]))
    parts.append(
        "--cfg job prints the configuration and exits; -m sweeps over comma-separated values; force=true does work\n"
        "again. Exit code 0: done or up to date, 2: something to mend in the command or its input, 1: a bug,\n"
        "130: interrupted, the same command continues."
    )
    return "\n\n".join(parts) + "\n"


def _line(key: Key, value: Any) -> str:
    shown = "(required)" if value == "???" else _as_typed(value)
    return f"  {key.name + '=' + shown:52s} {key.meaning}".rstrip()


def _as_typed(value: Any) -> str:
    """A value as one would type it in an override."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def _lookup(composed: dict[str, Any], key: Key) -> Any:
    value: Any = composed
    for part in key.name.split("."):
        if not isinstance(value, dict) or part not in value:
            return key.default
        value = value[part]
    return value
