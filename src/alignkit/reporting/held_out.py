"""What the evaluations of one or several seeds say together: the ladder of models, gains, breakdown, samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from alignkit.evaluation.predictions import TAGS, ModelAnswer, Prediction, compare, read_predictions
from alignkit.evaluation.statistics import Estimate, bootstrap_mean
from alignkit.reporting.runs import Run, Step

KEPT = "kept"
"""What the report calls the policy that was kept of several rounds, beside its name in its round."""

Role = Literal["stage", "control", "upper bound", "against control"]


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
    pooled: dict[str, Any]
    by_seed: list[dict[str, Any] | None]

    @property
    def estimates(self) -> list[Estimate | None]:
        """The gain in exact match for each seed."""
        return [each["exact_match"] if each else None for each in self.by_seed]

    @property
    def verdict(self) -> str:
        """What the pooled interval of exact match allows to be said."""
        estimate = self.pooled["exact_match"]
        if estimate["low"] > 0:
            return "helped"
        return "hurt" if estimate["high"] < 0 else "did not help"


@dataclass(frozen=True)
class Sample:
    """A held-out question with the answers of all rungs; equal answers of neighbouring rungs stand together."""

    group: str
    row: Prediction
    answers: list[tuple[list[str], ModelAnswer]]


@dataclass(frozen=True)
class HeldOut:
    """The evaluations of one or several runs of the same pipeline, one a seed."""

    roles: Roles
    seeds: list[str]
    metrics: list[dict[str, Any]]
    predictions: list[list[Prediction]]

    @property
    def models(self) -> list[str]:
        """All models, in the order of the first run that has them; what was kept of several rounds stands last."""
        found = list(dict.fromkeys(name for metrics in self.metrics for name in metrics["models"]))
        return sorted(found, key=lambda name: name == KEPT)

    @property
    def ladder(self) -> list[str]:
        """The models in the order of training, without controls and upper bounds."""
        beside = {*self.roles.controls, *self.roles.upper_bounds}
        return [name for name in self.models if name not in beside]

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

    def by_seed(self, model: str, score: str) -> list[Estimate | None]:
        """A model's score for each seed; None where that seed's evaluation does not have it."""
        return [metrics["models"].get(model, {}).get(score) for metrics in self.metrics]

    def pooled(self, model: str, score: str) -> Estimate | None:
        """A model's score over all seeds together, with a bootstrap interval over statements; of one seed, its own."""
        if len(self.seeds) == 1:
            return self.by_seed(model, score)[0]
        scored = [(row.score(model, score), row.cluster) for row in self._rows(model)]
        known = [(value, cluster) for value, cluster in scored if value is not None]
        return bootstrap_mean([value for value, _ in known], [cluster for _, cluster in known]) if known else None

    def gain(self, new: str, old: str) -> Gain:
        """`new` against `old`, over all seeds together and for each of them."""
        by_seed = [
            compare(rows, new, old) if rows and {new, old} <= rows[0].answers.keys() else None
            for rows in self.predictions
        ]
        title = f"{self.title(new)} over {self.title(old)}"
        return Gain(title, self._role(new, old), new, compare(self._rows(new, old), new, old), by_seed)

    @cached_property
    def gains(self) -> list[Gain]:
        """Every comparison of any run, and each stage against the control that started where it did."""
        compared = [(entry["new"], entry["old"]) for metrics in self.metrics for entry in metrics["comparisons"]]
        pairs = list(dict.fromkeys(compared))
        for control, start in [pair for pair in pairs if pair[0] in self.roles.controls]:
            for stage, old in list(pairs):
                if old == start and stage in self.ladder and (stage, control) not in pairs:
                    pairs.append((stage, control))
        order: tuple[Role, ...] = ("stage", "control", "against control", "upper bound")
        return sorted((self.gain(new, old) for new, old in pairs), key=lambda gain: order.index(gain.role))

    def breakdown(self) -> dict[str, list[tuple[str, int, list[Estimate]]]]:
        """Exact match by tag, over all seeds together: tag -> (value, questions, an estimate for each model)."""
        table: dict[str, list[tuple[str, int, list[Estimate]]]] = {}
        for tag in TAGS:
            by_value: dict[str, list[Prediction]] = {}
            for row in self._rows():
                if (value := getattr(row, tag)) is not None:
                    by_value.setdefault(str(value), []).append(row)
            for value, rows in by_value.items():
                estimates = [
                    _exact_match([row for row in rows if model in row.answers], model) for model in self.models
                ]
                table.setdefault(tag, []).append((value, len({row.id for row in rows}), estimates))
        return table

    def samples(self) -> tuple[list[Sample], dict[str, int]]:
        """About twelve questions of the first run, and how many of each kind there are.

        A question is "improved" when the first rung got it wrong and the last right, "broken" when an earlier rung got
        it right and the last wrong, else "still right" or "still wrong". Of these the first 4, 4, 2 and 2 in file order
        are taken, one form of question after the other.
        """
        groups: dict[str, list[Prediction]] = {"improved": [], "broken": [], "still wrong": [], "still right": []}
        for row in self.predictions[0]:
            groups[self._group(row)].append(row)
        wanted = {"improved": 4, "broken": 4, "still wrong": 2, "still right": 2}
        chosen = [
            Sample(group, row, self._answers(row))
            for group, rows in groups.items()
            for row in _in_turn(rows)[: wanted[group]]
        ]
        return chosen, {group: len(rows) for group, rows in groups.items()}

    def _rows(self, *models: str) -> list[Prediction]:
        return [row for rows in self.predictions for row in rows if all(model in row.answers for model in models)]

    def _role(self, new: str, old: str) -> Role:
        if old in self.roles.controls:
            return "against control"
        if new in self.roles.controls:
            return "control"
        return "upper bound" if new in self.roles.upper_bounds else "stage"

    def _group(self, row: Prediction) -> str:
        right = [row.score(model, "exact_match") == 1 for model in self.ladder if model in row.answers]
        if right[-1]:
            return "still right" if right[0] else "improved"
        return "broken" if any(right) else "still wrong"

    def _answers(self, row: Prediction) -> list[tuple[list[str], ModelAnswer]]:
        told: list[tuple[list[str], ModelAnswer]] = []
        for model in [name for name in self.ladder if name in row.answers]:
            answer = row.answers[model]
            if told and told[-1][1].text == answer.text:
                told[-1][0].append(model)
            else:
                told.append(([model], answer))
        return told


def read_held_out(runs: Sequence[Run], roles: Roles) -> HeldOut | None:
    """The evaluations of those runs that have one; None when the first run has none."""
    found = [
        (run, step) for run in runs if (step := run.step(roles.evaluation)) is not None and step.stage == "evaluate"
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
    rows = [row.model_copy(update={"answers": {**row.answers, KEPT: row.answers[kept]}}) for row in predictions]
    return metrics | more, rows


def _exact_match(rows: Sequence[Prediction], model: str) -> Estimate:
    return bootstrap_mean([row.answers[model].scores["exact_match"] for row in rows], [row.cluster for row in rows])


def _in_turn(rows: Sequence[Prediction]) -> list[Prediction]:
    """Rows in file order, but one of each form (or kind) after the other."""
    by_form: dict[str | None, list[Prediction]] = {}
    for row in rows:
        by_form.setdefault(row.form or row.kind, []).append(row)
    rounds = max((len(each) for each in by_form.values()), default=0)
    return [each[turn] for turn in range(rounds) for each in by_form.values() if turn < len(each)]
