"""What the report says about reward models: right pairs, probabilities, length, agreement, probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.charts import reward_figures
from alignkit.reporting.figures import reliability, scatter
from alignkit.reporting.runs import Run

if TYPE_CHECKING:
    from markupsafe import Markup

SCORES_FILE = "held_out_scores.jsonl"
MOST_POINTS = 1000
"""Answers in the figure of score and length; a page with more is slow."""
WORST = 3

_CORRELATIONS = (
    ("Spearman with the grade", "agreement", "spearman"),
    ("Kendall's tau-b with the grade", "agreement", "kendall"),
    ("Pearson with the length", "length", "pearson"),
    ("Spearman with the length", "length", "spearman"),
)
_GAINS = {
    "best_over_single": "best of n over one sample",
    "best_over_greedy": "best of n over the greedy answer",
    "single_over_greedy": "one sample over the greedy answer",
}
_LENGTHS = {"longer": "longer", "as_long": "as long", "shorter": "shorter"}


@dataclass(frozen=True)
class Mistake:
    """A pair that was ranked wrong: what was asked, both answers with their scores."""

    source: str
    question: str
    better: str
    better_score: float
    worse: str
    worse_score: float


@dataclass(frozen=True)
class RewardSection:
    """One examined reward model. Lists hold an entry for each seed, None where a seed has none."""

    step: str
    seeds: list[str]
    accuracy: Markup | None = None
    reliability: Markup | None = None
    length: Markup | None = None
    calibration: list[Mapping[str, Any] | None] = field(default_factory=list)
    correlations: list[tuple[str, list[Estimate | None], list[Estimate | None]]] = field(default_factory=list)
    by_length: list[tuple[str, list[Estimate | None]]] = field(default_factory=list)
    probes: list[tuple[str, list[Mapping[str, Any] | None]]] = field(default_factory=list)
    rewardbench: list[tuple[str, list[float | None]]] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)


def reward_sections(runs: Sequence[Run]) -> list[RewardSection]:
    """A section for each step of the first run that trained or examined a reward model, with the other seeds beside."""
    from markupsafe import Markup

    accuracy = dict(reward_figures(runs))
    sections = []
    for number, step in enumerate(runs[0].of_stage("reward", "evaluate_reward")):
        steps = [run.step(step.name) for run in runs]
        found = [each.metrics.get("held_out") or {} if each else {} for each in steps]
        seeds = [f"seed {run.seed}" for run in runs]
        rows = step.rows(SCORES_FILE)
        sections.append(
            RewardSection(
                step=step.name,
                seeds=seeds,
                accuracy=Markup(accuracy[step.name]) if step.name in accuracy else None,
                reliability=_reliability(f"reliability-{number}", step.name, seeds, found),
                length=_length(f"length-{number}", step.name, rows),
                calibration=[each.get("calibration") or None for each in found],
                correlations=_correlations(found),
                by_length=_by_length(found),
                probes=_by_seed([each.get("probes", {}) for each in found]),
                rewardbench=_by_seed([each.get("rewardbench", {}) for each in found]),
                mistakes=worst_mistakes(rows),
            )
        )
    return sections


def best_of_n_gains(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[Estimate | None]]]]]:
    """For each step that chose the best of n, what choosing is worth over one sample and over the greedy answer.

    (title, its lines: the comparison, and its paired difference for each seed).
    """
    found = []
    for step in runs[0].of_stage("rejection_sampling"):
        by_teacher = step.config.get("scorer") == "judge"
        gains = [(other.metrics if (other := run.step(step.name)) else {}).get("gains", {}) for run in runs]
        for measure, comparisons in gains[0].items():
            said = "grade" if by_teacher or measure == "grade" else "reward model's score"
            lines = [
                (_GAINS[name], [each.get(measure, {}).get(name) for each in gains])
                for name in _GAINS
                if name in comparisons
            ]
            found.append((f"{step.name}: {said}", lines))
    return found


def worst_mistakes(rows: Sequence[Mapping[str, Any]]) -> list[Mistake]:
    """The pairs in which the worse answer scores highest above the better one, one a prompt."""
    wrong: list[tuple[float, Mistake]] = []
    for row in rows:
        pairs = [(row["answers"][better], row["answers"][worse]) for better, worse in row["comparisons"]]
        if not pairs:
            continue
        better, worse = max(pairs, key=lambda pair: pair[1]["score"] - pair[0]["score"])
        if worse["score"] > better["score"]:
            texts = better["text"], better["score"], worse["text"], worse["score"]
            mistake = Mistake(row["source"], row["prompt"][-1]["content"], *texts)
            wrong.append((worse["score"] - better["score"], mistake))
    return [mistake for _, mistake in sorted(wrong, key=lambda each: -each[0])[:WORST]]


def _reliability(name: str, step: str, seeds: Sequence[str], found: Sequence[Mapping[str, Any]]) -> Markup | None:
    from markupsafe import Markup

    lines = [
        (seed, [(each["predicted"], each["right"]) for each in metrics["calibration"]["bins"]])
        for seed, metrics in zip(seeds, found, strict=True)
        if metrics.get("calibration")
    ]
    return Markup(reliability(name, f"Probabilities of {step}", lines)) if lines else None


def _length(name: str, step: str, rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Score and length of every answer, the best of its prompt on top."""
    from markupsafe import Markup

    best: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    for row in rows:
        winners = {better for better, _ in row["comparisons"]} - {worse for _, worse in row["comparisons"]}
        for place, each in enumerate(row["answers"]):
            if len(best) + len(others) < MOST_POINTS:
                (best if place in winners else others).append((each["tokens"], each["score"]))
    if not best:
        return None
    groups = [("other answers", "muted", others), ("best of its prompt", "reward", best)]
    description = f"{len(best)} best answers and {len(others)} others, score against length in tokens"
    title = f"Score and length by {step}"
    labels = {"x_label": "tokens of the answer", "y_label": "score"}
    return Markup(scatter(name, title, groups, **labels, description=description))


def _correlations(
    found: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[Estimate | None], list[Estimate | None]]]:
    lines = []
    for title, group, kind in _CORRELATIONS:
        each = [metrics.get(group, {}).get(kind) or {"over": None, "within": None} for metrics in found]
        if any(one["over"] or one["within"] for one in each):
            lines.append((title, [one["over"] for one in each], [one["within"] for one in each]))
    return lines


def _by_length(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Estimate | None]]]:
    lines = _by_seed([metrics.get("length", {}).get("accuracy_where_better_is", {}) for metrics in found])
    return [(_LENGTHS[name], each) for name, each in lines]


def _by_seed(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Name -> its entry for each seed, in the order of the first seed that has any."""
    names = dict.fromkeys(name for each in found for name in each)
    return [(name, [each.get(name) for each in found]) for name in names]
