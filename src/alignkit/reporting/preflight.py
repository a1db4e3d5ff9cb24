"""The page about what is estimated before a run: memory by part against the card's, speed, and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.reporting.figures import WIDE
from alignkit.reporting.svg import COLOURS, figure_style, new_figure, to_svg
from alignkit.reporting.templating import open_environment, style

GIB = 2**30

PARTS = {
    "base weights": "rung-1",
    "embeddings and head": "rung-0",
    "adapters": "rung-2",
    "optimizer": "rung-5",
    "gradients": "upper",
    "activations": "rung-3",
    "one layer": "reward",
    "logits": "control",
    "keys and values": "rung-4",
}
"""Part of the memory -> its colour; any other part is grey."""


def render_preflight(report: Mapping[str, Any]) -> str:
    """The page about a report as the stage writes it."""
    from markupsafe import Markup

    from alignkit.models.memory import CONTEXT_BYTES, FRAGMENTATION_SHARE, PROCESS_BYTES

    return (
        open_environment()
        .get_template("preflight.html.jinja")
        .render(
            report=report,
            failing=[each["stage"] for each in report["stages"] if not each["fits"] or each["problems"]],
            figure=Markup(stacked("memory", report["stages"], report["machine"]["memory_bytes"])),
            fragmentation=FRAGMENTATION_SHARE,
            outside=CONTEXT_BYTES if report["machine"]["is_gpu"] else PROCESS_BYTES,
            style=style(),
        )
    )


def stacked(name: str, stages: Sequence[Mapping[str, Any]], limit: int) -> str:
    """Memory of each stage as a bar of its parts in GiB, allowances hollow at its end, with a line at `limit` bytes."""
    with figure_style(name):
        figure, axes = new_figure(1.5 * WIDE, 50 * len(stages) + 110)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        most = max(limit, *(stage["needed_bytes"] for stage in stages)) / GIB
        used: list[str] = []
        for place, stage in enumerate(stages):
            left = 0.0
            for part, size in stage["parts"].items():
                label = part if part not in used else None
                used.append(part)
                colour = COLOURS[PARTS.get(part, "muted")]
                axes.barh(-place, size / GIB, left=left, height=0.56, color=colour, label=label)
                left += size / GIB
            rest = stage["needed_bytes"] / GIB - left
            allowance = {"facecolor": "none", "edgecolor": COLOURS["muted"], "linewidth": 1.0}
            axes.barh(-place, rest, left=left, height=0.56, label="" if place else "allowances", **allowance)
            text = f"{stage['needed_bytes'] / GIB:.1f} GiB"
            axes.text(left + rest + 0.01 * most, -place, text if stage["fits"] else f"{text}, too much", va="center")
        axes.axvline(limit / GIB, color=COLOURS["ink"], linewidth=1.6)
        axes.set_yticks([-place for place in range(len(stages))], [stage["stage"] for stage in stages])
        axes.set_xlim(0, 1.2 * most)
        axes.set_xlabel("GiB")
        figure.legend(labelcolor=COLOURS["muted"], ncols=5, loc="outside lower center", handlelength=1.2)
        said = [f"{each['stage']} {each['needed_bytes'] / GIB:.1f} GiB" for each in stages]
        return to_svg(figure, name, f"Memory by part, of {limit / GIB:.1f} GiB", "; ".join(said))
