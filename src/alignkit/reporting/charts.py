"""From manifests to figures: which numbers go into which chart, and in which colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting import measures
from alignkit.reporting.figures import Curve, Interval, Rung, best_of_n, curves, intervals, ladder
from alignkit.reporting.held_out import HeldOut
from alignkit.reporting.runs import Run, Step

_TRAINING = ("sft", "reward", "dpo")


def evaluation_figures(held_out: HeldOut) -> dict[str, str]:
    """The ladder in the deciding score and in grades, and the gains; a figure without numbers is left out."""
    figures = {}
    main = held_out.main
    said, percent = measures.title(main).lower(), measures.is_share(main)
    figures["ladder"] = ladder(
        "ladder", f"Held-out {said} by stage", _rungs(held_out, main), held_out.seeds, percent=percent
    )
    grades = _rungs(held_out, "judge")
    if main != "judge" and any(estimate for rung in grades for estimate in rung.estimates):
        figures["grades"] = ladder("grades", "Grade from 0 to 10 by stage", grades, held_out.seeds, percent=False)
    if percent and held_out.gains:
        figures["gains"] = intervals(
            "gains",
            f"Gain in {said}, in percentage points",
            [
                Interval(
                    gain.title,
                    held_out.colour(gain.new),
                    gain.estimates,
                    gain.pooled[main],
                    hollow=gain.role == "control",
                )
                for gain in held_out.gains
                if main in gain.pooled
            ],
            [f"seed {seed}" for seed in held_out.seeds],
            reference=0.0,
            signed=True,
        )
    return figures


def loss_curves(runs: Sequence[Run], held_out: HeldOut | None = None) -> list[tuple[str, list[Curve]]]:
    """The training loss of each training step of the first run, and its held-out loss, by seed: (step, curves)."""
    kinds = (("loss", ""), ("held_out_loss", ", held out"))
    found = []
    for step in runs[0].of_stage(*_TRAINING):
        lines = [
            Curve(f"seed {run.seed}{said}", "muted" if said else _colour(step, held_out), xs, ys, dashed=place > 0)
            for place, run in enumerate(runs)
            for key, said in kinds
            for xs, ys in _logged(run, step.name, key)
        ]
        if lines:
            found.append((step.name, lines))
    return found


def loss_figures(runs: Sequence[Run], held_out: HeldOut | None) -> list[tuple[str, str]]:
    """`loss_curves` drawn: (step, figure)."""
    return [
        (name, curves(f"loss-{number}", f"Training loss of {name}", lines, x_label="optimizer step"))
        for number, (name, lines) in enumerate(loss_curves(runs, held_out))
    ]


def preference_curves(runs: Sequence[Run]) -> list[tuple[str, list[Curve]]]:
    """How each DPO step moved chosen and rejected answers, their rewards, and the margin: (title, curves)."""
    kinds = (
        ("log-ratio a token", {"chosen_log_ratio": ("chosen", "rung-3"), "rejected_log_ratio": ("rejected", "muted")}),
        ("reward", {"chosen_reward": ("chosen", "rung-3"), "rejected_reward": ("rejected", "muted")}),
        ("reward margin", {"reward_margin": ("margin", "rung-3")}),
    )
    found = []
    for step in runs[0].of_stage("dpo"):
        for said, keys in kinds:
            lines = [
                Curve(f"{name}, seed {run.seed}", colour, xs, ys, dashed=place > 0)
                for place, run in enumerate(runs)
                for key, (name, colour) in keys.items()
                for xs, ys in _logged(run, step.name, key)
            ]
            if lines:
                found.append((f"{step.name}: {said}", lines))
    return found


def preference_figures(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """`preference_curves` drawn: (title, figure)."""
    return [
        (name, curves(f"preference-{number}", name, lines, x_label="optimizer step"))
        for number, (name, lines) in enumerate(preference_curves(runs))
    ]


def _logged(run: Run, name: str, key: str) -> list[tuple[Sequence[float], Sequence[float]]]:
    """Optimizer steps and values of one key of a step's loss.jsonl, as the only entry; none where it is not there."""
    step = run.step(name)
    points = [(row["step"], row[key]) for row in step.rows("loss.jsonl") if key in row] if step else []
    return [tuple(zip(*points, strict=True))] if points else []  # type: ignore[list-item]


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
