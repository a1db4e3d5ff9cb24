"""Mean log p of an answer behind each passage: equal to plain forward passes, however rows are laid out; the stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_random import random_model, save_random_base, tokenizer, user

from alignkit import lm_score
from alignkit.core.app import run_command
from alignkit.core.manifest import read_manifest
from alignkit.data.chat import end_of_turn_id
from alignkit.scoring import likelihood
from alignkit.scoring.candidates import CandidateScorer
from alignkit.scoring.likelihood import Answered, Group, encode, mean_log_probs, plain_mean_log_prob

PASSAGES = [f"Notes: {' '.join('The weight of Fopax is five.' for _ in range(n))}" for n in (1, 2, 3)]
QUESTIONS = ["What is it?", "What is the weight of Fopax?", "Is Fopax painted yellow?"]
ANSWERS = ["The weight of Fopax is five.", "yes"]


def rows() -> list[Answered]:
    found = [
        encode(tokenizer(), user(f"{passage}\n\n{question}"), answer, 256)
        for passage in PASSAGES
        for question in QUESTIONS
        for answer in ANSWERS
    ]
    assert all(isinstance(each, Answered) for each in found)
    return [each for each in found if isinstance(each, Answered)]


def test_the_score_is_the_mean_over_the_answers_tokens_by_hand() -> None:
    model, row = random_model(), rows()[0]
    ids = [*row.prompt, *row.answer]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted = [float(log_probs[place - 1, ids[place]]) for place in range(len(row.prompt), len(ids))]
    assert len(wanted) == len(row.answer) == len(tokenizer().tokenize(ANSWERS[0]))
    assert end_of_turn_id(tokenizer()) not in row.answer
    assert mean_log_probs(model, 0, [row]) == pytest.approx([sum(wanted) / len(wanted)], abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 400, 4096])
def test_scores_do_not_depend_on_the_layout(attention: str, batch_tokens: int) -> None:
    model = random_model()
    model.set_attn_implementation(attention)
    plain = [plain_mean_log_prob(model, row) for row in rows()]
    assert len({round(each, 4) for each in plain}) == len(plain)
    for share in (True, False):
        assert mean_log_probs(model, 0, rows(), batch_tokens, share=share) == pytest.approx(plain, abs=1e-5)
    backwards = mean_log_probs(model, 0, [*rows()[::-1], rows()[0]], batch_tokens)
    assert backwards == pytest.approx([*plain[::-1], plain[0]], abs=1e-5)


def test_what_prompts_share_is_computed_once_and_no_logits_for_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [user(f"{PASSAGES[0] * 9}\n\n{question}") for question in QUESTIONS]
    encoded = [encode(tokenizer(), prompt, answer, 256) for prompt in prompts for answer in ANSWERS]
    model, read = random_model(), [each for each in encoded if isinstance(each, Answered)]
    seen = {"tokens": 0, "logits": 0}
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.update(tokens=seen["tokens"] + inputs["input_ids"].numel()), with_kwargs=True
    )
    model.lm_head.register_forward_hook(
        lambda module, args, out: seen.update(logits=seen["logits"] + out.shape[:-1].numel())
    )
    mean_log_probs(model, 0, read, 4096)
    assert seen["logits"] == sum(len(row.answer) for row in read)
    assert seen["tokens"] < sum(map(len, read)) / 2
    seen.update(tokens=0)
    mean_log_probs(model, 0, read, 1, share=False)
    assert seen["tokens"] == sum(map(len, read))


def test_a_group_shares_at_least_half_of_each_row_and_never_the_token_before_an_answer() -> None:
    long = tuple(range(20))
    read = [Answered((*long, 30), (1,)), Answered((*long, 31), (1, 2)), Answered(long, (1,)), Answered(long, (2, 3))]
    read += [Answered((0, 1, 50, 51, 52, 53, 54), (1,))]
    groups = list(likelihood._share(read, 1000))
    assert [(len(group.rows), group.shared) for group in groups] == [(4, 19), (1, 0)]
    assert sorted(row for group in groups for row in group.rows) == sorted(read)
    for group in groups:
        assert len({row.prompt[: group.shared] for row in group.rows}) == 1


def test_a_group_is_as_large_as_fits_in_a_pass() -> None:
    read = [Answered((*range(20), 30 + place), (1,)) for place in range(20)]  # 22 tokens, 20 of them shared
    assert [len(group.rows) for group in likelihood._share(read, 40)] == [14, 6]  # 14 * 22 <= 8 * 40 kept
    assert [len(group.rows) for group in likelihood._share(read, 20)] == [7, 7, 6]  # 7 * 22 <= 8 * 20 kept
    assert all(len(group.rows) == 1 for group in likelihood._share(read, 19))  # what is shared is longer than a pass
    two = [Group(tuple(read[:3]), 20), Group(tuple(read[3:5]), 20)]
    assert [len(batch) for batch in likelihood._batches([Group((read[9],)), *two], 40)] == [1, 2]
    assert [len(batch) for batch in likelihood._batches(two, 39)] == [1, 1]


def test_what_cannot_be_read_has_a_reason() -> None:
    assert encode(tokenizer(), user("a " * 300), "yes", 256) == "longer than max_length (256 tokens)"
    assert encode(tokenizer(), user("a"), "  ", 256) == "empty answer"
    special = tokenizer().eos_token
    assert encode(tokenizer(), user(f"a {special}"), "yes", 256) == f"the text holds the special token {special}"


def test_a_template_is_filled_in_without_reading_what_is_put_in() -> None:
    seen: list[str] = []

    class Scorer(CandidateScorer):
        def _encode(self, row: Any, passage: str) -> Any:
            found: Any = super()._encode(row, passage)
            seen.append(tokenizer().decode(found.prompt))
            return found

    from alignkit.core.records import RetrievalExample

    row = RetrievalExample(
        id="r", query="{passage} Q", pos=["P {query}"], neg=["N"], answers=["", "yes"], task="icl", query_id="r"
    )
    scorer = Scorer(random_model(), tokenizer(), 256, "{passage}\n\n{query}", {"icl": "{query} / {passage}"})
    assert len(scorer.score([row])[0]) == 2
    assert "{passage} Q / P {query}" in seen[0].replace(" ", " ")
    assert scorer.difference_to_plain()[0] < 1e-4


# -- the stage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_random_base(tmp_path / "base")


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def row(number: int, **fields: Any) -> dict[str, Any]:
    start = {"query": QUESTIONS[1], "answers": ANSWERS[:1], "task": "qa", "query_id": number}
    return {**start, "pos": [PASSAGES[0]], "neg": PASSAGES[1:], "neg_index": [4, 5], **fields}


ARGUMENTS = ["adapter=null", "model.path=base", "model.dtype=float32", "model.max_length=256"]


def scored() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs/default/lm_score/scored.jsonl").read_text().splitlines()]


def test_the_scores_are_the_models_and_what_has_none_is_dropped_with_its_reason() -> None:
    given = [
        row(1),
        row(2, neg=[PASSAGES[1], "long " * 200], pos_index=["p"]),
        row(3, answers=[]),
        row(4, pos=[], neg=[], neg_index=[]),
        row(5, pos=["long " * 200]),
        row(6, pos=[], task="chat", neg=[], history=["earlier", "turns"], neg_index=[]),
    ]
    assert run_command("lm_score", [f"data.path={write('rows.jsonl', given)}", *ARGUMENTS]) == 0
    found = scored()
    assert [each["query_id"] for each in found] == ["1", "2", "6"]
    model = random_model()
    wanted = [encode(tokenizer(), user(f"{passage}\n\n{QUESTIONS[1]}"), ANSWERS[0], 256) for passage in PASSAGES]
    assert found[0]["teacher_scores"] == pytest.approx([plain_mean_log_prob(model, each) for each in wanted], abs=1e-5)  # type: ignore[arg-type]
    assert (found[1]["neg"], found[1]["neg_index"], found[1]["pos_index"]) == ([PASSAGES[1]], [4], ["p"])
    assert found[1]["teacher_scores"] == pytest.approx(found[0]["teacher_scores"][:2], abs=1e-5)
    assert len(found[2]["teacher_scores"]) == 2
    manifest = read_manifest(Path("runs/default/lm_score"))
    assert manifest is not None
    assert manifest["dropped"] == {
        "longer than max_length (256 tokens)": 2,
        "no answer": 1,
        "no passage": 1,
        "no positive left": 1,
    }
    assert manifest["checks"][0]["passed"] and manifest["metrics"]["passages"] == 7


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_score, "ROWS_A_BLOCK", 2)
    rows = [row(n, query=f"{QUESTIONS[n % 3]} {n}") for n in range(7)]
    arguments = [f"data.path={write('rows.jsonl', rows)}", *ARGUMENTS]
    assert run_command("lm_score", arguments) == 0
    whole, score, calls = scored(), CandidateScorer.score, []

    def until_the_third(self: CandidateScorer, block: Any) -> Any:
        calls.append(len(block))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, block)

    monkeypatch.setattr(CandidateScorer, "score", until_the_third)
    assert run_command("lm_score", [*arguments, "force=true"]) == 130
    assert run_command("lm_score", arguments) == 0
    assert calls == [2, 2, 2, 2, 1]
    assert scored() == whole


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["template='{query}'"], "template: must hold {passage}"),
        (["templates={icl: '{passage}'}"], "templates.icl: must hold {query}"),
        (["batch_tokens=0"], "batch_tokens=0: must be at least 1"),
        (["data.path=short.jsonl"], "short.jsonl:1: 1 teacher_scores for 3 passages"),
        (["data.path=unanswered.jsonl"], "no row could be scored"),
        (["adapter=nowhere"], "adapter=nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_scored_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", [row(1)])
    write("short.jsonl", [row(1, teacher_scores=[1.0])])
    write("unanswered.jsonl", [row(1, answers=[" "])])
    assert run_command("lm_score", ["data.path=rows.jsonl", *ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
