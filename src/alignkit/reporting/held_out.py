"""What the evaluations of one or several seeds say together: the ladder of models, gains, breakdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from alignkit.evaluation.comparison import verdict
from alignkit.evaluation.predictions import TAGS, Prediction, compare, read_predictions
from alignkit.evaluation.statistics import Estimate, bootstrap_together
from alignkit.reporting.measures import FULL_MARKS, estimated, rows_behind
from alignkit.reporting.runs import Run, Step

MOST_VALUES = 40
"""A tag with more values than that is not broken down."""
KEPT = "kept"
"""What the report calls the policy that was kept of several rounds, beside its name in its round."""

GROUPS = ("better", "worse", "wrong", "right", "unknown")
"""What became of a question from the first model of the ladder to the last: got better, got worse, still wrong, still
right; unknown where one of the two has no score."""

Role = Literal["stage", "control", "upper bound", "against control", "from elsewhere"]

_ELSEWHERE = ("server", "answers")
"""Kinds of systems whose training no run here knows anything of."""


@dataclass(frozen=True)
class Roles:
    """How the models of an evaluation are to be read."""

    evaluation: str = "evaluate"
    """Name of the step that examined the models."""
    titles: dict[str, str] = field(default_factory=dict)
    """Model -> what the report calls it; its own name when it has no entry."""
    controls: Sequence[str] = ()
    """Models that got as much training of another kind, to compare a stage with."""
    upper_bounds: Sequence[str] = ()
    """Models made with help that a real run does not have, such as the grader itself as reward."""


@dataclass(frozen=True)
class Gain:
    """One model against another on the same questions: over all seeds together, and for each."""

    title: str
    role: Role
    new: str
    old: str
    score: str
    """The score that decides."""
    pooled: dict[str, Any]
    by_seed: list[dict[str, Any] | None]

    @property
    def estimates(self) -> list[Estimate | None]:
        """The gain in the deciding score for each seed."""
        return [each.get(self.score) if each else None for each in self.by_seed]

    @property
    def verdict(self) -> str:
        """What interval and p of the deciding score, over all seeds together, allow to be said."""
        return verdict(self.pooled.get(self.score))

    @property
    def left_out(self) -> int:
        """Questions, over all seeds, that only one of the two models answered."""
        return sum(each.get("left_out", 0) for each in self.by_seed if each)


@dataclass(frozen=True)
class HeldOut:
    """The evaluations of one or several runs of the same pipeline, one a seed."""

    roles: Roles
    seeds: list[str]
    metrics: list[dict[str, Any]]
    predictions: list[list[Prediction]]
    _pooled: dict[str, dict[str, Estimate]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Score -> model -> its estimate over all seeds, as far as anybody asked."""

    @cached_property
    def models(self) -> list[str]:
        """All models, in the order of the first run that has them; what was kept of several rounds stands last."""
        found = list(dict.fromkeys(name for metrics in self.metrics for name in metrics["models"]))
        return sorted(found, key=lambda name: name == KEPT)

    @cached_property
    def ladder(self) -> list[str]:
        """The models in the order of training, without controls, upper bounds and systems from elsewhere.

        Where nothing is left, all of them.
        """
        beside = {*self.roles.controls, *self.roles.upper_bounds, *self.elsewhere}
        return [name for name in self.models if name not in beside] or self.models

    @cached_property
    def elsewhere(self) -> set[str]:
        """Servers and files of answers."""
        kinds = [item for metrics in self.metrics for item in metrics.get("systems", {}).items()]
        return {name for name, kind in kinds if kind in _ELSEWHERE}

    def title(self, model: str) -> str:
        """What the page calls a model; `round2_dpo`, unless it has a title of its own, by that of `dpo`."""
        of_round = re.fullmatch(r"round(\d+)_(.+)", model)
        if of_round and model not in self.roles.titles:
            return f"Round {of_round[1]}: {self.title(of_round[2])}"
        return self.roles.titles.get(model, model)

    def colour(self, model: str) -> str:
        """The colour variable of a model: the same in every figure."""
        if model in self.roles.controls:
            return "control"
        if model in self.roles.upper_bounds:
            return "upper"
        return f"rung-{self.ladder.index(model) % 6}" if model in self.ladder else "muted"

    @cached_property
    def scores(self) -> list[str]:
        """Every score of the models that is an estimate."""
        return estimated([each for metrics in self.metrics for each in metrics["models"].values()])

    @cached_property
    def differences(self) -> list[str]:
        """Every score that models were compared by."""
        return estimated([each for metrics in self.metrics for each in metrics["comparisons"]])

    @cached_property
    def measures(self) -> list[str]:
        """Scores of single answers, higher is better: those that models are compared by, the deciding one first."""
        found = self.differences or [name for name in ("exact_match", "judge") if name in self.scores]
        return sorted((name for name in found if name in self.scores), key=lambda name: name != "exact_match")

    @cached_property
    def main(self) -> str:
        """The score that decides whether a stage helped: exact match, or else the first that there is."""
        return next(iter(self.measures), self.scores[0])

    def by_seed(self, model: str, score: str) -> list[Estimate | None]:
        """A model's score for each seed; None where that seed's evaluation does not have it."""
        return [metrics["models"].get(model, {}).get(score) for metrics in self.metrics]

    def rows_behind(self, score: str) -> int | bool:
        """What the table of scores has to say of the rows behind one of them: see `measures.rows_behind`."""
        found = [each for model in self.models for each in self.by_seed(model, score)]
        return rows_behind(found, len(self.predictions[0]))

    def pairs_behind(self, score: str) -> int | bool:
        """The same of the table of gains, over all seeds together."""
        return rows_behind([gain.pooled.get(score) for gain in self.gains], sum(map(len, self.predictions)))

    @property
    def uneven(self) -> bool:
        """Whether some models have a score on other questions than others."""
        return any(self.rows_behind(score) is True for score in self.scores)

    @property
    def uneven_pairs(self) -> bool:
        """Whether some gains in a score stand on other questions than others."""
        return any(self.pairs_behind(score) is True for score in self.differences)

    def pooled(self, model: str, score: str) -> Estimate | None:
        """A model's score over all seeds together, with a bootstrap interval over statements; of one seed, its own."""
        if len(self.seeds) == 1:
            return self.by_seed(model, score)[0]
        if score not in self._pooled:
            self._pooled[score] = _means(self._rows(), self.models, score)
        return self._pooled[score].get(model)

    def gain(self, new: str, old: str) -> Gain:
        """`new` against `old`, over all seeds together and for each of them."""
        by_seed = []
        for rows in self.predictions:
            both = _with(rows, new, old)
            left_out = sum((new in row.answers) != (old in row.answers) for row in rows)
            by_seed.append({**compare(both, new, old), "left_out": left_out} if both else None)
        title = f"{self.title(new)} over {self.title(old)}"
        both = [row for rows in self.predictions for row in _with(rows, new, old)]
        alone = by_seed[0] if len(by_seed) == 1 else None
        pooled = alone or (compare(both, new, old) if both else {})
        return Gain(title, self._role(new, old), new, old, self.main, pooled, by_seed)

    @cached_property
    def overall(self) -> Gain | None:
        """The last model of the ladder against the first; None where there is only one."""
        if len(self.ladder) < 2:
            return None
        last, first = self.ladder[-1], self.ladder[0]
        known = [gain for gain in self.gains if (gain.new, gain.old) == (last, first)]
        return known[0] if known else self.gain(last, first)

    @cached_property
    def gains(self) -> list[Gain]:
        """Every comparison of any run, and each stage against the control that started where it did."""
        compared = [(entry["new"], entry["old"]) for metrics in self.metrics for entry in metrics["comparisons"]]
        pairs = list(dict.fromkeys(compared))
        for control, start in [pair for pair in pairs if pair[0] in self.roles.controls]:
            for stage, old in list(pairs):
                if old == start and stage in self.ladder and (stage, control) not in pairs:
                    pairs.append((stage, control))
        order: tuple[Role, ...] = ("stage", "control", "against control", "upper bound", "from elsewhere")
        return sorted((self.gain(new, old) for new, old in pairs), key=lambda gain: order.index(gain.role))

    @cached_property
    def breakdown(self) -> dict[str, list[tuple[str, int, list[Estimate | None]]]]:
        """The deciding score by tag, over all seeds together: tag -> (value, questions, an estimate for each model)."""
        table: dict[str, list[tuple[str, int, list[Estimate | None]]]] = {}
        for tag in TAGS:
            by_value: dict[str, list[Prediction]] = {}
            for row in self._rows():
                if (value := getattr(row, tag)) is not None:
                    by_value.setdefault(str(value), []).append(row)
            if len(by_value) > MOST_VALUES:
                continue
            for value, rows in by_value.items():
                means = _means(rows, self.models, self.main)
                estimates = [means.get(model) for model in self.models]
                table.setdefault(tag, []).append((value, len({row.id for row in rows}), estimates))
        return table

    def group(self, row: Prediction) -> str:
        """What became of a question from the first model of the ladder to the last, one of `GROUPS`."""
        first, last = (row.score(self.ladder[place], self.main) for place in (0, -1))
        if first is None or last is None:
            return "unknown"
        if first != last:
            return "better" if last > first else "worse"
        return "right" if last >= FULL_MARKS.get(self.main, 1.0) else "wrong"

    def _rows(self) -> list[Prediction]:
        return [row for rows in self.predictions for row in rows]

    def _role(self, new: str, old: str) -> Role:
        if not {new, old} <= {*self.ladder, *self.roles.controls, *self.roles.upper_bounds}:
            return "from elsewhere"
        if old in self.roles.controls:
            return "against control"
        if new in self.roles.controls:
            return "control"
        return "upper bound" if new in self.roles.upper_bounds else "stage"


