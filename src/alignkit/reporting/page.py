"""Put the report together: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit.reporting import charts, tables
from alignkit.reporting.held_out import HeldOut
from alignkit.reporting.rewards import best_of_n_gains, reward_sections
from alignkit.reporting.rounds import Rounds
from alignkit.reporting.runs import Run
from alignkit.reporting.selection import AUDIT, read_audit, selection_section
from alignkit.reporting.templating import open_environment, style

if TYPE_CHECKING:
    from markupsafe import Markup


def render_page(runs: Sequence[Run], held_out: HeldOut | None, rounds: Rounds | None = None) -> str:
    """The page for a run and its replicates (`runs[0]` is the run itself).

    `held_out` is None before any evaluation, and `rounds` where there were none.
    """
    from markupsafe import Markup

    run = runs[0]
    return (
        open_environment()
        .get_template("page.html.jinja")
        .render(
            run=run,
            runs=runs,
            held_out=held_out,
            rounds=rounds,
            rounds_figure=Markup(rounds.figure()) if rounds else None,
            headline=_headline(held_out) if held_out else None,
            stages=tables.stage_table(run),
            checks=tables.check_table(runs),
            memory=tables.memory_table(run),
            lineage=tables.lineage(run),
            facts=tables.facts(run),
            teacher=tables.teacher_statement(run),
            figures={name: Markup(svg) for name, svg in charts.evaluation_figures(held_out).items()}
            if held_out
            else {},
            losses=[(title, Markup(svg)) for title, svg in charts.loss_figures(runs, held_out)],
            preferences=[(title, Markup(svg)) for title, svg in charts.preference_figures(runs)],
            best_of_n_gains=best_of_n_gains(runs),
            best_of_n=[(title, Markup(svg)) for title, svg in charts.best_of_n_figures(runs)],
            rewards=reward_sections(runs),
            selections=_selections(run),
            style=style(),
        )
    )


def _headline(held_out: HeldOut) -> dict[str, Any]:
    """The first rung against the last: scores over all seeds, the gain, and whether it may be called one."""
    first, last = held_out.ladder[0], held_out.ladder[-1]
    gain = held_out.gain(last, first) if first != last else None
    return {
        "first": held_out.title(first),
        "last": held_out.title(last),
        "before": held_out.pooled(first, "exact_match"),
        "after": held_out.pooled(last, "exact_match"),
        "gain": gain.pooled["exact_match"] if gain else None,
        "verdict": gain.verdict if gain else None,
    }


def _selections(run: Run) -> list[tuple[str, Markup]]:
    """What each complete `select` step that left an audit tells about itself: (step, section)."""
    from markupsafe import Markup

    audited = [step for step in run.of_stage("select") if (step.folder / AUDIT).is_file()]
    return [
        (step.name, Markup(selection_section(read_audit(step.folder / AUDIT), f"selection-{place}")))
        for place, step in enumerate(audited)
    ]
