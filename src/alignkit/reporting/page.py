"""Put the report together: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting import charts, tables
from alignkit.reporting.held_out import HeldOut
from alignkit.reporting.runs import Run

_TEMPLATES = Path(__file__).parent / "templates"

NO_BREAK, MINUS = "\u00a0", "\u2212"


def render_page(runs: Sequence[Run], held_out: HeldOut | None) -> str:
    """The page for a run and its replicates (`runs[0]` is the run itself); `held_out` is None before any evaluation."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "difference": difference,
        "duration": duration,
        "gibibytes": gibibytes,
        "count": count,
    }
    run = runs[0]
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        run=run,
        runs=runs,
        held_out=held_out,
        headline=_headline(held_out) if held_out else None,
        stages=tables.stage_table(run),
        checks=tables.check_table(runs),
        lineage=tables.lineage(run),
        facts=tables.facts(run),
        teacher=tables.teacher_statement(run),
        figures={name: Markup(svg) for name, svg in charts.evaluation_figures(held_out).items()} if held_out else {},
        losses=[(title, Markup(svg)) for title, svg in charts.loss_figures(runs, held_out)],
        best_of_n=[(title, Markup(svg)) for title, svg in charts.best_of_n_figures(runs)],
        reward_accuracy=[(title, Markup(svg)) for title, svg in charts.reward_figures(runs)],
        style=Markup(style),
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


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage: 0.474 is "47.4 %"."""
    return f"{100 * value:.{digits}f}{NO_BREAK}%"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, with its interval: "+3.4 [+1.2, +5.6]"."""
    mean, low, high = (f"{100 * estimate[key]:+.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", MINUS)


def difference(estimate: Estimate) -> str:
    """A difference of grades with its interval: "+0.42 [+0.22, +0.62]"."""
    mean, low, high = (f"{estimate[key]:+.2f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", MINUS)


def duration(seconds: float) -> str:
    """A time as one reads it: "4.2 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f}{NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NO_BREAK}min {rest}{NO_BREAK}s"
    return f"{minutes // 60}{NO_BREAK}h {minutes % 60}{NO_BREAK}min"


def gibibytes(size: float) -> str:
    """Bytes as GiB: "1.24 GiB"."""
    return f"{size / 2**30:.2f}{NO_BREAK}GiB"


def count(value: int) -> str:
    """A whole number with thousands set apart: "12,400"."""
    return f"{value:,}"
