"""Matplotlib figures as inline SVG that follows the page: its fonts, its colours in light and dark, its ids.

Matplotlib writes fixed colours and ids. Figures are drawn in placeholder colours, which become CSS variables of the
page, and every id gets the figure's name in front, since ids must be unique on a page that holds several figures.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VARIABLES = ("ink", "muted", "rule", "paper", "control", "upper", "reward", *(f"rung-{number}" for number in range(6)))
COLOURS = {name: f"#0102{number:02x}" for number, name in enumerate(_VARIABLES, start=16)}
"""Name of a CSS variable -> the placeholder colour to draw with."""


@contextmanager
def figure_style(name: str) -> Iterator[None]:
    """Matplotlib settings for one figure: text stays text, no frame, ids that depend on `name` alone."""
    import matplotlib

    ink, muted, rule = COLOURS["ink"], COLOURS["muted"], COLOURS["rule"]
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "text.color": ink,
        "font.size": 12,
        "axes.edgecolor": rule,
        "axes.labelcolor": muted,
        "axes.labelsize": 11.5,
        "axes.titlesize": 12.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": rule,
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.major.pad": 6,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "figure.dpi": 72,
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    """A transparent figure of `width` x `height` CSS pixels, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none", edgecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    return figure, axes


def to_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an <svg> element for a page; `title` and `description` are read out by screen readers."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.canvas.print_svg(buffer, metadata=metadata)  # type: ignore[attr-defined]  # savefig draws all of it twice
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would apply to the whole page
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"(href=\"#|url\(#)", rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    labels = f'role="img" aria-labelledby="{name}-title {name}-description"'
    head = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(description)}</desc>'
    return re.sub(r"<svg([^>]*)>", lambda match: f"<svg{match[1]} {labels}>{head}", text, count=1)
