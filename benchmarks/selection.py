"""Does selection pay on the embedded world? Equal budgets, five seeds, held-out questions of the development split.

    python benchmarks/selection.py [--rows 600] [--mistakes 0.3] [--judgmental 0.5] [--k 120] [--folder runs/selection]

The scripted teacher writes a pool of question-answer rows, of which the share `mistakes` is wrong on purpose, and in
which the share `judgmental` of the rows are questions for a yes or no (about half are, when it is left as it comes).
`alignkit select compare=random,quality,coverage,mods` then trains an adapter on what each strategy selects, k rows
each, and examines it. The teacher grades the rows by its rules, without knowing which it got wrong on purpose. Run
again with the same options, it goes on where it stopped. Ten to fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from alignkit.core.app import run_command

STRATEGIES = ("random", "quality", "coverage", "mods")


def main() -> None:
    """Write the pool, compare the strategies, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--mistakes", type=float, default=0.3)
    parser.add_argument("--judgmental", type=float)
    parser.add_argument("--k", type=int, default=120)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/selection"))
    options = parser.parse_args()
    pool = write_pool(options.folder, options.rows, options.mistakes, options.judgmental)
    place = [f"output_dir={options.folder}/compare", f"data.path={pool}", f"k={options.k}"]
    held_out = "held_out=['${recipe:closed_world/development.jsonl}']"
    training = ["train.batch_size=16", "train.learning_rate=1e-3", f"train.max_steps={options.steps}"]
    answering = ["sampling.max_new_tokens=24", "sampling.batch_size=256", "quality.scorer=judge", "workers=2"]
    compare = [f"compare={','.join(STRATEGIES)}", f"compare_seeds={options.seeds}"]
    run(["select", *place, held_out, *training, *answering, *compare])
    manifest = json.loads((options.folder / "compare" / "manifest.json").read_text(encoding="utf-8"))
    print(table(manifest["metrics"]["comparison"], manifest["metrics"]["quality"]))


def write_pool(folder: Path, rows: int, mistakes: float, judgmental: float | None) -> Path:
    """The pool: rows as the scripted teacher writes them, or so many of each kind that the share comes out."""
    asked = rows if judgmental is None else 3 * rows
    run(["expand", f"output_dir={folder}/expand", f"count={asked}", f"teacher.mistake_rate={mistakes}"])
    path = folder / "expand" / "expanded.jsonl"
    if judgmental is None:
        return path
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = {"judgmental": round(rows * judgmental), "non_judgmental": rows - round(rows * judgmental)}
    drawn = [
        row
        for kind, count in wanted.items()
        for row in Random(f"pool-{kind}").sample([each for each in found if each["kind"] == kind], count)
    ]
    skewed = folder / "pool.jsonl"
    skewed.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn), encoding="utf-8")
    return skewed


def run(command: list[str]) -> None:
    """Run a stage as its command line does; leaves when it fails."""
    code = run_command(command[0], command[1:])
    if code:
        sys.exit(code)


def table(comparison: dict[str, Any], quality: dict[str, Any]) -> str:
    """Exact match of each strategy, over all seeds and by seed, and the differences from random."""
    lines = [f"{comparison['budget']} rows each; the pool's mean grade is {quality['mean']:.2f} of 10", ""]
    lines.append(f"{'exact match, %':22s} {'all seeds':>20s}   by seed")
    for each in comparison["strategies"]:
        seeds = " ".join(f"{100 * scores['exact_match']['mean']:5.1f}" for scores in each["by_seed"])
        lines.append(f"{each['name']:22s} {interval(each['scores']['exact_match']):>20s}   {seeds}")
    lines += ["", "differences, points"]
    for each in comparison["differences"]:
        seeds = " ".join(f"{100 * scores['exact_match']['mean']:+5.1f}" for scores in each["by_seed"])
        verdict = "helped" if each["exact_match"]["helped"] else ""
        lines.append(f"{each['name']:22s} {interval(each['exact_match'], '+'):>20s}   {seeds}  {verdict}")
    return "\n".join(lines)


def interval(estimate: dict[str, float], sign: str = "") -> str:
    """Mean and 95 % interval in percent."""
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
