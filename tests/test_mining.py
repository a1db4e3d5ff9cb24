"""Hard negatives: what is removed and why, margins, and the stage as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bm25s")

from alignkit.core.app import run_command
from alignkit.core.errors import UserError
from alignkit.core.manifest import read_manifest
from alignkit.core.records import RetrievalExample
from alignkit.retrieval.answers import answer_in
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.corpus import Corpus, gather, open_corpus, passage_text
from alignkit.retrieval.corpus_search import Query, search_corpus
from alignkit.retrieval.mining import Limits, mine, with_negatives

TEXTS = {
    "p": "Padera has a mayor, Bunis.",
    "same": "padera  has a MAYOR, Bunis.",
    "answer": "The mayor of Rosora is bunis!",
    "near": "Padera has a mayor.",
    "far": "Lafura has a mayor.",
    "other": "Kopax weighs five tons.",
}
CORPUS = Corpus(Passage(id=id, text=text) for id, text in TEXTS.items())
SCORES = {"p": 10.0, "same": 9.9, "answer": 9.0, "near": 8.0, "far": 4.0, "other": 1.0}
RANKING = [Found(CORPUS[id], score) for id, score in SCORES.items()]


def example(**fields: Any) -> RetrievalExample:
    row = {"id": "q", "query": "Who is mayor of Padera?", "pos": [TEXTS["p"]], "task": "qa", "query_id": "q"}
    return RetrievalExample.model_validate({**row, "pos_index": ["p"], "answers": ["Bunis"], **fields})


def mined(limits: Limits, *rankings: list[Found], **fields: Any) -> list[str]:
    return [each.id for each in mine(example(**fields), CORPUS, rankings or [RANKING], limits, 1)[0]]


def test_positives_go_by_id_and_by_text_and_so_do_passages_with_an_answer() -> None:
    negatives, removed = mine(example(), CORPUS, [RANKING], Limits(9), 1)
    assert [each.id for each in negatives] == ["near", "far", "other"]
    assert removed == {"positive by id": 1, "positive by text": 1, "holds an answer": 1}
    assert mined(Limits(9, without_answers=False)) == ["answer", "near", "far", "other"]
    assert mined(Limits(9), answers=["no"]) == ["answer", "near", "far", "other"]  # a no stands anywhere


@pytest.mark.parametrize(
    ("margins", "left"),
    [
        ({}, ["near", "far", "other"]),
        ({"absolute_margin": 2.0}, ["near", "far", "other"]),  # 8 <= 10 - 2
        ({"absolute_margin": 2.1}, ["far", "other"]),
        ({"relative_margin": 0.2}, ["near", "far", "other"]),  # 8 <= 10 - 10 * 0.2
        ({"relative_margin": 0.21}, ["far", "other"]),
        ({"absolute_margin": 0.0, "relative_margin": 0.65}, ["other"]),  # the stricter of the two
    ],
)
def test_margins_count_from_the_best_positive(margins: dict[str, float], left: list[str]) -> None:
    assert mined(Limits(9, **margins)) == left  # type: ignore[arg-type]


def test_a_positive_that_was_not_found_leaves_nothing_under_a_margin() -> None:
    assert mined(Limits(9, relative_margin=0.0), RANKING[3:]) == []
    assert mined(Limits(9), RANKING[3:]) == ["near", "far", "other"]


def test_a_negative_cosine_keeps_its_distance() -> None:
    """Of p = -0.1 a relative margin of 0.5 leaves what scores at most -0.15."""
    ranking = [Found(CORPUS[id], score) for id, score in (("p", -0.1), ("near", -0.12), ("far", -0.2))]
    assert mined(Limits(9, relative_margin=0.5), ranking) == ["far"]


def test_ranks_count_without_the_positives() -> None:
    assert mined(Limits(9, first_rank=2, without_answers=False)) == ["near", "far", "other"]
    assert mined(Limits(9, last_rank=2)) == ["near"]  # the passage with the answer has the first rank
    assert mined(Limits(1)) == ["near"]


def test_two_retrievers_are_fused_and_either_may_refuse() -> None:
    backwards = [Found(each.passage, 11 - each.score) for each in reversed(RANKING)]
    assert set(mined(Limits(9), RANKING, backwards)) == {"near", "far", "other"}
    order = [Found(CORPUS[id], 3.0 - rank) for rank, id in enumerate(("p", "other", "far"))]
    assert mined(Limits(9), RANKING, order) == ["other", "far", "near"]  # 1/64 + 1/61 > 1/63 + 1/62 > 1/62
    close = [Found(CORPUS[id], score) for id, score in (("p", 1.0), ("far", 0.99), ("near", 0.1))]
    assert mined(Limits(9, relative_margin=0.05), RANKING, close) == ["near", "other"]


def test_drawing_at_random_is_seeded_by_row_and_keeps_the_order() -> None:
    def draw() -> list[tuple[str, ...]]:
        drawn = (mine(example(), CORPUS, [RANKING], Limits(2, at_random=True), seed)[0] for seed in range(40))
        return [tuple(passage.id for passage in each) for each in drawn]

    assert draw() == draw()
    assert set(draw()) == {("near", "far"), ("near", "other"), ("far", "other")}


def test_teacher_scores_are_stale_when_a_negative_has_changed() -> None:
    row = example(neg=[TEXTS["far"]], neg_index=["far"], teacher_scores=[1.0, 0.5], neg_score=[0.5])
    kept = with_negatives(row, CORPUS, [CORPUS["far"]])
    assert kept.teacher_scores == [1.0, 0.5] and kept.model_extra == {"neg_score": [0.5]}
    changed = with_negatives(row, CORPUS, [CORPUS["near"]])
    assert changed.teacher_scores is None and changed.model_extra == {}
    assert (changed.neg, changed.neg_index, changed.pos_index) == ([TEXTS["near"]], ["near"], ["p"])
    assert with_negatives(example(pos_index=[]), CORPUS, [CORPUS["far"]]).pos_index == ["p"]


def test_answers_in_any_script() -> None:
    holds = answer_in(["Ａlaska's", "朱诺", "1,000"])
    assert holds is not None
    found = [
        holds(text) for text in ("in ALASKA’S north", "首府是朱诺。", "1000 of them", "Alaskas", "朱、诺", "11,000")
    ]
    assert found == [True, True, True, False, True, False]
    assert answer_in(["yes", "No.", " "]) is None


def test_passages_are_gathered_once_and_an_index_means_one_text() -> None:
    rows = [example(pos_index=[], neg=["A b.", "a  B."]), example(id="r", pos_index=[], pos=["a b."])]
    assert sorted(passage_text(each) for each in gather(rows)) == ["A b.", TEXTS["p"]]
    assert {each.id for each in gather([example(pos=["x"], pos_index=[7])])} == {"7"}
    with pytest.raises(UserError, match="row 'r': the passage with the index p has another text"):
        gather([example(), example(id="r", pos=["x"])])
    with pytest.raises(UserError, match=r"give corpus=passages.jsonl"):
        open_corpus(None, [example(pos=[], pos_index=[3])])


def test_equal_scores_stand_by_id_whatever_the_retriever() -> None:
    corpus = Corpus(Passage(id=id, title="On", text="one thing") for id in "cab")
    for name in ("bm25", "characters"):
        hits = search_corpus(name, corpus, [Query("qa", "one thing")], 2)[0]
        assert [hit.passage.id for hit in hits] == ["a", "b"], name


def test_the_same_negatives_as_sentence_transformers_for_one_encoder(tmp_path: Path) -> None:
    """By cosine alone, without answers to look for: the library's own function is the reference."""
    st = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives
    from tiny_encoders import encoder_settings, save_encoder, word_tokenizer
    from transformers import BertConfig, BertModel

    folder = save_encoder(tmp_path / "encoder", BertModel, BertConfig(**encoder_settings()), word_tokenizer())
    words = "a b c d e f g h is the mayor old".split()
    texts = [f"{one} {two} {three}" for one in words for two in words[:5] for three in words[:3]]
    queries = [f"who is {word} ?" for word in words]
    corpus = Corpus(Passage(id=f"{number:03d}", text=text) for number, text in enumerate(dict.fromkeys(texts)))
    positives = [corpus.passages[7 * place].text for place in range(len(queries))]
    k, margin = len(corpus) - 1, 0.001
    hits = search_corpus(str(folder), corpus, [Query("qa", query) for query in queries], k + 1)
    ours = []
    for query, positive, found in zip(queries, positives, hits, strict=True):
        row = example(id=query, query=query, pos=[positive], pos_index=[], answers=[])
        limits = Limits(100, last_rank=k, relative_margin=margin)
        ours += [(query, each.text) for each in mine(row, corpus, [found], limits, 1)[0]]
    theirs = mine_hard_negatives(
        Dataset.from_dict({"query": queries, "answer": positives}),
        st.SentenceTransformer(str(folder)),
        corpus=[each.text for each in corpus.passages],
        range_max=k,
        relative_margin=margin,
        num_negatives=100,
        verbose=False,
    )
    assert ours == list(zip(theirs["query"], theirs["negative"], strict=True))
    assert 5 * len(queries) < len(ours) < 100 * len(queries)  # the margin leaves some with fewer


