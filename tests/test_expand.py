"""The expand stage with recipe=self_instruct: what it writes, what it drops and why, and that nothing is paid twice."""

from __future__ import annotations

import json
import re
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
from alignkit.core.app import load_config, run_command
from alignkit.core.config import RowsConfig, TeacherConfig, TeacherMode
from alignkit.core.errors import UserError
from alignkit.data.closed_world import World, answer, read_question, read_statement
from alignkit.data.metadata import MetadataConfig
from alignkit.expand import ExpandConfig, Recipe
from alignkit.scoring.novelty import NoveltyFilter
from alignkit.teacher.client import Answer, OnAnswer, Request, Usage
from alignkit.teacher.reading import read_reply
from alignkit.teacher.recipes.self_instruct import SelfInstructConfig, Shape
from alignkit.teacher.scripted import ScriptedTeacher
from alignkit.teacher.server import TeacherServer


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    rows = []
    for number in range(12):
        world = World(1000 + number)
        passage = world.passage()
        question = world.ask(passage)
        row = {"id": f"seed-{number}", "instruction": passage.statement, "input": question.text, "kind": question.kind}
        rows.append({**row, "output": answer(passage.facts, question)})
    return write_rows(tmp_path / "seeds.jsonl", rows)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def configure(seeds: Path, folder: Path, self_instruct: dict[str, Any] | None = None, **changes: Any) -> ExpandConfig:
    settings: dict[str, Any] = {"count": 60, "name": "expand", "teacher": TeacherConfig(model="scripted"), **changes}
    settings |= {"data": RowsConfig(path=str(seeds)), "output_dir": str(folder / "out")}
    return ExpandConfig(self_instruct=SelfInstructConfig(**(self_instruct or {})), **settings)


class Written:
    """A teacher whose replies are written beforehand: by request number, the last one for all that follow."""

    def __init__(self, replies: Sequence[str | Answer]) -> None:
        self.replies = replies
        self.asked: list[Request] = []
        self.usage = Usage()

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        answers = []
        for request in requests:
            self.asked.append(request)
            reply = self.replies[min(request.sample, len(self.replies)) - 1]
            answers.append(reply if isinstance(reply, Answer) else read_reply(request, reply))
        self.usage.count(answers)
        return answers


def use(monkeypatch: pytest.MonkeyPatch, teacher: Any) -> None:
    monkeypatch.setattr("alignkit.teacher.client.open_teacher", lambda config: teacher)


def said(
    statement: str = "A statement of some length.", question: str = "Is it?", answer: str = "It is, so yes."
) -> str:
    return json.dumps({"statement": statement, "question": question, "answer": answer})


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_new_rows_are_new_complete_and_traceable(seeds: Path, tmp_path: Path) -> None:
    artifact = expand.run(configure(seeds, tmp_path, {"judgmental_share": 0.25}, name="more"))
    rows = read_rows(tmp_path / "out" / "expanded.jsonl")
    assert [row["id"] for row in rows] == [f"more-{number:05d}" for number in range(1, 61)]
    originals = read_rows(seeds)
    pool = NoveltyFilter(0.7)
    for seed in originals:
        pool.add(f"{seed['instruction']}\n{seed['input']}")
    for row in rows:
        question = read_question(row["input"])
        assert read_statement(row["instruction"]) and question and question.kind == row["kind"]
        assert row["output"] and row["source"] == "teacher:scripted"
        assert 6 <= len(row["parents"]) <= 8 and set(row["parents"]) <= {seed["id"] for seed in originals}
        assert pool.max_similarity(f"{row['instruction']}\n{row['input']}") <= 0.7
        pool.add(f"{row['instruction']}\n{row['input']}")
    assert len(rows[0]["parents"]) == 8 and len(rows[-1]["parents"]) == 6  # machine-made rows take the place of two
    assert 4 <= Counter(row["kind"] for row in rows)["judgmental"] <= 26  # 15 expected
    metrics = artifact.metrics
    assert metrics["accepted"] == 60 and "missing" not in metrics
    assert metrics["requested"] == 60 + sum(artifact.dropped.values()) == metrics["usage"]["requests"]
    assert metrics["steps"]["examples"]["asked"] == metrics["requested"]
    assert metrics["usage"]["prompt_tokens"] > 0


def test_tasks_step_by_step(seeds: Path, tmp_path: Path) -> None:
    artifact = expand.run(configure(seeds, tmp_path, {"shape": Shape.task}, count=30))
    rows = read_rows(tmp_path / "out" / "expanded.jsonl")
    assert len(rows) == 30 > len({row["instruction"] for row in rows})
    assert list(artifact.metrics["steps"]) == ["instructions", "kinds", "instances"]
    assert sum(step["asked"] for step in artifact.metrics["steps"].values()) == artifact.metrics["requested"]
    made = {row["instruction"] for row in rows} | {
        row["row"]["instruction"] for row in read_rows(tmp_path / "out" / "dropped.jsonl")
    }
    assert len(made) == 8 * artifact.metrics["steps"]["instructions"]["asked"]  # none is lost without a trace


