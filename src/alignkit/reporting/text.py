"""The report's main figures as plain text: what a terminal shows at the end of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.held_out import HeldOut
from alignkit.reporting.rounds import Rounds


def render_text(held_out: HeldOut, rounds: Rounds | None = None) -> str:
    """Exact match of every model and every gain in percentage points, by seed and over all, with 95 % intervals.

    Where not all stand on all questions, each line says on how many. With rounds also each policy's development score,
    its gain, what was kept and why.
    """
    seeds = [f"seed {seed}" for seed in held_out.seeds]
    columns = [*seeds, "all seeds"] if len(seeds) > 1 else seeds
    questions = len(held_out.predictions[0])
    uneven = bool(held_out.rows_behind("exact_match"))
    rows = [(f"exact match, % of {'at most ' * uneven}{questions} questions", columns, "")]
    for model in held_out.models:
        estimates = held_out.by_seed(model, "exact_match")
        pooled = [held_out.pooled(model, "exact_match")] if len(seeds) > 1 else []
        remark = _counts(estimates) if uneven else ""
        rows.append((held_out.title(model), [_cell(each, "") for each in [*estimates, *pooled]], remark))
    rows.append((f"gain, percentage points{', on the questions that both have' * uneven}", columns, ""))
    for gain in held_out.gains:
        pooled = [gain.pooled["exact_match"]] if len(seeds) > 1 else []
        remark = f"{gain.verdict}{', ' * uneven}{_counts(gain.estimates) if uneven else ''}"
        rows.append((gain.title, [_cell(each, "+") for each in [*gain.estimates, *pooled]], remark))
    if rounds:
        scale = ("%", "percentage points") if rounds.percent else ("0 to 10", "points")
        heading = f"rounds: development {rounds.score}, {scale[0]}; gain, {scale[1]}"
        rows.append((heading, [f"seed {seed}" for seed in rounds.seeds], ""))
        for title, estimates, is_gain in rounds.lines():
            rows.append((title, [_cell(each, "+" * is_gain, 100 if rounds.percent else 1) for each in estimates], ""))
    width = max(len(title) for title, _, _ in rows)
    lines = [f"{title:{width}s}{''.join(f'{cell:>22s}' for cell in cells)}  {remark}" for title, cells, remark in rows]
    endings = rounds.endings if rounds else []
    return "\n".join(line.rstrip() for line in [*lines, *endings]) + "\n"


def _counts(estimates: Sequence[Estimate | None]) -> str:
    """The questions behind a line, by seed."""
    return "n " + " / ".join(f"{each['n']}" if each else "-" for each in estimates)


def _cell(estimate: Estimate | None, sign: str, scale: int = 100) -> str:
    if estimate is None:
        return "-"
    mean, low, high = (f"{scale * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