def read_held_out(runs: Sequence[Run], roles: Roles) -> HeldOut | None:
    """The evaluations of those runs that have one; None when the first run has none."""
    found = [
        (run, step)
        for run in runs
        if (step := run.step(roles.evaluation) or run.job) is not None and step.stage == "evaluate"
    ]
    if not found or found[0][0] is not runs[0]:
        return None
    steps = [step for _, step in found]
    seeds = [run.seed for run, _ in found]
    if len(set(seeds)) < len(seeds):  # the same seed in two folders: the folders tell them apart
        seeds = [run.folder.name for run, _ in found]
    metrics = [step.metrics for step in steps]
    predictions = [read_predictions(step.folder / "predictions.jsonl") for step in steps]
    for place, (run, step) in enumerate(found):
        if kept := kept_model(run, step):
            metrics[place], predictions[place] = _with_kept(metrics[place], predictions[place], *kept)
    return HeldOut(roles, seeds, metrics, predictions)


def kept_model(run: Run, evaluation: Step) -> tuple[str, str] | None:
    """What an evaluation calls the policy that was kept of several rounds, and the one that they started from.

    None where there were no rounds, or where the evaluation examined other adapters.
    """
    best = next(iter(run.of_stage("keep_best")), None)
    if best is None:
        return None
    names = {path: name for name, path in evaluation.config["models"].items()}
    policies = best.config["policies"]
    kept, start = names.get(policies[best.metrics["kept"]]), names.get(next(iter(policies.values())))
    return (kept, start) if kept and start else None


