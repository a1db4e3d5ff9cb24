"""The retry queue: many attempts at once, none of which holds a slot while it waits for its next."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")


class RetryQueue(Generic[Item]):
    """Attempts each item until it is done: what is due again first, by the time it is due, then what is new, in order.

    `attempt` makes one attempt: it returns None when the item is done with, else the seconds to wait before the next.
    `admit` is asked before each: 0 lets the item go now; a number of seconds holds everything back for so long, or
    until something under way has ended; infinity, which must not be said while nothing is under way, until then.
    `slots` says how many may be under way at once. An error of any of them stops the queue: nothing more is begun, what
    is under way is waited for, and `run` raises it.
    """

    def __init__(
        self,
        attempt: Callable[[Item], Awaitable[float | None]],
        admit: Callable[[Item], float],
        slots: Callable[[], int],
    ) -> None:
        self._attempt, self._admit, self._slots = attempt, admit, slots
        self._new: deque[Item] = deque()
        self._again: list[tuple[float, int, Item]] = []
        self._numbers = itertools.count()
        self._under_way: set[asyncio.Task[float | None]] = set()
        self._error: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._finished: asyncio.Future[None] | None = None

    @property
    def under_way(self) -> int:
        """Attempts being made."""
        return len(self._under_way)

    @property
    def waiting(self) -> int:
        """Items that wait for their first or next attempt."""
        return len(self._new) + len(self._again)

    def add(self, item: Item) -> None:
        """Add an item while the queue runs; it goes before those that are new."""
        heapq.heappush(self._again, (asyncio.get_running_loop().time(), next(self._numbers), item))

    async def run(self, items: Iterable[Item]) -> None:
        """Attempt all items, and what is added meanwhile, until all are done."""
        self._new.extend(items)
        self._finished = asyncio.get_running_loop().create_future()
        try:
            self._start()
            await self._finished
        except asyncio.CancelledError as error:
            self._error = self._error or error
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
        finally:
            if self._timer:
                self._timer.cancel()
        if self._error:
            raise self._error

    def _start(self) -> None:
        """Begin whatever may begin now, and see to it that this is called again when more may."""
        loop = asyncio.get_running_loop()
        if self._timer:
            self._timer.cancel()
        wait = 0.0
        try:
            while self._error is None and self.waiting and self.under_way < self._slots():
                due = self._again[0][0] if self._again else math.inf
                is_new = bool(self._new) and due > loop.time()
                wait = 0.0 if is_new else due - loop.time()
                if wait <= 0:
                    wait = self._admit(self._new[0] if is_new else self._again[0][2])
                if wait > 0:
                    break
                item = self._new.popleft() if is_new else heapq.heappop(self._again)[2]
                task = asyncio.ensure_future(self._attempt(item))
                self._under_way.add(task)
                task.add_done_callback(partial(self._ended, item))
        except Exception as error:
            self._error = self._error or error
        if 0 < wait < math.inf:
            self._timer = loop.call_later(wait, self._start)
        assert self._finished is not None
        if not self._under_way and (self._error or not self.waiting) and not self._finished.done():
            self._finished.set_result(None)

    def _ended(self, item: Item, task: asyncio.Task[float | None]) -> None:
        self._under_way.discard(task)
        with suppress(asyncio.CancelledError):
            error = task.exception()
            if error is not None:
                self._error = self._error or error
            elif (delay := task.result()) is not None:
                due = asyncio.get_running_loop().time() + delay
                heapq.heappush(self._again, (due, next(self._numbers), item))
        self._start()
