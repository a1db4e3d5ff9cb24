"""Put the report together: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting import charts, costs, flow, measures, tables
from alignkit.reporting.answer_lengths import answer_lengths, training_lengths
from alignkit.reporting.held_out import HeldOut
from alignkit.reporting.retrieval import retrieval_tables, retriever_gains
from alignkit.reporting.rewards import RewardSection, best_of_n_gains, reward_sections
from alignkit.reporting.rounds import Rounds
from alignkit.reporting.runs import Run, read_aside
from alignkit.reporting.samples import read_samples
from alignkit.reporting.selection import AUDIT, read_audit, selection_section
from alignkit.reporting.templating import as_data, open_environment, script, style

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


MOST_BYTES, OTHER_BYTES = 4_900_000, 250_000
"""Of a page, and of what is on it besides figures and samples."""


@dataclass(frozen=True)
class Section:
    """A section of the page: the name of its template and anchor, its title, and whether this run has data for it."""

    name: str
    title: str
    there: bool


def render_page(runs: Sequence[Run], held_out: HeldOut | None, rounds: Rounds | None = None) -> str:
    """The page for a run and its replicates (`runs[0]` is the run itself).

    `held_out` is None before any evaluation, and `rounds` where there were none.
    """
    rest = {**_about_the_run(runs), **_about_training(runs, held_out, rounds), **_about_scores(held_out)}
    values = {
        **rest,
        **_about_samples(held_out, MOST_BYTES - OTHER_BYTES - _bytes(rest)),
        "run": runs[0],
        "runs": runs,
        "held_out": held_out,
        "rounds": rounds,
        "style": style(),
    }
    sections = _sections(values)
    absent = [section.title for section in sections if not section.there]
    return environment().get_template("page.html.jinja").render(**values, sections=sections, absent=absent)


def environment() -> Environment:
    """The templates, with how scores are written."""
    opened = open_environment()
    opened.globals |= {
        "title": measures.title,
        "figure": measures.figure,
        "interval": measures.interval,
        "unit": measures.unit,
        "p_value": measures.p_value,
        "heading": measures.heading,
        "rows_behind": measures.rows_behind,
    }
    return opened


def headline(held_out: HeldOut) -> dict[str, Any]:
    """The first rung against the last: scores over all seeds, the gain, and whether it may be called one."""
    score, first, last = held_out.main, held_out.ladder[0], held_out.ladder[-1]
    gain = held_out.overall
    before, after = held_out.pooled(first, score), held_out.pooled(last, score)
    difference = gain.pooled.get(score) if gain else None
    return {
        "score": measures.title(score),
        "percent": measures.is_share(score),
        "first": held_out.title(first),
        "last": held_out.title(last),
        "before": before,
        "after": after,
        "from": _said(score, before),
        "to": _said(score, after),
        "gain": measures.interval(score, difference, sign=True) if difference else None,
        "contains_zero": difference is not None and difference["low"] <= 0 <= difference["high"],
        "p_value": difference.get("p_holm") if difference else None,
        "verdict": gain.verdict if gain else None,
    }


def _said(score: str, estimate: Estimate | None) -> str:
    return measures.figure(score, estimate["mean"]) + measures.unit(score) if estimate else "n/a"


def _sections(values: dict[str, Any]) -> list[Section]:
    """The sections in their order. Rounds and retrieval are left out where there were none: hardly any run has them."""
    has = {name: bool(values[name]) for name in ("held_out", "losses", "selections", "checks", "costs")}
    held_out = values["held_out"]
    found = [
        Section("stages", "Pipeline", True),
        Section("gains", "Gains", bool(held_out and held_out.gains)),
        Section("scores", "Scores", has["held_out"]),
        Section("rounds", "Rounds", bool(values["rounds"])),
        Section("samples", "Samples", has["held_out"]),
        Section("breakdown", "Breakdown", bool(held_out and held_out.breakdown)),
        Section("training", "Training", has["losses"]),
        Section("reward", "Reward model", bool(values["rewards"] or values["best_of_n"])),
        Section("retrieval", "Retrieval", bool(values["retrieval"] or values["retriever_gains"])),
        Section("selection", "Selection", has["selections"]),
        Section("lengths", "Lengths", bool(values["answers"] or values["trained"])),
        Section("checks", "Checks", has["checks"]),
        Section("cost", "Cost", has["costs"]),
        Section("memory", "Memory", any(line["process"] for line in values["memory"])),
        Section("lineage", "Lineage", True),
        Section("reproduce", "How to reproduce", True),
        Section("method", "Method", True),
    ]
    return [section for section in found if section.name not in ("rounds", "retrieval") or section.there]


def _about_the_run(runs: Sequence[Run]) -> dict[str, Any]:
    run = runs[0]
    lines = costs.costs(run)
    return {
        "flow": flow.layout(run, len(runs) - 1),
        "stages": tables.stage_table(run),
        "checks": tables.check_table(runs),
        "costs": lines,
        "cost_totals": costs.totals(lines),
        "memory": costs.memory(run),
        "preflights": costs.preflights(run),
        "lineage": tables.lineage(run),
        "pipelines": [step.manifest["command"] for step in read_aside(run.folder, "pipeline")],
        "facts": tables.facts(run),
        "teacher": tables.teacher_statement(run),
        "selections": _selections(run),
    }


def _about_samples(held_out: HeldOut | None, most_bytes: int) -> dict[str, Any]:
    """The samples that there is room for, and the script that shows them."""
    from markupsafe import Markup

    samples = read_samples(held_out, most_bytes) if held_out else None
    return {
        "samples": samples,
        "samples_data": as_data(samples.data) if samples else None,
        "script": script() if samples else Markup(),
    }


def _bytes(value: Any) -> int:
    """How much the texts in it take, figures above all."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    value = vars(value) if isinstance(value, RewardSection) else value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, parts))


