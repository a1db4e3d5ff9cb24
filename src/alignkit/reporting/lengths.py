"""The page about the lengths of rows: a histogram with the share of rows up to each length, and two tables."""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.data.lengths import Cost, Summary
from alignkit.reporting.figures import WIDE
from alignkit.reporting.svg import COLOURS, figure_style, new_figure, to_svg
from alignkit.reporting.templating import open_environment, style

BARS = 48
"""Bars of the histogram, at most."""

Counts = Sequence[tuple[int, int, int, float]]
"""Length, its rows, the rows up to it, their share; by rising length."""


def render_lengths(
    title: str, summary: Summary, counts: Counts, costs: Sequence[Cost], proposed: Cost, batch_size: int
) -> str:
    """The page; `proposed` is the max_length that it recommends."""
    from markupsafe import Markup

    return (
        open_environment()
        .get_template("lengths.html.jinja")
        .render(
            title=title,
            summary=summary,
            costs=costs,
            proposed=proposed,
            batch_size=batch_size,
            figure=Markup(histogram("lengths", counts, proposed.max_length)),
            style=style(),
        )
    )


def histogram(name: str, counts: Counts, proposed: int) -> str:
    """Rows by length as bars, the share of rows up to a length as a line, and the proposed length."""
    longest = counts[-1][0]
    width = max(1, -(-longest // BARS))
    bars = [0] * (longest // width + 1)
    for length, count, _, _ in counts:
        bars[length // width] += count
    with figure_style(name):
        figure, axes = new_figure(1.5 * WIDE, 300)
        starts = [width * place for place in range(len(bars))]
        axes.bar(starts, bars, width=0.92 * width, align="edge", color=COLOURS["rung-1"])
        axes.set_xlabel("tokens")
        axes.set_ylabel("rows")
        axes.set_xlim(0, max(longest, proposed) * 1.03)
        share = axes.twinx()
        share.plot(
            [0, *(length for length, *_ in counts)],
            [0.0, *(share_ for *_, share_ in counts)],
            color=COLOURS["rung-3"],
            drawstyle="steps-post",
        )
        share.set_ylim(0, 1.04)
        share.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.0f} %")
        share.grid(visible=False)
        share.axvline(proposed, color=COLOURS["muted"], linestyle=(0, (4, 4)), linewidth=1.2)
        share.text(
            proposed, 0.06, f" {proposed} ", color=COLOURS["muted"], ha="right" if proposed > longest / 2 else "left"
        )
        said = f"{counts[-1][2]} rows of {counts[0][0]} to {longest} tokens; proposed is {proposed}"
        return to_svg(figure, name, "Rows by length", said)
