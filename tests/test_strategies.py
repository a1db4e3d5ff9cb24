"""Comparing strategies: the steps it takes, and the numbers it tells, against those worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from selecting import QUICK, Rows, arguments, audit_of, ids, make_rows, read, refused, select, write
from smoke import ENVIRONMENT

from alignkit.core.app import load_config, run_command
from alignkit.core.config import LoraConfig, ModelConfig, SamplingConfig, TeacherConfig, TrainConfig
from alignkit.core.manifest import read_manifest
from alignkit.core.stages import recipe_dir
from alignkit.data.hygiene.config import HygieneConfig
from alignkit.evaluation.predictions import Prediction, score_answer
from alignkit.evaluation.strategies import Trial, read_trials, steps_of
from alignkit.scoring.quality import QualityConfig

pytest_plugins = ["inside_steps"]

COMPARE = ("k=4", "compare=random,quality,mods", *QUICK, "train.max_steps=1", "sampling.max_new_tokens=8")


def held_out(path: Path, count: int = 6) -> Path:
    lines = (recipe_dir() / "closed_world" / "development.jsonl").read_text(encoding="utf-8").splitlines()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return path


def trial(home: Path, strategies: list[str], seeds: list[int], held: str = "held_out.jsonl") -> Trial:
    model = ModelConfig(name="tiny", path="embedded")
    return Trial(
        home=home,
        strategies=strategies,
        seeds=seeds,
        k=3,
        held_out=held,
        judge=False,
        shared={"run": "a run, it's", "model": model},
        selecting={"hygiene": HygieneConfig(), "quality": QualityConfig(threshold=6.5, reuse=True)},
        training={"lora": LoraConfig(rank=3), "train": TrainConfig(max_steps=7)},
        answering={"sampling": SamplingConfig(n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0], max_new_tokens=5)},
        teaching={"teacher": TeacherConfig(model="scripted")},
    )


def test_the_steps_of_a_trial_and_what_they_wait_for(tmp_path: Path) -> None:
    home = tmp_path / 'it\'s, a "home"'
    steps = {
        f"{step.folder.parent.name}/{step.name}": step for step in steps_of(trial(home, ["mods", "random"], [4, 5]))
    }
    assert set(steps) == {
        f"seed{seed}/{name}" for seed in (4, 5) for name in ("mods", "random", "mods-sft", "random-sft", "evaluate")
    }
    for seed in (4, 5):
        folder = home / f"seed{seed}"
        evaluate: Any = steps[f"seed{seed}/evaluate"].config
        assert steps[f"seed{seed}/evaluate"].needs == {folder / "mods-sft", folder / "random-sft"}
        assert evaluate.models == {
            "base": None, **{name: str(folder / f"{name}-sft" / "adapter") for name in ("mods", "random")}
        }  # fmt: skip
        assert evaluate.judge is False
        assert evaluate.sampling.max_new_tokens == 5
        for name in ("mods", "random"):
            chosen: Any = steps[f"seed{seed}/{name}"].config
            trained: Any = steps[f"seed{seed}/{name}-sft"].config
            assert steps[f"seed{seed}/{name}"].needs == set()
            assert steps[f"seed{seed}/{name}-sft"].needs == {folder / name}
            assert (chosen.seed, chosen.k, chosen.strategy.name) == (seed, 3, name)
            assert (chosen.quality.threshold, chosen.quality.reuse) == (6.5, True)
            assert chosen.data.path == str(home / "pool.jsonl")
            assert chosen.train.max_steps == trained.train.max_steps == 7  # the initial model trains alike
            assert trained.data.path == str(folder / name / "selected.jsonl")
            assert (trained.seed, trained.lora.rank, trained.run) == (seed, 3, "a run, it's")


def prediction(number: int, statement: str, right: dict[str, bool]) -> Prediction:
    answers = {
        name: score_answer("It is old." if good else "It is not that.", "It is old.", finished=True)
        for name, good in right.items()
    }
    return Prediction(id=f"q{number}", instruction=statement, input="How old?", reference="It is old.", answers=answers)


def test_the_numbers_of_a_trial_by_hand(tmp_path: Path) -> None:
    """Two seeds, four questions about two statements; a is right 3 + 2 times of 8, b 1 + 0 times."""
    right = {1: [(1, 0), (1, 1), (1, 0), (0, 0)], 2: [(1, 0), (0, 0), (1, 0), (0, 0)]}
    for seed, answers in right.items():
        rows = [
            prediction(number, f"statement {number // 2}", {"base": False, "a": bool(a), "b": bool(b)})
            for number, (a, b) in enumerate(answers)
        ]
        path = tmp_path / f"seed{seed}" / "evaluate" / "predictions.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
        for name in ("a", "b"):
            manifest = {"stage": "select", "status": "complete", "fingerprint": "", "inputs": [], "outputs": []}
            write(tmp_path / f"seed{seed}" / name / "manifest.json", [manifest | {"metrics": {"rows_selected": 3}}])
    found = read_trials(trial(tmp_path, ["b", "a"], [1, 2]))
    b, a = found["strategies"]
    assert (b["name"], a["name"], found["budget"]) == ("b", "a", 3)
    assert (a["scores"]["exact_match"]["mean"], b["scores"]["exact_match"]["mean"]) == (5 / 8, 1 / 8)
    assert [each["exact_match"]["mean"] for each in a["by_seed"]] == [3 / 4, 2 / 4]
    assert a["rows"] == b["rows"] == [3, 3]
    (difference,) = found["differences"]
    assert difference["name"] == "a - b"
    assert difference["exact_match"]["mean"] == 4 / 8
    assert [each["exact_match"]["mean"] for each in difference["by_seed"]] == [2 / 4, 2 / 4]
    # statement 0 has differences 1 0 1 0, statement 1 has 1 0 1 0: whichever are drawn, the mean is one half
    assert (difference["exact_match"]["low"], difference["exact_match"]["high"]) == (0.5, 0.5)
    assert difference["exact_match"]["p"] == 0.5  # two statements prove nothing, whatever the interval
    assert difference["exact_match"]["helped"] is False
    assert set(a["scores"]) == {"exact_match", "token_f1"}


def by_hand(folder: Path, seeds: list[int], name: str) -> list[dict[str, float]]:
    """Exact match and word F1 of a strategy, as plain means over predictions.jsonl, for each seed."""
    means = []
    for seed in seeds:
        answers = [row["answers"][name] for row in read(folder / f"seed{seed}" / "evaluate", "predictions.jsonl")]
        means.append({score: fmean(each["scores"][score] for each in answers) for score in ("exact_match", "token_f1")})
    return means


def check_comparison(folder: Path, rows: Rows, seeds: list[int]) -> None:
    """The manifest, the page and the files of a finished comparison tell one story."""
    manifest = read_manifest(folder)
    assert manifest is not None
    assert [(check["name"], check["passed"]) for check in manifest["checks"]] == [("equal budgets", True)]
    comparison = manifest["metrics"]["comparison"]
    assert [each["name"] for each in comparison["strategies"]] == ["random", "quality", "mods"]
    home = folder / "compare"
    assert sorted(ids(read(home, "pool.jsonl"))) == sorted(ids(rows))
    for strategy in comparison["strategies"]:
        expected = by_hand(home, seeds, strategy["name"])
        for score in ("exact_match", "token_f1"):
            told = [each[score]["mean"] for each in strategy["by_seed"]]
            assert told == pytest.approx([each[score] for each in expected])
            assert strategy["scores"][score]["mean"] == pytest.approx(fmean(each[score] for each in expected))
        assert strategy["rows"] == [4] * len(seeds)
        for seed in seeds:
            chosen = read(home / f"seed{seed}" / strategy["name"], "selected.jsonl")
            assert len(set(ids(chosen))) == 4
            trained: Any = read_manifest(home / f"seed{seed}" / f"{strategy['name']}-sft")
            assert trained["inputs"][0]["rows"] == 4
            assert trained["inputs"][0]["path"].endswith(f"seed{seed}/{strategy['name']}/selected.jsonl")
    names = [each["name"] for each in comparison["differences"]]
    assert names == ["quality - random", "mods - random", "mods - quality"]
    means = {each["name"]: each["scores"]["token_f1"]["mean"] for each in comparison["strategies"]}
    for each in comparison["differences"]:
        new, old = each["name"].split(" - ")
        assert each["token_f1"]["mean"] == pytest.approx(means[new] - means[old])
        assert each["token_f1"]["helped"] is (each["token_f1"]["low"] > 0 and each["token_f1"]["p_holm"] <= 0.05)
    page = (folder / "selection.html").read_text(encoding="utf-8")
    assert "Does it pay?" in page
    assert not (folder / "selected.jsonl").exists()


def test_compare_by_the_command_line(tmp_path: Path, inside: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(12)
    held = held_out(tmp_path / "held.jsonl")
    given = arguments(tmp_path, rows, *COMPARE, f"held_out=[{held}]", "compare_seeds=1", "seed=3")
    assert run_command("select", given) == 0, capsys.readouterr()
    check_comparison(tmp_path / "select", rows, [3])
    labels = [f"seed3/{name}{part}" for name in ("random", "quality", "mods") for part in ("", "-sft")]
    assert set(inside) == {*labels, "initial/sft", "initial/sample", "seed3/evaluate"}
    (tmp_path / "select" / "manifest.json").unlink()
    assert run_command("select", given) == 0
    assert len(inside) == 9  # all steps were up to date


@pytest.mark.slow
def test_compare_in_processes_with_two_seeds(tmp_path: Path) -> None:
    rows = make_rows(12)
    held = held_out(tmp_path / "held.jsonl")
    given = arguments(tmp_path, rows, *COMPARE, f"held_out={held}", "compare_seeds=2", "workers=2")
    done = subprocess.run(
        [sys.executable, "-m", "alignkit.select", *given], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_comparison(tmp_path / "select", rows, [1, 2])


def test_unequal_budgets_stop_the_comparison(
    tmp_path: Path, inside: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: strategies that come back with different numbers of rows are not compared."""

    def compared(trial: Trial, pool: Any, workers: int) -> dict[str, Any]:
        scores = {"exact_match": {"mean": 0.5, "low": 0.4, "high": 0.6}}
        rows = {"random": [5], "quality": [3]}
        return {
            "budget": 5,
            "strategies": [{"name": name, "rows": rows[name], "scores": scores} for name in trial.strategies],
            "differences": [],
        }

    monkeypatch.setattr("alignkit.evaluation.strategies.run_trial", compared)
    held = held_out(tmp_path / "held.jsonl")
    more = ["k=5", "compare=[random,quality]", f"held_out={held}"]
    said = refused(tmp_path, make_rows(6), more, capsys)
    assert "check 'equal budgets' failed: rows by seed: {'random': [5], 'quality': [3]}" in said