def _with_kept(
    metrics: dict[str, Any], predictions: list[Prediction], kept: str, start: str
) -> tuple[dict[str, Any], list[Prediction]]:
    """An evaluation with the kept policy as a model of its own, compared with where the rounds started."""
    more = {
        "models": {**metrics["models"], KEPT: metrics["models"][kept]},
        "comparisons": [*metrics["comparisons"], {"new": KEPT, "old": start}],
    }
    rows = [
        row.model_copy(update={"answers": {**row.answers, KEPT: row.answers[kept]}}) if kept in row.answers else row
        for row in predictions
    ]
    return metrics | more, rows


def in_turn(rows: Sequence[Prediction], group: Callable[[Prediction], str] | None = None) -> list[Prediction]:
    """Rows in file order, but one of each form (or kind), and of each `group` of it, after the other."""
    by_form: dict[tuple[str | None, str | None], list[Prediction]] = {}
    for row in rows:
        by_form.setdefault((group(row) if group else None, row.form or row.kind), []).append(row)
    rounds = max((len(each) for each in by_form.values()), default=0)
    return [each[turn] for turn in range(rounds) for each in by_form.values() if turn < len(each)]


def _with(rows: Sequence[Prediction], *models: str) -> list[Prediction]:
    return [row for row in rows if all(model in row.answers for model in models)]


def _means(rows: Sequence[Prediction], models: Sequence[str], score: str) -> dict[str, Estimate]:
    """The mean score of each model that has it in any of the rows, with a bootstrap interval over statements."""
    samples: dict[str, tuple[list[float], list[str]]] = {}
    for model in models:
        known = [(value, row.cluster) for row in rows if (value := row.score(model, score)) is not None]
        if known:
            samples[model] = ([value for value, _ in known], [cluster for _, cluster in known])
    return bootstrap_together(samples)
