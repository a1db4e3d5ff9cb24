"""A pipeline's plan: the steps of a run, and how some of them are repeated in rounds.

What stands in braces in a step's overrides is filled in: `{run}`, the pipeline's variables, and the name of a step,
which stands for that step's folder. `{previous}` is the adapter that a round starts from, `{best}` the folder with the
adapter that is kept in the end. Without rounds every step is run once, in the folder of its name. With them, those of
`round.steps` are run again and again, in `round1_<step>`, `round2_<step>`, ...; what stands before the last of them in
reading order comes before the rounds, what stands behind it follows them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.core.config import MISSING, RowsConfig, Score, StageConfig
from alignkit.core.errors import UserError
from alignkit.core.help import stage_keys
from alignkit.core.stages import default_groups, nearest
from alignkit.core.steps import Step, make_step, quoted


@dataclass
class StepConfig:
    """One step: a stage and the overrides it is run with."""

    stage: str = MISSING
    overrides: list[str] = field(default_factory=list)
    each_round: list[str] = field(default_factory=list)
    """For a step behind the rounds: overrides to repeat for each round that was run. In them the name of a repeated
    step stands for its folder in that round, and `{round}` for what comes before its name there: `round1_`, or nothing
    without rounds."""
    advance: dict[str, int] = field(default_factory=dict)
    """For a repeated step: keys whose number grows by so much each round. With data.skip, each reads fresh rows."""
    earlier: dict[str, str] = field(default_factory=dict)
    """For a repeated step: keys that are given the list of this file of the same step in all rounds before."""


@dataclass
class RoundConfig:
    """What a round is."""

    steps: list[str] = field(default_factory=list)
    """The steps that every round repeats, the last of which makes the round's policy."""
    start: str = "sft"
    """The step whose adapter the first round starts from: `{previous}`."""
    evaluation: list[str] = field(default_factory=list)
    """Overrides of the evaluation at the end of each round. Its questions decide when to stop and what to keep, so they
    must not be those of the report."""
    score: Score = Score.exact_match
    """What decides."""


@dataclass
class PlanConfig(StageConfig):
    """The part of a pipeline's configuration that says what one run consists of."""

    steps: dict[str, StepConfig] = MISSING
    """Name of a step, which is also its folder -> what it runs, in reading order."""
    variables: dict[str, str] = field(default_factory=dict)
    """What differs from user to user: paths, the teacher's model."""
    common: list[str] = field(default_factory=list)
    """Overrides for every step whose stage has the key: the base model, the hardware, the teacher."""
    rounds: int = 0
    """Most rounds to run; 0 runs each step once. Rounds end with the first whose gain is not above zero."""
    round: RoundConfig = field(default_factory=RoundConfig)
    only: list[str] = field(default_factory=list)
    """Names of the steps to run; none given: all. `dpo` is that of every round, `round2_dpo` that of one."""

    def __post_init__(self) -> None:
        """Raise `UserError` for rounds that cannot be made."""
        if self.rounds < 0:
            raise UserError(f"rounds={self.rounds}: must be 0 or more")
        if self.rounds and not self.round.steps:
            raise UserError(f"rounds={self.rounds}: this pipeline has no round.steps to repeat (pipeline=rounds has)")
        start = [self.round.start] if self.round.steps else []
        for key, names in (("round.steps", self.round.steps), ("round.start", start)):
            for name in names:
                if name not in self.steps:
                    raise UserError(f"{key}: no step named {name!r}{nearest(name, list(self.steps))}")
        if len(set(self.round.steps)) < len(self.round.steps):
            raise UserError(f"round.steps={self.round.steps}: each step is repeated once a round; name it once")
        if taken := sorted({"run", "round", "previous", "best", *self.variables} & self.steps.keys()):
            raise UserError(f"steps.{taken[0]}: {{{taken[0]}}} means something else in overrides; rename the step")


