"""Scoring in blocks: each row once, in its place, also after a kill."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from choosing import completion, row
from tiny_random import conversation

from alignkit.core.journal import Journal
from alignkit.core.records import Message
from alignkit.scoring.resumable import score_all, score_completions

HANGS_AT_THE_THIRD_BLOCK = """
import sys, time
from pathlib import Path
from alignkit.core.journal import Journal
from alignkit.core.records import Message
from alignkit.scoring.resumable import score_all, score_completions

class Hanging:
    calls = 0
    def score(self, conversations):
        self.calls += 1
        if self.calls == 3:
            print("third block", flush=True)
            time.sleep(60)
        self.reasons = [None] * len(conversations)
        return [len(turns[-1].content) / 3 for turns in conversations]

def turns(number):
    return [Message(role="user", content="?"), Message(role="assistant", content="a" * number)]

with Journal(Path(sys.argv[1]), "scores") as journal:
    score_all(Hanging(), [(f"row {number}", turns(number)) for number in range(50)], journal, block=10)
"""


class LengthScorer:
    """A third of the answer's length; none for an answer without characters; not a number for "nan" and "inf"."""

    def __init__(self) -> None:
        self.reasons: list[str | None] = []
        self.blocks: list[int] = []

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        self.blocks.append(len(conversations))
        texts = [turns[-1].content for turns in conversations]
        self.reasons = [None if text else "empty answer" for text in texts]
        return [(float(text) if text in ("nan", "inf") else len(text) / 3) if text else None for text in texts]


def rows(*answers: str) -> list[tuple[str, list[Message]]]:
    return [(f"row {number}", conversation("?", answer)) for number, answer in enumerate(answers)]


def test_scores_and_reasons_in_the_rows_order(tmp_path: Path) -> None:
    scorer = LengthScorer()
    with Journal(tmp_path / "journal.jsonl", "scores") as journal:
        found = score_all(scorer, rows("a", "", "abc", "ab", "abcd"), journal, block=2)
        assert found == [(1 / 3, None), (None, "empty answer"), (1.0, None), (2 / 3, None), (4 / 3, None)]
        assert scorer.blocks == [2, 2, 1]
        assert score_all(scorer, [], journal) == []


def test_a_score_that_is_no_number_is_none_with_a_reason_also_when_read_back(tmp_path: Path) -> None:
    for scorer in (LengthScorer(), LengthScorer()):
        with Journal(tmp_path / "journal.jsonl", "scores") as journal:
            found = score_all(scorer, rows("nan", "a", "inf"), journal)
        assert found == [(None, "score is not a number"), (1 / 3, None), (None, "score is not a number")]
    assert scorer.blocks == []


def test_what_the_journal_holds_is_not_scored_again(tmp_path: Path) -> None:
    scorer = LengthScorer()
    with Journal(tmp_path / "journal.jsonl", "scores") as journal:
        journal.add("row 1", [9.0, None])
        assert score_all(scorer, rows("a", "ab", "abc"), journal) == [(1 / 3, None), (9.0, None), (1.0, None)]
    assert scorer.blocks == [2]


def test_completions_are_scored_by_row_and_unfinished_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = [
        row("a", completion("abc", None), completion("cut", None, finished=False), completion("", None)),
        row("b", completion("nan", None)),
        row("c", completion("cut", None, finished=False)),
    ]
    scorer = LengthScorer()
    with Journal(tmp_path / "journal.jsonl", "scores") as journal:
        scored = score_completions(scorer, some, journal, block=2)
        assert [[each.score for each in found.completions] for found in scored] == [[1.0, None, None], [None], [None]]
        assert [[each.text for each in found.completions] for found in scored] == [["abc", "cut", ""], ["nan"], ["cut"]]
        assert scorer.blocks == [3]  # nothing to score in the second block
        assert "2 of 3 completions have no score, the first because: empty answer" in caplog.text
        assert score_completions(scorer, some, journal, block=2) == scored
    assert scorer.blocks == [3]


def test_a_block_that_was_torn_is_scored_anew_as_a_whole(tmp_path: Path) -> None:
    some = [row(id, completion("abc", None)) for id in "abcd"]
    with Journal(tmp_path / "journal.jsonl", "scores") as journal:
        for id in "abc":
            journal.add(id, [[9.0, None]])
        scorer = LengthScorer()
        scored = score_completions(scorer, some, journal, block=2)
    assert [each.completions[0].score for each in scored] == [9.0, 9.0, 1.0, 1.0]
    assert scorer.blocks == [2]


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl", "scores") as journal, pytest.raises(ValueError, match="same id"):
        score_all(LengthScorer(), rows("a") * 2, journal)


def test_after_kill_9_each_row_is_scored_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", HANGS_AT_THE_THIRD_BLOCK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "third block\n"
        process.kill()
    scorer = LengthScorer()
    with Journal(path, "scores") as journal:
        assert set(journal.done) == {f"row {number}" for number in range(20)}
        found = score_all(scorer, rows(*("a" * number for number in range(50))), journal, block=10)
    assert scorer.blocks == [10, 10, 10]
    assert [score for score, _ in found] == [number / 3 for number in range(50)]
    assert all(math.isfinite(score) for score, _ in found if score is not None)