# -- the stage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def row(**fields: Any) -> dict[str, Any]:
    return {"query": "Who is mayor of Padera?", "task": "qa", "query_id": 1, "answers": ["Bunis"], **fields}


def test_rows_with_ids_alone_and_a_corpus_by_number() -> None:
    """LLM-Embedder's evaluation rows: the positive is the number of a passage, from 0."""
    write("corpus.jsonl", [{"title": "T", "text": text} for text in TEXTS.values()])
    rows = [
        row(pos_index=[0], neg=["old"], teacher_scores=[1.0]),
        row(query_id=2, pos_index=[99]),
        row(query_id=3, pos=[], neg=["x"]),
        row(query_id=4, query="zzz", pos=["none such"]),
    ]
    assert run_command("mine", [f"data.path={write('rows.jsonl', rows)}", "corpus=corpus.jsonl", "negatives=2"]) == 0
    (found,) = read("runs/default/mine/mined.jsonl")
    assert found["pos"] == [f"T {TEXTS['p']}"] and found["pos_index"] == [0]
    assert found["neg_index"] == ["3", "4"] and "teacher_scores" not in found
    manifest = read_manifest(Path("runs/default/mine"))
    assert manifest is not None
    assert manifest["metrics"]["teacher_scores_removed"] == 1
    assert manifest["dropped"] == {"a positive is not in the corpus": 1, "no positive": 1, "no negative left": 1}
    assert not Path("runs/default/mine/passages.jsonl").exists()


