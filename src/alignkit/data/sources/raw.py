"""A row as a foreign file has it, on its way to one of our types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from alignkit.core.errors import UserError
from alignkit.core.records import Dropped, Row
from alignkit.data.jsonl import AnyModel, AnyRow, to_record

Read = TypeVar("Read", bound=Row, covariant=True)
"""The type of row that a format is read as."""


@dataclass(frozen=True)
class RawRow:
    """A row, where it stands, and the id it has or was given."""

    place: str
    id: str
    fields: dict[str, Any]

    def record(self, kind: type[AnyModel], **changes: Any) -> AnyModel:
        """The row, with `changes`, validated as `kind`. Raises `UserError` with the place when it is not one."""
        return to_record(self.place, {**self.fields, **changes}, kind)

    def drop(self, reason: str, detail: str = "") -> Dropped:
        """The row set aside: it is well formed, but of no use."""
        return Dropped(reason=reason, row=self.fields, detail=detail or self.place)


@dataclass(frozen=True)
class Format(Generic[Read]):
    """One way to write a row: its name for people, the fields every row has, and the function that reads a row."""

    name: str
    fields: tuple[str, ...]
    read: Callable[[RawRow], Read | Dropped]

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row has this format's fields."""
        return all(field in fields for field in self.fields)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


def detect(raw: RawRow, formats: tuple[Format[AnyRow], ...]) -> Format[AnyRow]:
    """The first format that a row matches. Raises `UserError` that names the fields found and those expected."""
    for candidate in formats:
        if candidate.matches(raw.fields):
            return candidate
    raise UserError(
        f"{raw.place}: the fields {', '.join(raw.fields) or '(none)'} are of no format that fits here. "
        f"Expected one of: {'; '.join(str(candidate) for candidate in formats)}. Is it the file of another stage?"
    )


def row_id(place: str, fields: Mapping[str, Any], default: str) -> str:
    """The id a row has, as `id` or `_id`, or else `default`. A whole number is an id, too."""
    for key in ("id", "_id"):
        value = fields.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value:
            return value
        if key in fields:
            raise UserError(f"{place}: {key}: must be a text that is not empty, found {value!r}. Correct or remove it.")
    return default