def wanted(config: PlanConfig, step: str) -> bool:
    """Whether `only` lets a step be run."""
    return not config.only or not {step, re.sub(r"^round\d+_", "", step)}.isdisjoint(config.only)


def first_steps(config: PlanConfig) -> list[str]:
    """Names of the wanted steps before the rounds; without rounds, of all."""
    later = {*config.round.steps, *_behind(config)} if config.rounds else set()
    return [name for name in config.steps if name not in later and wanted(config, name)]


def last_steps(config: PlanConfig) -> list[str]:
    """Names of the wanted steps behind the rounds."""
    return [name for name in _behind(config) if wanted(config, name)]


def plan_step(config: PlanConfig, name: str, ran: int = 0, also: Sequence[str] = ()) -> Step:
    """A step outside the rounds, of which `ran` were run; `also` are overrides behind its own."""
    entry, fillings = config.steps[name], _fillings(config)
    if config.rounds:  # `{dpo}` alone would not say of which round
        fillings = {key: value for key, value in fillings.items() if key not in config.round.steps}
    overrides = [fill(each, fillings) for each in entry.overrides]
    if config.rounds and not ran and entry.each_round:
        raise UserError(f"steps.{name}.each_round: the step comes before the rounds; move it behind them")
    for number in range(1, ran + 1) if config.rounds else [0]:
        overrides += [fill(each, _fillings(config, number)) for each in entry.each_round]
    for each in overrides:
        if asked := [step for step in config.round.steps if f"{{{step}}}" in each]:
            raise UserError(f"steps.{name}: {{{asked[0]}}} is a folder in each round: use each_round, or {{best}}")
    return _make(config, name, entry.stage, [*overrides, *also])


def plan_round(config: PlanConfig, number: int) -> Iterator[Step]:
    """The wanted steps of one round, and the evaluation that ends it; with the first, that of what it starts from."""
    if number == 1 and wanted(config, "round0_evaluate"):
        yield plan_evaluation(config, 0)
    for name in config.round.steps:
        if not wanted(config, f"round{number}_{name}"):
            continue
        entry, fillings = config.steps[name], _fillings(config, number)
        overrides = [fill(each, fillings) for each in [*entry.overrides, *entry.each_round]]
        for key, by in entry.advance.items():
            overrides = list(_advanced(f"steps.{name}", overrides, key, by * (number - 1)))
        if number > 1:
            for key, file in entry.earlier.items():
                files = [f"{_folder(config, f'round{earlier}_{name}')}/{file}" for earlier in range(1, number)]
                overrides.append(f"{key}=[{', '.join(files)}]")
        yield _make(config, f"round{number}_{name}", entry.stage, overrides)
    if wanted(config, f"round{number}_evaluate"):
        yield plan_evaluation(config, number)


def plan_evaluation(config: PlanConfig, number: int) -> Step:
    """The evaluation of one round's policy. Each is examined once; `keep_best` pairs its answers with the others'."""
    if not any(each.startswith("data.path=") for each in config.round.evaluation):
        raise UserError("round.evaluation: give data.path=..., the questions that decide how many rounds help")
    given = [fill(each, _fillings(config, number)) for each in config.round.evaluation]
    models = ["models.base=null", f"models.round{number}={_policy(config, number)}"]
    return _make(config, f"round{number}_evaluate", "evaluate", [*given, *models])


def plan_best(config: PlanConfig, ran: int) -> Step:
    """The step that keeps the best policy of so many rounds."""
    policies = [f"policies.round{number}={_policy(config, number)}" for number in range(ran + 1)]
    evaluations = ", ".join(str(predictions(config, number)) for number in range(ran + 1))
    score = f"score={config.round.score.name}"
    return _make(config, "best", "keep_best", [score, *policies, f"evaluations=[{evaluations}]"])


