"""select: quality by rule and by judge, coverage, and every row accounted for."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from selecting import make_rows, refused, warnings, write

from alignkit.core.app import load_config, run_command
from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.core.records import Message, QAExample
from alignkit.data.closed_world import World, answer
from alignkit.data.words import words
from alignkit.scoring.rules import broken_rules, read_verdict, repetition, rule_quality
from alignkit.select import check, run
from alignkit.teacher.client import Usage

Rows = list[dict[str, Any]]


# -- the rules -------------------------------------------------------------------------------------------------------


def test_words_of_any_script() -> None:
    assert words("Größer—than  ＡＢＣ, state-of-the-art!") == ["grösser", "than", "abc", "state", "of", "the", "art"]
    assert words("请看 Qwen2 的说明。") == ["请", "看", "qwen2", "的", "说", "明"]
    assert words("... ?!") == []


def test_repetition_by_hand() -> None:
    assert repetition("one two three four") == 0
    assert repetition("so so so so so") == pytest.approx(2 / 3)  # three runs, all the same
    assert repetition("two words") == 0


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The head of Fikico is Pezus, so no.", "no"),
        ("The head of Fikico is Pezus, so yes.", "yes"),
        ("Yes, it does.", "yes"),
        ("no", "no"),
        ("开车以后不能退票，所以不能。", "no"),
        ("三个月付一次，所以可以。", "yes"),
        ("不是。", "no"),
        ("是的，可以。", "yes"),
        ("否", "no"),
        ("The statement does not say.", "undecided"),
        ("文中没有说明电话客服，所以无法判断。", "undecided"),
        ("Yes, it opens at nine, so no.", None),  # contradicts itself
        ("No one knows the head of Fikico.", None),
        ("The wing has three floors.", None),
        ("展品在二楼，所以应该上二楼。", None),
        ("", None),
    ],
)
def test_verdicts(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


def test_every_right_answer_of_the_closed_world_passes() -> None:
    world = World(11)
    for _ in range(300):
        passage = world.passage()
        question = world.ask(passage)
        example = QAExample.model_validate(
            {
                "id": "1",
                "instruction": passage.statement,
                "input": question.text,
                "output": answer(passage.facts, question),
                "kind": question.kind,
            }
        )
        assert broken_rules(example, min_words=1, max_words=40, max_repetition=0.3) == []


@pytest.mark.parametrize(
    ("output", "kind", "broken"),
    [
        ("  ", None, ["empty answer"]),
        ("It", None, ["answer too short"]),
        ("a b c d e f g h i j k", None, ["answer too long"]),
        ("go on go on go on go on", None, ["answer repeats itself"]),
        ("is it open", None, ["answer is the question"]),
        ("It opens at nine.", "judgmental", ["judgmental answer without a verdict"]),
        ("It opens at nine.", "non_judgmental", []),
    ],
)
def test_each_rule_finds_what_it_is_for(output: str, kind: Any, broken: list[str]) -> None:
    example = QAExample(id="1", instruction="", input="Is it open?", output=output, kind=kind)
    assert broken_rules(example, min_words=2, max_words=10, max_repetition=0.3) == broken


def test_quality_falls_with_every_broken_rule() -> None:
    assert [rule_quality(broken) for broken in ([], ["a"], ["a", "b"], ["empty answer"])] == [10, 5, 10 / 3, 0]


# -- the stage -------------------------------------------------------------------------------------------------------


def select(tmp_path: Path, rows: Rows, *overrides: str) -> Artifact:
    path = write(tmp_path / "rows.jsonl", rows)
    config = load_config("select", [f"data.path={path}", f"output_dir={tmp_path / 'select'}", *overrides])
    return run(config)


def read(artifact: Artifact, name: str) -> Rows:
    path = artifact.folder / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_covers_in_input_order_and_accounts_for_every_row(tmp_path: Path) -> None:
    rows = make_rows(40)
    rows[3]["output"] = ""
    rows[7] = {**rows[8], "id": "row-7"}  # a copy
    rows[9] |= {"kind": "judgmental", "output": "It is blue."}
    artifact = select(tmp_path, rows, "k=12")
    selected, dropped = read(artifact, "selected.jsonl"), read(artifact, "dropped.jsonl")
    kept = [row["id"] for row in selected]
    assert len(kept) == 12
    assert kept == sorted(kept, key=lambda id: int(id.removeprefix("row-")))
    assert sorted(row["scores"]["rank"] for row in selected) == list(range(1, 13))
    assert {row["scores"]["quality"] for row in selected} == {10.0}
    assert {row["row"]["id"] for row in dropped} | set(kept) == {row["id"] for row in rows}
    reasons = {row["row"]["id"]: row["reason"] for row in dropped}
    assert reasons["row-3"] == "empty answer"
    assert reasons["row-9"] == "judgmental answer without a verdict"
    assert reasons["row-8"] == "exact duplicate"
    assert set(reasons.values()) == {
        "empty answer", "judgmental answer without a verdict", "covered by a selected row", "exact duplicate"
    }  # fmt: skip
    assert artifact.dropped.total() == 28
    assert 0 < artifact.metrics["coverage_radius"] < 2
    audit = json.loads((artifact.folder / "selection.json").read_text(encoding="utf-8"))
    assert [each["rows"] for each in audit["funnel"]] == [40, 38, 37, 12]
    assert sum(audit["quality"]["counts"]) == 38
    assert sum(audit["quality"]["selected"]) == 12


def test_a_copy_is_named_as_such_and_k_may_exceed_the_rows(tmp_path: Path) -> None:
    rows = make_rows(6)
    rows[4] = {**rows[1], "id": "copy"}
    artifact = select(tmp_path, rows, "k=50", "hygiene.exact_duplicates=false", "hygiene.near_duplicates=null")
    assert [row["id"] for row in read(artifact, "selected.jsonl")] == ["row-0", "row-1", "row-2", "row-3", "row-5"]
    (dropped,) = read(artifact, "dropped.jsonl")
    assert (dropped["reason"], dropped["row"]["id"]) == ("copy of a selected row", "copy")
    assert "row-1" in dropped["detail"]


def test_covers_the_configured_field(tmp_path: Path) -> None:
    rows = make_rows(6)
    for row in rows:
        row["input"] = "What is the seat of Fikico?"
    artifact = select(tmp_path, rows, "k=6", "embedding.text=input")
    assert [row["id"] for row in read(artifact, "selected.jsonl")] == ["row-0"]  # to the others there is no distance


def test_without_k_every_good_row_stays(tmp_path: Path) -> None:
    artifact = select(tmp_path, make_rows(9))
    selected = read(artifact, "selected.jsonl")
    assert len(selected) == 9
    assert all("rank" not in row["scores"] for row in selected)


class FakeJudge:
    """Grades by the answer's length, and has nothing to say about answers with an "x"."""

    def __init__(self, teacher: object) -> None:
        self.reasons: list[str | None] = []
        self.teacher = SimpleNamespace(usage=Usage())

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        texts = [conversation[-1].content for conversation in conversations]
        self.reasons = ["unreadable" if "x" in text else None for text in texts]
        return [None if "x" in text else float(min(10, len(text))) for text in texts]


