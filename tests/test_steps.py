"""Steps: settings that survive the way through a command line, dependencies, order, and what a failure says."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any

import psutil
import pytest

from alignkit.core import steps
from alignkit.core.app import load_config
from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.manifest import to_plain
from alignkit.core.records import QAExample
from alignkit.core.stages import config_class
from alignkit.core.steps import Step, connect, describe, execute, hand_over, make_step, make_step_in, settings
from alignkit.data.jsonl import read_records

TEXTS = [
    "",
    " ",
    "plain",
    "odd \\\n",
    "it's",
    'a "word"',
    'say \\"it\\"',
    "comma, comma",
    "[x, y]",
    "{a: b}",
    "a=b",
    "key: value",
    "# no comment",
    "Größe 请看 🙂",
    "null",
    "true",
    "1",
    "1e5",
    "~a",
    "@b",
    "100 %",
    "$HOME",
    "two\nlines",
    "tab\there",
    "ends with \\",
    " spaces around ",
    "choice(a,b)",
    "C:\\models\\mine",
    "e\\'",
    'two \\\\" before',
    "${run}",
    "\\${run}",
]
NUMBERS = [0.0, -0.5, 1e-5, 0.1 + 0.2, 2e-308, 1e22, float("inf"), 3.0]


def through_a_command_line(stage: str, key: str, value: Any) -> Any:
    """The value that a stage has after `settings` has given it to the key."""
    given = ["data.path=held_out.jsonl"] if stage == "evaluate" else []
    config = load_config(stage, [*given, *settings(key, value)])
    for part in key.split("."):
        config = getattr(config, part)
    return config


FIVE_KEYS = ("model.chat_template", "model.revision", "model.eos_token", "model.pad_token", "model.attn")


@pytest.mark.parametrize("start", range(0, len(TEXTS), len(FIVE_KEYS)))
def test_any_text_arrives_alone_and_in_a_list(start: int) -> None:
    texts = TEXTS[start : start + len(FIVE_KEYS)]
    given = [each for key, text in zip(FIVE_KEYS, texts, strict=False) for each in settings(key, text)]
    model = load_config("sft", [*given, *settings("model.lora_targets", texts)]).model
    found = [getattr(model, key.removeprefix("model.")) for key in FIVE_KEYS]
    assert found[: len(texts)] == texts
    assert model.lora_targets == texts


def test_numbers_lists_and_nothing_arrive() -> None:
    for number in NUMBERS:
        assert through_a_command_line("judge", "temperature", number) == number
    assert through_a_command_line("sample", "sampling.temperature", [0.0, 1e-3]) == [0.0, 1e-3]
    assert through_a_command_line("sft", "model.lora_targets", []) == []
    assert through_a_command_line("sft", "model.revision", None) is None
    assert through_a_command_line("evaluate", "judge", False) is False
    assert through_a_command_line("evaluate", "seed", -3) == -3


# -- every configuration that a step is given -------------------------------------------------------------------------


def values_of(kind: Any, draw: random.Random) -> Any:
    """A value that a field of this type may have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return draw.choice([None, values_of(next(each for each in arguments if each is not type(None)), draw)])
    if origin is list:
        return [values_of(arguments[0], draw) for _ in range(draw.randrange(4))]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return draw.choice(list(kind))
    if kind is bool:
        return draw.random() < 0.5
    if kind is int:
        return draw.randrange(1, 10_000)
    if kind is float:
        return draw.choice([0.25, 1e-5, 0.1 + 0.2, 1 / 3])
    assert kind is str, kind
    return draw.choice(TEXTS[2:])


def filled(schema: type[Any], draw: random.Random) -> Any:
    """An instance of a dataclass with a value drawn for each field, except those that its own rules refuse."""
    hints = typing.get_type_hints(schema)
    for _ in range(200):
        values = {}
        for field in dataclasses.fields(schema):
            kind = hints[field.name]
            inner = isinstance(kind, type) and dataclasses.is_dataclass(kind)
            values[field.name] = filled(kind, draw) if inner else values_of(kind, draw)
        try:
            return schema(**values)
        except UserError:
            continue
    raise AssertionError(f"{schema} refuses every value")


