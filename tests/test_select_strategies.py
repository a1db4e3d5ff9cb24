"""select, strategy by strategy: how many rows, which ones, in what order, and what became of the others."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from selecting import (
    QUICK,
    Rows,
    arguments,
    audit_of,
    ids,
    in_order_of_rank,
    make_rows,
    read,
    reasons,
    select,
    start_command,
    warnings,
    with_qualities,
)

from alignkit.core.config import RowsConfig
from alignkit.core.records import CompletionSet, QAExample
from alignkit.data.jsonl import read_records
from alignkit.generation.hf import HFGenerator
from alignkit.scoring.diversity import k_center_greedy
from alignkit.scoring.row_embedding import EmbeddingConfig, embed_rows
from alignkit.scoring.rules import broken_rules, rule_quality

pytest_plugins = ["inside_steps"]

MODS = ("strategy=mods", *QUICK)


def vectors_of(rows: Rows) -> Any:
    return embed_rows([QAExample.model_validate(row) for row in rows], EmbeddingConfig(cache="none"))


# -- without a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("random", "not drawn"),
        ("quality", "others have a higher or equal quality"),
        ("coverage", "covered by a selected row"),
    ],
)
@pytest.mark.parametrize("k", [1, 5, 12])
def test_exactly_k_rows_and_every_other_one_has_the_reason(tmp_path: Path, strategy: str, reason: str, k: int) -> None:
    rows = make_rows(12)
    artifact = select(tmp_path, rows, f"strategy={strategy}", f"k={k}")
    chosen, left = in_order_of_rank(artifact), reasons(artifact)
    assert len(chosen) == k
    assert {*chosen, *left} == set(ids(rows))
    assert set(left.values()) == ({reason} if k < 12 else set())
    assert artifact.metrics["rows_selected"] == k
    assert artifact.metrics["rows_read"] == 12
    assert audit_of(artifact)["strategy"] == strategy


def test_the_seed_moves_what_is_drawn_and_nothing_else(tmp_path: Path) -> None:
    rows = with_qualities(make_rows(12), [9.0] * 6 + [8.0] * 6)

    def chosen(strategy: str, seed: int, k: int) -> list[str]:
        overrides = [f"strategy={strategy}", f"k={k}", f"seed={seed}", "quality.reuse=true", "quality.threshold=7"]
        return in_order_of_rank(select(tmp_path / f"{strategy}-{seed}-{k}", rows, *overrides))

    assert chosen("coverage", 1, 5) == chosen("coverage", 2, 5)
    drawn = {tuple(chosen("random", seed, 5)) for seed in range(3)}
    assert len(drawn) == 3
    best = [chosen("quality", seed, 9) for seed in range(3)]
    assert {frozenset(each[:6]) for each in best} == {frozenset(ids(rows)[:6])}  # rank 1 to 6: all of the better ones
    assert len({frozenset(each[6:]) for each in best}) > 1  # of equal ones it is the seed that decides


def test_quality_takes_the_best_scores(tmp_path: Path) -> None:
    rows = with_qualities(make_rows(6), [8.0, 9.5, 7.0, 9.0, 7.5, 10.0])
    artifact = select(tmp_path, rows, "strategy=quality", "k=3", "quality.reuse=true", "quality.threshold=7")
    assert in_order_of_rank(artifact) == ["row-5", "row-1", "row-3"]
    assert reasons(artifact)["row-2"] == "earlier score too low"  # 7 is not above 7
    assert [each["rows"] for each in audit_of(artifact)["funnel"]] == [6, 6, 5]


def test_random_draws_among_all_rows_that_hygiene_leaves(tmp_path: Path) -> None:
    rows = with_qualities(make_rows(8), [1.0] * 8)
    rows[3]["output"] = ""
    artifact = select(tmp_path, rows, "strategy=random", "k=7", "quality.reuse=true", "quality.threshold=7")
    assert set(in_order_of_rank(artifact)) == {f"row-{number}" for number in (0, 1, 2, 4, 5, 6, 7)}
    assert reasons(artifact) == {"row-3": "empty answer"}


def test_coverage_begins_with_the_best_row_and_goes_on_with_the_farthest(tmp_path: Path) -> None:
    rows = with_qualities(make_rows(10), [8.0] * 4 + [9.0] + [8.0] * 5)
    artifact = select(tmp_path, rows, "k=6", "quality.reuse=true", "quality.threshold=7")
    expected = [f"row-{place}" for place in k_center_greedy(vectors_of(rows), 6, first=4)]
    assert in_order_of_rank(artifact) == expected
    distances = np.linalg.norm(vectors_of(rows)[:, None] - vectors_of(rows)[None], axis=2)
    centres = [int(id.removeprefix("row-")) for id in expected]
    radius = distances[:, centres].min(axis=1).max()
    assert artifact.metrics["coverage_radius"] == pytest.approx(radius, abs=1e-4)
    coverage = audit_of(artifact)["coverage"]
    assert coverage["chosen"] == [[6, pytest.approx(radius, abs=1e-6)]]
    assert [coverage["curve"][0][0], coverage["curve"][-1]] == [1, [6, pytest.approx(radius, abs=1e-6)]]
    details = {each["row"]["id"]: each["detail"] for each in read(artifact.folder, "dropped.jsonl")}
    for id, detail in details.items():
        near = distances[int(id.removeprefix("row-")), centres]
        assert detail == f"nearest is {expected[near.argmin()]}, at distance {near.min():.3f}"


def test_a_radius_is_reached_with_as_few_centres_as_the_greedy_way_needs(tmp_path: Path) -> None:
    rows = make_rows(15)
    every = select(tmp_path / "all", rows, "radius=0")
    assert len(in_order_of_rank(every)) == 15
    curve = dict(audit_of(every)["coverage"]["curve"])
    wanted = curve[6]
    artifact = select(tmp_path / "some", rows, f"radius={wanted!r}")
    assert len(in_order_of_rank(artifact)) == next(k for k, radius in curve.items() if radius <= wanted)
    assert artifact.metrics["coverage_radius"] <= round(wanted, 4)
    assert len(in_order_of_rank(select(tmp_path / "fewer", rows, f"radius={wanted!r}", "k=3"))) == 3


# -- mods -------------------------------------------------------------------------------------------------------------


def initial_scores(folder: Path, rows: Rows) -> dict[str, float]:
    """Id -> what rules say of the initial model's answer, worked out from the answers on disk."""
    path = folder / "initial" / "sample" / "completions.jsonl"
    kinds = {row["id"]: row["kind"] for row in rows}
    scores = {}
    for row in read_records(RowsConfig(path=str(path)), CompletionSet):
        (completion,) = row.completions
        output = completion.text if completion.finished else ""
        example = QAExample(
            id=row.id, instruction="", input=row.prompt[-1].content.split("\n\n")[-1], output=output, kind=kinds[row.id]
        )
        scores[row.id] = rule_quality(broken_rules(example, min_words=1, max_words=400, max_repetition=0.3))
    return scores