def test_judged_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.scoring.judge.JudgeScorer", FakeJudge)
    outputs = ["It opens at nine.", "short", "", "extra words", "1234567"]
    rows = [{"id": str(i), "instruction": "s", "input": "q", "output": output} for i, output in enumerate(outputs)]
    artifact = select(tmp_path, rows, "quality.scorer=judge", "quality.threshold=6.5")
    assert {row["id"]: row["scores"]["quality"] for row in read(artifact, "selected.jsonl")} == {"0": 10, "4": 7}
    assert artifact.dropped == {"judge score too low": 1, "empty answer": 1, "no quality score": 1}


def test_the_scripted_teacher_can_judge(tmp_path: Path) -> None:
    rows = make_rows(8)
    rows[2]["output"] = "The seat of Fikico is Padera."
    artifact = select(tmp_path, rows, "quality.scorer=judge", f"teacher.store={tmp_path / 'store.sqlite'}")
    assert "row-2" not in {row["id"] for row in read(artifact, "selected.jsonl")}
    assert len(read(artifact, "selected.jsonl")) == 7


def test_when_nothing_passes_the_user_is_told(tmp_path: Path) -> None:
    rows = [{**row, "output": " "} for row in make_rows(3)]
    with pytest.raises(UserError, match=r"hygiene leaves none of 3 rows.*dropped\.jsonl says why"):
        select(tmp_path, rows)
    with pytest.raises(UserError, match=r"none of 3 rows passes quality\.threshold=7"):
        select(tmp_path, rows, "hygiene.empty_answer=false")
    assert len((tmp_path / "select" / "dropped.jsonl").read_text().splitlines()) == 3


def test_up_to_date_and_bad_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = select(tmp_path, make_rows(5), "k=2")
    assert not first.up_to_date
    assert select(tmp_path, make_rows(5), "k=2").up_to_date
    assert run_command("select", [f"data.path={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'b'}", "k=0"]) == 2
    assert "k=0: must be at least 1" in capsys.readouterr().err


# -- the pool ---------------------------------------------------------------------------------------------------------


