"""`tune`: trials are runs of the stage, the same seed gives the same ones, and an interrupted search goes on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import pytest

from alignkit import tune
from alignkit.core.app import load_config
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from house import House

pytest_plugins = ["house"]

ROOT = Path(__file__).resolve().parents[1]
HOME = Path("runs/default/tune")


@pytest.fixture
def tuned(house: House) -> House:
    """A house with `tune`, which searches the toy."""
    shutil.copy(ROOT / "src/alignkit/tune.py", house.folder / "src/alignkit/tune.py")
    lines = ["defaults:", "  - tune_schema", "  - _self_", "name: tune", "stage: toy", "metric: length"]
    text = "\n".join([*lines, "space: {factor: 'uniform(1,3)'}", ""])
    (house.folder / "conf/tune.yaml").write_text(text, encoding="utf-8")
    return house


def factors(house: House) -> list[float]:
    return sorted(float(path.name.removeprefix("factor-")) for path in (house.folder / HOME / "jobs").iterdir())


@pytest.mark.parametrize(("maximize", "best"), [("true", -1), ("false", 0)])
def test_the_best_trial_is_the_one_that_measures_best(tuned: House, maximize: str, best: int) -> None:
    result = tuned.run("trials=3", f"maximize={maximize}", 'overrides=["seed=5"]', stage="tune")
    assert result.code == 0, result.err
    found = factors(tuned)
    assert len(found) == 3
    assert all(1 <= factor <= 3 for factor in found)
    command = (tuned.folder / HOME / "best.txt").read_text()
    assert command == f"alignkit toy run=default seed=5 factor={found[best]:.4g}\n"
    metrics = tuned.manifest(str(HOME))["metrics"]
    assert (metrics["trials"], metrics["failed"]) == (3, 0)
    assert metrics["best"] == pytest.approx(11 * found[best], rel=1e-6)
    assert (tuned.folder / HOME / "comparison" / "comparison.md").read_text().count("complete") == 3


def test_the_trials_are_part_of_the_search(tuned: House) -> None:
    """Its time is theirs, and its log holds what they say."""
    assert tuned.run("trials=2", stage="tune").code == 0
    assert (tuned.folder / HOME / "log.txt").read_text().count("toy: 3 rows in ") == 2


def test_trials_that_tie_for_best_are_counted(tuned: House) -> None:
    assert "best length 11: alignkit toy" in tuned.run("trials=2", 'space={factor: "choice(1)"}', stage="tune").out
    varied = 'space={factor: "choice(1)", seed: "int(1,1000000)"}'
    result = tuned.run("trials=3", varied, "name=other", stage="tune")
    command = (tuned.folder / "runs/default/other/best.txt").read_text().strip()
    assert f"3 of 3 trials tie at 11 for the best length, one is {command}" in result.out


def test_more_trials_continue_the_same_search(tuned: House) -> None:
    tuned.run("trials=2", stage="tune")
    before = factors(tuned)
    result = tuned.run("trials=3", stage="tune")
    assert result.out.count("toy is up to date") == 2
    assert tuned.run("trials=3", "force=true", stage="tune").out.count("toy is up to date") == 0
    assert set(before) < set(factors(tuned))
    assert len(factors(tuned)) == 3
    assert tuned.run("trials=2", "seed=2", "name=other", stage="tune").code == 0
    other = {path.name for path in (tuned.folder / "runs/default/other/jobs").iterdir()}
    assert len(other) == 2
    assert not other & {f"factor-{factor:.4g}" for factor in before}


def test_a_failed_trial_does_not_end_the_search(tuned: House) -> None:
    result = tuned.run("trials=6", 'space={fail: "choice(user,none)"}', stage="tune")
    assert result.code == 0, result.err
    metrics = tuned.manifest(str(HOME))["metrics"]
    assert 0 < metrics["failed"] < 6
    assert "fail=none" in (tuned.folder / HOME / "best.txt").read_text()


def test_a_search_in_which_every_trial_fails_is_an_error(tuned: House) -> None:
    result = tuned.run("trials=2", 'overrides=["fail=user"]', stage="tune")
    assert result.code == 2
    assert tuned.manifest(str(HOME))["status"] == "failed"
    assert "all 2 trials failed; the last one: runs/default/tune/jobs/factor-" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metric=depth"], "has no such number. Its metrics: length, found"),
        (['space={factr: "uniform(1,3)"}'], "unknown key 'factr' (did you mean 'factor'?)"),
        (['space={factor: "between(1,3)"}'], "space.factor=between(1,3): write log(low,high)"),
        (['space={factor: "log(0,3)"}'], "space.factor=log(0,3): write log(low,high) with low above 0"),
        (['space={factor: "uniform(3,1)"}'], "with low below high"),
        (["stage=toys"], "unknown command 'toys' (did you mean 'toy'?)"),
        (["trials=0"], "trials is below 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(tuned: House, arguments: list[str], message: str) -> None:
    result = tuned.run("trials=2", *arguments, stage="tune")
    assert result.code == 2
    assert message in result.err


def test_values_are_of_their_kind() -> None:
    trial = optuna.trial.FixedTrial({"a": 0.0123456, "b": 7, "c": "ipo"})
    assert tune.suggest(trial, "a", "log(0.001, 1)") == "0.01235"  # type: ignore[arg-type]
    assert tune.suggest(trial, "b", "int(1,9)") == "7"  # type: ignore[arg-type]
    assert tune.suggest(trial, "c", "choice(sigmoid, ipo)") == "ipo"  # type: ignore[arg-type]


def test_the_shipped_search_is_of_dpo_and_composes() -> None:
    config = load_config("tune")
    assert config.stage == "dpo"
    assert list(config.ranges) == ["beta", "train.learning_rate"]
    first = {key: tune._read_range(key, text)[1][0] for key, text in config.ranges.items()}
    assert load_config("dpo", tune._overrides(config, first)).beta == 0.02


def test_a_setting_of_the_shipped_search_can_be_left_out() -> None:
    """Which another stage needs: sft has no beta, and what is given only adds to what is shipped."""
    config = load_config("tune", ["stage=sft", "overrides=[]", 'space={beta: null, lora.rank: "int(4,16)"}'])
    assert list(config.ranges) == ["train.learning_rate", "lora.rank"]
    first = {key: tune._read_range(key, text)[1][0] for key, text in config.ranges.items()}
    assert load_config("sft", tune._overrides(config, first)).lora.rank == 4
    assert list(load_config("tune", ["space={train.learning_rate: null}"]).ranges) == ["beta"]


def test_without_optuna_the_install_line_is_said(tuned: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = tuned.run(stage="tune")
    assert result.code == 2
    assert "pip install 'alignkit[optuna]'" in result.err


def test_a_mean_counts_for_an_estimate(tmp_path: Path) -> None:
    manifest = '{"stage": "dpo", "status": "complete", "fingerprint": "", "inputs": [], "outputs": [], "metrics": %s}'
    metrics = '{"loss": 0.5, "held_out": {"accuracy": {"mean": 0.75, "low": 0.5, "high": 0.875}}}'
    (tmp_path / "manifest.json").write_text(manifest % metrics)
    assert tune.measured(tmp_path, "held_out.accuracy") == 0.75
    assert tune.interval(tmp_path, "held_out.accuracy") == " (0.5 to 0.875)"
    assert tune.interval(tmp_path, "loss") == ""
    with pytest.raises(UserError, match=r"metric=held_out.margin: .* has no such number"):
        tune.measured(tmp_path, "held_out.margin")
