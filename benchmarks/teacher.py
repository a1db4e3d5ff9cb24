"""The teacher's client against a loopback server that fails on purpose: how fast, and whether an answer is ever lost.

    python benchmarks/teacher.py                 # both
    python benchmarks/teacher.py faults          # 5,000 requests, 64 at once, through every common fault
    python benchmarks/teacher.py kills           # 2,000 requests, the client killed 50 times on the way

Both exit with 1 when an answer is lost, doubled or paid for twice beyond what they allow; never because of the time.

What counts, in `faults`. Every reply takes 50 ms; 10 % of the attempts end in a 429, 5 % in a 500 and 1 % never, and
2 % of the conversations are answered with broken JSON, which has to be asked for once more in other words.
  answered    requests with a usable answer; the rest is *lost*
  doubled     requests that got the answer to another one, or one that an earlier request got as well
  paid twice  completions that the server sent to a conversation beyond its first; asking once more is a new one
  ideal       concurrency / latency: all slots always busy with calls that succeed. Hanging calls are not in it,
              although each holds a slot until its deadline (2 s), and the last of them ends that much after the others
  bare loop   the `openai` package with nothing around it that costs: 64 workers that repeat a failed call at once,
              without delay, store, account or output. It does what cannot be avoided (attempts, deadlines, asking once
              more), so it is the ceiling that the package's use of the CPU sets on this machine under these faults
  reached     our answers a second / the smaller of ideal and bare loop
Both run twice, in the order bare, ours, ours, bare, and the times are added up; what else the machine does bends them,
but hardly the CPU time. The package without faults is shown besides. After each of our runs the same is asked again,
which must not send anything.

What counts, in `kills`. The client is a process that asks everything and writes the answers in the end; it is killed
(SIGKILL) when the server has sent a number of answers that is drawn at random, and up to 50 ms later. In the end it
runs undisturbed. *Needed* are the answers that a run takes that nothing disturbs, *surplus* those beyond.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from alignkit.core.config import PricesConfig, TeacherConfig, TeacherMode
from alignkit.core.records import Message
from alignkit.teacher.client import Answer, Request, open_teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faulty_server import Fault, Faults, ServerApart, server_apart

FAULTS_REQUESTS, KILLS_REQUESTS, CONCURRENCY, KILLS = 5000, 2000, 64, 50
LATENCY_SECONDS, DEADLINE_SECONDS = 0.05, 2.0
SHARES = {Fault.rate_limited: 0.1, Fault.broken: 0.05, Fault.hang: 0.01, Fault.malformed: 0.02}
TASK = " " + "Read the page of the manual below, and write one question about it as a JSON object. " * 12


class Item(BaseModel):
    """What the server answers."""

    item: str
    question: str


@dataclass(frozen=True)
class Speed:
    """What a client needed for its requests. `cpu_seconds` are its own, without the server's."""

    answered: int
    seconds: float
    cpu_seconds: float
    server: dict[str, Any]

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds

    def row(self, name: str) -> str:
        """A line of the table."""
        cpu, attempts = 1000 * self.cpu_seconds / self.answered, self.server["requests"]
        return f"{name:34s} {self.answered:8d} {attempts:9d} {self.seconds:8.1f} {self.rate:11.1f} {cpu:14.2f}"


def request(number: int) -> Request:
    """The request for item `number`."""
    return Request([Message(role="user", content=f"item-{number:05d}{TASK}")], shape=Item)


def configuration(base_url: str, store: Path, concurrency: int) -> TeacherConfig:
    """A teacher at `base_url`; it needs no key."""
    return TeacherConfig(
        mode=TeacherMode.openai,
        base_url=base_url,
        model="faulty",
        api_key_env="",
        concurrency=concurrency,
        timeout_seconds=DEADLINE_SECONDS,
        store=str(store),
        prices=PricesConfig(),
    )


