"""How much may be sent: requests at once, and requests and tokens a minute.

Two of the limits are the user's (`teacher.requests_per_minute`, `teacher.tokens_per_minute`), the others are learnt
from the server: from its refusals (status 429), and from the headers in which some servers say what is left.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TOLERATED_SHARE = 0.25
"""Share of refusals (429) above which there are too many requests at once. Some are no sign of it: a server may refuse
at random, and a client that took each for congestion would end with next to no requests under way."""
FEWEST_OUTCOMES = 10
"""So many outcomes are looked at before concurrency is changed, or as many as are under way at once."""
LONGEST_HOLD_SECONDS = 60.0
"""What the headers say is believed for so long; then one request finds out how it is."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Concurrency:
    """How many requests may be under way at once: additive increase, multiplicative decrease (AIMD).

    After each round of outcomes, half of it when too many were refusals, else a sixteenth of the most more.
    Source: Chiu and Jain, 1989, "Analysis of the increase and decrease algorithms for congestion avoidance".
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = most
        self._outcomes = self._refusals = 0

    def record(self, *, refused: bool) -> None:
        """Take note of an attempt's outcome."""
        self._outcomes += 1
        self._refusals += refused
        if self._outcomes < max(FEWEST_OUTCOMES, self.now):
            return
        if self._refusals > TOLERATED_SHARE * self._outcomes:
            self.now = max(1, self.now // 2)
        else:
            self.now = min(self.most, self.now + max(1, self.most // 16))
        self._outcomes = self._refusals = 0


class Pace:
    """Something that may be used up evenly, so much a minute; None: as much as one likes."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._next = 0.0

    def wait(self, now: float) -> float:
        """Seconds until more may be used."""
        return max(0.0, self._next - now)

    def take(self, now: float, amount: float) -> None:
        """Use some; a negative amount gives back what was taken for too much."""
        if self.per_minute:
            self._next = max(self._next, now) + 60 * amount / self.per_minute


@dataclass
class Window:
    """What a server says is left of a limit, until it is full again. Nothing is known of it at first."""

    limit: float | None = None
    remaining: float = 0.0
    until: float = 0.0

    def learn(self, headers: Mapping[str, str], what: str, now: float) -> None:
        """Read `x-ratelimit-{limit,remaining,reset}-<what>`, where they are."""
        limit = _number(headers.get(f"x-ratelimit-limit-{what}"))
        if limit is None:
            return
        remaining = _number(headers.get(f"x-ratelimit-remaining-{what}"))
        reset = read_duration(headers.get(f"x-ratelimit-reset-{what}"))
        if remaining is None or reset is None:
            return
        self.limit, self.remaining = limit, remaining
        self.until = now + min(reset, LONGEST_HOLD_SECONDS)

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` may be used. A request that is larger than the limit waits for all of it."""
        if self.limit is None or now >= self.until or min(amount, self.limit) <= self.remaining:
            return 0.0
        return self.until - now

    def take(self, amount: float) -> None:
        """Use some."""
        self.remaining -= amount


class Limits:
    """All limits together. Amounts of tokens are estimates before a request, and corrected after it."""

    def __init__(
        self,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.concurrency = Concurrency(concurrency)
        self._paces = Pace(requests_per_minute), Pace(tokens_per_minute)
        self._windows = Window(), Window()
        self._clock = clock

    @property
    def count_tokens(self) -> bool:
        """Whether the tokens of a request matter to any limit."""
        return self._paces[1].per_minute is not None or self._windows[1].limit is not None

    def wait(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may be sent; 0: now."""
        now = self._clock()
        waits = [pace.wait(now) for pace in self._paces]
        waits += [window.wait(now, amount) for window, amount in zip(self._windows, (1, tokens), strict=True)]
        return max(waits)

    def take(self, tokens: int) -> None:
        """Note that a request of so many tokens is being sent."""
        now = self._clock()
        for pace, window, amount in zip(self._paces, self._windows, (1, tokens), strict=True):
            pace.take(now, amount)
            window.take(amount)

    def correct(self, estimated: int, used: int | None) -> None:
        """Replace an estimate by what was used, where the server reported it."""
        if used is not None:
            self._paces[1].take(self._clock(), used - estimated)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Read the rate-limit headers of any answer."""
        now = self._clock()
        for window, what in zip(self._windows, ("requests", "tokens"), strict=True):
            window.learn(headers, what, now)


def read_duration(text: str | None) -> float | None:
    """Seconds of a duration such as "6m0s", "120ms" or "1.5"; None for anything else."""
    if not text:
        return None
    if (number := _number(text)) is not None:
        return number
    parts = _DURATION.findall(text)
    if not parts or "".join(f"{value}{unit}" for value, unit in parts) != text:
        return None
    return sum(float(value) * _UNITS[unit] for value, unit in parts)


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text else None
    except ValueError:
        return None
    return number if number is not None and 0 <= number < float("inf") else None
