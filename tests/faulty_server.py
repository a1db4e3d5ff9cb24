"""A fast loopback server of chat completions that fails as told; for tests (in a thread) and benchmarks (a process).

Every request names its item (`item-<number>` somewhere in its messages), and the answer is a JSON object that names it
back. Faults of transport are drawn for each attempt, faults of content for each conversation, from a hash and not from
a generator: so they do not depend on the order of arrival, and the same conversation always gets the same content.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any

HOST = "127.0.0.1"


class Fault(Enum):
    """What can go wrong. Up to `hang` an attempt gets no completion; from `malformed` on its content is not usable."""

    rate_limited = "rate_limited"
    broken = "broken"
    truncated = "truncated"
    html = "html"
    empty_choices = "empty_choices"
    unauthorized = "unauthorized"
    unknown_model = "unknown_model"
    no_quota = "no_quota"
    hang = "hang"
    malformed = "malformed"
    content_filter = "content_filter"
    length = "length"


CONTENT = (Fault.malformed, Fault.content_filter, Fault.length)
_ERRORS: dict[Fault, tuple[str, str, str | None]] = {
    Fault.rate_limited: ("429 Too Many Requests", "slow down", "rate_limit_exceeded"),
    Fault.broken: ("500 Internal Server Error", "the server had an error", None),
    Fault.unauthorized: ("401 Unauthorized", "the key is unknown", "invalid_api_key"),
    Fault.unknown_model: ("404 Not Found", "the model does not exist", "model_not_found"),
    Fault.no_quota: ("429 Too Many Requests", "you exceeded your quota", "insufficient_quota"),
}


@dataclass(frozen=True)
class Faults:
    """Shares of the attempts (or conversations) that each fault befalls, and the latency of every reply."""

    shares: Mapping[Fault, float] = field(default_factory=dict)
    latency_seconds: float = 0.0
    retry_after_ms: int = 200
    seed: int = 0

    def of_attempt(self, conversation: str, attempt: int) -> Fault | None:
        """What befalls attempt number `attempt` (from 0) at a conversation on its way."""
        return self._draw(f"{self.seed} {conversation} {attempt}", [fault for fault in Fault if fault not in CONTENT])

    def of_content(self, conversation: str) -> Fault | None:
        """What is wrong with the content of every answer to a conversation."""
        return self._draw(f"{self.seed} {conversation} content", CONTENT)

    def _draw(self, what: str, faults: list[Fault] | tuple[Fault, ...]) -> Fault | None:
        number = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "big") / 2**64
        for fault in faults:
            number -= self.shares.get(fault, 0.0)
            if number < 0:
                return fault
        return None


class Account:
    """What the server did. An answer counts when it is sent, whether or not somebody is there to read it."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        """By conversation."""
        self.answers: Counter[str] = Counter()
        """Completions by conversation: what a paid server would charge for."""
        self.items: Counter[str] = Counter()
        """Completions by item."""
        self.faults: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = self.connections = 0

    def summary(self) -> dict[str, Any]:
        """The sums. `paid_twice` counts the answers to a conversation beyond its first one."""
        answered = sum(self.answers.values())
        return {
            "requests": sum(self.attempts.values()),
            "answered": answered,
            "paid_twice": answered - len(self.answers),
            "items": len(self.items),
            "most_in_flight": self.most_in_flight,
            "connections": self.connections,
            "faults": dict(self.faults),
        }


class _Connection(asyncio.Protocol):
    """One connection: the requests of a keep-alive client, one after the other."""

    def __init__(self, faults: Faults, account: Account) -> None:
        self.faults, self.account = faults, account
        self.received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.account.connections += 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            length = re.search(rb"content-length: *(\d+)", head)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self.received) < size:
                return
            body, self.received = self.received[end + 4 : size], self.received[size:]
            method, path, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
            if method == b"post":
                self._answer(body)
            elif path.startswith(b"/wait/"):
                self._wait(int(path.removeprefix(b"/wait/")))
            else:
                self._send("200 OK", json.dumps(self.account.summary()).encode())

    def _answer(self, body: bytes) -> None:
        account = self.account
        messages = json.dumps(json.loads(body)["messages"])
        conversation = hashlib.blake2b(messages.encode(), digest_size=12).hexdigest()
        fault = self.faults.of_attempt(conversation, account.attempts[conversation])
        account.attempts[conversation] += 1
        account.in_flight += 1
        account.most_in_flight = max(account.most_in_flight, account.in_flight)
        asyncio.get_running_loop().call_later(self.faults.latency_seconds, self._reply, messages, conversation, fault)

    def _reply(self, messages: str, conversation: str, fault: Fault | None) -> None:
        account = self.account
        account.in_flight -= 1
        if fault is None:
            fault = self.faults.of_content(conversation)
        if fault is not None:
            account.faults[fault.value] += 1
        match fault:
            case Fault.hang:
                return
            case Fault.truncated:
                return self._send("200 OK", completion("item-0", None)[:60])
            case Fault.html:
                return self._send("200 OK", b"<html>a proxy's page</html>", kind="text/html")
            case Fault.empty_choices:
                return self._send("200 OK", b'{"id": "c", "object": "chat.completion", "choices": []}')
            case Fault() if fault in _ERRORS:
                status, message, code = _ERRORS[fault]
                error = json.dumps({"error": {"message": message, "type": "error", "param": None, "code": code}})
                wait = f"retry-after-ms: {self.faults.retry_after_ms}\r\n" if fault is Fault.rate_limited else ""
                return self._send(status, error.encode(), wait)
        found = re.search(r"item-\d+", messages)
        item = found[0] if found else "item-none"
        account.answers[conversation] += 1
        account.items[item] += 1
        self._send("200 OK", completion(item, fault))

    def _wait(self, answered: int) -> None:
        """Reply once so many answers were sent."""
        if sum(self.account.answers.values()) >= answered:
            return self._send("200 OK", json.dumps(self.account.summary()).encode())
        if not self.transport.is_closing():
            asyncio.get_running_loop().call_later(0.005, self._wait, answered)

    def _send(self, status: str, body: bytes, headers: str = "", kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{headers}content-length: {len(body)}\r\n\r\n"
        if not self.transport.is_closing():
            self.transport.write(head.encode() + body)


def completion(item: str, fault: Fault | None) -> bytes:
    """The body of a completion about `item`."""
    content: str | None = json.dumps({"item": item, "question": "What is the highest speed of the machine? " * 4})
    assert content is not None
    if fault is Fault.malformed:
        content = f"Sure! Here it is: {content[:-3]}"
    elif fault is Fault.length:
        content = content[:20]
    elif fault is Fault.content_filter:
        content = None
    finish = fault.value if fault in (Fault.length, Fault.content_filter) else "stop"
    message = {"role": "assistant", "content": content, "refusal": None}
    return json.dumps(
        {
            "id": f"c-{item}",
            "object": "chat.completion",
            "created": 1,
            "model": "faulty",
            "choices": [{"index": 0, "finish_reason": finish, "logprobs": None, "message": message}],
            "usage": {"prompt_tokens": 50, "completion_tokens": 60, "total_tokens": 110},
        }
    ).encode()


async def _listen(faults: Faults, account: Account, port: int = 0) -> tuple[asyncio.Server, str]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(faults, account), HOST, port, backlog=4096)
    return server, f"http://{HOST}:{server.sockets[0].getsockname()[1]}/v1"


class FaultyServer:
    """The server in a thread of its own, as a context manager; `account` tells what it did so far."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.account = Account()
        self.base_url = ""

    def __enter__(self) -> FaultyServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(_listen(self.faults, self.account), self._loop)
        self._server, self.base_url = listening.result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@dataclass(frozen=True)
