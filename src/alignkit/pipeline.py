"""pipeline: run the stages in order, each in its own process, and end at a report.

Every step is an ordinary stage command with its own run folder, so whatever a pipeline does can be done by hand, and
whatever is already done is skipped. A step starts when the steps whose outputs it reads have finished; up to `workers`
steps run side by side. After a kill the same command continues. All configurations are checked before the first step.

With rounds=3 the steps that a pipeline names in round.steps are repeated up to three times, each round starting from
the policy of the one before. After each, that policy is examined on development questions; the rounds end with the
first whose gain is not above zero by its 95 % interval, and the best is kept in runs/<run>/best/ (docs/rounds.md).

Reads:   what the first steps read (the seeds)
Writes:  runs/<run>/<step>/ for every step, runs/<run>-seed<k>/<step>/ for every replicate; the last step writes
         runs/<run>/report/report.html. With rounds: runs/<run>/round<r>_<step>/, and runs/<run>/best/

Overrides people use:
  pipeline=qwen7b         the road on a 24 GB GPU with a real teacher (pipeline=demo: offline, embedded model)
  run=mine                another run folder
  rounds=3                rejection sampling, SFT and DPO up to three times over (pipeline=rounds, smoke or qwen7b)
  replicates=[2,3]        repeat everything with these seeds; the report shows all of them
  workers=1               one step at a time
  only=[select,sft]       only these steps (what they read must be there); round2_dpo is one of a round, dpo all of them
  variables.held_out=x    what a pipeline leaves to you (see the head of its file in conf/pipeline)

Examples:
  python -m alignkit.pipeline pipeline=demo
  python -m alignkit.pipeline pipeline=rounds
  python -m alignkit.pipeline pipeline=qwen7b run=mine
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from alignkit.core.artifact import Artifact, read_manifest
from alignkit.core.errors import UserError
from alignkit.core.plan import (
    PlanConfig,
    check_evaluation,
    first_steps,
    last_steps,
    plan_best,
    plan_round,
    plan_step,
    predictions,
    wanted,
)
from alignkit.core.steps import Step, connect, describe, execute, require_sources


@dataclass
class PipelineConfig(PlanConfig):
    """What to run: the steps of a run, the seeds to repeat it with, and how much at once."""

    inputs: ClassVar[tuple[str, ...]] = ()

    once: list[str] = field(default_factory=lambda: ["report"])
    """Steps that replicates do not repeat; they start when everything else is done."""
    replicates: list[int] = field(default_factory=list)
    """Further seeds with which everything is repeated, in runs/<run>-seed<k>."""
    workers: int = 1


def run(config: PipelineConfig) -> Artifact:
    """Plan all steps, run them as their inputs become ready, round after round, and record what each one cost."""
    planned = plan(config)
    steps_planned = [step for part in planned for step in part]
    require_sources(steps_planned)
    total, most = len(steps_planned), "at most " if config.rounds else ""
    with Artifact.open("pipeline", config, always=True) as artifact:
        began, memory, steps = time.monotonic(), 0, list[Step]()
        print(f"{most}{total} steps, {config.workers} at a time -> {artifact.folder.parent}", flush=True)
        for part in in_turn(config, planned):
            for step, peak in execute(part, config.workers, artifact.folder):
                memory = max(memory, peak)
                steps.append(step)
                print(f"[{len(steps):2d}/{total}] {describe(step)}", flush=True)
        artifact.metrics = {
            "steps": {step.label: (read_manifest(step.folder) or {})["seconds"] for step in steps},
            "wall_seconds": round(time.monotonic() - began, 1),
            "peak_memory_bytes": memory,
        }
        print(f"done in {time.monotonic() - began:.0f} s, peak memory {memory / 2**30:.2f} GiB (all processes)")
        for step in steps:
            if step.stage == "report":
                if (step.folder / "figures.txt").exists():
                    print("\n" + (step.folder / "figures.txt").read_text(encoding="utf-8"))
                print(f"report: {(step.folder / 'report.html').resolve()}")
    return artifact


def plan(config: PipelineConfig) -> list[list[Step]]:
    """All steps that may come to be run, composed: those before the rounds, those of each round, those behind.

    Without rounds there is one part. So no mistake in a step's configuration is found after hours of work.
    """
    check(config)
    runs = seeds(config)
    first = [plan_step(own, name, also=others(config, name)) for name, own in repeated(config, first_steps(config))]
    parts = [connected(config, first)]
    for number in range(1, config.rounds + 1):
        side_by_side = zip(*(plan_round(own, number) for own in runs), strict=True)
        parts.append(connected(config, [step for steps in side_by_side for step in steps]))
    if config.rounds:
        parts.append(plan_last(config, {own.run: config.rounds for own in runs}))
        check_evaluation(parts[1], parts[-1])
    return parts


def plan_last(config: PipelineConfig, ran: Mapping[str, int]) -> list[Step]:
    """The steps behind the rounds, of which each seed's run has made so many."""
    best = [plan_best(own, ran[own.run]) for own in seeds(config) if wanted(config, "best")]
    names = repeated(config, last_steps(config))
    last = [plan_step(own, name, ran[own.run], others(config, name)) for name, own in names]
    return connected(config, [*best, *last])


