"""Rounds: how they are planned, when they end, what is kept, and that they continue where they were interrupted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from inside_steps import inside  # noqa: F401  (a fixture)

from alignkit.core import steps
from alignkit.core.app import load_config, run_command, run_stage
from alignkit.core.artifact import Artifact, read_manifest
from alignkit.core.config import Score
from alignkit.core.errors import UserError
from alignkit.core.lineage import lineage
from alignkit.core.plan import StepConfig
from alignkit.core.steps import Step
from alignkit.evaluation.leakage import find_leakage
from alignkit.evaluation.predictions import Prediction, compare, score_answer, summarise
from alignkit.evaluation.rounds import compare_policies, decide, in_words, join_predictions
from alignkit.pipeline import plan
from alignkit.reporting.model_card import _stages

QWEN = ["pipeline=qwen7b", "run=r", "variables.teacher_model=m", "variables.held_out=t.jsonl"]


def planned(*overrides: str) -> list[dict[str, Any]]:
    """The parts of a plan: label -> step."""
    return [{step.label: step for step in part} for part in plan(load_config("pipeline", list(overrides)))]


# -- planning ---------------------------------------------------------------------------------------------------------


def test_each_round_starts_from_the_policy_of_the_one_before() -> None:
    repeated = ("rejection_sampling", "sft_best", "version_pairs", "dpo")
    first, one, two, last = planned(
        *QWEN, "rounds=2", "variables.development=d.jsonl", f"only=[sft,round1_evaluate,{','.join(repeated)}]"
    )
    assert (list(first), list(last)) == (["r/sft"], [])
    assert list(one) == [f"r/round1_{name}" for name in (*repeated, "evaluate")]
    for start, place, steps_of_round in (("sft", 1, one), ("round1_dpo", 2, two)):
        config = {name: steps_of_round[f"r/round{place}_{name}"].config for name in repeated}
        assert config["rejection_sampling"].adapter == config["sft_best"].init_adapter == f"runs/r/{start}/adapter"
        assert config["sft_best"].data.path == f"runs/r/round{place}_rejection_sampling/best.jsonl"
        assert config["version_pairs"].adapter == config["dpo"].init_adapter == f"runs/r/round{place}_sft_best/adapter"
        assert config["version_pairs"].previous_adapter == f"runs/r/{start}/adapter"
        assert config["version_pairs"].reward == "runs/r/reward"
        assert config["dpo"].data.path == f"runs/r/round{place}_version_pairs/pairs.jsonl"
    assert two["r/round2_dpo"].needs == {Path("runs/r/round2_version_pairs"), Path("runs/r/round2_sft_best")}
    evaluation = one["r/round1_evaluate"].config
    assert evaluation.models == {"base": None, "round1": "runs/r/round1_dpo/adapter"}
    assert (evaluation.data.path, evaluation.model.name) == ("d.jsonl", "qwen7b")


def test_the_last_evaluation_and_the_kept_policy_know_every_round() -> None:
    _, one, two, last = planned("pipeline=smoke", "run=r", "rounds=2", "only=[evaluate,best,report]")
    assert [*one, *two] == ["r/round0_evaluate", "r/round1_evaluate", "r/round2_evaluate"]
    assert list(last) == ["r/best", "r/evaluate", "r/report"]
    evaluated = ["base", "sft", "round1_sft_best", "round1_dpo", "round2_sft_best", "round2_dpo"]
    assert list(last["r/evaluate"].config.models) == evaluated
    assert last["r/evaluate"].config.models["round2_dpo"] == "runs/r/round2_dpo/adapter"
    best = last["r/best"].config
    assert list(best.policies.items()) == [
        ("round0", "runs/r/sft/adapter"),
        ("round1", "runs/r/round1_dpo/adapter"),
        ("round2", "runs/r/round2_dpo/adapter"),
    ]
    assert best.evaluations == [f"runs/r/round{number}_evaluate/predictions.jsonl" for number in range(3)]
    assert last["r/report"].needs == {Path("runs/r/best"), Path("runs/r/evaluate")}


def test_without_rounds_a_repeated_step_is_run_once_under_its_own_name() -> None:
    config = load_config("pipeline", ["pipeline=smoke", "run=r", "only=[rejection_sampling,dpo,evaluate]"])
    (part,) = plan(config)
    one: dict[str, Any] = {step.label: step.config for step in part}
    assert list(one) == ["r/rejection_sampling", "r/dpo", "r/evaluate"]
    assert list(one["r/evaluate"].models) == ["base", "sft", "sft_best", "dpo"]
    assert one["r/dpo"].init_adapter == "runs/r/sft_best/adapter"
    assert one["r/rejection_sampling"].adapter == "runs/r/sft/adapter"


def test_a_step_behind_the_rounds_reads_what_is_kept() -> None:
    config = load_config("pipeline", ["pipeline=smoke", "run=r", "only=[sft]"])
    export = {"export": StepConfig("export", ["adapter={best}/adapter"])}
    for number, kept in ((0, "dpo"), (1, "best")):
        more = replace(config, rounds=number, only=["export"], steps={**config.steps, **export})
        (step,) = plan(more)[-1]
        assert step.config.adapter == f"runs/r/{kept}/adapter"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"steps\.best: \{best\} means something else in overrides"):
        replace(config, steps={**config.steps, "best": StepConfig("select")})


RETRAINED = "round.steps=[sample,judge,reward,rejection_sampling,sft_best,preference_pairs,dpo]"


def test_a_round_reads_fresh_questions_and_may_read_what_earlier_rounds_wrote() -> None:
    """`advance`, and `earlier`, which is for lists of files; any list of texts shows it."""
    given = [RETRAINED, "steps.judge.earlier={more_judges: scored.jsonl}", "only=[judge,rejection_sampling]"]
    parts = planned("pipeline=rounds", "run=r", "rounds=3", *given)[1:4]
    skips = [part[f"r/round{n}_rejection_sampling"].config.data.skip for n, part in enumerate(parts, 1)]
    assert skips == [2000, 4000, 6000]
    files = [f"runs/r/round{n}_judge/scored.jsonl" for n in (1, 2)]
    found = [part[f"r/round{n}_judge"].config.more_judges for n, part in enumerate(parts, 1)]
    assert found == [[], files[:1], files]


def test_the_shipped_rounds_never_sample_from_a_question_twice() -> None:
    parts = planned("pipeline=rounds", "run=r", "only=[questions,sample,rejection_sampling,preference_pairs]")
    rows = [step.config.data for part in parts for step in part.values() if step.stage != "expand"]
    asked = [place for each in rows for place in range(each.skip, each.skip + each.limit)]
    assert len(rows) == 5
    assert len(asked) == len(set(asked))
    assert max(asked) < parts[0]["r/questions"].config.count


def test_the_reward_model_may_be_trained_anew_in_each_round() -> None:
    only = "only=[reward,round2_sample,round2_judge,round2_preference_pairs]"
    first, _, two, _ = planned("pipeline=rounds", "run=r", RETRAINED, only)
    assert first == {}
    assert two["r/round2_sample"].config.adapter == two["r/round2_reward"].config.adapter == "runs/r/round1_dpo/adapter"
    assert two["r/round2_judge"].config.data.path == "runs/r/round2_sample/completions.jsonl"
    assert two["r/round2_reward"].config.data.path == "runs/r/round2_judge/scored.jsonl"
    assert two["r/round2_preference_pairs"].config.reward == "runs/r/round2_reward"


def test_replicates_have_rounds_of_their_own() -> None:
    only = "only=[round1_dpo,best,evaluate,report]"
    _, one, last = planned("pipeline=smoke", "run=r", "rounds=1", "replicates=[4]", only)
    assert one["r-seed4/round1_dpo"].config.init_adapter == "runs/r-seed4/round1_sft_best/adapter"
    assert one["r-seed4/round1_dpo"].config.seed == last["r-seed4/best"].config.seed == 4
    assert last["r/report"].config.replicates == ["runs/r-seed4"]
    needed = {Path(f"runs/{run}/{name}") for run in ("r", "r-seed4") for name in ("best", "evaluate")}
    assert last["r/report"].needs == needed


def test_only_names_a_step_of_one_round_or_of_all() -> None:
    def labels(only: str) -> list[list[str]]:
        return [list(part) for part in planned("pipeline=smoke", "run=r", "rounds=2", f"only=[{only}]")]

    assert labels("dpo") == [[], ["r/round1_dpo"], ["r/round2_dpo"], []]
    assert labels("sft,round2_dpo,best") == [["r/sft"], [], ["r/round2_dpo"], ["r/best"]]


LAST = "only=[best,evaluate]"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rounds=-1"], "rounds=-1: must be 0 or more"),
        (["pipeline=demo", "rounds=2"], "rounds=2: this pipeline has no round.steps to repeat"),
        (["rounds=1", "round.steps=[sft_best,dpp]"], "round.steps: no step named 'dpp' (did you mean 'dpo'?)"),
        (["rounds=1", "round.steps=[dpo,dpo]"], "each step is repeated once a round"),
        (["rounds=1", "round.start=sfd"], "round.start: no step named 'sfd' (did you mean 'sft'?)"),
        (["rounds=1", "round.evaluation=[]", LAST], "round.evaluation: give data.path=..."),
        ([*QWEN, "rounds=1", LAST], "round.evaluation: data.path=none. Rounds are decided on questions of their own"),
        (["rounds=1", "round.evaluation=['data.path={held_out}']", LAST], "step 'evaluate' reports on the same rows"),
        (
            ["rounds=1", "round.evaluation=['data.path=gone.jsonl']", LAST],
            "gone.jsonl: no such file",
        ),
        (
            ["rounds=1", "steps.sft.overrides=['data.path={dpo}/x']", "only=[sft]"],
            "steps.sft: {dpo} is a",
        ),
        (["rounds=1", "steps.report.overrides=['run_dir={dpo}']", "only=[report]"], "steps.report: {dpo} is a folder"),
        (["rounds=1", "steps.sft.each_round=['seed=2']", "only=[sft]"], "steps.sft.each_round: the step comes before"),
        (
            ["rounds=2", "steps.dpo.advance={seed: 1}", "only=[dpo]"],
            "steps.dpo.advance: its overrides",
        ),
        (["rounds=1", "only=[round2_dpo]"], "only: no step named 'round2_dpo'"),
    ],
)
def test_rounds_that_cannot_be_are_refused_before_anything_runs(
    overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    smoke = [] if overrides[0].startswith("pipeline=") else ["pipeline=smoke"]
    assert run_command("pipeline", [*smoke, *overrides]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# -- stopping and keeping ---------------------------------------------------------------------------------------------


def answers(model: str, right: int, *, of: int = 40, judge: float | None = None) -> list[Prediction]:
    """A model that answers the first `right` of so many questions right; each has a statement of its own."""
    return [
        Prediction(
            id=f"q{n}", instruction=f"statement {n}", input="?", reference="blue",
            answers={model: score_answer("blue" if n < right else "red", "blue", finished=True, judge=judge)},
        )
        for n in range(of)
    ]  # fmt: skip


def write_predictions(path: Path, rows: Sequence[Prediction]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    return path


def decided(folder: Path, *right: int) -> tuple[list[Any], Any]:
    """What is decided of policies that answer so many of 40 questions right."""
    files = [write_predictions(folder / f"{n}.jsonl", answers(f"round{n}", each)) for n, each in enumerate(right)]
    names = [f"round{n}" for n in range(len(right))]
    results = compare_policies(join_predictions(files), names, Score.exact_match, seed=1)
    return results, decide(results, Score.exact_match)


def test_a_round_helped_when_the_interval_of_its_gain_is_above_zero(tmp_path: Path) -> None:
    """20 of 40 questions more: +0.5, and +-1.96 sqrt(0.5 * 0.5 / 40) = 0.155. One of 40 more: resamples without it have
    no gain, and there are (39/40)^40 = 36 % of them, so the interval begins at zero. None more: no gain in any."""
    results, decision = decided(tmp_path, 10, 30, 31, 31)
    assert [each.score["mean"] for each in results] == [0.25, 0.75, 0.775, 0.775]
    assert results[0].gain is results[0].helped is None
    assert results[1].gain["mean"] == 0.5
    assert results[1].gain["low"] == pytest.approx(0.5 - 0.155, abs=0.03)
    assert results[2].gain["low"] == 0
    last = results[3].gain
    assert last is not None
    assert (last["mean"], last["low"], last["high"], last["n"]) == (0, 0, 0, 40)
    assert [each.helped for each in results] == [None, True, False, False]
    assert in_words(results[1], Score.exact_match).startswith("round1 has exact match 75.0, +50.0 [+3")
    assert decision.kept == "round1"
    assert decision.reason.startswith("round2 has exact match 77.5, +2.5 [+0.0, ")


@pytest.mark.parametrize(
    ("right", "kept"),
    [
        ([20], "round0"),
        ([20, 20], "round0"),
        ([20, 5], "round0"),
        ([5, 20, 35], "round2"),
        ([5, 20, 20, 40], "round1"),  # what comes after a round without a gain does not count
    ],
)
def test_the_last_policy_before_the_first_round_that_did_not_help_is_kept(
    right: list[int], kept: str, tmp_path: Path
) -> None:
    results, decision = decided(tmp_path, *right)
    assert decision.kept == kept
    looked_at = results[: int(kept.removeprefix("round")) + 1]
    assert max(looked_at, key=lambda each: each.score["mean"]).name == kept


def test_gains_are_paired_by_question_and_resampled_by_statement(tmp_path: Path) -> None:
    """Eight questions on each of five statements: the interval is that of five statements, as `evaluate` has it."""

    def grouped(rows: list[Prediction]) -> list[Prediction]:
        return [row.model_copy(update={"instruction": f"statement {n // 8}"}) for n, row in enumerate(rows)]

    files = [write_predictions(tmp_path / f"{n}.jsonl", grouped(answers(f"m{n}", 8 + 16 * n))) for n in range(2)]
    rows = join_predictions([files[0], write_predictions(tmp_path / "turned.jsonl", grouped(answers("m1", 24))[::-1])])
    _, after = compare_policies(rows, ["m0", "m1"], Score.exact_match, seed=3)
    assert after.gain == compare(rows, "m1", "m0", seed=3)["exact_match"]
    assert after.gain is not None
    assert after.gain["low"] == 0  # (3/5)^5 = 8 % of the resamples hold none of the two statements that were gained


def test_grades_decide_where_the_evaluations_have_them(tmp_path: Path) -> None:
    graded = [write_predictions(tmp_path / f"{n}.jsonl", answers(f"m{n}", 0, judge=4.0 + n)) for n in range(2)]
    _, after = compare_policies(join_predictions(graded), ["m0", "m1"], Score.judge, seed=1)
    assert after.gain is not None
    assert (after.gain["mean"], after.gain["low"], after.gain["high"], after.gain["n"]) == (1, 1, 1, 40)
    assert (after.score["mean"], after.helped) == (5, True)
    assert in_words(after, Score.judge) == "m1 has judge 5.00, +1.00 [+1.00, +1.00] over m0: it helped"
    with pytest.raises(UserError, match="score=judge: the evaluation of round0 has none; it needs judge=true"):
        compare_policies(answers("round0", 3), ["round0"], Score.judge, seed=1)


def test_evaluations_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    files = [write_predictions(tmp_path / f"{n}.jsonl", answers("m", 3, of=4 + n)) for n in range(2)]
    with pytest.raises(UserError, match=r"1\.jsonl: not the questions of .*0\.jsonl"):
        join_predictions(files)
    with pytest.raises(UserError, match="no evaluation has answers of 'other'"):
        compare_policies(join_predictions(files[:1]), ["m", "other"], Score.exact_match, seed=1)
    with pytest.raises(UserError, match="keep_best needs policies"):
        run_stage("keep_best", load_config("keep_best", ["run=r"]))


# -- running ----------------------------------------------------------------------------------------------------------


class Pretended:
    """Steps that only leave files. The models answer so many of 40 questions right, by run and name."""

    def __init__(self, right: Mapping[str, Mapping[str, int]]) -> None:
        self.right = right
        self.started: list[str] = []
        self.stop_at: str | None = None

    def start(self, step: Step, workers: int, logs: Path) -> Any:
        if step.label == self.stop_at:
            raise KeyboardInterrupt
        self.started.append(step.label)
        if step.stage in ("keep_best", "report"):
            run_stage(step.stage, step.config)
        else:
            self.write(step)

        class Done:
            pid, returncode = os.getpid(), 0

            def poll(self) -> int:
                return 0

            def terminate(self) -> None: ...
            def wait(self) -> None: ...

        return Done()

    def write(self, step: Step) -> None:
        with Artifact.open(step.stage, step.config) as artifact:
            if step.stage != "evaluate":
                with artifact.output("adapter") as folder:
                    folder.mkdir()
                    (folder / "weights").write_text(step.label, encoding="utf-8")
            else:
                config: Any = step.config
                models = [name for name, adapter in config.models.items() if adapter is not None]
                by_model = [answers(name, self.right[config.run][name]) for name in models]
                rows = [
                    same[0].model_copy(update={"answers": {k: v for row in same for k, v in row.answers.items()}})
                    for same in zip(*by_model, strict=True)
                ]
                artifact.write_rows("predictions.jsonl", rows)
                artifact.metrics["models"] = {name: summarise(rows, name) for name in models}
                pairs = zip(models[1:], models, strict=False)
                artifact.metrics["comparisons"] = [compare(rows, new, old) for new, old in pairs]


def pretend(
    monkeypatch: pytest.MonkeyPatch, folder: Path, first: Sequence[int], second: Sequence[int] = ()
) -> Pretended:
    """Pretended steps in `folder` for the run `r` and its replicate, whose rounds score as given on development."""
    right = {
        run: {f"round{n}": each for n, each in enumerate(scores)}
        | {"base": 4, "sft": scores[0]}
        | {f"round{n}_{step}": each for n, each in enumerate(scores) for step in ("sft_best", "dpo")}
        for run, scores in (("r", first), ("r-seed2", second))
        if scores
    }
    pretended = Pretended(right)
    monkeypatch.setattr(steps, "_start", pretended.start)
    monkeypatch.setattr(steps, "load_config", composed)
    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text('{"id": "a"}\n', encoding="utf-8")
    return pretended


@cache
def _composed(stage: str, overrides: tuple[str, ...]) -> Any:
    return load_config(stage, overrides)


def composed(stage: str, overrides: Sequence[str]) -> Any:
    """A stage's configuration, which is the same for the same overrides: composing it takes most of a plan's time."""
    return _composed(stage, tuple(overrides))


def rounds(*overrides: str) -> int:
    """A small pipeline with rounds: each is an SFT and a DPO."""
    without = ("expand", "select", "questions", "sample", "judge", "reward", "rejection_sampling")
    given = ["pipeline=smoke", "run=r", "round.steps=[sft_best,dpo]", *(f"~steps.{name}" for name in without)]
    starts = {"sft": "", "sft_best": ",'init_adapter={previous}'", "dpo": ",'init_adapter={sft_best}/adapter'"}
    given += [f"steps.{name}.overrides=['data.path=rows.jsonl'{start}]" for name, start in starts.items()]
    return run_command("pipeline", [*given, *overrides])


def manifest(folder: str) -> dict[str, Any]:
    found = read_manifest(Path("runs") / folder)
    assert found is not None
    return found


def test_rounds_end_with_the_first_that_does_not_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended = pretend(monkeypatch, tmp_path, [10, 25, 26, 40])
    assert rounds("rounds=3") == 0
    assert "r/round2_dpo" in pretended.started
    assert not [label for label in pretended.started if "round3" in label]
    best = manifest("r/best")["metrics"]
    assert best["kept"] == "round1"
    assert [(each["name"], each["helped"]) for each in best["policies"]] == [
        ("round0", None), ("round1", True), ("round2", False)]  # fmt: skip
    assert Path("runs/r/best/adapter/weights").read_text() == "r/round1_dpo"
    assert list(manifest("r/evaluate")["metrics"]["models"]) == [
        "base", "sft", "round1_sft_best", "round1_dpo", "round2_sft_best", "round2_dpo"]  # fmt: skip
    out = capsys.readouterr().out
    assert "r: round1 has exact match 62.5, +37.5 [" in out
    assert "r: round2 has exact match 65.0, +2.5 [+0.0, " in out
    assert "kept round1: round2 has exact match 65.0" in out
    kept = next(line for line in out.splitlines() if line.startswith("Kept of all rounds over SFT"))
    assert "+37.5 [" in kept
    assert kept.endswith("helped")
    page = Path("runs/r/report/report.html").read_text(encoding="utf-8")
    assert "Exact match on held‑out questions rose from 10.0 % to 62.5 %" in page.replace("\u202f", " ").replace(
        "\xa0", " "
    )
    assert 'id="rounds"' in page
    assert "Round 2: DPO" in page


def test_what_was_kept_knows_its_training_data_and_the_questions_that_chose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, [10, 12])
    assert rounds("rounds=1") == 0
    assert manifest("r/best")["metrics"]["kept"] == "round0"
    assert Path("runs/r/best/adapter/weights").read_text() == "r/sft"
    found = find_leakage([], ["runs/r/best/adapter"])
    chosen_by = {f"runs/r/round{number}_evaluate/predictions.jsonl" for number in (0, 1)}
    assert (found.files | found.unknown, found.unknown & chosen_by) == ({"rows.jsonl", *chosen_by}, set())
    assert [origin.folder.name for origin in _stages("runs/r/best/adapter")] == ["sft"]
    traced = "\n".join(lineage("runs/r/best/adapter"))
    assert "rows.jsonl" in traced
    assert "keep_best" in traced


def test_rounds_continue_where_they_were_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two rounds, and in the middle of one: what is finished is not begun again, and decided alike."""
    pretended = pretend(monkeypatch, tmp_path, [5, 20, 35, 36])
    for stop_at in ("r/round2_sft_best", "r/round3_dpo"):
        pretended.stop_at = stop_at
        assert rounds("rounds=3") == 130
    pretended.stop_at = None
    assert rounds("rounds=3") == 0
    assert len(pretended.started) == len(set(pretended.started))
    assert pretended.started.index("r/round3_dpo") == len(pretended.started) - 5
    assert manifest("r/best")["metrics"]["kept"] == "round2"
    done = list(pretended.started)
    assert rounds("rounds=3") == 0
    assert pretended.started == done


