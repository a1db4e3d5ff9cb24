"""Categories of things to compare: what the recipe `multihop` draws its subjects from."""

from __future__ import annotations

from pydantic import Field

from alignkit.core.records import Row
from alignkit.data.sources.raw import RawRow


class Category(Row):
    """A category and some narrower ones."""

    category: str = Field(min_length=1)
    sub_categories: list[str] = Field(default_factory=list)


def read_category(raw: RawRow) -> Category:
    """One row of a list of categories."""
    return raw.record(Category, id=raw.id)
