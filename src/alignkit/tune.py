"""tune: search a stage's settings with Optuna: each trial is a run of the stage, and what it measures decides the next.

Where a sweep (`-m`) runs every combination that is named, this tries `trials` of them, chosen by a tree-structured
Parzen estimator (Bergstra et al., 2011) from ranges. The same seed and results give the same trials, and a finished one
is up to date: the same command, or one with more trials, continues an interrupted search.

Reads:   what the stage reads
Writes:  jobs/<settings>/              each trial, a run folder of the stage
         comparison/comparison.md      all trials side by side, with a plot
         best.txt                      the command of the best one

Overrides people use:
  trials=20                                       how many
  metric=held_out.margin                          what to raise: a number of the stage's manifest
  'space.beta="log(0.02,0.5)"'                    what to vary: log(..), uniform(..), int(..) or choice(..)
  'overrides=["model=tiny","sft_weight=0.1"]'     what all trials have in common
  'space={train.learning_rate: null}'             what not to vary, of conf/tune.yaml's settings
  stage=sft space.beta=null maximize=false metric=held_out.loss
                                                  another stage, which has no beta, and a number to lower

Examples:
  python -m alignkit.tune run=demo 'overrides=["model=tiny","held_out_share=0.2"]'
  python -m alignkit.tune run=demo trials=30 'space={beta: "log(0.02,0.5)", loss: "choice(sigmoid,ipo)"}'
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact, read_manifest
from alignkit.core.config import MISSING, StageConfig
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    import optuna

_RANGE = re.compile(r"(log|uniform|int|choice)\(([^()]+)\)")


@dataclass
class TuneConfig(StageConfig):
    """Which settings of which stage to search, and for what."""

    inputs: ClassVar[tuple[str, ...]] = ()

    stage: str = MISSING
    overrides: list[str] = field(default_factory=list)
    """What all trials have in common; `run` is that of this command."""
    space: dict[str, Optional[str]] = field(default_factory=dict)  # noqa: UP045
    """Setting -> log(low,high), uniform(low,high), int(low,high) or choice(a,b,...); null: not varied."""
    metric: str = MISSING
    """A number in the manifest's metrics, with dots; of an estimate its mean counts."""
    maximize: bool = True
    trials: int = 12

    @property
    def ranges(self) -> dict[str, str]:
        """The part of the space that is searched."""
        return {key: text for key, text in self.space.items() if text is not None}


def run(config: TuneConfig) -> Artifact:
    """Ask for settings, run the stage with them, tell what came of it, and begin again; then compare."""
    from alignkit.core.sweep import compare_jobs

    study, home = _study(config), Path(config.output_dir)
    with Artifact.open("tune", config, always=True) as artifact:
        failed: list[str] = []
        for _ in range(config.trials):
            trial = study.ask()
            settings = {key: suggest(trial, key, text) for key, text in config.ranges.items()}
            folder, error = _run_trial(config, settings, home / "jobs")
            if error:
                failed.append(error)
                study.tell(trial, state=_failed())
            else:
                trial.set_user_attr("command", (read_manifest(folder) or {})["command"])
                trial.set_user_attr("interval", interval(folder, config.metric))
                study.tell(trial, measured(folder, config.metric))
        if len(failed) == config.trials:
            raise UserError(f"all {config.trials} trials failed; the last one: {failed[-1]}")
        best = study.best_trial
        artifact.write_text("best.txt", best.user_attrs["command"] + "\n")
        artifact.metrics = {"trials": config.trials, "failed": len(failed), "best": best.value}
        artifact.summary = summarize(study, config.metric)
    compare_jobs(home / "jobs", home / "comparison")  # which reads what is complete
    return artifact


def summarize(study: optuna.Study, metric: str) -> str:
    """The best value, its interval if it has one, and its command; or how many trials tie for it, and one's command.

    Trials with the same settings are the same run, which does not tie with itself.
    """
    best = study.best_trial
    command = best.user_attrs["command"]
    tied = [trial.user_attrs["command"] for trial in study.trials if trial.value == best.value]
    value = f"{best.value:.4g}{best.user_attrs['interval']}"
    if len(set(tied)) > 1:
        return f"{len(tied)} of {len(study.trials)} trials tie at {value} for the best {metric}, one is {command}"
    return f"best {metric} {value}: {command}"