def test_more_rounds_can_be_asked_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = pretend(monkeypatch, tmp_path, [5, 20, 35])
    assert rounds("rounds=1") == 0
    assert manifest("r/best")["metrics"]["reason"] == "every round helped, and no more were asked for"
    before = len(pretended.started)
    assert rounds("rounds=2") == 0
    assert pretended.started[before:] == [
        *(f"r/round2_{name}" for name in ("sft_best", "dpo", "evaluate")),
        "r/best", "r/evaluate", "r/report"]  # fmt: skip
    assert manifest("r/best")["metrics"]["kept"] == "round2"


def test_each_seed_ends_its_rounds_for_itself_and_the_report_shows_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = pretend(monkeypatch, tmp_path, [10, 11], [10, 25, 39])
    assert rounds("rounds=2", "replicates=[2]") == 0
    assert "r/round2_dpo" not in pretended.started
    assert "r-seed2/round2_dpo" in pretended.started
    assert [manifest(f"{run}/best")["metrics"]["kept"] for run in ("r", "r-seed2")] == ["round0", "round2"]
    lines = Path("runs/r/report/figures.txt").read_text(encoding="utf-8").splitlines()
    cells = {line[:46].strip(): line[46:].split() for line in lines}
    found = {title: text for title, text in cells.items() if title == "Round 2"}
    assert found["Round 2"][0] == "-"
    assert found["Round 2"][1] == "97.5"
    assert next(line for line in lines if line.startswith("Round 2: DPO ")).split("]")[0].count("-") == 1
    kept = next(line for line in lines if line.startswith("Kept of all rounds ")).replace("Kept of all rounds", "")
    assert [part.split("[")[0].strip() for part in kept.split("]")][:3] == ["25.0", "97.5", "61.3"]
    assert lines[-2].startswith("seed 1 kept round0: ")
    assert lines[-1] == "seed 2 kept round2: every round helped, and no more were asked for"
    page = Path("runs/r/report/report.html").read_text(encoding="utf-8")
    assert "Round 2: DPO" in page


