"""From manifests to figures: which numbers go into which chart, and in which colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.figures import Curve, Interval, Rung, best_of_n, curves, intervals, ladder
from alignkit.reporting.held_out import HeldOut
from alignkit.reporting.runs import Run, Step

_TRAINING = ("sft", "reward", "dpo")


def evaluation_figures(held_out: HeldOut) -> dict[str, str]:
    """The ladder in exact match and in grades, and the gains; a figure without numbers is left out."""
    figures = {}
    rungs = {score: _rungs(held_out, score) for score in ("exact_match", "judge")}
    figures["ladder"] = ladder(
        "ladder", "Held-out exact match by stage", rungs["exact_match"], held_out.seeds, percent=True
    )
    if any(estimate for rung in rungs["judge"] for estimate in rung.estimates):
        figures["grades"] = ladder(
            "grades", "Grade from 0 to 10 by stage", rungs["judge"], held_out.seeds, percent=False
        )
    if held_out.gains:
        figures["gains"] = intervals(
            "gains",
            "Gain in exact match, in percentage points",
            [
                Interval(
                    gain.title,
                    held_out.colour(gain.new),
                    gain.estimates,
                    gain.pooled["exact_match"],
                    hollow=gain.role == "control",
                )
                for gain in held_out.gains
            ],
            [f"seed {seed}" for seed in held_out.seeds],
            reference=0.0,
            signed=True,
        )
    return figures


def loss_figures(runs: Sequence[Run], held_out: HeldOut | None) -> list[tuple[str, str]]:
    """The training loss of each training step of the first run, and its held-out loss, by seed: (step, figure)."""
    figures: list[tuple[str, str]] = []
    for step in runs[0].of_stage(*_TRAINING):
        lines = []
        for place, run in enumerate(runs):
            other = run.step(step.name)
            rows = list(other.rows("loss.jsonl")) if other else []
            for key, title, colour in (("loss", "", _colour(step, held_out)), ("held_out_loss", ", held out", "muted")):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    xs, ys = zip(*points, strict=True)
                    lines.append(Curve(f"seed {run.seed}{title}", colour, xs, ys, dashed=place > 0))
        if lines:
            title = f"Training loss of {step.name}"
            figures.append((step.name, curves(f"loss-{len(figures)}", title, lines, x_label="optimizer step")))
    return figures


def preference_figures(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """How each DPO step moved chosen and rejected answers, and the margin between them: (title, figure)."""
    figures: list[tuple[str, str]] = []
    kinds = (
        ("log-ratio a token", {"chosen_log_ratio": ("chosen", "rung-3"), "rejected_log_ratio": ("rejected", "muted")}),
        ("reward margin", {"reward_margin": ("margin", "rung-3")}),
    )
    for step in runs[0].of_stage("dpo"):
        for said, keys in kinds:
            lines = []
            for place, run in enumerate(runs):
                other = run.step(step.name)
                rows = list(other.rows("loss.jsonl")) if other else []
                for key, (name, colour) in keys.items():
                    points = [(row["step"], row[key]) for row in rows if key in row]
                    if points:
                        xs, ys = zip(*points, strict=True)
                        lines.append(Curve(f"{name}, seed {run.seed}", colour, xs, ys, dashed=place > 0))
            if lines:
                title, name = f"{step.name}: {said}", f"preference-{len(figures)}"
                figures.append((title, curves(name, title, lines, x_label="optimizer step")))
    return figures


def reward_figures(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """How many pairs each reward model ranks right, held out by source, and all in training: (step, figure)."""
    figures: list[tuple[str, str]] = []
    for step in runs[0].of_stage("reward", "evaluate_reward"):
        found = [other.metrics if (other := run.step(step.name)) else {} for run in runs]
        lines = []
        for split, title in (("held_out_accuracy", "held out"), ("train_accuracy", "in training")):
            for source in found[0].get(split, {}):
                if split == "train_accuracy" and source != "all":
                    continue
                estimates = [metrics.get(split, {}).get(source) for metrics in found]
                colour = "reward" if split.startswith("held_out") else "muted"
                lines.append(Interval(f"{title}, {source}", colour, estimates))
        if lines:
            title = f"Pairs that {step.name} ranks right"
            seeds = [f"seed {run.seed}" for run in runs]
            name = f"accuracy-{len(figures)}"
            figures.append((step.name, intervals(name, title, lines, seeds, reference=0.5, signed=False)))
    return figures


def best_of_n_figures(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the best of n answers is worth, by the score that chose it and by the teacher's grade: (title, figure)."""
    figures: list[tuple[str, str]] = []
    for step in runs[0].of_stage("rejection_sampling"):
        by_teacher = step.config.get("scorer") == "judge"
        for measure in step.metrics.get("best_of_n", {}):
            lines = []
            for place, run in enumerate(runs):
                other = run.step(step.name)
                curve = other.metrics.get("best_of_n", {}).get(measure) if other else None
                if curve:
                    colour = "upper" if by_teacher or measure == "grade" else "reward"
                    lines.append(_best_of_n(f"seed {run.seed}", colour, curve, dashed=place > 0))
            said = "grade" if by_teacher or measure == "grade" else "reward model's score"
            figure = best_of_n(f"best-{len(figures)}", f"{step.name}: {said} of the best of n", lines)
            figures.append((f"{step.name}: {said}", figure))
    return figures


def _best_of_n(title: str, colour: str, curve: Mapping[str, Estimate], *, dashed: bool) -> Curve:
    """A curve over n with its interval as a band."""
    ns = sorted(curve, key=int)
    mean, low, high = ([curve[n][key] for n in ns] for key in ("mean", "low", "high"))
    return Curve(title, colour, [int(n) for n in ns], mean, low, high, dashed=dashed)


def _rungs(held_out: HeldOut, score: str) -> list[Rung]:
    """The ladder's models, then those beside it, with their estimates for each seed."""
    beside = [name for name in held_out.models if name not in held_out.ladder]
    return [
        Rung(held_out.title(name), held_out.colour(name), held_out.by_seed(name, score), beside=name in beside)
        for name in (*held_out.ladder, *beside)
    ]


def _colour(step: Step, held_out: HeldOut | None) -> str:
    """A training step's colour: that of the model it made; the reward model has its own."""
    if step.stage == "reward":
        return "reward"
    return held_out.colour(step.name) if held_out else "rung-1"