async def bare_loop(base_url: str, count: int, concurrency: int) -> int:
    """Ask with the `openai` package alone until everything is answered; the number of answers."""
    from openai import AsyncOpenAI, OpenAIError

    schema = {"type": "json_schema", "json_schema": {"name": "Item", "schema": Item.model_json_schema()}}
    waiting = [(number, request(number).messages) for number in reversed(range(count))]
    answered = 0

    async def work(client: AsyncOpenAI) -> None:
        nonlocal answered
        while waiting:
            number, messages = waiting.pop()
            body: Any = {"model": "faulty", "max_tokens": 1024, "temperature": 0.7, "response_format": schema}
            try:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    said: Any = [message.model_dump() for message in messages]
                    reply = await client.chat.completions.create(messages=said, **body)
            except (OpenAIError, TimeoutError):
                waiting.append((number, messages))
                continue
            try:
                Item.model_validate_json(reply.choices[0].message.content)
                answered += 1
            except ValidationError:
                waiting.append((number, [*messages, Message(role="user", content="Once more, as JSON.")]))

    async with AsyncOpenAI(api_key="none", base_url=base_url, max_retries=0) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
    return answered


def measure_bare(faults: Faults, count: int, concurrency: int) -> Speed:
    """The bare loop against a server of its own."""
    with server_apart(faults) as server:
        began, cpu_began = time.monotonic(), time.process_time()
        answered = asyncio.run(bare_loop(server.base_url, count, concurrency))
        return Speed(answered, time.monotonic() - began, time.process_time() - cpu_began, server.summary())


