"""The stage `evaluate_retriever` as a user runs it: one table for all, paired, and contexts to answer from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bm25s")

from alignkit.core.app import run_command
from alignkit.core.config import RowsConfig
from alignkit.core.manifest import read_manifest
from alignkit.data.sources import read_questions

FOLDER = Path("runs/default/evaluate_retriever")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        question("q0", "Who is mayor of Padera?", "The mayor of Padera is Bunis.", "Bunis"),
        question("q1", "What does Kopax weigh?", "Kopax weighs five tons.", "five tons"),
        question("q2", "Is Lafura old?", "The age of the city by the sea is great.", "yes"),
    ]
    write("rows.jsonl", rows)


def question(id: str, query: str, statement: str, output: str) -> dict[str, Any]:
    return {"id": id, "instruction": statement, "input": query, "output": output, "form": "value"}


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def metrics() -> dict[str, Any]:
    manifest = read_manifest(FOLDER)
    assert manifest is not None and manifest["status"] == "complete"
    return dict(manifest["metrics"]) | {"dropped": manifest["dropped"]}


def test_retrievers_are_measured_and_compared_on_the_same_queries() -> None:
    given = ["data.path=rows.jsonl", "task=qa", "retrievers={letters: characters}", "cutoffs=[1,3]", "contexts=1"]
    assert run_command("evaluate_retriever", given) == 0
    found = metrics()
    assert (found["queries"], found["passages"], list(found["retrievers"])) == (3, 3, ["bm25", "letters"])
    by_words = {row["id"]: [hit["id"] for hit in row["found"]["bm25"]] for row in read("rankings.jsonl")}
    relevant = {row["id"]: row["relevant"] for row in read("rankings.jsonl")}
    assert [by_words[id][:1] == relevant[id] for id in ("q0", "q1")] == [True, True]
    assert found["retrievers"]["bm25"]["all"]["mrr@1"]["mean"] == pytest.approx(2 / 3)
    assert found["retrievers"]["bm25"]["qa"]["hit@1"] | {"low": 1.0, "high": 1.0} == {
        "mean": 1.0,
        "low": 1.0,
        "high": 1.0,
        "n": 2,  # a mere yes is not looked for
    }
    (comparison,) = found["retrieval_comparisons"]
    assert (comparison["new"], comparison["old"]) == ("letters", "bm25")
    means = [found["retrievers"][name]["all"]["ndcg@3"]["mean"] for name in ("letters", "bm25")]
    assert comparison["all"]["ndcg@3"]["mean"] == pytest.approx(means[0] - means[1])
    assert "letters over bm25" in (FOLDER / "retrieval.txt").read_text(encoding="utf-8")

    contexts, dropped = read_questions(RowsConfig(path=str(FOLDER / "contexts_bm25.jsonl")))
    assert [(each.id, each.instruction, each.output) for each in contexts[:2]] == [
        ("q0", "The mayor of Padera is Bunis.", "Bunis"),
        ("q1", "Kopax weighs five tons.", "five tons"),
    ]
    assert contexts[0].model_extra == {"form": "value"} and not dropped


def test_a_positive_outside_the_corpus_counts_as_not_found_and_a_query_without_any_is_dropped() -> None:
    write("corpus.jsonl", [{"id": "1", "text": "a b"}, {"id": "2", "text": "c d"}])
    rows: list[dict[str, Any]] = [
        {"query": "a", "pos_index": [1, 7], "task": "qa", "query_id": "x"},
        {"query": "a", "pos_index": [7], "task": "qa", "query_id": "y"},
        {"query": "a", "neg": ["a b"], "task": "qa", "query_id": "z"},
    ]
    write("ids.jsonl", rows)
    assert run_command("evaluate_retriever", ["data.path=ids.jsonl", "corpus=corpus.jsonl", "cutoffs=[5]"]) == 0
    found = metrics()
    assert found["retrievers"]["bm25"]["qa"]["recall@5"]["mean"] == 0.5
    assert found["dropped"] == {"no positive is in the corpus": 1, "no positive": 1}


def test_an_encoder_reads_queries_and_passages_with_the_instructions_of_their_task(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from tiny_encoders import encoder_settings, save_encoder, word_tokenizer
    from transformers import BertConfig, BertModel

    plain = save_encoder(tmp_path / "plain", BertModel, BertConfig(**encoder_settings()), word_tokenizer())
    model = st.SentenceTransformer(str(plain))
    model.prompts = {"qa_query": "who ", "qa_passage": "the mayor ", "query": "", "document": ""}
    model.save_pretrained(str(tmp_path / "trained"))
    write("corpus.jsonl", [{"id": letter, "text": f"{letter} {letter} is"} for letter in "abcdef"])
    rows: list[dict[str, Any]] = [
        {"query": "a is", "pos_index": ["a"], "task": task, "query_id": task} for task in ("qa", "icl")
    ]
    write("tasks.jsonl", rows)
    given = ["data.path=tasks.jsonl", "corpus=corpus.jsonl", "retrievers={bm25: null, after: trained}", "cutoffs=[6]"]
    assert run_command("evaluate_retriever", given) == 0
    found = {row["task"]: row["found"]["after"] for row in read("rankings.jsonl")}
    by_task = {task: {hit["id"]: hit["score"] for hit in hits} for task, hits in found.items()}
    passages = [f"{letter} {letter} is" for letter in "abcdef"]
    for task, before, ahead in (("qa", "who ", "the mayor "), ("icl", "", "")):
        asked, read_as = model.encode([f"{before}a is"]), model.encode([ahead + text for text in passages])
        cosines = model.similarity(asked, read_as)[0].tolist()
        assert by_task[task] == pytest.approx(dict(zip("abcdef", cosines, strict=True)), abs=1e-5)
    assert by_task["qa"] != pytest.approx(by_task["icl"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retrievers={bm25: null}"], "retrievers: name at least one"),
        (["retrievers={-a: bm25}"], "retrievers: '-a' is no name"),
        (["comparisons=['after>bm25']"], "must be 'new>old' with two of the retrievers bm25"),
        (["retrievers={after: nowhere}"], "retrievers.after=nowhere: no such file or folder"),
        (["cutoffs=[0]"], "give ranks of at least 1"),
        (["contexts=-1"], "contexts=-1: must be 0 or more"),
        (["task=null"], "rows.jsonl:1: task: missing"),
    ],
)
def test_what_cannot_be_evaluated_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("evaluate_retriever", ["data.path=rows.jsonl", "task=qa", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
