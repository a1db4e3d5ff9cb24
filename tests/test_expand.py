"""The expand stage: new rows from seeds, what it drops and why, and that no answer is asked for twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alignkit import expand
from alignkit.core.app import load_config
from alignkit.core.config import RowsConfig, TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.data.closed_world import World, answer, read_question, read_statement
from alignkit.expand import HOPELESS_REQUESTS, ExpandConfig
from alignkit.scoring.novelty import NoveltyIndex
from alignkit.teacher.client import Answer, OnAnswer, Request
from alignkit.teacher.recipes.expand import NewExample, Unusable, read_example
from alignkit.teacher.recipes.reading import read_object
from alignkit.teacher.scripted import OUTSIDE, ScriptedTeacher
from alignkit.teacher.server import TeacherServer


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    rows = []
    for number in range(12):
        world = World(1000 + number)
        passage = world.passage()
        question = world.ask(passage)
        kind = "judgmental" if question.proposed else "non_judgmental"
        row = {"id": f"seed-{number}", "instruction": passage.statement, "input": question.text}
        rows.append({**row, "output": answer(passage.facts, question), "kind": kind})
    return write_rows(tmp_path / "seeds.jsonl", rows)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def configure(seeds: Path, folder: Path, **changes: Any) -> ExpandConfig:
    settings: dict[str, Any] = {"count": 60, "name": "expand", "teacher": TeacherConfig(model="scripted"), **changes}
    return ExpandConfig(seeds=RowsConfig(path=str(seeds)), output_dir=str(folder / "out"), **settings)


class Written:
    """A teacher whose answers are written beforehand: by request number, the last one for all that follow."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self.asked: list[Request] = []

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        given = []
        for position, request in enumerate(requests):
            given.append(self.answers[min(request.sample, len(self.answers)) - 1])
            self.asked.append(request)
            if on_answer:
                on_answer(position, given[-1])
        return given


def use(monkeypatch: pytest.MonkeyPatch, teacher: Any) -> None:
    monkeypatch.setattr("alignkit.teacher.client.open_teacher", lambda config: teacher)


def said(
    statement: str = "A statement of some length.", question: str = "Is it?", answer: str = "It is, so yes."
) -> Answer:
    return Answer(json.dumps({"statement": statement, "question": question, "answer": answer}))


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_new_rows_are_new_complete_and_traceable(seeds: Path, tmp_path: Path) -> None:
    artifact = expand.run(configure(seeds, tmp_path, name="more", judgmental_share=0.25))
    rows = read_rows(tmp_path / "out" / "expanded.jsonl")
    assert [row["id"] for row in rows] == [f"more-{number:05d}" for number in range(1, 61)]
    originals = read_rows(seeds)
    pool = NoveltyIndex(0.7)
    for seed in originals:
        pool.add(f"{seed['instruction']}\n{seed['input']}", seed["id"])
    for row in rows:
        question = read_question(row["input"])
        assert read_statement(row["instruction"]) and question and question.kind == row["kind"]
        assert row["output"] and row["source"] == "teacher:scripted"
        assert 6 <= len(row["parents"]) <= 8 and set(row["parents"]) <= {seed["id"] for seed in originals}
        assert pool.most_similar(f"{row['instruction']}\n{row['input']}") is None
        pool.add(f"{row['instruction']}\n{row['input']}", row["id"])
    assert len(rows[0]["parents"]) == 8 and len(rows[-1]["parents"]) == 6  # machine-made rows take the place of two
    assert 4 <= Counter(row["kind"] for row in rows)["judgmental"] <= 26  # 15 expected
    metrics = artifact.metrics
    assert metrics["accepted"] == 60 and metrics["missing"] == 0
    assert metrics["requested"] == 60 + sum(artifact.dropped.values()) == metrics["usage"]["requests"]
    assert metrics["usage"]["prompt_tokens"] > 0
    assert not artifact.work_folder.exists()


def test_questions_only(seeds: Path, tmp_path: Path) -> None:
    without_answers = [{**row, "output": ""} for row in read_rows(seeds)]
    expand.run(configure(write_rows(tmp_path / "q.jsonl", without_answers), tmp_path, count=10, answers=False))
    assert all(row["output"] == "" for row in read_rows(tmp_path / "out" / "expanded.jsonl"))