def test_a_pool_of_files_of_several_formats(tmp_path: Path) -> None:
    ours, (alpaca, *more) = make_rows(4), make_rows(6)[4:]
    del alpaca["id"]
    instances = [{"input": "one two", "output": "Three."}]
    tasks = [
        {"id": "task-1", "instruction": "Go on counting.", "instances": instances, "is_classification": False},
        {"id": "task-2", "instruction": "Count.", "instances": []},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps([alpaca]), encoding="utf-8")
    prompts = [{"prompt": "Say hello.\n\n###", "completion": " Hello to you.<|endoftext|>"}]
    answers = [{"id": "p", "instruction": "Write a poem.", "response": "Roses are red.\n", "model": "x"}]
    also = [tmp_path / "alpaca.json"]
    for name, rows in (("tasks", tasks), ("prompts", prompts), ("answers", answers), ("ours", more)):
        also.append(tmp_path / f"{name}.jsonl")
        also[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    artifact = select(tmp_path, ours, f"also=[{','.join(str(path) for path in also)}]", "data.limit=3")
    outputs = {row["id"]: row["output"] for row in read(artifact, "selected.jsonl")}
    assert outputs == {
        **{row["id"]: row["output"] for row in (*ours[:3], *more)},
        "alpaca-1": alpaca["output"],
        "task-1": "Three.",
        "prompts-1": "Hello to you.",
        "p": "Roses are red.",
    }
    (dropped,) = read(artifact, "dropped.jsonl")
    assert (dropped["reason"], dropped["row"]["id"]) == ("no instance", "task-2")
    assert artifact.metrics["rows_read"] == 9
    assert [entry["key"] for entry in artifact.inputs] == ["data.path", *(f"also[{number}]" for number in range(5))]


def test_personal_data_is_flagged_in_the_rows_and_counted(tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[1]["output"] += " Write to anna.torv@posteo.de for more."
    artifact = select(tmp_path / "flag", rows)
    assert {row["id"]: row.get("personal_data") for row in read(artifact, "selected.jsonl")}["row-1"] == [
        "e-mail address"
    ]
    assert sum("personal_data" in row for row in read(artifact, "selected.jsonl")) == 1
    assert artifact.metrics["flagged"] == {"e-mail address": 1}
    artifact = select(tmp_path / "drop", rows, "hygiene.personal_data=drop")
    assert artifact.dropped == {"personal data": 1}
    assert "flagged" not in artifact.metrics


def test_held_out_rows_are_not_selected(tmp_path: Path) -> None:
    rows = make_rows(8)
    held_out = tmp_path / "held_out.jsonl"
    other = {**rows[5], "id": "h-5", "input": rows[5]["input"].replace("?", " now?")}
    taken = [{**rows[2], "id": "h-2", "output": "Unknown."}, other]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in taken), encoding="utf-8")
    artifact = select(tmp_path / "words", rows, f"held_out=[{held_out}]")
    details = {row["row"]["id"]: (row["reason"], row["detail"]) for row in read(artifact, "dropped.jsonl")}
    assert details["row-2"] == ("in the evaluation data", "holds 100% of evaluation row h-2")
    off = ["hygiene.contamination_words=null", f"held_out=[{held_out}]"]
    assert len(read(select(tmp_path / "off", rows, *off), "selected.jsonl")) == 8
    artifact = select(tmp_path / "vectors", rows, *off, "embedding.held_out_similarity=0.9")
    details = {row["row"]["id"]: (row["reason"], row["detail"]) for row in read(artifact, "dropped.jsonl")}
    assert details["row-2"] == ("similar to the evaluation data", "h-2: cosine 1.000")
    assert details["row-5"][1].startswith("h-5: cosine 0.9")
    assert set(details) == {"row-2", "row-5"}
    assert len(read(artifact, "selected.jsonl")) == 6


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=best"], "strategy: "),
        (["radius=0.5", "strategy=mods", "k=2"], "radius=0.5: is for strategy=coverage; with strategy=mods give k"),
        (["radius=-1"], "radius=-1.0: a distance is a number from 0 up"),
        (["strategy=mods"], "k: strategy=mods and compare need a number of rows"),
        (["strategy=random"], "k: strategy=random and compare need"),
        (["compare=random,quality"], "k: strategy=coverage and compare need a number of rows"),
        (["quality.threshold=5", "quality.quantile=0.5"], "quality.threshold and quality.quantile: give one of them"),
        (["quality.scorer=reward"], "quality.reward: name the model"),
        (["quality.scorer=reward", "quality.reward=runs/gone"], "quality.reward=runs/gone: no such file or folder"),
        (["necessity.share=1", "strategy=mods", "k=2"], "necessity.share=1.0: must lie between 0 and 1"),
        (["sampling.n=2", "strategy=mods", "k=2"], "sampling.n=2: the initial model answers once"),
        (["compare=random,best", "k=2"], "compare=random,best: name two or more different ones of coverage, mods"),
        (["compare=random", "k=2"], "compare=random: name two or more"),
        (["compare=random,random", "k=2"], "compare=random,random: name two or more different ones"),
        (["compare=random,quality", "k=2"], "held_out: compare needs exactly one file of held-out questions"),
        (["also=gone.jsonl"], "also[0]=gone.jsonl: no such file or folder"),
        (["held_out=gone.jsonl"], "held_out[0]=gone.jsonl: no such file or folder"),
        (["embedding.held_out_similarity=2"], "embedding.held_out_similarity=2.0: must lie above 0"),
        (["hygiene.near_duplicates=0"], "hygiene.near_duplicates=0.0: must lie above 0"),
    ],
)
def test_settings_that_cannot_be_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in refused(tmp_path, make_rows(3), overrides, capsys)
    assert not (tmp_path / "select" / "manifest.json").exists()


