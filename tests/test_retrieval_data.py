"""Rows of queries with passages: how they are read, what is drawn from them, and which stand in one step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import RetrievalExample
from alignkit.core.retriever_config import Distill, Negatives, Positives, TaskConfig
from alignkit.data.sources import read_retrieval
from alignkit.training.held_out import split_by_query
from alignkit.training.retrieval_data import TaskSampler, draw, usable, without_false_negatives

ROW: dict[str, Any] = {"query": "who ?", "pos": ["p0", "p1"], "neg": ["n0", "n1", "n2"], "task": "qa", "query_id": 7}
SCORES = [0.1, 0.4, 0.9, 0.2, 0.3]


def example(**changes: Any) -> RetrievalExample:
    return RetrievalExample(**{**ROW, "id": "r", "query_id": "7", **changes})


def read(folder: Path, *rows: dict[str, Any], task: str | None = None) -> list[RetrievalExample]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_retrieval(RowsConfig(path=str(path)), task)[0]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_the_names_of_rows(tmp_path: Path) -> None:
    nameless = {key: value for key, value in ROW.items() if key != "query_id"}
    found = read(tmp_path, ROW, nameless, {**nameless, "qid": "x1"}, {**nameless, "id": "mine"})
    assert [row.id for row in found] == ["qa-7", "rows-2", "qa-x1", "mine"]
    assert [row.query_id for row in found] == ["7", "rows-2", "x1", "mine"]


def test_a_chat_has_its_history_for_passages(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"query": "so ?", "history": ["a", "b"], "task": "chat", "teacher_scores": [1, 2]})
    assert (found.pos, found.neg, found.teacher_scores) == ([], ["a", "b"], [1, 2])


def test_hotpotqa_rows_are_queries_with_passages(tmp_path: Path) -> None:
    context = [["A", ["A is.", " It was."]], ["B", ["B is."]], ["C", ["C is."]]]
    row = {"_id": "h", "question": "which ?", "answer": "B", "context": context, "supporting_facts": [["B", 0]]}
    (found,) = read(tmp_path, row, task="qa")
    assert (found.pos, found.neg) == (["B B is."], ["A A is. It was.", "C C is."])
    assert (found.id, found.task, found.answers) == ("h", "qa", ["B"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": None}, r"rows\.jsonl:2: task: missing.*task=qa"),
        ({"teacher_scores": [1.0, 2.0]}, r"rows\.jsonl:2: 2 teacher_scores for 5 passages \(2 pos and 3 neg\)"),
        ({"query_id": 1.5}, r"rows\.jsonl:2: query_id: must be a text or a whole number"),
        ({"neg": ["a", 3]}, r"rows\.jsonl:2: neg\.1"),
        ({"query": ""}, r"rows\.jsonl:2: query"),
    ],
)
def test_bad_rows_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    bad = {key: value for key, value in {**ROW, "query_id": 8, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=said):
        read(tmp_path, ROW, bad)


def test_a_negative_that_is_a_positive_leaves_with_its_score() -> None:
    given = example(neg=["n0", " P1", "n2"], neg_index=[5, 6, 7], teacher_scores=SCORES)
    found, removed = without_false_negatives(given)
    assert removed == [" P1"]
    assert (found.neg, found.neg_index) == (["n0", "n2"], [5, 7])
    assert found.teacher_scores == [0.1, 0.4, 0.9, 0.3]
    assert without_false_negatives(found) == (found, [])


# -- what can be learned from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "task", "reason"),
    [
        ({"pos": []}, TaskConfig(), "no positive"),
        ({"neg": []}, TaskConfig(), "no negative"),
        ({}, TaskConfig(distill_weight=1.0), "no teacher scores"),
        ({}, TaskConfig(negatives=Negatives.teacher_highest), "no teacher scores"),
        ({"teacher_scores": SCORES}, TaskConfig(min_teacher_margin=0.9), "teacher scores too close"),
        ({"teacher_scores": SCORES}, TaskConfig(min_teacher_score=1.0), "teacher scores too low"),
        (
            {"pos": [], "neg": ["n0"], "teacher_scores": [1.0]},
            TaskConfig(positives=Positives.teacher),
            "no negative",
        ),
    ],
)
def test_rows_of_no_use_are_set_aside(row: dict[str, Any], task: TaskConfig, reason: str) -> None:
    good = example(id="good", teacher_scores=[9.0, 0.0, 0.0, 0.0, 0.0])
    kept, dropped = usable([example(**row), good], {"qa": task}, 2, seed=1)
    assert [each.id for each in kept] == ["good"]
    assert [each.reason for each in dropped] == [reason]
    with pytest.raises(UserError, match=f"task 'qa': none of its 1 rows can be used. {reason}: "):
        usable([example(**row)], {"qa": task}, 2, seed=1)


def test_a_row_without_positive_has_the_teachers() -> None:
    task = TaskConfig(positives=Positives.teacher)
    kept, _ = usable([example(pos=[], teacher_scores=[1.0, 3.0, 2.0])], {"qa": task}, 2, seed=1)
    drawn = draw(kept[0], task, 2, Random(1))
    assert drawn.passages[0] == "n1"
    assert set(drawn.passages[1:]) == {"n0", "n2"}
    assert drawn.positives == ("n1",)


def test_at_most_max_rows_are_used() -> None:
    rows = [example(id=f"r{number}") for number in range(9)]
    kept, dropped = usable(rows, {"qa": TaskConfig(max_rows=4)}, 2, seed=1)
    assert (len(kept), Counter(each.reason for each in dropped)) == (4, {"more rows than max_rows": 5})


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "passages"),
    [
        (TaskConfig(negatives=Negatives.first), ("p0", "n0", "n1")),
        (TaskConfig(negatives=Negatives.teacher_lowest), ("p0", "n1", "n2")),
        (TaskConfig(negatives=Negatives.teacher_highest), ("p0", "n0", "n2")),
        (TaskConfig(positives=Positives.teacher, negatives=Negatives.first), ("n0", "n1", "n2")),
        (TaskConfig(positives=Positives.teacher_positives, negatives=Negatives.first), ("p1", "n0", "n1")),
    ],
)
def test_the_choices_that_leave_nothing_to_chance(task: TaskConfig, passages: tuple[str, ...]) -> None:
    drawn = draw(example(teacher_scores=SCORES), task, 2, Random(1))
    assert drawn.passages == passages
    by_text = dict(zip(["p0", "p1", "n0", "n1", "n2"], SCORES, strict=True))
    assert drawn.teacher == tuple(by_text[text] for text in passages)


def test_chance_draws_every_passage() -> None:
    task = TaskConfig(positives=Positives.random)
    drawn = [draw(example(), task, 2, Random(number)) for number in range(40)]
    assert {each.passages[0] for each in drawn} == {"p0", "p1"}
    assert {text for each in drawn for text in each.passages[1:]} == {"n0", "n1", "n2"}
    assert all(len(set(each.passages)) == 3 for each in drawn)
    assert all(set(each.positives) == {"p0", "p1"} for each in drawn)


def test_too_few_negatives_are_repeated_and_ranks_stand_by_score() -> None:
    task = TaskConfig(distill_weight=1.0, distill=Distill.stable, passage_instruction="P: ", query_instruction="Q: ")
    drawn = draw(example(teacher_scores=SCORES), task, 5, Random(1))
    assert drawn.query == "Q: who ?"
    assert drawn.teacher == (0.1, *sorted((drawn.teacher or ())[1:], reverse=True))
    assert sorted(Counter(drawn.passages[1:]).values()) == [1, 2, 2]
    assert all(text.startswith("P: ") for text in (*drawn.passages, *drawn.positives))


def test_queries_are_held_out_whole_and_of_every_task() -> None:
    rows = [
        example(id=f"{task}{number}", task=task, query_id=str(number // 2)) for task in "ab" for number in range(20)
    ]
    train, held_out = split_by_query(rows, 0.2, seed=1)
    sides = [{(row.task, row.query_id) for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert Counter(task for task, _ in sides[1]) == {"a": 2, "b": 2}
    with pytest.raises(UserError, match=r"held_out_share=0\.01"):
        split_by_query(rows, 0.01, seed=1)


# -- steps -------------------------------------------------------------------------------------------------------------

TASKS = ["big"] * 41 + ["small"] * 7


def sampler(seed: int = 1, **others: Any) -> TaskSampler:
    return TaskSampler(TASKS, [1] * len(TASKS), 8, seed, **others)


def test_a_step_has_one_task_and_an_epoch_every_row_once() -> None:
    steps = list(sampler().steps())
    assert all(len({TASKS[row] for row in step}) == 1 for step in steps)
    assert sorted(row for step in steps for row in step) == list(range(len(TASKS)))
    assert sorted(len(step) for step in steps) == sorted(sampler().sizes()) == [6, 7, 7, 7, 7, 7, 7]


def test_steps_depend_on_seed_and_epoch_alone() -> None:
    later = sampler()
    later.set_epoch(1)
    assert list(sampler().steps()) == list(sampler().steps())
    assert list(sampler().steps()) != list(later.steps())
    assert list(sampler().steps()) != list(sampler(seed=2).steps())


def test_processes_get_equally_many_rows_of_every_step() -> None:
    shared = sampler(processes=2)
    assert all(size % 2 == 0 for size in shared.sizes())
    assert len(shared) == 40 + 6
    with pytest.raises(UserError, match="'small' has fewer rows than the 8 processes"):
        sampler(processes=8)


def test_a_high_temperature_evens_the_tasks_out() -> None:
    even = sampler(temperature=100.0)
    counts = Counter(TASKS[step[0]] for step in even.steps())
    assert counts == {"big": 4, "small": 3}  # 7 steps, shared by 41^0.01 and 7^0.01
    assert all(len(set(step)) == len(step) for step in even.steps())
