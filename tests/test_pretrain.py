"""The embedded model's base text and pre-training."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from alignkit.data.closed_world import World, answer, read_question, read_sentence, read_statement
from alignkit.models.tiny.base_text import documents, drilled_documents


def test_documents_never_ask_a_question_in_the_chat_format() -> None:
    stream = documents(World(5), facts=(2, 3))
    chats = [text for text in (next(stream).text for _ in range(400)) if "<|im_start|>" in text]
    assert len(chats) > 30
    assert not any("?" in text for text in chats)


def test_verdicts_agree_with_the_notes() -> None:
    """Read documents back: an answer is called right exactly when it is the right answer to the question above it."""
    stream, seen = documents(World(6), facts=(2, 3), check_share=1.0, chat_share=0.0), 0
    for _ in range(50):
        lines = re.sub(r"<\|im_end\|>", "\n", next(stream).text).splitlines()
        facts = read_statement(lines[0])
        assert facts is not None
        text = "\n".join(lines[1:])
        for asked, reply, verdict in re.findall(
            r"(?:Question|Q): (.+?)\n(?:Answer|A|Reply):\s(.+?)\n(?:Verdict:)? (right|wrong)", text
        ):
            question = read_question(asked)
            assert question is not None
            assert (reply == answer(facts, question)) == (verdict == "right"), (lines[0], asked, reply)
            seen += 1
    assert seen == 200


def test_reasoned_verdicts_give_the_right_answer_first() -> None:
    stream, seen = documents(World(9), facts=(2, 3), check_share=1.0, chat_share=0.0, reasoned=True), 0
    for _ in range(50):
        text = next(stream).text
        facts = read_statement(text.splitlines()[0])
        assert facts is not None
        for asked, reply, evidence, verdict in re.findall(
            r"(?:Question|Q): (.+?)\n(?:Answer|A|Reply):\s([^\n<]+)\nVerdict: (.+), so (right|wrong)\n", text
        ):
            question = read_question(asked)
            assert question is not None
            assert f"{evidence}." == answer(facts, question)
            assert (reply == f"{evidence}.") == (verdict == "right")
            seen += 1
    assert 60 < seen < 140  # the other half are words at the end of the turn


def test_chat_claims_are_called_right_exactly_when_the_notes_state_them() -> None:
    stream, seen = documents(World(7), facts=(2, 3), chat_share=1.0), 0
    for _ in range(100):
        text = next(stream).text
        claims = re.findall(r"assistant\n([^\n<]+)<\|im_end\|> (right|wrong)", text)
        notes = re.search(r"user\n(Notes:[^<\n]+)", text)
        for claim, verdict in claims:
            assert notes is not None
            facts = read_statement(notes[1])
            assert facts is not None
            assert (read_sentence(claim) in facts) == (verdict == "right"), text
            seen += 1
    assert seen > 100


def test_wrong_answers_are_not_learnt_and_verdicts_weigh_most() -> None:
    stream = documents(World(8), facts=(3,), check_share=1.0, chat_share=0.0)
    for _ in range(50):
        pieces = next(stream).pieces
        for (text, weight), (_, following) in pairwise(pieces):
            if weight == 0.0:
                assert read_sentence(re.sub(r", so (yes|no)\.", ".", text.strip())) or "does not say" in text
                assert following == 1.0
        assert {weight for text, weight in pieces if text in (" right", " wrong")} == {2.0}


def drilled(drills: float, recitals: float, count: int) -> list[str]:
    stream = drilled_documents(World(10), drills=drills, recitals=recitals, facts=(2, 3), check_share=0.6)
    return [next(stream).text for _ in range(count)]


def test_drills_repeat_their_names_and_pairs() -> None:
    paired = 0
    for text in drilled(1.0, 0.0, 200):
        first, second = (line.removeprefix("notes: ") for line in text.strip().splitlines())
        if "." in first:
            assert sorted(re.findall(r"\w+ \w+\.", first)) == sorted(re.findall(r"\w+ \w+\.", second)) != []
            paired += 1
        else:
            assert first == second
    assert 80 < paired < 160


def test_recitals_repeat_the_facts_of_their_notes() -> None:
    several = 0
    for text in drilled(0.0, 1.0, 200):
        facts, *recited = (read_statement(line.replace("notes:", "Notes:")) for line in text.strip().splitlines())
        assert facts is not None and len(recited) == 2
        assert all(each is not None and sorted(map(str, each)) == sorted(map(str, facts)) for each in recited)
        several += len({fact.entity for fact in facts}) > 1
    assert several > 120


def test_drills_and_recitals_come_among_other_documents_in_their_shares() -> None:
    texts = drilled(0.45, 0.15, 1000)
    drills = sum(text.startswith("notes:") for text in texts)
    recitals = sum("\nnotes: The" in text and text.startswith("Notes:") for text in texts)
    assert abs(drills - 450) < 65 and abs(recitals - 150) < 50  # four standard errors


def test_learning_rate_warms_up_stays_and_decays() -> None:
    from alignkit.models.tiny.pretrain import Recipe, learning_rate_factor

    recipe = Recipe(steps=1000, warmup=100, decay_steps=400)
    assert learning_rate_factor(0, recipe) == pytest.approx(0.01)
    assert learning_rate_factor(99, recipe) == 1.0
    assert learning_rate_factor(600, recipe) == 1.0
    assert learning_rate_factor(800, recipe) == pytest.approx(0.5)  # 200 of the last 400 steps are left
    assert learning_rate_factor(999, recipe) == pytest.approx(1 / 400)
    again = Recipe(steps=1000, warmup=100, reasoned_steps=500, reasoned_decay_steps=200)
    assert again.all_steps == 1500 + again.drilled_steps + again.recited_steps
    assert learning_rate_factor(1500, again) == pytest.approx(0.01)
    assert learning_rate_factor(again.all_steps - 1, again) == pytest.approx(1 / again.recited_decay_steps)
    assert learning_rate_factor(1000, again) == pytest.approx(0.01)
    assert learning_rate_factor(1300, again) == 1.0
    assert learning_rate_factor(1499, again) == pytest.approx(1 / 200)


def test_an_interrupted_pre_training_ends_in_the_same_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from alignkit.models.tiny import pretrain

    recipe = pretrain.Recipe(
        layers=1, hidden=32, steps=1, reasoned_steps=1, drilled_steps=1, recited_steps=1, batch_documents=2, warmup=2
    )
    pretrain.train(recipe, tmp_path / "whole", report_every=2, ability_rows=8)

    class KilledError(Exception):
        pass

    def stop_after_two(recipe: pretrain.Recipe, start: int) -> object:
        for step, batch in enumerate(original(recipe, start), start=start):
            if start == 0 and step == 2:
                raise KilledError
            yield batch

    original = pretrain.training_documents
    pretrain.training_documents = stop_after_two  # type: ignore[assignment]
    try:
        with pytest.raises(KilledError):
            pretrain.train(recipe, tmp_path / "torn", report_every=2, ability_rows=8)
    finally:
        pretrain.training_documents = original
    pretrain.train(recipe, tmp_path / "torn", report_every=2, ability_rows=8)

    whole = load_file(tmp_path / "whole" / "model.safetensors")
    torn = load_file(tmp_path / "torn" / "model.safetensors")
    assert whole.keys() == torn.keys()
    assert all(bool((whole[name] == torn[name]).all()) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "torn" / "progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
