"""What `select` did, to look at: how many rows each step left, where they lie, how they scored, why the rest went.

The audit is what `select` writes as `selection.json`. Its numbers become figures here; its texts are foreign and stay
text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from alignkit.core.errors import UserError
from alignkit.evaluation.comparison import HELPED, verdict
from alignkit.reporting import measures
from alignkit.reporting.figures import NARROW, WIDE, Interval, intervals
from alignkit.reporting.plain import one_line
from alignkit.reporting.svg import COLOURS, figure_style, new_figure, to_svg
from alignkit.reporting.templating import MINUS, open_environment, style
from alignkit.reporting.yields import spread

AUDIT = "selection.json"

Audit = Mapping[str, Any]


class _Step(BaseModel):
    step: str
    rows: int


class _Reason(BaseModel):
    reason: str
    rows: int
    examples: list[dict[str, str]]


class _Scores(BaseModel):
    edges: list[float]
    counts: list[int]
    selected: list[int]


class _Map(BaseModel):
    explained: tuple[float, float]
    points: list[tuple[float, float, str, str]]


class _Form(BaseModel):
    strategy: str
    rows_read: int
    rows_selected: int
    k: int | None
    funnel: list[_Step]
    reasons: list[_Reason]
    quality: _Scores | None = None
    necessity: _Scores | None = None
    map: _Map | None = None


_DECISIONS = {
    "selected": ("round", "kept"),
    "seed": ("round", "kept for coverage"),
    "necessary": ("diamond", "kept because the initial model answers it badly"),
    "covered": ("dot", "good, but not needed"),
    "poor quality": ("cross", "below the quality threshold"),
    "unclean": ("plus", "dropped by hygiene"),
}
"""Every decision on the map: its mark and what it means, in the order of the key; the first ones are drawn on top."""

_STEPS = {
    "read": "Read",
    "hygiene": "Clean",
    "quality": "Of good quality",
    "coverage": "Chosen for coverage",
    "necessity": "With the necessary ones",
}

_MAP_WIDTH, _MAP_HEIGHTS, _MARGIN = 560.0, (160.0, 430.0), 10.0
_CURVE_POINTS = 300


def read_audit(path: Path) -> dict[str, Any]:
    """The audit that a `select` step wrote. Raises `UserError` for a file that is not one."""
    try:
        audit = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the audit of alignkit select ({str(error).splitlines()[0]})") from error
    try:
        _Form.model_validate(audit)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: not the audit of alignkit select ({where}: {first['msg']})") from error
    return dict(audit)


def selection_page(audit: Audit, title: str) -> str:
    """A page of its own about one selection: no script, no request, light and dark, any screen."""
    from markupsafe import Markup

    return (
        open_environment()
        .get_template("selection.html.jinja")
        .render(
            audit=audit,
            title=title,
            contents=[(anchor, heading) for anchor, heading, there in _contents(audit) if there],
            section=Markup(selection_section(audit, level=2)),
            style=style(),
        )
    )


def selection_section(audit: Audit, name: str = "selection", level: int = 3) -> str:
    """The same for the report: HTML whose ids begin with `name` and whose headings are of that level."""
    from markupsafe import Markup

    return (
        open_environment()
        .get_template("selection_section.html.jinja")
        .render(
            audit=audit,
            name=name,
            level=level,
            funnel=_funnel(audit),
            comparison=_comparison(audit["comparison"]) if audit.get("comparison") else None,
            map=_map(audit["map"]) if audit.get("map") and audit["map"]["points"] else None,
            figures={key: Markup(svg) for key, svg in _figures(audit, name).items()},
        )
    )


def _contents(audit: Audit) -> list[tuple[str, str, bool]]:
    """The parts of the page: (anchor, heading, whether this audit has it)."""
    return [
        ("funnel", "Funnel", True),
        ("comparison", "Does it pay?", bool(audit.get("comparison"))),
        ("map", "Map", bool(audit.get("map") and audit["map"]["points"])),
        ("scores", "Scores", bool(audit.get("quality") or audit.get("necessity"))),
        ("coverage", "Coverage", bool(audit.get("coverage"))),
        ("reasons", "Reasons", True),
    ]


def _funnel(audit: Audit) -> list[dict[str, Any]]:
    """A line for each step: the rows it left, what share of those read that is, and the change."""
    lines = []
    before = None
    for entry in audit["funnel"]:
        change = "" if before in (None, entry["rows"]) else f"{entry['rows'] - before:+,}".replace("-", MINUS)
        share = entry["rows"] / max(audit["rows_read"], 1)
        title = _STEPS.get(entry["step"], entry["step"])
        lines.append({"title": title, "rows": entry["rows"], "share": share, "change": change})
        before = entry["rows"]
    return lines


def _map(found: Audit) -> dict[str, Any]:
    """The points on the drawing area, by decision; both axes have one scale, so that distances can be compared."""
    xs, ys = ([float(point[axis]) for point in found["points"]] for axis in (0, 1))
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    lowest, highest = _MAP_HEIGHTS
    unit = max(wide / (_MAP_WIDTH - 2 * _MARGIN), high / (highest - 2 * _MARGIN)) or 1.0
    height = max(lowest, high / unit + 2 * _MARGIN)
    groups: dict[str, list[tuple[str, str, str]]] = {decision: [] for decision in _DECISIONS}
    for x, y, (_, _, decision, row) in zip(xs, ys, found["points"], strict=True):
        across, down = _MAP_WIDTH / 2 + (x - middle_x) / unit, height / 2 - (y - middle_y) / unit
        groups[decision].append((f"{across:.1f}", f"{down:.1f}", one_line(str(row), 60)))
    known = [
        {"decision": decision, "mark": mark, "meaning": meaning, "points": groups[decision]}
        for decision, (mark, meaning) in _DECISIONS.items()
        if groups[decision]
    ]
    return {
        "width": _MAP_WIDTH,
        "height": round(height, 1),
        "groups": known,
        "shown": len(xs),
        "method": found["method"],
        "explained": found["explained"],
        "flat": not (wide or high),
        "zoom": 1.0 if len(xs) > 400 else 1.7,
    }


def _figures(audit: Audit, name: str) -> dict[str, str]:
    """The plots that this audit has numbers for."""
    figures = {}
    for key, title in (("quality", "quality"), ("necessity", "score of the initial model's answer")):
        if audit.get(key) and sum(audit[key]["counts"]):
            figures[key] = histogram(f"{name}-{key}-figure", title, audit[key])
    if audit.get("coverage") and audit["coverage"]["curve"]:
        figures["coverage"] = radius_curve(f"{name}-coverage-figure", audit["coverage"])
    if audit.get("comparison") and (score := _drawn_score(audit["comparison"])):
        figures["comparison"] = _strategies(f"{name}-comparison-figure", score, audit["comparison"]["strategies"])
    return figures


def histogram(name: str, title: str, scores: Audit) -> str:
    """How all scored rows are distributed (filled) and those selected (outlined): each as shares of its own number.

    Shares, because a selection of 2,000 rows from 1,000,000 could not be seen beside them in one scale of counts.
    """
    scored, selected = sum(scores["counts"]), sum(scores["selected"])
    with figure_style(name):
        figure, axes = new_figure(NARROW, 230)
        shares = [count / scored for count in scores["counts"]]
        axes.stairs(
            shares, scores["edges"], fill=True, color=COLOURS["control"], alpha=0.45, label=f"{scored:,} scored"
        )
        if selected:
            chosen = [count / selected for count in scores["selected"]]
            ink = COLOURS["rung-1"]
            axes.stairs(chosen, scores["edges"], color=ink, linewidth=2, label=f"{selected:,} selected")
        if (threshold := scores["threshold"]) is not None:
            ink = COLOURS["ink"]
            axes.axvline(threshold, color=ink, linewidth=1.2, linestyle=(0, (4, 3)), label=f"threshold {threshold:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(title)
        axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:g} %")
        axes.figure.legend(
            labelcolor=COLOURS["muted"], loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.2
        )
        bins = zip(pairwise(scores["edges"]), scores["counts"], scores["selected"], strict=True)
        told = [f"{low:g} to {high:g}: {count} scored, {kept} selected" for (low, high), count, kept in bins if count]
        return to_svg(figure, name, f"Distribution of the {title}", "; ".join(told))


def radius_curve(name: str, coverage: Audit) -> str:
    """The coverage radius by the number of centres, with a mark where the selection stopped."""
    curve = [coverage["curve"][place] for place in spread(len(coverage["curve"]), _CURVE_POINTS)]
    chosen = [(int(k), float(radius)) for k, radius in coverage["chosen"]]
    with figure_style(name):
        figure, axes = new_figure(WIDE, 240)
        axes.plot([k for k, _ in curve], [radius for _, radius in curve], color=COLOURS["rung-2"])
        farthest = max(k for k, _ in (*curve, *chosen))
        for place, (k, radius) in enumerate(chosen):
            axes.plot([k], [radius], marker="D", markersize=6, color=COLOURS["rung-2"], clip_on=False)
            axes.annotate(
                f"k = {k:,}: {radius:.3g}",
                (k, radius),
                xytext=(0, 9 + 15 * place),
                textcoords="offset points",
                ha="right" if k > farthest / 2 else "left",
            )
        axes.set_xlim(0, 1.03 * farthest)
        axes.set_ylim(0, 1.05 * max(radius for _, radius in (*curve, *chosen)) or 1)
        axes.set_xlabel("rows chosen (k)")
        axes.set_ylabel("radius")
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        told = [f"k = {k:,}: radius {radius:.3g}" for k, radius in (curve[0], curve[-1], *chosen)]
        return to_svg(figure, name, "Coverage radius by number of rows chosen", "; ".join(told))


def _drawn_score(found: Audit) -> str | None:
    """The first score of the strategies that is a share of 1; only such a one is drawn."""
    return next((score for score in found["strategies"][0]["scores"] if measures.is_share(score)), None)


def _baseline(strategies: Sequence[Audit]) -> Audit:
    """The strategy that the others are drawn against: the random one, or else the first."""
    return next((each for each in strategies if each["name"] == "random"), strategies[0])


def _strategies(name: str, score: str, strategies: Sequence[Audit]) -> str:
    """One score of every strategy, over all seeds and for each."""
    seeds = len(strategies[0]["by_seed"])
    lines = []
    for place, strategy in enumerate(strategies):
        whole = strategy["scores"][score]
        parts = [scores[score] for scores in strategy["by_seed"]] if seeds > 1 else [whole]
        colour = "control" if strategy["name"] == "random" else f"rung-{1 + place % 5}"
        lines.append(Interval(one_line(strategy["name"], 40), colour, parts, whole))
    reference = _baseline(strategies)["scores"][score]["mean"]
    labels = [f"seed no. {number}" for number in range(1, max(seeds, 1) + 1)]
    return intervals(name, measures.title(score), lines, labels, reference=reference, signed=False)


def _comparison(found: Audit) -> dict[str, Any]:
    """The tables of scores and of differences, in words."""
    names = list(found["strategies"][0]["scores"])
    strategies = [
        {
            "name": one_line(strategy["name"], 80),
            "cells": [measures.interval(name, strategy["scores"][name]) for name in names],
            "seeds": [
                [measures.figure(name, scores[name]["mean"]) for scores in strategy["by_seed"]] for name in names
            ],
        }
        for strategy in found["strategies"]
    ]
    differences = [
        {
            "name": one_line(each["name"], 80).replace(" - ", f" {MINUS} "),
            "cells": [(measures.interval(name, each[name], sign=True), verdict(each[name])) for name in names],
        }
        for each in found["differences"]
    ]
    return {
        "budget": found["budget"],
        "columns": [measures.title(name) for name in names],
        "drawn": measures.title(_drawn_score(found) or names[0]),
        "baseline": one_line(_baseline(found["strategies"])["name"], 80),
        "first": measures.title(names[0])[0].lower() + measures.title(names[0])[1:],
        "strategies": strategies,
        "differences": differences,
        "helped": [line["name"] for line in differences if line["cells"][0][1] == HELPED],
    }