@pytest.mark.parametrize(
    ("scores", "quantile", "good"),
    [([1.0, 2.0, 3.0, 4.0], "quality.quantile=0.5", {2, 3}), ([7.0, 8.0, 7.5, 7.0], "quality.threshold=7", {1, 2})],
)
def test_the_strategies_of_a_comparison_take_the_same_rows_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], quantile: str, good: set[int]
) -> None:
    """The quantile of the pool becomes a threshold, so that the border's row is good in every step as well."""
    trials: list[Trial] = []

    def caught(trial: Trial, pool: Any, workers: int) -> dict[str, Any]:
        trials.append(trial)
        write(trial.home / "pool.jsonl", [row.model_dump(exclude_none=True) for row in pool])
        raise KeyboardInterrupt

    monkeypatch.setattr("alignkit.evaluation.strategies.run_trial", caught)
    rows = [row | {"scores": {"quality": score}} for row, score in zip(make_rows(4), scores, strict=True)]
    held = held_out(tmp_path / "held.jsonl")
    options = ["k=2", "compare=random,quality", "compare_seeds=1", f"held_out={held}", "quality.reuse=true", quantile]
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path, rows, *options)
    step = next(step for step in steps_of(trials[0]) if step.name == "quality")
    config: Any = load_config("select", [*step.overrides, f"output_dir={tmp_path / 'one'}"])
    from alignkit.select import run

    artifact = run(config)
    assert set(ids(read(artifact.folder, "selected.jsonl"))) == {f"row-{number}" for number in good}
    assert audit_of(artifact)["quality"]["scorer"] == "earlier"
    assert json.loads((trials[0].home / "pool.jsonl").read_text().splitlines()[0])["scores"] == {"quality": scores[0]}