def _study(config: TuneConfig) -> optuna.Study:
    """An empty study. Raises `UserError` for what no trial could be run with, before the first one."""
    from alignkit.core.app import load_config

    if not config.ranges or config.trials < 1:
        raise UserError(
            "space has nothing to vary, or trials is below 1: give 'space.beta=\"log(0.02,0.5)\"' trials=12"
        )
    first = {key: _read_range(key, text)[1][0] for key, text in config.ranges.items()}
    load_config(config.stage, _overrides(config, first))
    try:
        import optuna
    except ImportError as error:
        raise UserError("tune needs Optuna: pip install 'alignkit[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=config.seed)
    return optuna.create_study(sampler=sampler, direction="maximize" if config.maximize else "minimize")


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


def suggest(trial: optuna.Trial, key: str, text: str) -> str:
    """A value of a setting, as an override has it: numbers with four significant digits."""
    kind, parts = _read_range(key, text)
    if kind == "choice":
        return str(trial.suggest_categorical(key, parts))
    low, high = float(parts[0]), float(parts[1])
    if kind == "int":
        return str(trial.suggest_int(key, int(low), int(high)))
    return f"{trial.suggest_float(key, low, high, log=kind == 'log'):.4g}"


def _read_range(key: str, text: str) -> tuple[str, list[str]]:
    """Kind and parts of a range. Raises `UserError` when it cannot be read."""
    match = _RANGE.fullmatch(text.strip())
    kind, parts = (match[1], [part.strip() for part in match[2].split(",")]) if match else ("", [])
    try:
        numbers = [] if kind == "choice" else [float(part) for part in parts]
    except ValueError:
        numbers = []
    ordered = len(numbers) == 2 and numbers[0] < numbers[1] and (kind != "log" or numbers[0] > 0)
    if not match or (kind != "choice" and not ordered):
        raise UserError(
            f"space.{key}={text}: write log(low,high) with low above 0, uniform(low,high), int(low,high) or "
            "choice(a,b,...), with low below high"
        )
    return kind, parts


def _run_trial(config: TuneConfig, settings: dict[str, str], jobs: Path) -> tuple[Path, str]:
    """Run the stage with these settings, unless that is done; returns its folder, and why it failed or nothing."""
    from alignkit.core.app import load_config
    from alignkit.core.process import DONE
    from alignkit.core.sweep import job_name, run_one

    folder = jobs / job_name(settings, list(settings))
    given = _overrides(config, settings)

    def configure() -> StageConfig:
        composed: StageConfig = load_config(config.stage, given)
        composed.output_dir, composed.force = str(folder), composed.force or config.force
        return composed

    code = run_one(config.stage, folder, settings, configure, shlex.join(["alignkit", config.stage, *given]))
    return folder, "" if code == DONE else f"{folder} (see log.txt there)"


def _overrides(config: TuneConfig, settings: Mapping[str, str]) -> list[str]:
    return [f"run={config.run}", *config.overrides, *(f"{key}={value}" for key, value in settings.items())]


def measured(folder: Path, metric: str) -> float:
    """A number in the metrics of a finished run. Raises `UserError` that names those there are."""
    value = _metric(folder, metric)
    value = value.get("mean") if isinstance(value, Mapping) else value
    if not isinstance(value, int | float):
        raise UserError(
            f"metric={metric}: {folder} has no such number. Its metrics: {', '.join(_metrics(folder))}. held_out.* "
            "needs held-out rows, as in 'overrides=[\"held_out_share=0.2\"]'"
        )
    return float(value)


def interval(folder: Path, metric: str) -> str:
    """An estimate's interval, as it stands behind the value; of other numbers nothing."""
    value = _metric(folder, metric)
    known = isinstance(value, Mapping) and {"low", "high"} <= value.keys()
    return f" ({value['low']:.4g} to {value['high']:.4g})" if known else ""


def _metric(folder: Path, metric: str) -> Any:
    value: Any = _metrics(folder)
    for part in metric.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _metrics(folder: Path) -> dict[str, Any]:
    return dict((read_manifest(folder) or {})["metrics"])


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("tune")