def parts_that_are_handed_on() -> Iterator[tuple[str, str]]:
    """Stage and key of every dataclass that `select`, `sft`, `sample` and `evaluate` hold; nobody hands on servers."""
    for stage in ("select", "sft", "sample", "evaluate"):
        for name, kind in typing.get_type_hints(config_class(stage)).items():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and name != "servers":
                yield stage, name


@pytest.mark.parametrize(("stage", "key"), list(parts_that_are_handed_on()))
def test_whole_configurations_arrive(stage: str, key: str) -> None:
    schema = typing.get_type_hints(config_class(stage))[key]
    for number in range(2):
        value = filled(schema, random.Random(f"{stage} {key} {number}"))
        assert to_plain(through_a_command_line(stage, key, value)) == to_plain(value)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_mistake_in_a_step_is_found_when_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'train\.epoch'"):
        make_step_in(tmp_path, "first", "sft", ["train.epoch=1"])


def test_a_step_lies_in_the_folder_of_the_stage_that_runs_it(tmp_path: Path) -> None:
    home = tmp_path / 'odd, "home"'
    step = make_step_in(home, "first", "sft", ["seed=3"])
    assert (step.folder, step.label, step.config.seed) == (home / "first", f"{home.name}/first", 3)


def test_a_step_needs_those_whose_folder_it_reads_from(tmp_path: Path) -> None:
    def sft(name: str, path: str) -> Step:
        return make_step_in(tmp_path, name, "sft", settings("data.path", path))

    first, other = sft("first", "seeds.jsonl"), sft("first-2", "seeds.jsonl")
    second = make_step_in(
        tmp_path, "second", "sample",
        [*settings("data.path", str(tmp_path / "first-2" / "a.jsonl")), *settings("adapter", str(tmp_path / "first"))],
    )  # fmt: skip
    third = sft("third", str(tmp_path / "third" / "own.jsonl"))
    connect([second, third, first, other])
    assert first.needs == other.needs == third.needs == set()  # a step does not wait for itself
    assert second.needs == {tmp_path / "first", tmp_path / "first-2"}


def test_rows_are_handed_over_whole(tmp_path: Path) -> None:
    rows = [
        QAExample(id="a", instruction="请", input='"q"\n', output="", scores={"quality": 1 / 3}),
        QAExample.model_validate(
            {"id": "b", "instruction": "s", "kind": "judgmental", "level": "easy", "flags": ["x"]}
        ),
    ]
    path = tmp_path / "new" / "rows.jsonl"
    hand_over(path, rows)
    assert read_records(RowsConfig(path=str(path)), QAExample) == rows
    hand_over(path, rows[:1])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1
    assert [each.name for each in path.parent.iterdir()] == ["rows.jsonl"]


QUICK = "import sys, time, pathlib\n"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Python programs to run in the place of steps, by the steps' names."""
    import subprocess

    programs: dict[str, str] = {}

    def start(step: Step, workers: int, logs: Path) -> subprocess.Popen[bytes]:
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{step.label.replace('/', '-')}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-S", "-c", QUICK + programs[step.name], str(tmp_path)]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    monkeypatch.setattr(steps, "_start", start)
    return programs


def chain(tmp_path: Path, *names: str) -> list[Step]:
    """Steps of which each reads what the one before it writes."""
    (tmp_path / "seeds.jsonl").write_text('{"id": "a", "instruction": "s", "output": "o"}\n', encoding="utf-8")
    made, path = [], tmp_path / "seeds.jsonl"
    for name in names:
        made.append(make_step_in(tmp_path, name, "sft", settings("data.path", str(path))))
        path = tmp_path / name / "out.jsonl"
    connect(made)
    return made


