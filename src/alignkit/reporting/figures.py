"""The report's figures. Each function takes plain numbers and returns an <svg> element; nothing here reads a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.svg import COLOURS, figure_style, new_figure, to_svg
from alignkit.scoring.best_of_n import kl_bound

WIDE, NARROW = 460, 330
"""Figure widths in CSS pixels; both stay readable on a phone."""

_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Rung:
    """A model on the ladder, or beside it: its title, colour, and one estimate for each seed."""

    title: str
    colour: str
    estimates: Sequence[Estimate | None]
    beside: bool = False
    """A control or an upper bound: drawn hollow and not connected with the rungs."""


@dataclass(frozen=True)
class Interval:
    """A line of an interval plot: an estimate for each seed, and the one over all seeds where it is known."""

    title: str
    colour: str
    parts: Sequence[Estimate | None]
    whole: Estimate | None = None
    hollow: bool = False

    def text(self, signed: bool) -> str:
        """The numbers to write beside the title: the whole with its interval, or what each seed has."""
        known = [part for part in self.parts if part is not None]
        if self.whole is None and len(known) > 1:
            return " / ".join(f"{100 * part['mean']:.1f}" for part in known)
        shown = self.whole or known[0]
        return _bracket(shown, signed)


@dataclass(frozen=True)
class Curve:
    """A line of a line plot; `low` and `high` bound a shaded band."""

    title: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False


def ladder(name: str, title: str, rungs: Sequence[Rung], seeds: Sequence[str], *, percent: bool) -> str:
    """A score by model: a point with its error bar for each seed; the rungs of one seed are connected."""
    with figure_style(name):
        figure, axes = new_figure(WIDE, 290)
        climbing = [place for place, rung in enumerate(rungs) if not rung.beside]
        for seed, offset in enumerate(_spread(len(seeds))):
            known = [(place + offset, e["mean"]) for place in climbing if (e := rungs[place].estimates[seed])]
            axes.plot([x for x, _ in known], [y for _, y in known], color=COLOURS["rule"], linewidth=1.4, zorder=1)
            for place, rung in enumerate(rungs):
                if (e := rung.estimates[seed]) is not None:
                    _mark(axes, place + offset, e, _MARKERS[seed % len(_MARKERS)], rung.colour, hollow=rung.beside)
        if len(climbing) < len(rungs):
            axes.axvline(len(climbing) - 0.5, color=COLOURS["rule"], linewidth=1, linestyle=(0, (4, 4)))
        axes.set_xticks(range(len(rungs)), [_fold(rung.title, 58 // len(rungs)) for rung in rungs])
        axes.set_xlim(-0.5, len(rungs) - 0.5)
        axes.yaxis.set_major_formatter(_percent if percent else _plain)
        _marker_legend(axes, [f"seed {seed}" for seed in seeds])
        lines = [f"{rung.title}: " + ", ".join(_say(e, percent) for e in rung.estimates if e) for rung in rungs]
        return to_svg(figure, name, title, "; ".join(lines))


def intervals(
    name: str, title: str, lines: Sequence[Interval], seeds: Sequence[str], *, reference: float, signed: bool
) -> str:
    """Horizontal intervals, each under its title and number, with a line at `reference`; numbers are shares of 1."""
    with figure_style(name):
        figure, axes = new_figure(WIDE, 50 * len(lines) + 62)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.axvline(reference, color=COLOURS["muted"], linewidth=1.2, zorder=1)
        for place, line in enumerate(lines):
            level = -place * 2.0
            text = {"transform": axes.get_yaxis_transform(), "va": "center", "bbox": _plate()}
            axes.text(0, level + 0.75, line.title, fontweight="bold", **text)
            axes.text(1, level + 0.75, line.text(signed), ha="right", **text)
            pooled = line.whole is not None and len(seeds) > 1
            if pooled and line.whole:
                _mark(axes, level + 0.05, line.whole, "D", line.colour, hollow=line.hollow, sideways=True)
            for seed, offset in enumerate(_spread(len(seeds), 0.26)):
                if (part := line.parts[seed]) is not None:
                    height = level - offset - (0.5 if pooled else 0.1)
                    hollow = pooled or line.hollow
                    _mark(
                        axes,
                        height,
                        part,
                        _MARKERS[seed % len(_MARKERS)],
                        line.colour,
                        hollow,
                        sideways=True,
                        small=pooled,
                    )
        axes.set_ylim(-2.0 * len(lines) + 0.9, 1.15)
        axes.set_yticks([])
        axes.xaxis.set_major_formatter(_signed if signed else _percent)
        axes.spines["bottom"].set_visible(False)
        _marker_legend(axes, seeds, below=True, pooled=any(line.whole for line in lines))
        return to_svg(figure, name, title, "; ".join(f"{line.title}: {line.text(signed)}" for line in lines))


def best_of_n(name: str, title: str, lines: Sequence[Curve]) -> str:
    """What the best of n is worth by what choosing among n costs: the bound of its KL divergence from the policy."""
    costs = [replace(line, x=[kl_bound(int(n)) for n in line.x]) for line in lines]
    ticks = {kl_bound(int(n)): f"{n:g}\n{kl_bound(int(n)):.1f}" for n in lines[0].x}
    return curves(name, title, costs, x_label="n, and the most that choosing costs (KL, nats)", ticks=ticks)


def curves(
    name: str, title: str, lines: Sequence[Curve], *, x_label: str, ticks: Mapping[float, str] | None = None
) -> str:
    """Lines over a common x axis, named in a legend where there are several; `ticks` are its places and labels."""
    with figure_style(name):
        figure, axes = new_figure(NARROW, 220)
        for line in lines:
            style = (0, (5, 2)) if line.dashed else "-"
            colour = COLOURS[line.colour]
            axes.plot(line.x, line.y, color=colour, linestyle=style, label=line.title)
            if len(line.x) < 10:
                axes.plot(line.x, line.y, color=colour, linestyle="", marker="o", markersize=4)
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(x_label)
        axes.yaxis.set_major_formatter(_plain)
        axes.margins(x=0.03)
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
        if len(lines) > 1:
            axes.legend(labelcolor=COLOURS["muted"], handlelength=1.6)
        ends = [f"{line.title}: from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines if line.y]
        return to_svg(figure, name, title, "; ".join(ends))


def reliability(name: str, title: str, lines: Sequence[tuple[str, Sequence[tuple[float, Estimate]]]]) -> str:
    """How often something happens against how probable it was said to be, from 1/2 to 1: a marker for each line.

    A line is its title and its points, the probability and the share of each; on the diagonal they are the same.
    """
    with figure_style(name):
        figure, axes = new_figure(WIDE, 290)
        axes.plot([0.5, 1], [0.5, 1], color=COLOURS["muted"], linewidth=1.2, zorder=1)
        for number, (_, points) in enumerate(lines):
            for probability, share in points:
                _mark(
                    axes, probability, share, _MARKERS[number % len(_MARKERS)], "reward", hollow=number > 0, small=True
                )
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("probability that the model gives")
        axes.set_ylabel("share that is right")
        axes.xaxis.set_major_formatter(_percent)
        axes.yaxis.set_major_formatter(_percent)
        _marker_legend(axes, [line_title for line_title, _ in lines])
        said = [
            f"{100 * each:.0f} % said, {100 * share['mean']:.0f} % right"
            for _, points in lines
            for each, share in points
        ]
        return to_svg(figure, name, title, "; ".join(said))


def scatter(
    name: str,
    title: str,
    groups: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    y_label: str,
    description: str,
) -> str:
    """Points in groups: each a title, a colour, and the places of its points; the last group lies on top."""
    with figure_style(name):
        figure, axes = new_figure(WIDE, 290)
        for place, (label, colour, points) in enumerate(groups):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            face = COLOURS[colour] if place else "none"
            axes.scatter(xs, ys, s=16, facecolor=face, edgecolor=COLOURS[colour], linewidth=0.9, alpha=0.7, label=label)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.yaxis.set_major_formatter(_plain)
        axes.figure.legend(
            labelcolor=COLOURS["muted"], handletextpad=0.2, ncols=len(groups), loc="outside lower center"
        )
        return to_svg(figure, name, title, description)


def _mark(
    axes: Any,
    place: float,
    estimate: Estimate,
    marker: str,
    colour: str,
    hollow: bool = False,
    *,
    sideways: bool = False,
    small: bool = False,
) -> None:
    """A point with its interval, upright, or `sideways` on an x axis."""
    ink = COLOURS[colour]
    ends = ([estimate["low"]], [estimate["high"]])
    length = {"color": ink, "linewidth": 1.1 if small else 2.0, "zorder": 2}
    (axes.hlines if sideways else axes.vlines)([place], *ends, **length)
    x, y = (estimate["mean"], place) if sideways else (place, estimate["mean"])
    face = COLOURS["paper"] if hollow else ink
    axes.plot(
        x, y, marker, color=ink, markerfacecolor=face, markersize=4.5 if small else 7, markeredgewidth=1.4, zorder=3
    )


def _marker_legend(axes: Any, labels: Sequence[str], *, below: bool = False, pooled: bool = False) -> None:
    """Which marker stands for which seed; nothing where there is only one."""
    from matplotlib.lines import Line2D

    if len(labels) < 2:
        return
    style: dict[str, Any] = {
        "linestyle": "",
        "color": COLOURS["muted"],
        "markerfacecolor": COLOURS["paper"],
        "markersize": 5,
    }
    handles = [
        Line2D([], [], marker=_MARKERS[i % len(_MARKERS)], label=label, **style) for i, label in enumerate(labels)
    ]
    if pooled:
        handles.append(Line2D([], [], marker="D", linestyle="", color=COLOURS["muted"], markersize=6, label="pooled"))
    muted = COLOURS["muted"]
    if below:
        axes.figure.legend(
            handles=handles, labelcolor=muted, ncols=len(handles), handletextpad=0.2, loc="outside lower center"
        )
    else:
        axes.legend(handles=handles, labelcolor=muted, handletextpad=0.2, loc="lower right")


def _plate() -> dict[str, Any]:
    """Ground for a text, so that lines do not run through it."""
    return {"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1.5}


def _spread(count: int, step: float = 0.18) -> list[float]:
    """Offsets around 0 for `count` marks beside each other."""
    return [step * (place - (count - 1) / 2) for place in range(count)]


def _fold(title: str, width: int) -> str:
    """A tick label on lines of about `width` characters."""
    import textwrap

    return "\n".join(textwrap.wrap(title, max(width, 6), break_long_words=False))


def _percent(value: float, place: int | None = None) -> str:
    return f"{100 * value:.3g} %"


def _signed(value: float, place: int | None = None) -> str:
    return f"{100 * value:+.0f}".replace("-", "\u2212") if round(100 * value) else "0"


def _plain(value: float, place: int | None = None) -> str:
    return f"{value:g}"


def _bracket(estimate: Estimate, signed: bool) -> str:
    """A mean with its interval, in percent or percentage points."""
    sign = "+" if signed else ""
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean}  [{low}, {high}]".replace("-", "\u2212")


def _say(estimate: Estimate, percent: bool) -> str:
    return f"{100 * estimate['mean']:.1f} %" if percent else f"{estimate['mean']:.2f}"