def test_questions_over_statements_need_no_other_file() -> None:
    rows = [
        {"id": f"r{n}", "instruction": text, "input": f"What of {text}", "output": "Bunis", "form": "value"}
        for n, text in enumerate(TEXTS.values())
    ]
    arguments = [f"data.path={write('rows.jsonl', rows)}", "task=qa", "retrievers=[bm25,characters]", "negatives=3"]
    assert run_command("mine", arguments) == 0
    found = read("runs/default/mine/mined.jsonl")
    passages = {each["id"]: each["text"] for each in read("runs/default/mine/passages.jsonl")}
    assert len(passages) == 5 and len(found) == 6
    for each in found:
        assert each["form"] == "value" and [passages[id] for id in each["neg_index"]] == each["neg"]
        assert passages[each["pos_index"][0]].casefold().split() == each["pos"][0].casefold().split()
        assert not any("bunis" in text.casefold() for text in each["neg"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.path=rows.jsonl", "retrievers=[bm26]"], "retrievers[0]=bm26: no such file or folder"),
        (["data.path=rows.jsonl", "retrievers=[]"], "name at least one"),
        (["data.path=rows.jsonl", "first_rank=0"], "first_rank=0: must be from 1"),
        (["data.path=rows.jsonl", "relative_margin=-1"], "relative_margin=-1.0: must be 0 or more"),
        (["data.path=rows.jsonl", "negatives=0"], "negatives=0: must be at least 1"),
        (["data.path=untold.jsonl"], "untold.jsonl:1: task: missing"),
        (["data.path=scores.jsonl"], "scores.jsonl:2: 3 teacher_scores for 2 passages"),
        (["data.path=none_left.jsonl"], "no row has a positive"),
        (["data.path=rows.jsonl", "corpus=twice.jsonl"], "twice.jsonl:2: id 'a' stands already"),
        (["data.path=rows.jsonl", "corpus=rows.jsonl"], "rows.jsonl:1: text: missing"),
    ],
)
def test_what_cannot_be_mined_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = row(pos=["a b"], neg=["c d"])
    write("rows.jsonl", [good])
    write("untold.jsonl", [{"query": "q", "pos": ["a"]}])
    write("scores.jsonl", [good, row(query_id=2, pos=["a"], neg=["b"], teacher_scores=[1, 2, 3])])
    write("none_left.jsonl", [row(neg=["c d"])])
    write("twice.jsonl", [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}])
    assert run_command("mine", arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