def test_questions_only(seeds: Path, tmp_path: Path) -> None:
    without_answers = [{**row, "output": ""} for row in read_rows(seeds)]
    path = write_rows(tmp_path / "q.jsonl", without_answers)
    expand.run(configure(path, tmp_path, {"answers": False}, count=10))
    assert all(row["output"] == "" for row in read_rows(tmp_path / "out" / "expanded.jsonl"))


def test_the_seed_decides_the_rows(seeds: Path, tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate([1, 1, 2]):
        expand.run(configure(seeds, tmp_path / str(number), count=20, seed=seed))
        texts.append((tmp_path / str(number) / "out" / "expanded.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_second_run_is_up_to_date_until_the_blacklist_changes(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blacklist = tmp_path / "words.txt"
    blacklist.write_text("zebra\n")
    settings = {"blacklist": str(blacklist)}
    first = expand.run(configure(seeds, tmp_path, settings, count=10))
    assert "word of the blacklist" not in first.dropped
    with monkeypatch.context() as patch:
        use(patch, None)
        second = expand.run(configure(seeds, tmp_path, settings, count=10))
    assert second.up_to_date and second.metrics == first.metrics
    blacklist.write_text("who\nwhat\n")
    third = expand.run(configure(seeds, tmp_path, settings, count=10))
    assert not third.up_to_date and third.dropped["word of the blacklist"] > 0


def test_what_is_dropped_and_why(seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(row for row in read_rows(seeds) if row["kind"] == "non_judgmental")
    replies: list[str | Answer] = [
        said("The first statement is this one."),
        "I would rather not.",
        Answer(None, reason="no answer", detail="500: broken"),
        said(question="No question mark"),
        said(answer=" "),
        said(statement="Short."),
        said("The first statement is this two."),
        said("Another statement of some length.", answer="It cannot be seen."),
        said("另一段中文的陈述，说的是别的事情。", "这是真的吗？", "文中这样说，所以是。"),
    ]
    use(monkeypatch, Written(replies))
    settings = {"max_requests": 9, "judgmental_share": 1.0}
    artifact = expand.run(configure(seeds, tmp_path, settings, count=5, max_failure_rate=0.7))
    assert dict(artifact.dropped) == {
        "no JSON object in the answer": 1,
        "no answer": 1,
        "another language than asked for": 1,
        "question without question mark": 1,
        "answer missing": 1,
        "statement too short or too long": 1,
        "too similar": 1,
        "judgmental question without a verdict in its answer": 1,
    }
    details = {row["row"]["id"]: row["detail"] for row in read_rows(tmp_path / "out" / "dropped.jsonl")}
    assert "500" in details["expand-request-3"]
    assert details["expand-request-7"] == "ROUGE-L 0.875 with expand-00001"  # 7 of 8 words
    assert [row["input"] for row in read_rows(tmp_path / "out" / "expanded.jsonl")] == ["Is it?"]
    assert artifact.metrics["missing"] == 4 and artifact.status == "complete"  # a shortfall is said, not an error

    use(monkeypatch, Written([said(seed["instruction"], seed["input"], seed["output"]), said(answer="It is 3 m.")]))
    again = configure(seeds, tmp_path / "seed", {"max_requests": 2, "judgmental_share": 0.0}, count=2)
    assert dict(expand.run(again).dropped) == {"too similar": 1}
    (dropped,) = read_rows(tmp_path / "seed" / "out" / "dropped.jsonl")
    assert dropped["detail"] == f"ROUGE-L 1.000 with {seed['id']}"


def test_too_many_unusable_answers_fail_the_stage_after_writing(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Written([said(), "no", "no", "no"]))
    with pytest.raises(UserError, match="3 of 4 requests without a usable answer"):
        expand.run(configure(seeds, tmp_path, {"max_requests": 4, "judgmental_share": 1.0}, count=4))
    assert len(read_rows(tmp_path / "out" / "expanded.jsonl")) == 1


def test_a_teacher_that_gives_nothing_usable(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = Written(["I only know other things."])
    use(monkeypatch, teacher)
    with caplog.at_level("INFO"), pytest.raises(UserError, match=r"no usable row in \d+ answers: no JSON") as caught:
        expand.run(configure(seeds, tmp_path, count=1000))
    assert len(read_rows(tmp_path / "out" / "dropped.jsonl")) == len(teacher.asked) < 100
    assert re.search(r"^kept +0\n.*^tokens .*^cost +n/a", caplog.text, re.MULTILINE | re.DOTALL)
    assert "name a real teacher" in str(caught.value)
    served = configure(seeds, tmp_path / "served", count=1000)
    served.teacher.mode = TeacherMode.openai
    with pytest.raises(UserError, match=r"teacher\.retry_failed=true") as caught:
        expand.run(served)
    assert "name a real teacher" not in str(caught.value)


def test_seeds_that_cannot_be_shown_are_dropped(seeds: Path, tmp_path: Path) -> None:
    rows = [*read_rows(seeds), {"id": "a", "instruction": "s", "input": "", "output": "o"}]
    rows.append({"id": "b", "instruction": "s", "input": "q?", "output": ""})
    artifact = expand.run(configure(write_rows(tmp_path / "more.jsonl", rows), tmp_path, count=5))
    assert artifact.dropped["seed without statement or question"] == artifact.dropped["seed without answer"] == 1
    with pytest.raises(UserError, match="no row has a statement"):
        expand.run(configure(write_rows(tmp_path / "none.jsonl", rows[-2:]), tmp_path / "none"))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"round_size": 0}, "round_size"),
        ({"judgmental_share": 1.5}, "judgmental_share"),
        ({"novelty_threshold": 0.0}, "novelty_threshold"),
        ({"max_requests": 0}, "max_requests"),
        ({"machine_per_prompt": -1}, "machine_per_prompt"),
        ({"shape": Shape.task, "answers": False}, "answers"),
    ],
)
def test_settings_that_make_no_sense(seeds: Path, tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"self_instruct.{key}"):
        expand.run(configure(seeds, tmp_path, settings))


@pytest.mark.parametrize(("changes", "key"), [({"count": 0}, "count"), ({"max_failure_rate": 2.0}, "max_failure_rate")])
def test_numbers_that_make_no_sense(seeds: Path, tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        expand.run(configure(seeds, tmp_path, **changes))


@pytest.mark.parametrize("recipe", [Recipe.raft, Recipe.documents])
def test_documents_are_not_counted_in_rows(seeds: Path, tmp_path: Path, recipe: Recipe) -> None:
    config = configure(seeds, tmp_path, recipe=recipe)
    config.data.limit = 5
    with pytest.raises(UserError, match=rf"data.limit .*recipe={recipe.name} reads documents"):
        expand.run(config)


def test_metadata_that_no_one_would_join_is_refused(seeds: Path, tmp_path: Path) -> None:
    config = configure(seeds, tmp_path, metadata=MetadataConfig(path=str(seeds)))
    with pytest.raises(UserError, match="only recipe=documents joins it"):
        expand.run(config)


def test_a_dry_run_asks_for_as_much_as_the_wanted_rows_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"This is text number {number}, and it says that {number} is a number.")
    for recipe in (Recipe.raft, Recipe.documents):
        caplog.clear()
        with caplog.at_level("INFO", "alignkit"):
            expand.run(configure(folder, tmp_path / recipe.name, recipe=recipe, count=10, dry_run=True))
        assert any(line.split()[:2] == ["questions", "2"] for line in caplog.text.splitlines()), caplog.text


def test_a_count_is_needed(seeds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="count has no value"):
        expand.run(configure(seeds, tmp_path, count=None))


@pytest.mark.parametrize(
    ("setting", "said"), [("data.path=broken.jsonl", "broken.jsonl:1"), ("self_instruct.shape=tasks", "expected one")]
)
def test_bad_input_exits_with_2_and_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"id": "1", "instruction": "s", "input": "q?"\n')
    assert run_command("expand", ["run=r", "count=1", setting]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.out + told.err


def test_the_shipped_configuration_composes() -> None:
    config = load_config("expand", ["run=x"])
    assert isinstance(config, ExpandConfig) and config.recipe is Recipe.self_instruct
    assert config.self_instruct.novelty_threshold == 0.7 and config.self_instruct.shape is Shape.qa
    assert config.teacher.mode is TeacherMode.scripted
    assert Path(config.data.path).parts[-2:] == ("closed_world", "seeds.jsonl")
    assert config.self_instruct.blacklist and Path(config.self_instruct.blacklist).is_file()


# -- interruptions -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("shape", [Shape.qa, pytest.param(Shape.task, marks=pytest.mark.slow)])  # of one store
def test_killed_over_http_nothing_is_paid_twice(
    shape: Shape, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process is killed; what its command then does, and does once more, is done in this one."""
    canary, concurrency = "canary-b07d1-never-written-down", 4
    monkeypatch.setenv("TEST_TEACHER_KEY", canary)
    monkeypatch.chdir(tmp_path)
    with serving(lambda: time.sleep(0.02)) as server:
        given = [
            *(f"data.path={seeds}", "count=60", "run=r"),
            *("teacher.mode=openai", f"teacher.base_url={server.base_url}", "teacher.api_key_env=TEST_TEACHER_KEY"),
            *(f"teacher.concurrency={concurrency}", f"self_instruct.shape={shape.name}"),
        ]
        command = [sys.executable, "-m", "alignkit.expand", *given]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while server.requests < 30 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        outputs = tmp_path / "runs" / "r" / "expand"
        assert not (outputs / "expanded.jsonl").exists()
        assert run_command("expand", given) == 0
        requested = json.loads((outputs / "manifest.json").read_text())["metrics"]["requested"]
        assert requested <= server.requests <= requested + concurrency
        rows = (outputs / "expanded.jsonl").read_bytes()

        before = server.requests
        assert run_command("expand", [*given, "force=true"]) == 0
        assert server.requests == before  # everything came from the response store
    assert (outputs / "expanded.jsonl").read_bytes() == rows
    said, errors = capsys.readouterr()
    assert f"127.0.0.1:{server.server_port}" in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "teacher.sqlite" for path in files)
    assert all(canary.encode() not in path.read_bytes() for path in files)
    assert canary not in said + errors