def test_the_seed_decides_the_rows(seeds: Path, tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate([1, 1, 2]):
        expand.run(configure(seeds, tmp_path / str(number), count=20, seed=seed))
        texts.append((tmp_path / str(number) / "out" / "expanded.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_second_run_is_up_to_date(seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = expand.run(configure(seeds, tmp_path))
    use(monkeypatch, None)
    second = expand.run(configure(seeds, tmp_path))
    assert second.up_to_date and second.metrics == first.metrics


def test_what_is_dropped_and_why(seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = read_rows(seeds)[3]
    answers = [
        said("The first statement is this one."),
        Answer("I would rather not."),
        Answer(None, "500: broken"),
        said(question="No question mark"),
        said(answer=" "),
        said(statement="Short."),
        said("The first statement is this two."),
        said(seed["instruction"], seed["input"]),
        said("另一段中文的陈述，说的是别的事情。", "这是真的吗？", "是的。"),
    ]
    use(monkeypatch, Written(answers))
    artifact = expand.run(configure(seeds, tmp_path, count=5, max_requests=9))
    assert dict(artifact.dropped) == {
        "no JSON object in the answer": 1,
        "no answer": 1,
        "question without question mark": 1,
        "answer missing": 1,
        "statement too short or too long": 1,
        "too similar": 2,
    }
    details = {row["row"]["id"]: row["detail"] for row in read_rows(tmp_path / "out" / "dropped.jsonl")}
    assert "500" in details["expand-request-3"]
    assert details["expand-request-7"] == "ROUGE-L 0.875 with expand-00001"  # 7 of 8 words
    assert details["expand-request-8"] == f"ROUGE-L 1.000 with {seed['id']}"
    assert [row["input"] for row in read_rows(tmp_path / "out" / "expanded.jsonl")] == ["Is it?", "这是真的吗？"]
    assert artifact.metrics["missing"] == 3 and artifact.status == "complete"  # a shortfall is said, not an error


def test_a_teacher_that_gives_nothing_usable_is_not_asked_for_long(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Written([Answer("I only know other things.")])
    use(monkeypatch, teacher)
    with pytest.raises(UserError, match=r"no usable example in \d+ answers: no JSON object"):
        expand.run(configure(seeds, tmp_path, count=1000))
    assert HOPELESS_REQUESTS <= len(teacher.asked) < HOPELESS_REQUESTS + 32
    assert len(read_rows(tmp_path / "out" / "dropped.jsonl")) == len(teacher.asked)


def test_seeds_that_cannot_be_shown_are_dropped(seeds: Path, tmp_path: Path) -> None:
    rows = [*read_rows(seeds), {"id": "a", "instruction": "s", "input": "", "output": "o"}]
    rows.append({"id": "b", "instruction": "s", "input": "q?", "output": ""})
    artifact = expand.run(configure(write_rows(tmp_path / "more.jsonl", rows), tmp_path, count=5))
    assert artifact.dropped["seed without statement or question"] == artifact.dropped["seed without answer"] == 1
    with pytest.raises(UserError, match="no row has"):
        expand.run(configure(write_rows(tmp_path / "none.jsonl", rows[-2:]), tmp_path / "none"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"count": 0}, "count"),
        ({"round_size": 0}, "round_size"),
        ({"judgmental_share": 1.5}, "judgmental_share"),
        ({"novelty_threshold": 0.0}, "novelty_threshold"),
        ({"max_requests": 0}, "max_requests"),
        ({"machine_per_prompt": -1}, "machine_per_prompt"),
    ],
)
def test_numbers_that_make_no_sense(seeds: Path, tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        expand.run(configure(seeds, tmp_path, **changes))


def test_the_shipped_configuration_composes() -> None:
    config = load_config("expand", ["run=x"])
    assert isinstance(config, ExpandConfig)
    assert config.novelty_threshold == 0.7 and config.teacher.mode is TeacherMode.scripted
    assert Path(config.seeds.path).name == "seeds.jsonl"


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_same_rows(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(ScriptedTeacher):
        left, replied = 25, 0

        def reply(self, *arguments: Any, **options: Any) -> str:
            self.replied += 1
            if self.replied > self.left:
                raise KeyboardInterrupt
            return super().reply(*arguments, **options)

    whole = expand.run(configure(seeds, tmp_path / "whole"))
    first, second = Interrupted(), Interrupted()
    second.left = 10_000
    use(monkeypatch, first)
    with pytest.raises(KeyboardInterrupt):
        expand.run(configure(seeds, tmp_path))
    assert not (tmp_path / "out" / "expanded.jsonl").exists()
    use(monkeypatch, second)
    resumed = expand.run(configure(seeds, tmp_path))
    assert second.replied == whole.metrics["requested"] - 25
    assert resumed.metrics == whole.metrics
    for name in ("expanded.jsonl", "dropped.jsonl"):
        paths = [folder / "out" / name for folder in (tmp_path, tmp_path / "whole")]
        assert [path.exists() for path in paths] in ([True, True], [False, False])
        assert len({path.read_bytes() for path in paths if path.exists()}) <= 1


@contextmanager
def serving(delay: Callable[[], None]) -> Iterator[TeacherServer]:
    class Delayed(ScriptedTeacher):
        def reply(self, *arguments: Any, **options: Any) -> str:
            delay()
            return super().reply(*arguments, **options)

    with TeacherServer(Delayed()) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_killed_over_http_nothing_is_paid_twice(seeds: Path, tmp_path: Path) -> None:
    canary, concurrency = "canary-b07d1-never-written-down", 4
    environment = {**os.environ, "TEST_TEACHER_KEY": canary}
    with serving(lambda: time.sleep(0.02)) as server:
        command = [
            *(
                sys.executable,
                "-m",
                "alignkit.expand",
                f"seeds.path={seeds}",
                "count=80",
                "run=r",
                "teacher.mode=openai",
            ),
            *(f"teacher.base_url={server.base_url}", "teacher.api_key_env=TEST_TEACHER_KEY"),
            f"teacher.concurrency={concurrency}",
        ]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
            while server.requests < 30:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        manifest = json.loads((tmp_path / "runs" / "r" / "expand" / "manifest.json").read_text())
        assert manifest["metrics"]["requested"] <= server.requests <= manifest["metrics"]["requested"] + concurrency
        rows = (tmp_path / "runs" / "r" / "expand" / "expanded.jsonl").read_bytes()

        before = server.requests
        subprocess.run([*command, "force=true"], cwd=tmp_path, env=environment, capture_output=True, check=True)
        assert server.requests == before  # everything came from the response store
    assert (tmp_path / "runs" / "r" / "expand" / "expanded.jsonl").read_bytes() == rows
    assert f"127.0.0.1:{server.server_port}" in done.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "teacher.sqlite" for path in files)
    assert all(canary.encode() not in path.read_bytes() for path in files)
    assert canary not in done.stdout + done.stderr


# -- reading answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Sure! Here it is:\n```json\n{"a": {"b": "}"}}\n```\nAnything else?', {"a": {"b": "}"}}),
        ('{"a": "half', "the JSON of the answer is broken"),
        ("[1, 2]", "no JSON object in the answer"),
        ("", "no JSON object in the answer"),
        (OUTSIDE, "the scripted teacher knows only the closed world"),
        ('{"a": ' * 100_000, "the JSON of the answer is broken"),
    ],
)
def test_reading_an_object(text: str, expected: object) -> None:
    assert read_object(text) == expected


def test_reading_an_example() -> None:
    text = said(" Statement with spaces around. ", " Q？ ", " A. ").text
    assert read_example(str(text), answers=True) == NewExample("Statement with spaces around.", "Q？", "A.")
    assert read_example(str(text), answers=False) == NewExample("Statement with spaces around.", "Q？", "")
    found = read_example('{"statement": 3, "question": "Q?", "answer": "A."}', answers=True)
    assert found == Unusable("statement missing", '{"statement": 3, "question": "Q?", "answer": "A."}')
    assert isinstance(read_example(str(said(question="Q" * 600 + "?").text), answers=True), Unusable)
