"""The report's main figures in Markdown, as a code host shows it. Names and texts stand in code spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from alignkit.reporting import measures
from alignkit.reporting.plain import code, code_block
from alignkit.reporting.templating import count, duration, gibibytes

Table = Iterable[Sequence[str]]

INTERSECTION = "n: questions that both have the score of; two models are compared on no others.\n"


def render_markdown(report: dict[str, Any]) -> str:
    """report.md from what `summary.summarise_run` says. Empty sections are left out."""
    sections = [
        ("Gains", _gains(report)),
        ("Scores", _scores(report)),
        ("Steps", _steps(report)),
        ("Checks", _checks(report)),
        ("Cost", _cost(report)),
        ("How to reproduce", _reproduce(report)),
    ]
    body = "\n".join(f"## {name}\n\n{text}" for name, text in sections if text)
    return f"# alignkit report: {code(report['run'], in_table=False)}\n\n{_verdict(report)}\n\n{body}"


def table(header: Sequence[str], rows: Table) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _verdict(report: dict[str, Any]) -> str:
    found = report["verdict"]
    if found is None:
        return "This run has not been evaluated yet."
    points = " percentage points" if found["percent"] else ""
    said = f"{found['score']} on {count(report['questions'])} held-out questions: {found['to']}"
    if found["gain"]:
        first, last = (code(found[key], in_table=False) for key in ("first", "last"))
        said += f" ({last}), from {found['from']} ({first}): {found['gain']}{points}; it {found['verdict']}"
    note = f"\n\n{report['teacher']}" if report["teacher"].startswith("Teacher and grader of this run are") else ""
    return f"**{said}.** {_seeds(report)}; brackets hold 95 % intervals.{note}"


def _seeds(report: dict[str, Any]) -> str:
    seeds = [code(seed, in_table=False) for seed in report["seeds"]]
    return f"Seed {seeds[0]}" if len(seeds) == 1 else f"Seeds {', '.join(seeds)}, together where one number stands"


def _gains(report: dict[str, Any]) -> str:
    compared = report["comparisons"]
    scores = list(
        dict.fromkeys(n for each in compared for n, v in each["all_seeds"].items() if measures.is_estimate(v))
    )
    if not compared:
        return ""
    questions = report["questions"] * len(report["seeds"])
    behind = {
        score: measures.rows_behind((each["all_seeds"].get(score) for each in compared), questions) for score in scores
    }
    rows = [
        [
            code(each["title"]),
            *(_interval(score, each["all_seeds"].get(score), behind[score] is True, sign=True) for score in scores),
            each["role"],
            each["verdict"],
        ]
        for each in compared
    ]
    header = ["Comparison", *(code(measures.heading(score, behind[score])) for score in scores), "It is", "So it"]
    return table(header, rows) + ("\n" + INTERSECTION if any(each is True for each in behind.values()) else "")


def _scores(report: dict[str, Any]) -> str:
    models = report["models"]
    if not models:
        return ""
    scores = list(models[0]["scores"])
    behind = {
        score: measures.rows_behind((e for each in models for e in each["scores"][score]), report["questions"])
        for score in scores
    }
    rows = [
        [
            code(each["title"]),
            *(" / ".join(_interval(s, e, behind[s] is True) for e in each["scores"][s]) for s in scores),
        ]
        for each in models
    ]
    return table(["Model", *(code(measures.heading(score, behind[score])) for score in scores)], rows)


def _steps(report: dict[str, Any]) -> str:
    rows = [
        [
            code(step["name"]),
            code(step["stage"]),
            code(step["status"]),
            code(step["summary"] or step["error"] or ""),
            duration(step["seconds"]),
            gibibytes(step["memory"]) if step["memory"] else "",
        ]
        for step in report["stages"]
    ]
    text = table(["Step", "Stage", "Status", "Key result", "Time", "Peak memory"], rows)
    return text + (f"\nNot in this run: {', '.join(report['missing'])}.\n" if report["missing"] else "")


def _checks(report: dict[str, Any]) -> str:
    failed = [line for line in report["checks"] if False in line["passed"]]
    made = f"{len(report['checks'])} checks, {len(failed)} failed.\n" if report["checks"] else ""
    rows = [[code(line["step"]), code(line["name"]), code(line["detail"])] for line in failed]
    return made + ("\n" + table(["Step", "Failed check", "Detail"], rows) if rows else "")


def _cost(report: dict[str, Any]) -> str:
    total = report["cost"]["total"]
    if not report["cost"]["steps"]:
        return ""
    money = "n/a" if total["cost"] is None else f"{total['cost']:,.4f} {total['currency']}"
    said = f"{count(total['requests'])} requests to a teacher, {count(total['prompt_tokens'])} tokens in prompts and "
    said += f"{count(total['completion_tokens'])} in answers; cost {money}."
    missing = ", ".join(code(name, in_table=False) for name in total["not_recorded"])
    return said + (f" Not recorded: {missing}." if missing else "") + "\n"


def _reproduce(report: dict[str, Any]) -> str:
    commands = code_block("\n".join(line["command"] for line in report["lineage"]))
    facts = "\n".join(
        f"- {code(name, in_table=False)}: {code(value, in_table=False)}" for name, value in report["facts"].items()
    )
    return f"{commands}\n\n{facts}\n"


def _interval(score: str, estimate: Any, with_n: bool, *, sign: bool = False) -> str:
    return measures.interval(score, estimate, sign=sign, with_n=with_n) if estimate else "–"