def _about_scores(held_out: HeldOut | None) -> dict[str, Any]:
    """What the evaluations say; empty values before any."""
    from markupsafe import Markup

    return {
        "headline": headline(held_out) if held_out else None,
        "percent": measures.is_share(held_out.main) if held_out else True,
        "full_marks": measures.FULL_MARKS.get(held_out.main, 1.0) if held_out else 1.0,
        "figures": {name: Markup(svg) for name, svg in charts.evaluation_figures(held_out).items()} if held_out else {},
        "remarks": _told(held_out, "in_words"),
        "warnings": _told(held_out, "warnings"),
        "answers": answer_lengths(held_out) if held_out else [],
    }


def _told(held_out: HeldOut | None, key: str) -> list[str]:
    """What the comparisons say of themselves in sentences, over all seeds together."""
    return [line for gain in held_out.gains for line in gain.pooled.get(key, [])] if held_out else []


def _about_training(runs: Sequence[Run], held_out: HeldOut | None, rounds: Rounds | None) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "rounds_figure": Markup(rounds.figure()) if rounds else None,
        "losses": [(title, Markup(svg)) for title, svg in charts.loss_figures(runs, held_out)],
        "preferences": [(title, Markup(svg)) for title, svg in charts.preference_figures(runs)],
        "divergences": divergences(runs),
        "best_of_n_gains": best_of_n_gains(runs),
        "best_of_n": [(title, Markup(svg)) for title, svg in charts.best_of_n_figures(runs)],
        "rewards": reward_sections(runs),
        "retrieval": retrieval_tables(runs),
        "retriever_gains": retriever_gains(runs),
        "trained": training_lengths(runs[0]),
    }


def divergences(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """For each DPO step that measured it, by seed: KL from its reference, and answer lengths before and after."""
    found = []
    for step in runs[0].of_stage("dpo"):
        lines = [other.metrics.get("sampled") if (other := run.step(step.name)) else None for run in runs]
        if any(lines):
            found.append((step.name, lines))
    return found


def _selections(run: Run) -> list[tuple[str, Markup]]:
    """What each complete `select` step that left an audit tells about itself: (step, section)."""
    from markupsafe import Markup

    audited = [step for step in run.of_stage("select") if (step.folder / AUDIT).is_file()]
    return [
        (step.name, Markup(selection_section(read_audit(step.folder / AUDIT), f"selection-{place}")))
        for place, step in enumerate(audited)
    ]
