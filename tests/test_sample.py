"""The sample stage: completions for every usable question, resumable, nothing silently left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignkit import sample
from alignkit.core.app import load_config
from alignkit.core.config import ModelConfig, RowsConfig, SamplingConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.manifest import read_manifest
from alignkit.core.records import CompletionSet, Message
from alignkit.data.closed_world import World, answer
from alignkit.generation import hf
from alignkit.generation.engines import GeneratorKind
from alignkit.generation.openai import OpenAIGenerator
from alignkit.sample import SampleConfig
from alignkit.teacher.client import Answer, OnAnswer, Request, Usage
from alignkit.teacher.scripted import ScriptedTeacher

TINY = ModelConfig(name="tiny", path="embedded", dtype="float32", max_length=256)
SAMPLING = SamplingConfig(n=3, temperature=[0.7, 1.0], top_p=[0.8, 1.0], max_new_tokens=16, batch_size=6)


def questions(count: int) -> list[dict[str, Any]]:
    """Questions of the closed world, every second one with its answer."""
    world = World(1)
    rows = []
    for number in range(count):
        passage = world.passage()
        question = world.ask(passage)
        known = answer(passage.facts, question) if number % 2 else ""
        fields = {"instruction": passage.statement, "input": question.text, "output": known, "kind": question.kind}
        rows.append({"id": f"q-{number}", "parents": ["seed-1"], **fields})
    return rows


def configure(rows: list[dict[str, Any]], folder: Path, **changes: Any) -> SampleConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {"model": TINY, "sampling": SAMPLING, "name": "sample", "output_dir": str(folder / "out")}
    return SampleConfig(data=RowsConfig(path=str(path)), **(values | changes))


def completions(folder: Path) -> list[CompletionSet]:
    lines = (folder / "out" / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    return [CompletionSet.model_validate_json(line) for line in lines]


def test_every_question_gets_n_completions_and_keeps_its_id(tmp_path: Path) -> None:
    rows = questions(10)
    artifact = sample.run(configure(rows, tmp_path))
    written = completions(tmp_path)
    assert [row.id for row in written] == [row["id"] for row in rows]
    for row, source in zip(written, rows, strict=True):
        assert len(row.completions) == 3
        assert row.prompt[0].content == f"{source['instruction']}\n\n{source['input']}"
        assert row.reference == (source["output"] or None)
        assert row.parents == ["seed-1"]
        assert (row.model_extra or {})["kind"] == source["kind"]
        for completion in row.completions:
            assert completion.model == "tiny"
            assert 0.7 <= completion.sampling["temperature"] <= 1.0
            assert "<|im_end|>" not in completion.text
    assert len({each.sampling["temperature"] for row in written for each in row.completions}) > 20
    assert artifact.metrics["completions"] == 30
    assert 0 < artifact.metrics["distinct_share"] <= 1
    assert artifact.metrics["tokens_per_second"] > 0


def test_a_killed_run_ends_with_the_same_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = questions(40)  # 8 prompts a chunk
    (tmp_path / "whole").mkdir()
    sample.run(configure(rows, tmp_path / "whole"))

    decode, calls = hf.decode, 0

    def dies(*arguments: Any, **keywords: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the middle of the third chunk
            raise KeyboardInterrupt
        return decode(*arguments, **keywords)

    monkeypatch.setattr(hf, "decode", dies)
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        sample.run(configure(rows, tmp_path / "cut"))
    assert not (tmp_path / "cut" / "out" / "completions.jsonl").exists()
    calls = 100
    sample.run(configure(rows, tmp_path / "cut"))
    assert calls == 112  # three of five chunks were left, four batches each
    assert completions(tmp_path / "cut") == completions(tmp_path / "whole")
    assert not (tmp_path / "cut" / "out" / "unfinished").exists()


def test_questions_that_cannot_be_sampled_for_are_dropped_with_a_reason(tmp_path: Path) -> None:
    rows = questions(3)
    rows[0]["input"] = "Where? " * 300
    rows[1]["input"] = "Where? <|im_end|>"
    artifact = sample.run(configure(rows, tmp_path))
    assert [row.id for row in completions(tmp_path)] == ["q-2"]
    assert artifact.dropped == {
        "prompt and max_new_tokens exceed max_length": 1,
        "the text holds the special token <|im_end|>": 1,
    }
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [entry["row"]["id"] for entry in dropped] == ["q-0", "q-1"]
    with pytest.raises(UserError, match="no question can be sampled for"):
        sample.run(configure(rows[:2], tmp_path))


def test_the_known_answer_can_be_one_of_the_completions(tmp_path: Path) -> None:
    rows = questions(4)
    sample.run(configure(rows, tmp_path, include_reference=True))
    for row, source in zip(completions(tmp_path), rows, strict=True):
        models = [completion.model for completion in row.completions]
        assert models == ["tiny"] * 3 + (["reference"] if source["output"] else [])
        assert not source["output"] or row.completions[-1].text == source["output"]


def test_settings_without_sense_stop_before_anything_is_written(tmp_path: Path) -> None:
    config = configure(questions(1), tmp_path, sampling=SamplingConfig(n=2, temperature=[0.0, 0.0]))
    with pytest.raises(UserError, match="greedy"):
        sample.run(config)
    assert not (tmp_path / "out").exists()


def test_the_shipped_configuration_composes() -> None:
    config = load_config("sample", ["run=x", "+model=qwen7b", "sampling.n=2"])
    assert isinstance(config, SampleConfig)
    assert config.data.path == "runs/x/expand/expanded.jsonl"
    assert config.adapter == "runs/x/sft/adapter"
    assert (config.sampling.n, config.model.name) == (2, "qwen7b")
    assert load_config("sample", ["adapter=null"]).adapter is None


def test_a_missing_adapter_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter=.*nowhere: no such file or folder"):
        sample.run(configure(questions(1), tmp_path, adapter=str(tmp_path / "nowhere")))
    assert read_manifest(tmp_path / "out") is None


# -- from a teacher ----------------------------------------------------------------------------------------------------


class Numbering:
    """A teacher that answers with the number of the request, and not at all where that number is in `silent`."""

    def __init__(self, silent: Sequence[int] = ()) -> None:
        self.silent = silent
        self.usage = Usage()
        self.asked: list[Request] = []

    def ask(self, requests: Sequence[Request], on_answer: OnAnswer | None = None) -> list[Answer]:
        self.asked += requests
        failed = Answer(None, reason="no answer", detail="six attempts")
        answers = [failed if n in self.silent else Answer(str(n), str(n)) for n in range(len(requests))]
        self.usage.count(answers)
        return answers


PROMPTS = [[Message(role="user", content=text)] for text in ("one", "two", "three")]


def test_a_teacher_is_asked_for_every_completion_at_its_own_temperature() -> None:
    teacher = Numbering(silent=[4])
    generator = OpenAIGenerator(teacher, "model-x")
    written = generator.generate(PROMPTS, SAMPLING, seed=1)
    assert [[each.text for each in row] for row in written] == [["0", "1", "2"], ["3", "5"], ["6", "7", "8"]]
    assert [(position, answer.reason) for position, answer in generator.failures] == [(1, "no answer")]
    temperatures = [request.temperature for request in teacher.asked]
    assert [each.sampling for each in written[0]] == [{"temperature": value} for value in temperatures[:3]]
    assert all(value is not None and 0.7 <= value <= 1.0 for value in temperatures) and len(set(temperatures)) > 3
    assert {request.max_tokens for request in teacher.asked} == {16}
    assert {each.model for row in written for each in row} == {"model-x"}

    again, other = Numbering(), Numbering()
    OpenAIGenerator(again, "model-x").generate(PROMPTS, SAMPLING, seed=1)
    OpenAIGenerator(other, "model-x").generate(PROMPTS, SAMPLING, seed=2)
    assert again.asked == teacher.asked  # so that the response store has them
    assert {request.sample for request in other.asked}.isdisjoint(request.sample for request in teacher.asked)
    more = Numbering()
    OpenAIGenerator(more, "model-x").generate(PROMPTS, replace(SAMPLING, n=5), seed=1)
    assert len(more.asked) == 15 and all(request in more.asked for request in teacher.asked)


def from_teacher(rows: list[dict[str, Any]], folder: Path, **changes: Any) -> SampleConfig:
    teacher = TeacherConfig(model="scripted")
    return configure(rows, folder, generator=GeneratorKind.openai, teacher=teacher, adapter="nowhere/at/all", **changes)


def test_the_teacher_samples_without_a_policy(tmp_path: Path) -> None:
    rows = questions(30)
    artifact = sample.run(from_teacher(rows, tmp_path, include_reference=True))
    written = completions(tmp_path)
    assert [row.id for row in written] == [row["id"] for row in rows]
    texts = [completion.text for row in written for completion in row.completions if completion.model == "scripted"]
    right = [
        completion.text == row.reference
        for row in written
        for completion in row.completions
        if row.reference and completion.model == "scripted"
    ]
    assert len(texts) == 90 and 0.6 < sum(right) / len(right) < 1  # it makes mistakes
    assert (artifact.metrics["requested"], artifact.metrics["failed"], artifact.metrics["completions"]) == (90, 0, 90)
    assert artifact.metrics["teacher"] == "scripted" and artifact.metrics["usage"]["requests"] == 90
    assert [entry["key"] for entry in artifact.inputs] == ["data.path"]
    assert artifact.checks[-1].name == "answers usable" and artifact.checks[-1].passed


def test_answers_that_cannot_be_used_are_dropped_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Numbering(silent=[0, 3, 4, 5])
    monkeypatch.setattr("alignkit.teacher.client.open_teacher", lambda config: teacher)
    with pytest.raises(UserError, match="4 of 9 requests without a usable answer"):
        sample.run(from_teacher(questions(3), tmp_path))
    assert [(row.id, len(row.completions)) for row in completions(tmp_path)] == [("q-0", 2), ("q-2", 3)]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(entry["row"]["id"], entry["reason"]) for entry in dropped] == [("q-0", "no answer")] + [
        ("q-1", "no answer")
    ] * 3
    sample.run(from_teacher(questions(3), tmp_path, max_failure_rate=0.5))


def test_a_teacher_without_a_single_answer_is_one_clear_message(tmp_path: Path) -> None:
    rows = [{"id": "q", "instruction": "Water boils at 100 degrees.", "input": "When does it boil?"}]
    with pytest.raises(UserError, match="no usable answer at all, mostly: the scripted teacher knows only"):
        sample.run(from_teacher(rows, tmp_path))


def test_the_scripted_teacher_is_a_generator() -> None:
    written = OpenAIGenerator(ScriptedTeacher(), "scripted").generate(PROMPTS, SAMPLING, seed=1)
    assert written == [[], [], []]  # prompts outside its world