def measure_ours(faults: Faults, count: int, concurrency: int) -> tuple[Speed, list[Answer], int]:
    """Our client against a server of its own: its speed, its answers, and what it sent when asked the same again."""
    requests = [request(number) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder, server_apart(faults) as server:
        teacher = open_teacher(configuration(server.base_url, Path(folder) / "teacher.sqlite", concurrency))
        began, cpu_began = time.monotonic(), time.process_time()
        answers = teacher.ask(requests)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        summary = server.summary()
        answered = sum(answer.usable for answer in answers)
        teacher.ask(requests)
        sent_again = server.summary()["requests"] - summary["requests"]
    return Speed(answered, seconds, cpu_seconds, summary), answers, sent_again


def doubled(answers: list[Answer]) -> int:
    """Usable answers that are not about the item asked for, or about one that an earlier answer was about."""
    right, seen = 0, set()
    for number, answer in enumerate(answers):
        if answer.usable and answer.value.item == f"item-{number:05d}" and answer.value.item not in seen:
            right += 1
            seen.add(answer.value.item)
    return sum(answer.usable for answer in answers) - right


def faults(count: int, concurrency: int) -> bool:
    """Print the table; whether nothing was lost, doubled or paid twice."""
    failing = Faults(SHARES, LATENCY_SECONDS)
    ideal = concurrency / LATENCY_SECONDS
    ours, bare = [], []
    lost = twins = twice = again = 0
    print(f"{count} requests, {concurrency} at once; {load()}\n")
    print(f"{'':34s} {'answered':>8s} {'attempts':>9s} {'seconds':>8s} {'answers/s':>11s} {'CPU ms/answer':>14s}")
    print(f"{'ideal: concurrency / latency':34s} {count:8d} {count:9d} {count / ideal:8.1f} {ideal:11.1f}", flush=True)
    clean = measure_bare(Faults({}, LATENCY_SECONDS), count // 2, concurrency)
    print(clean.row("openai package, no faults"), flush=True)
    for who in ("bare", "ours", "ours", "bare"):
        if who == "bare":
            bare.append(measure_bare(failing, count, concurrency))
            print(bare[-1].row("openai package, bare loop"), flush=True)
            continue
        speed, answers, sent_again = measure_ours(failing, count, concurrency)
        ours.append(speed)
        print(speed.row("alignkit"), flush=True)
        lost += count - speed.answered
        twins += doubled(answers)
        twice += speed.server["paid_twice"]
        again += sent_again
    ceiling, reached = rate(bare), rate(ours)
    print(f"\nreached: {reached / min(ideal, ceiling):.2f} of the smaller of ideal and bare loop (0.90 is wanted);")
    print(f"         {cpu(bare) / cpu(ours):.2f} of the bare loop by CPU time,")
    print(f"         {reached / min(ideal, clean.rate):.2f} of the package without faults, which repeats nothing")
    print(f"lost {lost}, doubled {twins}, paid twice {twice}, sent when asked again {again}")
    return lost == twins == twice == again == 0


def rate(runs: list[Speed]) -> float:
    """Answers a second of several runs together."""
    return sum(run.answered for run in runs) / sum(run.seconds for run in runs)


def cpu(runs: list[Speed]) -> float:
    """CPU seconds an answer of several runs together."""
    return sum(run.cpu_seconds for run in runs) / sum(run.answered for run in runs)


def load() -> str:
    """What the machine is busy with besides, as far as its load tells."""
    return f"{len(os.sched_getaffinity(0))} CPUs allowed, load average {os.getloadavg()[0]:.1f} at the start"


@dataclass(frozen=True)
class Files:
    """What a client that is killed leaves behind."""

    store: Path
    output: Path

    @classmethod
    def within(cls, folder: Path, name: str) -> Files:
        """Files of that name."""
        return cls(folder / f"{name}.sqlite", folder / f"{name}.jsonl")


def client(base_url: str, files: Files, count: int, concurrency: int) -> None:
    """What the killed process does: ask for everything, and write the answers in the end."""
    answers = open_teacher(configuration(base_url, files.store, concurrency)).ask(list(map(request, range(count))))
    lines = [answer.value.model_dump_json() if answer.usable else json.dumps(answer.reason) for answer in answers]
    files.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def start_client(base_url: str, files: Files, count: int, concurrency: int) -> subprocess.Popen[bytes]:
    """`client` in a process of its own."""
    told = [base_url, str(files.store), str(files.output), str(count), str(concurrency)]
    return subprocess.Popen([sys.executable, __file__, "client", *told], stdout=subprocess.DEVNULL)


def run_killed(server: ServerApart, files: Files, count: int, concurrency: int, moments: list[int]) -> int:
    """Run the client, killed at each of the moments and then to its end; how often it was killed on the way."""
    killed = 0
    for moment in moments:
        process = start_client(server.base_url, files, count, concurrency)
        while process.poll() is None and not server.has_sent(moment, within_seconds=1.0):
            pass
        time.sleep(random.uniform(0, LATENCY_SECONDS))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    if start_client(server.base_url, files, count, concurrency).wait() != 0:
        raise SystemExit("the client failed without having been killed")
    return killed


def kills(count: int, concurrency: int, times: int) -> bool:
    """Print the table; whether the results are those of an undisturbed run, and the surplus within its bound."""
    failing = Faults(SHARES, LATENCY_SECONDS)
    print(f"{count} requests, {concurrency} at once; {load()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        whole, torn = Files.within(Path(name), "whole"), Files.within(Path(name), "torn")
        with server_apart(failing) as server:
            run_killed(server, whole, count, concurrency, [])
            needed = server.summary()["answered"]
        moments = sorted(random.Random(0).sample(range(1, needed), times))
        with server_apart(failing) as server:
            killed = run_killed(server, torn, count, concurrency, moments)
            sent = server.summary()["answered"]
        results = torn.output.read_text(encoding="utf-8")
        same = results == whole.output.read_text(encoding="utf-8")
    lost = sum(line.startswith('"') for line in results.splitlines())
    print(f"\nkilled                      {killed:7d}")
    print(f"answers needed              {needed:7d}   sent to an undisturbed run")
    print(f"answers sent                {sent:7d}")
    print(f"surplus                     {sent - needed:7d}   at most kills x concurrency: {killed * concurrency}")
    print(f"requests without an answer  {lost:7d}")
    print(f"results                     {'equal' if same else 'NOT equal'} to those of the undisturbed run")
    return same and lost == 0 and killed == times and sent - needed <= killed * concurrency


def main() -> int:
    """Run what is asked for; 1 when an answer was lost, doubled, or paid for too often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    for name, count in (("faults", FAULTS_REQUESTS), ("kills", KILLS_REQUESTS)):
        command = commands.add_parser(name)
        command.add_argument("--requests", type=int, default=count)
        command.add_argument("--concurrency", type=int, default=CONCURRENCY)
        if name == "kills":
            command.add_argument("--kills", type=int, default=KILLS)
    process = commands.add_parser("client")
    process.add_argument("told", nargs=5)
    chosen = parser.parse_args()
    logging.getLogger("alignkit").setLevel(logging.ERROR)
    if chosen.command == "client":
        base_url, store, output, count, concurrency = chosen.told
        client(base_url, Files(Path(store), Path(output)), int(count), int(concurrency))
        return 0
    if chosen.command is None:
        unharmed = faults(FAULTS_REQUESTS, CONCURRENCY)
        return 0 if kills(KILLS_REQUESTS, CONCURRENCY, KILLS) and unharmed else 1
    if chosen.command == "faults":
        return 0 if faults(chosen.requests, chosen.concurrency) else 1
    return 0 if kills(chosen.requests, chosen.concurrency, chosen.kills) else 1


if __name__ == "__main__":
    sys.exit(main())