def check_evaluation(steps: Sequence[Step], later: Sequence[Step]) -> None:
    """Raise `UserError` when a round's evaluation has no questions of its own, but those of one behind the rounds."""
    evaluations = [step for step in steps if step.stage == "evaluate"]
    if not evaluations:
        return
    config: Any = evaluations[0].config
    if config.data.path == "none":
        raise UserError(
            "round.evaluation: data.path=none. Rounds are decided on questions of their own, other than the held-out "
            "ones; a pipeline with variables.development takes them there"
        )
    for other in later:
        theirs: Any = other.config
        if other.stage == "evaluate" and _overlap(config.data, theirs.data):
            raise UserError(
                f"round.evaluation: {config.data.path} decides when rounds end, and step '{other.name}' reports on the "
                "same rows. Give one of them another file, or rows of their own by data.skip and data.limit"
            )


def _overlap(one: RowsConfig, other: RowsConfig) -> bool:
    """Whether two slices are of one file and share rows."""
    if os.path.realpath(one.path) != os.path.realpath(other.path):
        return False
    ends = [float("inf") if rows.limit is None else rows.skip + rows.limit for rows in (one, other)]
    return one.skip < ends[1] and other.skip < ends[0]


def predictions(config: PlanConfig, number: int) -> str:
    """Where the answers of a round's policy to the deciding questions are."""
    return f"{_folder(config, f'round{number}_evaluate')}/predictions.jsonl"


def applicable(stage: str, overrides: Sequence[str]) -> list[str]:
    """Those of the common overrides whose key or group the stage has."""
    known = {key.name for key in stage_keys(stage)} | set(default_groups(stage))
    return [override for override in overrides if override.split("=", 1)[0] in known]


def fill(override: str, fillings: Mapping[str, str]) -> str:
    """Put values into an override, quoted where Hydra would otherwise read them as more than text."""
    for name, value in fillings.items():
        plain = re.fullmatch(r"[\w./:+@-]*", value)
        override = override.replace(f"{{{name}}}", value if plain else quoted(value))
    return override


def _fillings(config: PlanConfig, number: int = 0) -> dict[str, str]:
    """What stands for what in braces: in a round, or outside of them (0)."""
    prefix = f"round{number}_" if number else ""
    inside = config.round.steps if number else []
    folders = {name: _folder(config, f"{prefix if name in inside else ''}{name}") for name in config.steps}
    rounds = {"previous": _policy(config, max(number - 1, 0)), "round": prefix} if config.round.steps else {}
    if config.round.steps:
        rounds["best"] = _folder(config, "best" if config.rounds else config.round.steps[-1])
    return {"run": config.run, **config.variables, **folders, **rounds}


def _policy(config: PlanConfig, number: int) -> str:
    """The adapter that a round ends with; 0: the one that the first starts from."""
    step = f"round{number}_{config.round.steps[-1]}" if number else config.round.start
    return f"{_folder(config, step)}/adapter"


def _folder(config: PlanConfig, step: str) -> str:
    return f"runs/{config.run}/{step}"


def _behind(config: PlanConfig) -> list[str]:
    names = list(config.steps)
    return names[max(names.index(name) for name in config.round.steps) + 1 :] if config.rounds else []


def _make(config: PlanConfig, name: str, stage: str, overrides: Sequence[str]) -> Step:
    common = [fill(each, _fillings(config)) for each in applicable(stage, config.common)]
    force = ["force=true"] * config.force
    return make_step(
        name, stage, [f"run={config.run}", f"name={name}", f"seed={config.seed}", *common, *overrides, *force]
    )


def _advanced(where: str, overrides: Sequence[str], key: str, by: int) -> Iterator[str]:
    """The overrides, with `by` added to the number that they give `key`."""
    given = [each for each in overrides if each.startswith(f"{key}=")]
    if not given or not re.fullmatch(r"\d+", given[-1].partition("=")[2]):
        raise UserError(f"{where}.advance: its overrides must give {key} a whole number, from which it grows")
    for each in overrides:
        yield f"{key}={int(each.partition('=')[2]) + by}" if each == given[-1] else each
