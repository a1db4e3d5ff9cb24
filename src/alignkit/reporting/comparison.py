"""Different runs side by side: what differs in their settings, their scores, and paired differences to the first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignkit.core.config import StageConfig
from alignkit.core.sweep import JOB_FILE
from alignkit.evaluation.comparison import HELPED, HURT, NO_HELP, NOT_COMPARED, NOT_SHOWN, verdict
from alignkit.evaluation.predictions import Prediction, compare
from alignkit.reporting import measures
from alignkit.reporting.held_out import HeldOut, Roles, read_held_out
from alignkit.reporting.markdown import table
from alignkit.reporting.page import environment
from alignkit.reporting.plain import code
from alignkit.reporting.runs import Run, numbers
from alignkit.reporting.summary import FORMAT
from alignkit.reporting.templating import style

_INCIDENTAL = (*StageConfig.incidental, "seed", "inputs")
_WORDS = {
    HELPED: "better",
    HURT: "worse",
    NO_HELP: "no difference",
    NOT_SHOWN: "not shown to be better",
    NOT_COMPARED: NOT_COMPARED,
}
"""What a verdict about a stage is called between runs."""
NO_STEP, NO_KEY = "no such step", "not set"


def compare_runs(runs: Sequence[Run], roles: Roles) -> dict[str, Any]:
    """What the page of a comparison shows, and report.json holds; lists have an entry for each run."""
    labels = [_label(run) for run in runs]
    found = [read_held_out([run], roles) for run in runs]
    models = list(dict.fromkeys(name for held_out in found if held_out for name in held_out.models))
    scores = list(dict.fromkeys(score for held_out in found if held_out for score in held_out.scores))
    differences, remarks = _differences(labels, found)
    return {
        "format": FORMAT,
        "kind": "comparison",
        "runs": [
            {
                "name": run.folder.name,
                "label": label,
                "seed": run.seed,
                "steps": len(run.steps),
                "unfinished": [step.name for step in run.steps if not step.complete],
                "seconds": sum(step.manifest.get("seconds", 0) for step in run.steps),
            }
            for label, run in zip(labels, runs, strict=True)
        ],
        "settings": _settings(runs),
        "scores": scores,
        "systems": [
            {
                "name": name,
                "title": next(held_out.title(name) for held_out in found if held_out and name in held_out.models),
                "by_run": [held_out.metrics[0]["models"].get(name, {}) if held_out else {} for held_out in found],
            }
            for name in models
        ],
        "differences": differences,
        "remarks": remarks,
        "metrics": _metrics(runs),
    }


def render_comparison(found: dict[str, Any]) -> str:
    """The page of a comparison."""
    compared = list(
        dict.fromkeys(n for each in found["differences"] for n, v in each.items() if measures.is_estimate(v))
    )
    return environment().get_template("comparison.html.jinja").render(found=found, compared=compared, style=style())


def markdown(found: dict[str, Any]) -> str:
    """report.md of a comparison."""
    labels = [code(each["label"]) for each in found["runs"]]
    parts = [f"# alignkit report: {len(labels)} runs\n"]
    if found["systems"]:
        rows = [
            [
                code(system["title"]),
                code(measures.title(score)),
                *(
                    measures.interval(score, each[score], with_n=_uneven(system, score)) if score in each else "–"
                    for each in system["by_run"]
                ),
            ]
            for system in found["systems"]
            for score in found["scores"]
        ]
        parts.append("## Scores\n\n" + table(["Model", "Score", *labels], rows))
    if found["differences"]:
        rows = [
            [
                code(each["run"]),
                code(each["title"]),
                code(measures.title(name)),
                measures.interval(name, value, sign=True, with_n=value["n"] != each["questions"]),
                _WORDS[verdict(each[name])],
            ]
            for each in found["differences"]
            for name, value in each.items()
            if measures.is_estimate(value)
        ]
        header = ["Run", "Model", "Score", f"Over {labels[0]}", "It is"]
        parts.append("## Differences to the first run\n\n" + table(header, rows))
    parts += [f"- {code(remark, in_table=False)}\n" for remark in found["remarks"]]
    rows = [[code(each["step"]), code(each["key"]), *map(code, each["values"])] for each in found["settings"]]
    parts.append("## Settings that differ\n\n" + (table(["Step", "Key", *labels], rows) if rows else "None.\n"))
    return "\n".join(parts)


def _uneven(system: Mapping[str, Any], score: str) -> bool:
    """Whether the runs have a score of a model on different numbers of questions."""
    return len({each[score]["n"] for each in system["by_run"] if score in each}) > 1


def _label(run: Run) -> str:
    """A run's name; of a job of a sweep what varies in it."""
    path = run.folder / JOB_FILE
    if not path.is_file():
        return run.folder.name
    varied = json.loads(path.read_text(encoding="utf-8"))["overrides"]
    return ", ".join(f"{key}={value}" for key, value in varied.items()) or run.folder.name


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every key of a step's configuration that is not the same in all runs, and every step that not all runs have.

    What only says where and how fast is left out, and the runs' own folders are written {run}.
    """
    names = list(dict.fromkeys(_name(run, step.name) for run in runs for step in run.steps))
    lines = []
    for name in names:
        configs = [_flat_config(run, name) for run in runs]
        there = [config for config in configs if config is not None]
        if len(there) < len(configs):
            values = [NO_STEP if config is None else "there" for config in configs]
            lines.append({"step": name, "key": "(step)", "values": values})
        for key in dict.fromkeys(key for config in there for key in config):
            if len({config.get(key, NO_KEY) for config in there}) > 1:
                values = ["–" if config is None else config.get(key, NO_KEY) for config in configs]
                lines.append({"step": name, "key": key, "values": values})
    return lines


def _name(run: Run, name: str) -> str:
    """A step's name; a run that is a single step is called by its stage, since jobs of a sweep are numbered."""
    return run.steps[0].stage if run.steps[0].folder == run.folder else name


