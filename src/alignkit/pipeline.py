"""pipeline: run the stages in order, each in its own process, and end at a report.

Every step is an ordinary stage command with its own run folder, so whatever a pipeline does can be done by hand, and
whatever is already done is skipped. A step starts when the steps whose outputs it reads have finished; up to `workers`
steps run side by side. After a kill the same command continues. All configurations are checked before the first step.

Reads:   what the first steps read (the seeds)
Writes:  runs/<run>/<step>/ for every step, runs/<run>-seed<k>/<step>/ for every replicate; the last step writes
         runs/<run>/report/report.html

Overrides people use:
  pipeline=qwen7b         the road on a 24 GB GPU with a real teacher (pipeline=demo: offline, embedded model)
  run=mine                another run folder
  replicates=[2,3]        repeat everything with these seeds; the report shows all of them
  workers=1               one step at a time
  only=[select,sft]       only these steps (what they read must be there)
  variables.held_out=x    what a pipeline leaves to you (see the head of its file in conf/pipeline)

Examples:
  python -m alignkit.pipeline pipeline=demo
  python -m alignkit.pipeline pipeline=qwen7b run=mine
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from alignkit.core.artifact import Artifact, read_manifest
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.help import stage_keys
from alignkit.core.stages import default_groups
from alignkit.core.steps import Step, connect, describe, execute, make_step, quoted


@dataclass
class StepConfig:
    """One step: a stage and the overrides it is run with.

    In them `{run}` stands for the run (of the replicate), and `{name}` for the pipeline's variable of that name.
    """

    stage: str = MISSING
    overrides: list[str] = field(default_factory=list)


@dataclass
class PipelineConfig(StageConfig):
    """What to run. `steps` maps the name of a step, which is also its folder, to what it runs, in reading order."""

    inputs: ClassVar[tuple[str, ...]] = ()

    steps: dict[str, StepConfig] = MISSING
    variables: dict[str, str] = field(default_factory=dict)
    """What differs from user to user: paths, the teacher's model."""
    common: list[str] = field(default_factory=list)
    """Overrides for every step whose stage has the key: the base model, the hardware, the teacher."""
    once: list[str] = field(default_factory=lambda: ["report"])
    """Steps that replicates do not repeat; they start when everything else is done."""
    replicates: list[int] = field(default_factory=list)
    """Further seeds with which everything is repeated, in runs/<run>-seed<k>."""
    workers: int = 1
    only: list[str] = field(default_factory=list)


def run(config: PipelineConfig) -> Artifact:
    """Plan all steps, run them as their inputs become ready, and record what each one cost."""
    steps = plan(config)
    with Artifact.open("pipeline", config, always=True) as artifact:
        began, memory = time.monotonic(), 0
        print(f"{len(steps)} steps, {config.workers} at a time -> {artifact.folder.parent}", flush=True)
        for number, (step, peak) in enumerate(execute(steps, config.workers, artifact.folder), start=1):
            memory = max(memory, peak)
            print(f"[{number:2d}/{len(steps)}] {describe(step)}", flush=True)
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


def plan(config: PipelineConfig) -> list[Step]:
    """Compose every step's configuration; a step needs each other step whose folder one of its inputs lies in."""
    unknown = [name for name in config.only if name not in config.steps]
    if unknown:
        raise UserError(f"only: no step named {unknown[0]!r}. Steps: {', '.join(config.steps)}")
    if not re.fullmatch(r"[\w.-]+", config.run):
        raise UserError(f"run={config.run}: the run of a pipeline is a plain name of letters, digits, '.', '_' and '-'")
    seeds = [config.seed, *config.replicates]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"replicates={config.replicates}: seeds must differ from each other and from seed={config.seed}"
        )
    steps: list[Step] = []
    for name, entry in config.steps.items():
        for seed in seeds:  # side by side, so that they end together
            run_name = config.run if seed == config.seed else f"{config.run}-seed{seed}"
            if (config.only and name not in config.only) or (name in config.once and seed != config.seed):
                continue
            variables = {"run": run_name, **config.variables}
            given = [*applicable(entry.stage, config.common), *entry.overrides]
            own = [fill(override, variables) for override in given]
            if entry.stage == "report" and config.replicates:
                folders = ", ".join(f"'runs/{config.run}-seed{other}'" for other in config.replicates)
                own.append(f"replicates=[{folders}]")
            overrides = [f"run={run_name}", f"name={name}", f"seed={seed}", *own]
            if config.force:
                overrides.append("force=true")
            steps.append(make_step(name, entry.stage, overrides))
    connect(steps)
    for step in steps:
        if step.name in config.once:
            step.needs = {other.folder for other in steps if other.name not in config.once}
    return steps


def applicable(stage: str, overrides: list[str]) -> list[str]:
    """Those of the common overrides whose key or group the stage has."""
    known = {key.name for key in stage_keys(stage)} | set(default_groups(stage))
    return [override for override in overrides if override.split("=", 1)[0] in known]


def fill(override: str, variables: Mapping[str, str]) -> str:
    """Put the variables into an override, quoted where Hydra would otherwise read them as more than text."""
    for name, value in variables.items():
        plain = re.fullmatch(r"[\w./:+@-]*", value)
        override = override.replace(f"{{{name}}}", value if plain else quoted(value))
    return override


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("pipeline")