def test_without_an_evaluation_no_further_round_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = pretend(monkeypatch, tmp_path, [5, 20, 35])
    assert rounds("rounds=2", "only=[sft,sft_best,dpo]") == 0
    assert "r/round1_dpo" in pretended.started
    assert "r/round2_dpo" not in pretended.started


@pytest.mark.slow  # the tests above have the rounds, and the smoke run the stages
def test_two_rounds_of_real_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: list[str]) -> None:  # noqa: F811
    """The smallest there are, the grader in the reward model's place: as many rounds run as their gains allow."""
    monkeypatch.chdir(tmp_path)
    short = "'sampling.max_new_tokens=12']"
    asked = "'data.path={questions}/expanded.jsonl', 'data.limit=16', 'adapter={previous}'"
    held_out = "'data.path={held_out}', 'data.limit=20', 'judge=false'"
    given = [
        *("~steps.sample", "~steps.judge", "~steps.reward", "steps.sft.overrides=['train.max_steps=1']"),
        f"steps.rejection_sampling.overrides=[{asked}, 'scorer=judge', 'sampling.n=4', {short}",
        f"steps.evaluate.overrides=[{held_out}, {short}",
    ]
    assert run_command("pipeline", ["pipeline=smoke", "run=r", "rounds=2", "workers=1", *given]) == 0
    best = manifest("r/best")["metrics"]
    helped = [each["helped"] for each in best["policies"][1:]]
    ran = sum(label.endswith("_dpo") for label in inside)
    assert len(helped) == ran
    assert ran == (2 if helped[0] else 1)
    assert best["kept"] == f"round{helped.index(False) if False in helped else 2}"
    kept = "sft" if best["kept"] == "round0" else f"{best['kept']}_dpo"
    weights = [Path(f"runs/r/{folder}/adapter/adapter_model.safetensors").read_bytes() for folder in ("best", kept)]
    assert weights[0] == weights[1]