def _flat_config(run: Run, name: str) -> dict[str, str] | None:
    step = next((step for step in run.steps if _name(run, step.name) == name), None)
    if step is None:
        return None
    own = (str(run.folder), f"runs/{run.folder.name}")
    flat = {}
    for key, value in _leaves(step.config):
        if not any(key == each or key.startswith(f"{each}.") for each in _INCIDENTAL):
            for folder in own:
                value = value.replace(folder, "{run}")
            flat[key] = value
    return flat


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value, as JSON, of every leaf of a configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every number of the manifests of the same step that differs between runs, outside the evaluations."""
    lines = []
    for name in dict.fromkeys(_name(run, step.name) for run in runs for step in run.steps if step.stage != "evaluate"):
        steps = [next((step for step in run.steps if _name(run, step.name) == name), None) for run in runs]
        found = [dict(numbers(step.metrics)) if step and step.complete else {} for step in steps]
        for key in dict.fromkeys(key for each in found for key in each):
            values = [each.get(key) for each in found]
            if len({value[0] for value in values if value}) > 1:
                lines.append({"step": name, "metric": key, "by_run": [_number(value) for value in values]})
    return lines


def _number(value: tuple[float, tuple[float, float] | None] | None) -> dict[str, float] | None:
    if value is None:
        return None
    ends = {"low": value[1][0], "high": value[1][1]} if value[1] else {}
    return {"value": value[0], **ends}


def _differences(labels: Sequence[str], found: Sequence[HeldOut | None]) -> tuple[list[dict[str, Any]], list[str]]:
    """Each later run against the first, model by model, on the questions that both were asked; and what was not."""
    first = found[0]
    differences: list[dict[str, Any]] = []
    remarks = [f"{label} has no evaluation" for label, each in zip(labels, found, strict=True) if each is None]
    for label, other in zip(labels[1:], found[1:], strict=True):
        if first is None or other is None:
            continue
        pairs = [(name, name) for name in other.models if name in first.models]
        if (last := (other.ladder[-1], first.ladder[-1])) not in pairs:
            pairs.append(last)
        asked = _asked_by_both(other, first)
        total = max(len(other.predictions[0]), len(first.predictions[0]))
        if not asked:
            remarks.append(f"{label} was asked other questions than {labels[0]}, so that nothing can be paired")
            continue
        if len(asked) < total:
            remarks.append(f"{label} and {labels[0]} have {len(asked):,} of {total:,} questions in common")
        for new, old in pairs:
            rows = _paired(asked, new, old)
            if rows:
                title = other.title(new) if new == old else f"{other.title(new)} over {first.title(old)}"
                known = compare(rows, "new", "old")
                line = {**known, "run": label, "title": title, "new": new, "old": old, "questions": len(rows)}
                differences.append(
                    {**line, "left_out": len(asked) - len(rows), "verdict": _WORDS[verdict(known.get(other.main))]}
                )
    return differences, remarks


def _asked_by_both(new: HeldOut, old: HeldOut) -> list[tuple[Prediction, Prediction]]:
    """The same question, with the same reference, as both runs answered it."""
    before = {_question(row): row for row in old.predictions[0]}
    return [(row, before[_question(row)]) for row in new.predictions[0] if _question(row) in before]


def _question(row: Prediction) -> tuple[str, str, str, str]:
    return row.id, row.instruction, row.input, row.reference


def _paired(asked: Sequence[tuple[Prediction, Prediction]], new: str, old: str) -> list[Prediction]:
    return [
        after.model_copy(update={"answers": {"new": after.answers[new], "old": before.answers[old]}})
        for after, before in asked
        if new in after.answers and old in before.answers
    ]
