"""What is read beside or in place of a row's statement: distractors, passages that are found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny_random import save_random_base

from alignkit.core.app import load_config
from alignkit.core.config import RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.core.records import QAExample
from alignkit.core.retrieval_config import RetrievalConfig
from alignkit.data.sources import read_questions
from alignkit.evaluate import run
from alignkit.evaluation.contexts import (
    ContextKind,
    Library,
    PassagesConfig,
    Question,
    ask_noisy,
    ask_retrieved,
    exact_match_by_place,
    pose,
    read_passages,
)
from alignkit.evaluation.predictions import ModelAnswer, Prediction, read_predictions
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.open import open_retriever

CITIES = "Oslo Rome Bern Lima Cairo Paris Delhi Quito Hanoi Sofia Accra Minsk".split()


def examples(count: int = 12) -> list[QAExample]:
    return [
        QAExample(
            id=f"q{n}", instruction=f"{city} has {n} towers.", input=f"How many towers has {city}?", output=str(n)
        )
        for n, city in enumerate(CITIES[:count])
    ]


def passages(rows: Sequence[QAExample]) -> list[Passage]:
    return list(read_passages(PassagesConfig(), rows))


def library(folder: Path, **settings: Any) -> Library:
    return Library(PassagesConfig(**settings), RetrievalConfig(), folder / "index")


def test_the_statement_stands_once_at_a_place_of_its_own_and_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    rows = [QAExample(**{**row.model_dump(), "id": f"{row.id}-{n}"}) for n in range(20) for row in examples()]
    config = library(tmp_path, distractors=3, distractor_rank=0)
    questions = ask_noisy(rows, passages(rows), config, seed=1)
    places = Counter(question.contexts.index(question.example.instruction) for question in questions)
    assert sorted(places) == [0, 1, 2, 3]
    assert all(40 <= count <= 80 for count in places.values())  # 60 expected of 240, four standard deviations: 27
    for question in questions:
        assert len(set(question.contexts)) == 4
        row = question.example
        assert question.prompt[0].content == "\n\n".join([*question.contexts, row.input])
    assert ask_noisy(rows, passages(rows), config, seed=1) == questions
    assert ask_noisy(rows, passages(rows), config, seed=2) != questions


def test_similar_distractors_are_the_last_of_the_best_and_never_the_rows_own(tmp_path: Path) -> None:
    row = QAExample(id="q", instruction="The red house is old.", input="Is the red house old?", output="yes")
    own = Passage(id="own", text="Here. The red  house is old. There.", document="elsewhere")
    document = Passage(id="page", text="The red house, the old red house", document=row.instruction)
    near = [Passage(id=f"n{n}", text="red house old " * (4 - n) + "and " * n, document=f"d{n}") for n in range(4)]
    far = Passage(id="far", text="Lisbon", document="d9")
    found = ask_noisy([row], [own, document, *near, far], library(tmp_path, distractors=2, distractor_rank=3), seed=1)
    assert set(found[0].contexts) == {row.instruction, near[1].text, near[2].text}
    filled = ask_noisy([row], [own, near[0], far], library(tmp_path, distractors=2, distractor_rank=3), seed=1)
    assert set(filled[0].contexts) == {
        row.instruction,
        near[0].text,
        "Lisbon",
    }  # which shares no word with the question
    with pytest.raises(UserError, match=r"distractors=3: row 'q' has only 2 passages of other documents"):
        ask_noisy([row], [own, document, near[0], far], library(tmp_path, distractors=3), seed=1)


def test_a_row_that_names_its_document_gets_none_of_it(tmp_path: Path) -> None:
    rows = examples(4)
    named = QAExample.model_validate({**rows[0].model_dump(), "document": "guide"})
    chunks = [Passage(id=f"g{n}", text=f"Chapter {n}", document="guide") for n in range(9)]
    others = [Passage(id=f"o{n}", text=f"Other {n}", document="other") for n in range(3)]
    question = ask_noisy([named], [*chunks, *others], library(tmp_path, distractor_rank=0), seed=3)[0]
    assert set(question.contexts) == {named.instruction, *(other.text for other in others)}


class Counting:
    """A retriever that says how often it was asked."""

    def __init__(self, rows: Sequence[QAExample], folder: Path) -> None:
        self.inner, self.asked = library(folder).open(passages(rows)), 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Found]]:
        self.asked += len(queries)
        return self.inner.search(queries, k)


def test_what_was_found_is_not_searched_again(tmp_path: Path) -> None:
    rows = examples()
    retriever = Counting(rows, tmp_path)
    with Journal(tmp_path / "j.jsonl", "f") as journal:
        first = ask_retrieved(rows[:5], retriever, 2, journal)  # type: ignore[arg-type]
    with Journal(tmp_path / "j.jsonl", "f") as journal:
        both = ask_retrieved(rows, retriever, 2, journal)  # type: ignore[arg-type]
    assert retriever.asked == len(rows)
    assert both[:5] == first
    for row, question in zip(rows, both, strict=True):
        assert question.contexts[0] == row.instruction  # its city stands nowhere else
        assert question.prompt[0].content == "\n\n".join([*question.contexts, row.input])


def test_questions_that_find_nothing_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = examples(4)
    strange = [row.model_copy(update={"input": "xyzzy?"}) for row in rows[1:3]]
    with Journal(tmp_path / "j.jsonl", "f") as journal:
        questions, _, description = pose(
            ContextKind.retrieved, library(tmp_path), [rows[0], *strange, rows[3]], 1, journal
        )
    assert description["nothing_found"] == 2
    assert [bool(question.contexts) for question in questions] == [True, False, False, True]
    assert questions[1].prompt[0].content == "xyzzy?"
    said = f"nothing is found for 2 of 4 questions, which are asked alone; the first: {rows[1].id}"
    assert [said in each for each in caplog.messages if "contexts=retrieved" in each] == [True]


def test_the_description_counts_where_the_statement_was(tmp_path: Path) -> None:
    rows = [*examples(3), QAExample(id="none", instruction="Zurich lies by a lake.", input="Xyz?", output="no")]
    with Journal(tmp_path / "j.jsonl", "f") as journal:
        questions, retriever, told = pose(ContextKind.retrieved, library(tmp_path, k=1), rows, 1, journal)
    assert retriever is None
    assert told == {
        "kind": "retrieved",
        "passages": 4,
        "statement_found": 0.75,
        "place_of_statement": {"1": 3, "not there": 1},
        "nothing_found": 1,
    }
    assert questions[3].contexts == []
    assert questions[3].prompt[0].content == "Xyz?"


def test_documents_are_cut_into_passages(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One\n\nFirst sentence here. Second sentence here.\n\n# Two\n\nThird one.\n")
    found = list(read_passages(PassagesConfig(documents=str(tmp_path), chunk_characters=40), []))
    assert len(found) == 3
    assert {passage.document for passage in found} == {"a.md"}
    assert len({passage.id for passage in found}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distractors": 0}, "passages.distractors=0: must be at least 1"),
        ({"k": 0}, "passages.k=0: must be at least 1"),
        ({"distractors": 3, "distractor_rank": 2}, "must not exceed distractor_rank=2"),
        ({"hops": 0}, "passages.hops=0"),
    ],
)
def test_numbers_that_make_no_sense(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PassagesConfig(**change).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["noisy", "retrieved", "multihop"])
def test_what_was_read_is_in_the_predictions(tmp_path: Path, kind: str) -> None:
    save_random_base(tmp_path / "base")
    rows = [row.model_dump(exclude_none=True) for row in examples(6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.path={tmp_path / 'test.jsonl'}", f"model.path={tmp_path / 'base'}", "model.max_length=512"]
    given += ["judge=false", "sampling.max_new_tokens=4", f"contexts={kind}", f"output_dir={tmp_path / 'out'}", "run=r"]
    artifact = run(load_config("evaluate", given))
    predictions = read_predictions(artifact.folder / "predictions.jsonl")
    assert [row.id for row in predictions] == [row["id"] for row in rows]
    assert [row.instruction for row in predictions] == [row["instruction"] for row in rows]
    answers = [row.answers["base"] for row in predictions]
    assert artifact.metrics["contexts"]["kind"] == kind
    assert artifact.metrics["contexts"]["passages"] == 6
    if kind == "multihop":  # a random model calls nothing
        assert all(answer.contexts == [] and answer.scores["hops"] == 0 for answer in answers)
        assert artifact.metrics["searches"]["base"]["hops"] == 0
    else:
        count = 4 if kind == "noisy" else 3
        assert all(row["instruction"] in answer.contexts for row, answer in zip(rows, answers, strict=True))
        assert all(len(answer.contexts) == count for answer in answers)
        assert artifact.metrics["contexts"]["statement_found"] == 1
        by_place = artifact.metrics["exact_match_by_place"]["base"]
        assert {place: found["n"] for place, found in by_place.items()} == artifact.metrics["contexts"][
            "place_of_statement"
        ]


def test_an_index_that_was_made_is_searched_in_place_of_the_statements(tmp_path: Path) -> None:
    save_random_base(tmp_path / "base")
    rows = examples(3)
    index = RetrievalConfig(path=str(tmp_path / "town"))
    with closing(open_retriever(index)) as retriever:
        retriever.index([*passages(rows[:2]), Passage(id="more", text="Bern has towers, and Bern has a river.")])
    (tmp_path / "test.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    given = [f"data.path={tmp_path / 'test.jsonl'}", f"model.path={tmp_path / 'base'}", "model.max_length=512"]
    given += ["judge=false", "sampling.max_new_tokens=4", f"output_dir={tmp_path / 'out'}", "run=r", "passages.k=1"]
    given += ["passages.indexed=true", f"retrieval.path={index.path}"]
    artifact = run(load_config("evaluate", [*given, "contexts=retrieved"]))
    read = [row.answers["base"].contexts for row in read_predictions(artifact.folder / "predictions.jsonl")]
    assert read == [[rows[0].instruction], [rows[1].instruction], ["Bern has towers, and Bern has a river."]]
    assert artifact.metrics["contexts"]["passages"] == 3
    assert "index" in {entry["key"] for entry in artifact.inputs}
    with pytest.raises(UserError, match="distractors are drawn from"):
        run(load_config("evaluate", [*given, "contexts=noisy", "force=true"]))
    with pytest.raises(UserError, match=r"passages\.indexed: not read with contexts=clean"):
        run(load_config("evaluate", given))


def test_exact_match_by_place_by_hand() -> None:
    rows = examples(3)
    questions = [
        Question(row, [], [other, row.instruction]) for row, other in zip(rows[:2], ("Rome", "Bern"), strict=True)
    ]
    questions.append(Question(rows[2], [], [rows[2].instruction, "Oslo"]))
    predictions = [
        Prediction(
            id=row.id,
            instruction=row.instruction,
            input=row.input,
            reference=row.output,
            answers={"m": ModelAnswer(text="", finished=True, scores={"exact_match": score})},
        )
        for row, score in zip(rows, (1.0, 0.0, 1.0), strict=True)
    ]
    assert exact_match_by_place(questions, predictions, "m") == {"1": {"mean": 1, "n": 1}, "2": {"mean": 0.5, "n": 2}}
    assert exact_match_by_place(questions, predictions, "other") == {}


def test_questions_of_the_documents_recipe_keep_their_document(tmp_path: Path) -> None:
    fields = {"question": "Q?", "context": "[d.md, 1]\nText.", "answer": "A.", "chunks_rag": "", "document": "d.md"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(fields) + "\n")
    (row,), _ = read_questions(RowsConfig(path=str(tmp_path / "rows.jsonl")))
    assert (row.instruction, row.model_extra) == ("[d.md, 1]\nText.", {"document": "d.md"})