@pytest.fixture(scope="module")
def pool() -> Rows:
    return make_rows(14)


def test_mods_selects_seeds_then_necessary_rows_then_covers(
    pool: Rows, tmp_path: Path, inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pick worked out again from the files, by k-center on whole matrices."""
    artifact = select(tmp_path, pool, "k=8", *MODS, "necessity.share=0.75")
    assert inside == ["initial/sft", "initial/sample"]
    chosen, left = in_order_of_rank(artifact), reasons(artifact)
    assert len(chosen) == len(set(chosen)) == 8
    assert {*chosen, *left} == set(ids(pool))

    vectors = vectors_of(pool)
    seeds = [f"row-{place}" for place in k_center_greedy(vectors, 2)]  # 8 - 0.75 * 8
    assert chosen[:2] == seeds
    assert sorted(ids(read(artifact.folder / "initial", "seeds.jsonl"))) == sorted(seeds)
    scores = initial_scores(artifact.folder, pool)
    necessary = [id for id in ids(pool) if scores[id] < 7]
    assert len(set(necessary) - set(seeds)) > 0

    expected, distances = list(seeds), np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    for candidates in (necessary, ids(pool)):
        while len(expected) < 8 and (rest := [id for id in candidates if id not in expected]):
            centres = [ids(pool).index(id) for id in expected]
            expected.append(max(rest, key=lambda id: distances[ids(pool).index(id), centres].min()))
    assert chosen == expected

    needed = min(6, len(set(necessary) - set(seeds)))
    counted = {"answered": 14, "no_score": 0, "necessary": len(necessary), "chosen": needed, "filled_up": 6 - needed}
    assert artifact.metrics["necessity"] == counted
    spared = {id for id, score in scores.items() if score >= 7} - set(chosen)
    assert {id for id, reason in left.items() if reason == "not necessary"} == spared
    audit = audit_of(artifact)
    assert [each["rows"] for each in audit["funnel"]] == [14, 14, 14, 2, 8]
    assert sum(audit["necessity"]["counts"]) == 14
    decided = {point[3]: point[2] for point in audit["map"]["points"]}
    assert {id for id, decision in decided.items() if decision == "necessary"} == set(chosen[2 : 2 + needed])
    assert {decided[id] for id in (*seeds, *chosen[2 + needed :])} == {"seed"}
    assert {decided[id] for id in left} <= {"covered"}


class Told:
    """Instead of `answer_by_initial_model`: answers that score as they are told to, in rows of reused quality."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
        self.seeds: list[str] = []
        self.answers = answers
        monkeypatch.setattr("alignkit.training.initial_model.answer_by_initial_model", self)

    def __call__(self, home: Path, seeds: list[QAExample], *others: Any) -> dict[str, str]:
        self.seeds = [row.id for row in seeds]
        return self.answers


GOOD, ONE_RULE_BROKEN, EMPTY = "It is a good answer.", "so so so so so so", ""
"""Answers that rules score with 10, 5 and 0, where the row is not judgmental."""


def plain_rows(count: int) -> Rows:
    return [row | {"kind": None} for row in make_rows(count)]


def test_scores_at_the_threshold_are_neither_good_nor_necessary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = with_qualities(plain_rows(8), [6.0] * 6 + [5.0, 4.0])
    answers = [GOOD, GOOD, ONE_RULE_BROKEN, ONE_RULE_BROKEN, EMPTY, EMPTY]
    told = Told(monkeypatch, {f"row-{number}": text for number, text in enumerate(answers)})
    options = ["strategy=mods", "quality.reuse=true", "quality.threshold=5"]
    artifact = select(tmp_path / "same", rows, "k=2", *options)
    left = reasons(artifact)
    assert left["row-6"] == left["row-7"] == "earlier score too low"  # 5 is not above 5
    assert artifact.metrics["necessity"]["necessary"] == 2  # and not below it either
    assert artifact.metrics["necessity"]["answered"] == 6
    chosen = in_order_of_rank(artifact)
    assert chosen[:1] == told.seeds
    assert chosen[1] in {"row-4", "row-5"}
    assert {id for id, reason in left.items() if reason == "not necessary"} == {
        f"row-{number}" for number in range(4)
    } - set(chosen)

    another = select(tmp_path / "another", rows, "k=2", *options, "necessity.threshold=5.01")
    assert another.metrics["necessity"]["necessary"] == 4
    none = select(tmp_path / "none", rows, "k=4", *options, "necessity.threshold=-1")
    assert none.metrics["necessity"] == {
        "answered": 6, "no_score": 0, "necessary": 0, "chosen": 0, "filled_up": 2
    }  # fmt: skip
    assert set(in_order_of_rank(none)[:2]) == set(told.seeds)
    vectors = vectors_of(rows[:6])
    assert in_order_of_rank(none) == [f"row-{place}" for place in k_center_greedy(vectors, 4)]  # coverage goes on


def test_a_row_is_merged_once_and_a_copy_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plain_rows(6)
    rows[5] = rows[2] | {"id": "row-5"}
    Told(monkeypatch, {row["id"]: EMPTY for row in rows})  # all are necessary, the seeds as well
    with warnings() as said:
        options = ["strategy=mods", "k=6", "hygiene.exact_duplicates=false", "hygiene.near_duplicates=null"]
        artifact = select(tmp_path, rows, *options)
    assert set(in_order_of_rank(artifact)) == {f"row-{number}" for number in range(5)}
    assert reasons(artifact) == {"row-5": "copy of a selected row"}
    assert "k=6, but there are only 5 different rows to choose from" in said


def test_a_row_that_the_initial_model_did_not_answer_is_not_called_necessary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = plain_rows(6)
    Told(monkeypatch, {f"row-{number}": EMPTY for number in (1, 2)})
    artifact = select(tmp_path, rows, "strategy=mods", "k=3")
    assert artifact.metrics["necessity"]["answered"] == 2
    assert artifact.metrics["necessity"]["necessary"] == 2
    assert "not necessary" not in reasons(artifact).values()


@pytest.mark.parametrize(("k", "share", "seeds"), [(1, 0.5, 1), (2, 0.9, 1), (3, 0.5, 1), (10, 0.2, 8), (99, 0.5, 6)])
def test_how_many_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, share: float, seeds: int) -> None:
    told = Told(monkeypatch, {})
    select(tmp_path, plain_rows(12), "strategy=mods", f"k={k}", f"necessity.share={share}")
    assert len(told.seeds) == seeds


