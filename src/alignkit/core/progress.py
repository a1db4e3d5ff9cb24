"""Progress of long loops: a bar on a terminal, one line at the start and one at the end in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

LOG = logging.getLogger("alignkit")
T = TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing how many are done; `total` is needed when they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stdout.isatty():
        from rich.progress import track

        yield from track(items, description=description, total=total, transient=True)
        return
    began, count = time.monotonic(), 0
    LOG.info("%s: %s", description, "begins" if total is None else f"{total} to do")
    for item in items:
        yield item
        count += 1
    LOG.info("%s: %d done in %.1f s", description, count, time.monotonic() - began)