def in_turn(config: PipelineConfig, planned: Sequence[list[Step]]) -> Iterator[list[Step]]:
    """The parts of a plan, each once it is known what it has to be: a seed ends its rounds when one did not help."""
    yield planned[0]
    if not config.rounds:
        return
    going, ran = seeds(config), dict.fromkeys((own.run for own in seeds(config)), 0)
    for number in range(1, config.rounds + 1):
        yield [step for step in planned[number] if step.config.run in {own.run for own in going}]
        ran |= {own.run: number for own in going}
        going = [own for own in going if helped(own, number)]
    yield planned[-1] if set(ran.values()) == {config.rounds} else plan_last(config, ran)


def helped(config: PlanConfig, number: int) -> bool:
    """Whether a round's gain is above zero, which it also says; False without an evaluation to tell it."""
    from alignkit.evaluation.rounds import compare_policies, in_words, join_predictions

    files = [Path(predictions(config, each)) for each in (number - 1, number)]
    if not all(file.is_file() for file in files):
        return False
    names = [f"round{number - 1}", f"round{number}"]
    _, last = compare_policies(join_predictions(files), names, config.round.score, config.seed)
    print(f"{config.run}: {in_words(last, config.round.score)}", flush=True)
    return bool(last.helped)


def seeds(config: PipelineConfig) -> list[PipelineConfig]:
    """The configuration of the run, and that of each replicate."""
    more = [replace(config, run=f"{config.run}-seed{seed}", seed=seed) for seed in config.replicates]
    return [config, *more]


def repeated(config: PipelineConfig, names: Sequence[str]) -> list[tuple[str, PipelineConfig]]:
    """Each of the steps with the seeds that it is run with: side by side, so that they end together."""
    return [(name, own) for name in names for own in seeds(config) if own is config or name not in config.once]


def others(config: PipelineConfig, name: str) -> list[str]:
    """What tells a report of the replicates."""
    if config.steps[name].stage != "report" or not config.replicates:
        return []
    folders = ", ".join(f"'runs/{own.run}'" for own in seeds(config)[1:])
    return [f"replicates=[{folders}]"]


def connected(config: PipelineConfig, steps: list[Step]) -> list[Step]:
    """The steps, each waiting for those that it reads from, and a step of `once` for all others."""
    connect(steps)
    for step in steps:
        if step.name in config.once:
            step.needs = {other.folder for other in steps if other.name not in config.once}
    return steps


def check(config: PipelineConfig) -> None:
    """Raise `UserError` for settings that do not go together."""
    rounds = [f"round{number}_{name}" for number in range(1, config.rounds + 1) for name in config.round.steps]
    evaluations = [f"round{number}_evaluate" for number in range(config.rounds + 1)] if config.rounds else []
    known = [*config.steps, *rounds, *evaluations, *(["evaluate", "best"] if config.rounds else [])]
    unknown = [name for name in config.only if name not in known]
    if unknown:
        raise UserError(f"only: no step named {unknown[0]!r}. Steps: {', '.join(dict.fromkeys(known))}")
    if not re.fullmatch(r"[\w.-]+", config.run):
        raise UserError(f"run={config.run}: the run of a pipeline is a plain name of letters, digits, '.', '_' and '-'")
    numbers = [config.seed, *config.replicates]
    if len(set(numbers)) < len(numbers):
        raise UserError(
            f"replicates={config.replicates}: seeds must differ from each other and from seed={config.seed}"
        )


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("pipeline")