def test_only_what_has_changed_is_done_again(pool: Rows, tmp_path: Path, inside: list[str]) -> None:
    first = select(tmp_path, pool, "k=6", *MODS)
    chosen = in_order_of_rank(first)
    assert select(tmp_path, pool, "k=6", *MODS).up_to_date
    assert len(inside) == 2
    forced = select(tmp_path, pool, "k=6", *MODS, "force=true")
    assert in_order_of_rank(forced) == chosen
    assert inside == ["initial/sft", "initial/sample"] * 2
    select(tmp_path, pool, "k=6", *MODS, "necessity.threshold=3", "workers=2")
    assert len(inside) == 4  # another threshold neither trains nor answers again
    select(tmp_path, pool, "k=6", *MODS, "sampling.max_new_tokens=8")
    assert inside[4:] == ["initial/sample"]


def wait_for(path: Path, lines: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and (not lines or len(path.read_bytes().splitlines()) >= lines):
            return
        time.sleep(0.005)
    raise AssertionError(f"{path} did not come about; exit code {process.poll()}")


@pytest.mark.slow
def test_after_kill_9_while_answering_neither_training_nor_answers_are_done_again(
    tmp_path: Path, inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(20)
    options = ["k=6", *MODS, "train.max_steps=1", "sampling.batch_size=1"]  # four rows a chunk
    whole = select(tmp_path / "whole", rows, *options)
    home = tmp_path / "select" / "initial"
    process = start_command(tmp_path, arguments(tmp_path, rows, *options))
    wait_for(home / "sample" / "unfinished" / "completions.jsonl", 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "select" / "selected.jsonl").exists()
    trained = (home / "sft" / "manifest.json").stat()
    journal = (home / "sample" / "unfinished" / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    answered = [json.loads(line) for line in journal[1:5]]

    inside.clear()
    generate, chunks = HFGenerator.generate, []

    def counted(self: HFGenerator, *arguments: Any) -> Any:
        chunks.append(len(arguments[0]))
        return generate(self, *arguments)

    monkeypatch.setattr(HFGenerator, "generate", counted)
    resumed = select(tmp_path, rows, *options)
    assert inside == ["initial/sample"]
    assert (home / "sft" / "manifest.json").stat().st_mtime_ns == trained.st_mtime_ns
    completions = {row["id"]: row for row in read(home / "sample", "completions.jsonl")}
    assert len(completions) == 20
    for entry in answered:
        assert completions[entry["id"]]["completions"][0]["text"] == entry["value"][0]["text"]
    assert len(chunks) == 5 - (len(journal) - 1) // 4
    assert in_order_of_rank(resumed) == in_order_of_rank(whole)
    assert reasons(resumed) == reasons(whole)


@pytest.mark.slow
def test_after_kill_9_while_training_the_checkpoint_goes_on(
    tmp_path: Path, inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(12)
    options = ["k=6", *MODS, "train.max_steps=60"]
    process = start_command(tmp_path, arguments(tmp_path, rows, *options))
    unfinished = tmp_path / "select" / "initial" / "sft" / "unfinished"
    deadline = time.monotonic() + 120
    while not list(unfinished.glob("**/seal.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "select" / "initial" / "sft" / "adapter").exists()
    step, taken = torch.optim.AdamW.step, list[int]()

    def counted(self: torch.optim.AdamW, *arguments: Any, **keywords: Any) -> Any:
        taken.append(1)
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    artifact = select(tmp_path, rows, *options)
    assert inside == ["initial/sft", "initial/sample"]
    assert 0 < len(taken) < 60
    assert len(in_order_of_rank(artifact)) == 6