def test_one_id_in_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.jsonl").write_text(json.dumps(make_rows(2)[1]) + "\n", encoding="utf-8")
    said = refused(tmp_path, make_rows(2), [f"also={tmp_path / 'more.jsonl'}"], capsys)
    assert "more.jsonl: id 'row-1' is also in " in said
    assert "rename the file or the ids" in said


@pytest.mark.parametrize("strategy", ["coverage", "random", "quality"])
def test_one_row(tmp_path: Path, strategy: str) -> None:
    artifact = select(tmp_path, make_rows(1), f"strategy={strategy}", "k=1")
    (row,) = read(artifact, "selected.jsonl")
    assert row["scores"] == ({"rank": 1.0} if strategy == "random" else {"quality": 10.0, "rank": 1.0})
    assert artifact.metrics.get("coverage_radius", 0) == 0


@pytest.mark.parametrize(("strategy", "kept"), [("coverage", 1), ("random", 4), ("quality", 4)])
def test_all_rows_equal(tmp_path: Path, strategy: str, kept: int) -> None:
    rows = [make_rows(1)[0] | {"id": f"row-{number}"} for number in range(6)]
    options = ["hygiene.exact_duplicates=false", "hygiene.near_duplicates=null", f"strategy={strategy}", "k=4"]
    assert len(read(select(tmp_path / "off", rows, *options), "selected.jsonl")) == kept
    artifact = select(tmp_path / "on", rows, f"strategy={strategy}", "k=4")
    assert [row["id"] for row in read(artifact, "selected.jsonl")] == ["row-0"]
    assert artifact.dropped == {"exact duplicate": 5}


@pytest.mark.parametrize("strategy", ["coverage", "random", "quality"])
def test_fewer_rows_than_asked_for_are_a_warning(tmp_path: Path, strategy: str) -> None:
    with warnings() as said:
        artifact = select(tmp_path, make_rows(3), f"strategy={strategy}", "k=9")
    assert len(read(artifact, "selected.jsonl")) == 3
    assert any(line.startswith("k=9") and "3" in line for line in said)


def test_a_radius_means_nothing_in_a_comparison(tmp_path: Path) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps(make_rows(1)[0]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="radius"):
        check(load_config("select", ["radius=0.5", "k=2", "compare=random,quality", f"held_out={path}"]))


def test_vectors_of_another_size_in_the_cache_are_made_again(tmp_path: Path) -> None:
    """The cache is keyed by model and text; a vector cut short under its key is not taken."""
    from tiny_encoders import encoder_settings, save_encoder, word_tokenizer
    from transformers import BertConfig, BertModel

    model = save_encoder(tmp_path / "bert", BertModel, BertConfig(**encoder_settings()), word_tokenizer())
    cache = tmp_path / "cache.sqlite"
    options = ["k=3", f"embedding.model={model}", f"embedding.cache={cache}"]
    first = select(tmp_path, make_rows(8), *options)
    chosen = read(first, "selected.jsonl")
    with closing(sqlite3.connect(cache)) as database, database:
        assert database.execute("SELECT count(*) FROM vectors").fetchone() == (8,)
        database.execute("UPDATE vectors SET vector = substr(vector, 1, 68)")  # 16 numbers and a checksum
    with warnings() as said:
        again = select(tmp_path, make_rows(8), *options, "force=true")
    assert "8 vectors are damaged or of another size and are computed again" in "\n".join(said)
    assert read(again, "selected.jsonl") == chosen
    assert any(entry["key"] == "embedding.model" for entry in again.inputs)
