"""The benchmark of the teacher's client, small: the server fails as told, nothing is lost, doubled or paid twice."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_server import CONTENT, Fault, Faults, FaultyServer
from openai import OpenAI, OpenAIError

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "teacher.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_faults_fall_as_often_as_told_and_always_on_the_same() -> None:
    faults = Faults({Fault.rate_limited: 0.1, Fault.hang: 0.02, Fault.malformed: 0.3})
    drawn = [faults.of_attempt(str(number), 0) for number in range(10_000)]
    assert drawn.count(Fault.rate_limited) == pytest.approx(1000, abs=120)  # four standard deviations
    assert drawn.count(Fault.hang) == pytest.approx(200, abs=56)
    assert not set(drawn) & set(CONTENT)
    contents = [faults.of_content(str(number)) for number in range(10_000)]
    assert contents.count(Fault.malformed) == pytest.approx(3000, abs=184)
    assert drawn == [faults.of_attempt(str(number), 0) for number in range(10_000)]
    assert drawn != [faults.of_attempt(str(number), 1) for number in range(10_000)]


def test_the_server_counts_what_is_paid_twice() -> None:
    with FaultyServer() as server, OpenAI(api_key="none", base_url=server.base_url, max_retries=0) as client:
        for item in ("item-1", "item-2", "item-1"):
            reply = client.chat.completions.create(model="m", messages=[{"role": "user", "content": f"about {item}"}])
            assert f'"{item}"' in str(reply.choices[0].message.content)
        summary = server.account.summary()
    assert (summary["requests"], summary["answered"], summary["paid_twice"], summary["items"]) == (3, 3, 1, 2)


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in (*CONTENT, Fault.hang, Fault.truncated)])
def test_an_attempt_that_fails_is_not_paid_for(fault: Fault) -> None:
    with (
        FaultyServer(Faults({fault: 1.0}, retry_after_ms=70)) as server,
        OpenAI(api_key="none", base_url=server.base_url, max_retries=0) as client,
    ):
        try:
            reply = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "item-1"}])
            assert fault in (Fault.html, Fault.empty_choices) and not getattr(reply, "choices", None)
        except OpenAIError as error:
            headers = error.response.headers  # type: ignore[attr-defined]
            assert (headers.get("retry-after-ms") == "70") is (fault is Fault.rate_limited)
        assert server.account.summary()["faults"] == {fault.value: 1}
        assert server.account.summary()["answered"] == 0


@pytest.mark.slow  # hundreds of requests; test_teacher.py has each fault once
def test_through_faults_nothing_is_lost_doubled_or_paid_twice() -> None:
    said = run("faults", "--requests", "100", "--concurrency", "32")
    assert "lost 0, doubled 0, paid twice 0, sent when asked again 0" in said
    assert re.search(r"reached: \d+\.\d\d of", said)


@pytest.mark.slow  # four processes; test_teacher_store.py kills one
def test_through_kills_the_results_are_the_same_and_little_is_paid_twice() -> None:
    said = run("kills", "--requests", "200", "--concurrency", "16", "--kills", "3")
    assert re.search(r"killed +3\n", said)
    assert "results                     equal" in said