WRITE = """
folder = pathlib.Path(sys.argv[1])
(folder / {name!r}).mkdir(exist_ok=True)
(folder / {name!r} / "out.jsonl").write_text('{{"id": "a", "instruction": "s", "output": "o"}}')
"""


def test_steps_run_in_the_order_of_their_needs(tmp_path: Path, scripts: dict[str, str]) -> None:
    made = chain(tmp_path, "one", "two", "three")
    scripts |= {name: WRITE.format(name=name) for name in ("one", "two", "three")}
    done = [step.name for step, _ in execute(made[::-1], 3, tmp_path / "logs")]
    assert done == ["one", "two", "three"]
    assert describe(made[0]).startswith(f"{tmp_path.name}/one")  # of a step without a manifest, too


def test_a_failed_step_says_its_error_and_stops_the_others(tmp_path: Path, scripts: dict[str, str]) -> None:
    made = [
        *chain(tmp_path, "bad", "after"),
        make_step_in(tmp_path, "beside", "sft", [f"data.path={tmp_path}/s.jsonl"]),
    ]
    (tmp_path / "s.jsonl").write_text("{}\n", encoding="utf-8")
    scripts["bad"] = "time.sleep(0.3); print('noise'); print('error: k=0: no good'); print('more'); sys.exit(2)"
    scripts["beside"] = "time.sleep(60)"
    with pytest.raises(UserError) as caught:
        list(execute(made, 2, tmp_path / "logs"))
    log = tmp_path / "logs" / f"{tmp_path.name}-bad.log"
    assert str(caught.value) == f"step {tmp_path.name}/bad failed (exit 2): k=0: no good -- whole output: {log}"
    assert log.read_text(encoding="utf-8").splitlines()[0] == "noise"


@pytest.mark.parametrize(
    ("program", "said"), [("sys.exit(3)", "no output"), ("print('a'); print('last'); sys.exit(3)", "last")]
)
def test_a_step_that_dies_without_a_message(tmp_path: Path, scripts: dict[str, str], program: str, said: str) -> None:
    scripts["bad"] = program
    with pytest.raises(UserError, match=rf"failed \(exit 3\): {said} -- whole output"):
        list(execute(chain(tmp_path, "bad"), 1, tmp_path / "logs"))


def test_steps_that_wait_for_each_other_are_named(tmp_path: Path) -> None:
    made = chain(tmp_path, "one", "two")
    made[0].needs = {tmp_path / "two"}
    with pytest.raises(UserError, match=r"steps wait for each other: .*one, .*two"):
        list(execute(made, 1, tmp_path / "logs"))


@pytest.mark.parametrize("forked", [True, False])
def test_a_real_step_is_the_command_a_user_would_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    """The command, the folder, the log and the message of a step that has nothing to read."""
    path = tmp_path / 'it\'s, "odd"' / "gone.jsonl"
    path.parent.mkdir()
    path.write_text("no json\n", encoding="utf-8")
    monkeypatch.setattr(steps, "can_fork", lambda: forked)
    step = make_step("select", "select", [*settings("data.path", str(path)), f"output_dir={tmp_path / 'out'}"])
    with pytest.raises(UserError, match=r"step .*/select failed \(exit 2\): .*gone\.jsonl:1"):
        list(execute([step], 1, tmp_path / "logs"))


STEP = (
    "import time; from alignkit.core.process import guarded as g; raise SystemExit(g('step', lambda: time.sleep(60)))"
)
PARENT_OF_STEP = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {STEP!r}], env=os.environ | {{"ALIGNKIT_PARENT": str(os.getpid())}})
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_step_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT_OF_STEP], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    step = psutil.Process(int(parent.stdout.readline()))
    time.sleep(2)  # until it watches its parent
    parent.kill()
    parent.wait()
    step.wait(timeout=10)  # raises when it is still there
    assert not psutil.pid_exists(step.pid)