class ServerApart:
    """The server in a process of its own, with an interpreter lock of its own."""

    base_url: str

    def summary(self) -> dict[str, Any]:
        """What it did so far."""
        return self._get("summary")

    def has_sent(self, answers: int, within_seconds: float) -> bool:
        """Wait until it has sent so many answers; whether it has."""
        try:
            self._get(f"wait/{answers}", within_seconds)
        except TimeoutError:
            return False
        return True

    def _get(self, path: str, timeout: float = 30.0) -> dict[str, Any]:
        with urllib.request.urlopen(self.base_url.removesuffix("v1") + path, timeout=timeout) as reply:
            found: dict[str, Any] = json.loads(reply.read())
            return found


@contextmanager
def server_apart(faults: Faults) -> Iterator[ServerApart]:
    """Start the server in a process of its own, and end it."""
    told = {
        "shares": {fault.value: share for fault, share in faults.shares.items()},
        "latency_seconds": faults.latency_seconds,
        "retry_after_ms": faults.retry_after_ms,
        "seed": faults.seed,
    }
    with subprocess.Popen([sys.executable, __file__, json.dumps(told)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield ServerApart(process.stdout.readline().strip())
        finally:
            process.kill()


def main() -> None:
    """Serve with the faults given as JSON, until killed; the first line printed is the base URL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", help="the fields of Faults as a JSON object")
    told = json.loads(parser.parse_args().faults)
    told["shares"] = {Fault(name): share for name, share in told.get("shares", {}).items()}

    async def serve() -> None:
        server, base_url = await _listen(Faults(**told), Account())
        print(base_url, flush=True)
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
