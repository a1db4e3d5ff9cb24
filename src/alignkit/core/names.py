"""Names that people give to what is examined, and which of two names are compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from alignkit.core.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_names(setting: str, names: Iterable[str]) -> None:
    """Raise `UserError` for a name that no file, URL or log could hold. `setting` is the key that gives the names."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"{setting}: {name!r} is no name; use letters, digits, dot, dash and underscore")


def read_comparisons(setting: str, names: Sequence[str], comparisons: Sequence[str]) -> list[tuple[str, str]]:
    """(new, old) for each comparison "new>old"; none given: each name with the one before it.

    `setting` is the key that gives the names. Raises `UserError` for a comparison that is not of two of them.
    """
    if not comparisons:
        return list(zip(names[1:], names[:-1], strict=True))
    pairs = []
    for comparison in comparisons:
        new, arrow, old = (part.strip() for part in comparison.partition(">"))
        if not arrow or new == old or {new, old} - set(names):
            raise UserError(
                f"comparisons: {comparison!r} must be 'new>old' with two of the {setting} {', '.join(names)}"
            )
        pairs.append((new, old))
    return pairs
