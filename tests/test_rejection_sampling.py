"""The rejection_sampling stage: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from choosing import completion, row
from test_sample import SAMPLING, TINY, questions

from alignkit import rejection_sampling
from alignkit.core.app import load_config
from alignkit.core.config import LoraConfig, RowsConfig, TeacherConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, CompletionSet, PreferencePair
from alignkit.generation import hf
from alignkit.generation.earlier_rounds import join_earlier
from alignkit.generation.engines import GeneratorKind, ServerConfig
from alignkit.generation.openai import OpenAIGenerator
from alignkit.models.loading import load_base, load_tokenizer, new_adapter, save_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel
from alignkit.rejection_sampling import RejectionSamplingConfig, ScorerKind
from alignkit.scoring.judge import JudgeScorer
from alignkit.scoring.preference_pairs import SAME_TEXT, Pairing
from alignkit.scoring.reward import RewardScorer
from alignkit.teacher.server import TeacherServer


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model over the embedded base, untrained: the stage only needs its order."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    policy = new_adapter(load_base(TINY), LoraConfig(rank=2, dropout=0.0), ["all-linear"])
    model = RewardModel(ValueHeadModel(policy), load_tokenizer(TINY), TINY)
    model.centre([0.0, 1.0])
    model.save_pretrained(folder)
    return folder


def configure(folder: Path, count: int = 12, **changes: Any) -> RejectionSamplingConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(count)), encoding="utf-8")
    values: dict[str, Any] = {
        "model": TINY,
        "sampling": replace(SAMPLING, n=4, batch_size=8),
        "teacher": TeacherConfig(model="scripted"),
        "name": "rejection_sampling",
        "output_dir": str(folder / "out"),
        "min_margin": 0.0,
    }
    return RejectionSamplingConfig(data=RowsConfig(path=str(path)), **(values | changes))


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / name).read_text(encoding="utf-8").splitlines()]


def test_the_stage_chooses_by_the_reward_model(tmp_path: Path, reward_folder: Path) -> None:
    artifact = rejection_sampling.run(configure(tmp_path, reward=str(reward_folder), grade=True))
    rows = [CompletionSet.model_validate(each) for each in read(tmp_path, "scored.jsonl")]
    examples = {each["id"]: ChatExample.model_validate(each) for each in read(tmp_path, "best.jsonl")}
    pairs = [PreferencePair.model_validate(each) for each in read(tmp_path, "pairs.jsonl")]
    assert len(rows) == 12
    model = RewardModel.from_pretrained(reward_folder)
    for each_row in rows:
        finished = [each for each in each_row.completions if each.finished]
        rescored = model.score(
            [{"messages": [*each_row.prompt, {"role": "assistant", "content": each.text}]} for each in finished]
        )
        assert [each.score for each in finished] == pytest.approx(rescored, abs=1e-4)
        assert all(each.score is None for each in each_row.completions if not each.finished)
        if finished:
            assert examples[each_row.id].completion[0].content == finished[rescored.index(max(rescored))].text
    assert pairs
    for pair in pairs:
        assert pair.margin is not None
        assert pair.margin > 0
        assert pair.chosen == examples[pair.id].completion
    curves = artifact.metrics["best_of_n"]
    means = [curves["score"][k]["mean"] for k in ("1", "2", "4")]
    assert means == sorted(means)
    assert means[0] < means[-1]
    assert means[-1] == pytest.approx(artifact.metrics["mean_best_score"])
    assert 0 <= curves["grade"]["1"]["mean"] <= 10
    assert len(read(tmp_path, "best.jsonl")) + artifact.dropped["no finished completion with a score"] == 12


def test_the_teacher_is_the_upper_bound_and_needs_no_reward_model(tmp_path: Path) -> None:
    config = configure(tmp_path, scorer=ScorerKind.judge, reward="nowhere/at/all")
    artifact = rejection_sampling.run(config)
    for each in read(tmp_path, "scored.jsonl"):
        assert all(0 <= completion["score"] <= 10 for completion in each["completions"] if completion["finished"])
    assert [entry["key"] for entry in artifact.inputs] == ["data.path"]


HANGS_IN_THE_LATEST_VERSION = """
import sys, time
from test_rejection_sampling import killed_here
killed_here(*sys.argv[1:])
"""


def killed_here(folder: str, reward: str, previous: str) -> None:
    """Run the stage in this process; it says when it is in the middle of the latest version's answers, and hangs."""
    decode, calls = hf.decode, 0

    def hangs(*arguments: Any, **keywords: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls == 20:  # the previous version's three chunks are done (12 batches), and the latest's first one
            print("in the middle", flush=True)
            time.sleep(100)
        return decode(*arguments, **keywords)

    hf.decode = hangs
    rejection_sampling.run(configure(Path(folder), 24, reward=reward, previous_adapter=previous))


def test_after_kill_9_and_an_interruption_the_files_are_the_same_to_the_byte(
    tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = save_random_adapter(tmp_path / "previous")
    whole, cut = (tmp_path / "whole", tmp_path / "cut")
    for folder in (whole, cut):
        folder.mkdir()
    monkeypatch.setattr(rejection_sampling, "ROWS_A_BLOCK", 10)
    settings: dict[str, Any] = {"reward": str(reward_folder), "previous_adapter": str(previous)}
    rejection_sampling.run(configure(whole, 24, **settings))

    command = [sys.executable, "-c", HANGS_IN_THE_LATEST_VERSION, str(cut), str(reward_folder), str(previous)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert "in the middle\n" in iter(process.stdout.readline, "")
        process.kill()

    decode, score, decoded, scored = hf.decode, RewardScorer.score, 0, 0

    def counted(*arguments: Any, **keywords: Any) -> list[list[int]]:
        nonlocal decoded
        decoded += 1
        return decode(*arguments, **keywords)

    def dies(self: RewardScorer, conversations: Any) -> Any:
        nonlocal scored
        scored += 1
        if scored == 3:  # of three blocks of candidates and three of the previous version
            raise KeyboardInterrupt
        return score(self, conversations)

    monkeypatch.setattr(hf, "decode", counted)
    monkeypatch.setattr(RewardScorer, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        rejection_sampling.run(configure(cut, 24, **settings))
    assert decoded == 8  # two of the latest version's three chunks, four batches each
    rejection_sampling.run(configure(cut, 24, **settings))
    assert (decoded, scored) == (8, 7)  # nothing is generated again, and two blocks are not scored again
    for name in ("scored.jsonl", "previous.jsonl", "best.jsonl", "pairs.jsonl", "dropped.jsonl"):
        assert (cut / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    old = {each["id"]: {answer["text"] for answer in each["completions"]} for each in read(cut, "previous.jsonl")}
    pairs = read(cut, "pairs.jsonl")
    assert pairs
    assert all(each["rejected"][0]["content"] in old[each["id"]] for each in pairs)


def save_random_adapter(folder: Path) -> Path:
    torch.manual_seed(9)
    policy = new_adapter(load_base(TINY), LoraConfig(rank=2, dropout=0.0), ["all-linear"])
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    save_adapter(policy, folder, TINY)
    return folder


# -- rounds, greedy answers, a server ----------------------------------------------------------------------------------


def test_the_best_is_the_best_over_all_rounds(tmp_path: Path, reward_folder: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    varied = replace(SAMPLING, n=4, temperature=[1.5, 1.5], top_p=[1.0, 1.0], max_new_tokens=24)
    rejection_sampling.run(configure(first, 12, scorer=ScorerKind.judge, sampling=varied))
    earlier = str(first / "out" / "scored.jsonl")
    rows = RowsConfig(path=str(first / "questions.jsonl"), skip=6)
    config = replace(configure(second, 1, reward=str(reward_folder), keep=[earlier], seed=5), data=rows)
    artifact = rejection_sampling.run(config)

    before = {each["id"]: finished_texts(each["completions"]) for each in read(first, "scored.jsonl")}
    now = {each["id"]: each["completions"] for each in read(second, "scored.jsonl")}
    of_this_round, others = [f"q-{number}" for number in range(6, 12)], [f"q-{number}" for number in range(6)]
    assert list(now) == of_this_round + [id for id in others if before[id]]
    for id, answers in now.items():
        drawn = 4 if id in of_this_round else 0  # and then what the earlier round wrote and this one did not
        own = finished_texts(answers[:drawn])
        assert [each["text"] for each in answers[drawn:]] == [text for text in before[id] if text not in own]
    assert any(len(now[id]) > 4 for id in of_this_round)
    assert artifact.metrics["best_of_n"]["score"]["4"]["n"] <= 6  # the curve is of this round
    assert len(read(second, "best.jsonl")) == sum(bool(finished_texts(answers)) for answers in now.values()) > 6
    assert [entry["key"] for entry in artifact.inputs] == ["data.path", "reward", "keep[0]"]
    model = RewardModel.from_pretrained(reward_folder)
    for each in read(second, "scored.jsonl"):
        for answer in each["completions"]:
            if answer["finished"]:
                turns = [*each["prompt"], {"role": "assistant", "content": answer["text"]}]
                assert answer["score"] == pytest.approx(model.score([{"messages": turns}])[0], abs=1e-4)


def finished_texts(answers: list[dict[str, Any]]) -> list[str]:
    """Each text of a finished answer once, in order."""
    return list(dict.fromkeys(each["text"] for each in answers if each["finished"]))


def test_earlier_rows_that_cannot_be_used_are_dropped_or_refused(tmp_path: Path) -> None:
    fresh = [row("a", completion("new", None))]
    path = tmp_path / "scored.jsonl"
    rows = [
        row("a", completion("new", 3.0), completion("old", 2.0), completion("cut", None, finished=False)),
        row("other", completion("other", 1.0)),
        row("empty"),
        row("a", completion("stranger", 1.0)).model_copy(update={"prompt": row("x").prompt}),
    ]
    path.write_text("".join(each.model_dump_json() + "\n" for each in rows[:3]), encoding="utf-8")
    joined, dropped = join_earlier(fresh, [str(path)])
    assert [(each.id, [answer.text for answer in each.completions]) for each in joined] == [
        ("a", ["new", "old"]),
        ("other", ["other"]),
    ]
    assert [answer.score for each in joined for answer in each.completions] == [None] * 3
    assert [each.reason for each in dropped] == ["no completions"]
    path.write_text(rows[3].model_dump_json() + "\n", encoding="utf-8")
    joined, dropped = join_earlier(fresh, [str(path)])
    assert joined == fresh
    assert [each.reason for each in dropped] == ["keep: another question has this id"]
    path.write_text(rows[2].model_dump_json() + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"keep: .*none of its 1 rows can be used \(no completions\)"):
        join_earlier(fresh, [str(path)])


def test_questions_that_are_asked_twice_are_both_kept(tmp_path: Path) -> None:
    again = row("b", completion("again", None)).model_copy(update={"prompt": row("a").prompt})
    fresh = [row("a", completion("new", None)), again]
    assert join_earlier(fresh, []) == (fresh, [])
    path = tmp_path / "scored.jsonl"
    path.write_text(row("a", completion("old", 2.0)).model_dump_json() + "\n", encoding="utf-8")
    joined, dropped = join_earlier(fresh, [str(path)])
    assert [[answer.text for answer in each.completions] for each in joined] == [["new", "old"], ["again"]]
    assert dropped == []


def test_greedy_answers_are_compared_but_never_chosen(tmp_path: Path, reward_folder: Path) -> None:
    config = configure(tmp_path, 10, reward=str(reward_folder), greedy=True, grade=True)
    artifact = rejection_sampling.run(config)
    greedy = {each["id"]: each["completions"] for each in read(tmp_path, "greedy.jsonl")}
    drawn = {each["id"]: each["completions"] for each in read(tmp_path, "scored.jsonl")}
    assert all([each["sampling"]["temperature"] for each in answers] == [0.0] for answers in greedy.values())
    assert {len(answers) for answers in drawn.values()} == {4}  # the greedy one is none of them
    both = [id for id in drawn if greedy[id][0]["finished"] and any(each["finished"] for each in drawn[id])]
    for measure in ("score", "grade"):
        gains = artifact.metrics["gains"][measure]
        assert set(gains) == {"best_over_single", "best_over_greedy", "single_over_greedy"}
        assert artifact.metrics["greedy"][measure]["n"] == gains["best_over_greedy"]["n"] == len(both) > 0
    best, single = (artifact.metrics["gains"]["score"][f"{name}_over_greedy"]["mean"] for name in ("best", "single"))
    assert best - single == pytest.approx(mean(best_over_single(drawn[id]) for id in both))


def best_over_single(answers: list[dict[str, Any]]) -> float:
    scores = [float(each["score"]) for each in answers if each["finished"]]
    return max(scores) - mean(scores)


def test_a_server_of_the_policy_answers(
    tmp_path: Path, server: TeacherServer, caplog: pytest.LogCaptureFixture
) -> None:
    served = ServerConfig(base_url=server.base_url, model="scripted", previous_model="scripted")
    config = configure(
        tmp_path,
        6,
        generator=GeneratorKind.openai,
        server=served,
        adapter="nowhere/at/all",
        scorer=ScorerKind.judge,
        teacher=TeacherConfig(model="scripted", store=str(tmp_path / "store.sqlite")),
        pairing=Pairing.versions,
        greedy=True,
    )
    artifact = rejection_sampling.run(config)
    rows = read(tmp_path, "scored.jsonl")
    assert len(rows) == 6
    assert {answer["model"] for each in rows for answer in each["completions"]} == {"scripted"}
    assert {len(each["completions"]) for each in rows} == {4}
    assert server.requests == 6 * 4 + 6  # of the two versions, which are the same, and the greedy ones
    assert artifact.dropped[SAME_TEXT] == 6  # so there is no pair
    assert read(tmp_path, "pairs.jsonl") == []
    assert "there is not a single pair" in caplog.text
    assert "the teacher gives all 5 different answers 10: there is no best" in caplog.text
    rejection_sampling.run(replace(config, force=True))
    assert server.requests == 30  # everything is in the response store


def test_what_a_server_or_the_teacher_failed_at_is_asked_again_on_request(
    tmp_path: Path, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the failures ended the stage, whose journals then remain."""
    config = configure(
        tmp_path,
        3,
        generator=GeneratorKind.openai,
        server=ServerConfig(base_url=server.base_url, model="scripted"),
        scorer=ScorerKind.judge,
        teacher=TeacherConfig(model="scripted", store=str(tmp_path / "store.sqlite"), retry_failed=True),
    )
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no completion at all was usable"):
        patch.setattr(OpenAIGenerator, "generate", lambda self, prompts, *others: [[] for _ in prompts])
        rejection_sampling.run(config)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no completion has both an end and a score"):
        patch.setattr(JudgeScorer, "score", unable)
        rejection_sampling.run(config)
    rejection_sampling.run(config)
    assert len(read(tmp_path, "best.jsonl")) == 3
    assert server.requests == 3 * 4


def unable(self: JudgeScorer, conversations: list[Any]) -> list[None]:
    self.reasons = ["unreachable"] * len(conversations)
    return [None] * len(conversations)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": replace(SAMPLING, n=1)}, r"sampling\.n=1: one completion a question leaves nothing"),
        ({"pairing": Pairing.versions}, "pairing=versions: name the previous version"),
        (
            {"pairing": Pairing.versions, "previous_adapter": "a", "keep": ["b"]},
            "not the latest version's. Leave keep out",
        ),
        ({"uncertainty_penalty": -1.0}, "uncertainty_penalty=-1.0: must be 0 or more"),
        ({"uncertainty_penalty": 1.0, "scorer": ScorerKind.judge}, "the teacher has no heads that disagree"),
        ({"max_length_ratio": 0.5}, "max_length_ratio=0.5: must be at least 1"),
        ({"generator": GeneratorKind.openai}, r"server\.model: name the model"),
        ({"server": ServerConfig(previous_model="v1")}, "server: the model v1 is asked only with generator=openai"),
    ],
)
def test_settings_that_leave_nothing_to_choose_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        rejection_sampling.run(configure(tmp_path, **({"reward": "somewhere"} | changes)))
    assert not (tmp_path / "out").exists()


def test_one_completion_is_enough_against_a_previous_version() -> None:
    rejection_sampling.check_config(
        RejectionSamplingConfig(name="x", reward="r", previous_adapter="p", sampling=replace(SAMPLING, n=1))
    )


@pytest.mark.parametrize("part", ["reward_config.json", "value_head.safetensors", "adapter"])
def test_an_incomplete_reward_model_is_refused_before_anything_is_generated(
    part: str, tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "load_generator", None)  # whoever calls it fails
    incomplete = shutil.copytree(reward_folder, tmp_path / "reward")
    (incomplete / part).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=f"reward=.*no reward model, or a damaged one \\({part} is missing\\)"):
        rejection_sampling.run(configure(tmp_path, reward=str(incomplete)))


def test_one_head_cannot_disagree(tmp_path: Path, reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "load_generator", None)  # whoever calls it fails
    with pytest.raises(UserError, match=r"uncertainty_penalty=0\.5: the reward model .* has one head"):
        rejection_sampling.run(configure(tmp_path, reward=str(reward_folder), uncertainty_penalty=0.5))


def test_a_reward_model_that_likes_everything_alike_stops_the_stage(tmp_path: Path, reward_folder: Path) -> None:
    model = RewardModel.from_pretrained(reward_folder)
    with torch.no_grad():
        model.module.value_head.weight.zero_()
    model.save_pretrained(tmp_path / "flat")
    with pytest.raises(UserError, match=r"scores tell answers apart.*1 different scores of \d+ different texts"):
        rejection_sampling.run(configure(tmp_path, reward=str(tmp_path / "flat")))
    assert not (tmp_path / "out" / "best.jsonl").exists()


def test_a_reward_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scorer=judge"):
        rejection_sampling.run(configure(tmp_path))
    with pytest.raises(UserError, match=r"reward=.*nowhere: no such file or folder"):
        rejection_sampling.run(configure(tmp_path, reward=str(tmp_path / "nowhere")))


def test_the_shipped_configuration_composes() -> None:
    config = load_config("rejection_sampling", ["run=x", "scorer=judge"])
    assert isinstance(config, RejectionSamplingConfig)
    assert (config.reward, config.sampling.n, config.adapter) == ("none", 8, "runs/x/sft/adapter")
    assert load_config("rejection_sampling", ["run=x"]).reward == "runs/x/reward"
