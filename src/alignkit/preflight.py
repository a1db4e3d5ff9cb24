"""preflight: will it fit, how long will it take, and if it does not fit, what to change. Nothing is loaded.

An estimate by formulas (docs/preflight.md says which, and what is assumed): nobody has measured it on a GPU yet. Each
training stage makes the same check with its own rows before it loads a model.

Reads:   data.path                rows to train on, for their lengths (optional)
Writes:  preflight.json           parts of the memory, speed, hours and advice for each stage
         preflight.html           the same as a page, with the card's memory as a line
         dropped.jsonl            rows of data.path that sft could not use, and why
Exit code 2 when a stage that was asked for does not fit, or is known to fail.

Overrides people use:
  model=qwen7b hardware=rtx4090_24gb   which model on which card (without: the GPU that is here)
  stages=sft,dpo                       only these (default: sft, reward, dpo, rejection_sampling)
  train.batch_size=4 lora.rank=64      as in the stages themselves
  data.path=mine.jsonl                 count the rows' own lengths
  rows=50000 mean_length=600           or state them

Examples:
  python -m alignkit.preflight +model=qwen7b hardware=rtx4090_24gb
  python -m alignkit.preflight +model=qwen2_5_7b hardware=h200 stages=sft,dpo lora.rank=64 rows=50000 mean_length=600
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import (
    HardwareConfig,
    LoraConfig,
    ModelConfig,
    RowsConfig,
    SamplingConfig,
    StageConfig,
    TrainConfig,
)
from alignkit.core.errors import UserError

if TYPE_CHECKING:
    from alignkit.models.jobs import Job
    from alignkit.models.machine import Machine

LOG = logging.getLogger("alignkit")

NONE = "none"


@dataclass
class PreflightConfig(StageConfig):
    """Which stages, on what, with which rows."""

    inputs: ClassVar[tuple[str, ...]] = ("data.path", "model.path")

    stages: list[str] = field(default_factory=lambda: ["sft", "reward", "dpo", "rejection_sampling"])
    data: RowsConfig = field(default_factory=lambda: RowsConfig(path=NONE))
    rows: int = 1000
    """Rows (prompts, pairs) to train on, when data.path does not tell."""
    mean_length: Optional[int] = None  # noqa: UP045
    """Tokens of a row, prompt and answer, when data.path does not tell; none: model.max_length."""
    reference: str = "sft_adapter"
    """As in dpo: `base` holds no second adapter."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass(frozen=True)
class Rows:
    """How many rows there are, and how long, in tokens."""

    count: int
    mean: float
    longest: int


def run(config: PreflightConfig) -> Artifact:
    """Estimate every stage, look for what makes it fit, write it down; raise when something does not fit."""
    from alignkit.models.jobs import STAGES
    from alignkit.models.machine import find_machine
    from alignkit.reporting.preflight import render_preflight

    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"stages={unknown[0]}: choose from {', '.join(STAGES)}")
    if config.rows < 1 or (config.mean_length is not None and config.mean_length < 1):
        raise UserError(f"rows={config.rows} mean_length={config.mean_length}: both must be at least 1")
    with Artifact.open("preflight", config, always=True) as artifact:
        machine = find_machine(config.hardware)
        rows = count_rows(config, artifact)
        found = [examine(job, machine, rows, config.train.epochs, artifact.command) for job in jobs(config, rows)]
        said = {"model": config.model.name, "machine": vars(machine), "rows": vars(rows)}
        report = {**said, "epochs": config.train.epochs, "stages": found}
        artifact.write_text("preflight.json", json.dumps(report, indent=1) + "\n")
        artifact.write_text("preflight.html", render_preflight(report))
        artifact.metrics = {each["stage"]: {"peak_bytes": each["peak_bytes"], "fits": each["fits"]} for each in found}
        LOG.info("%s", as_text(report))
        failing = [each["stage"] for each in found if not each["fits"] or each["problems"]]
        artifact.summary = f"does not fit: {', '.join(failing)}" if failing else f"fits: {', '.join(config.stages)}"
    if failing:
        raise UserError(f"{', '.join(failing)} will not run so with {config.model.name} on {machine.name}; see above")
    return artifact


def count_rows(config: PreflightConfig, artifact: Artifact) -> Rows:
    """The rows of data.path as `sft` would use them, or those that the configuration states, all as long as allowed."""
    most = config.model.max_length
    if config.data.path == NONE:
        return Rows(config.rows, float(min(config.mean_length or most, most)), most)
    from alignkit.data.lengths import collect, row_lengths
    from alignkit.models.loading import load_tokenizer

    read = row_lengths(load_tokenizer(config.model), config.data, config.model)
    found = collect(read, lambda each: artifact.drop(each.row, each.reason, each.detail), config.data.path)
    kept = [length for length in found if length <= most]
    if not kept:
        raise UserError(f"model.max_length={most}: every row of {config.data.path} is longer")
    counts = len(kept), len(found) - len(kept), artifact.dropped.total(), max(kept)
    LOG.info("%s: %d rows, %d too long, %d of no use; the longest has %d tokens", config.data.path, *counts)
    return Rows(len(kept), sum(kept) / len(kept), max(kept))


def jobs(config: PreflightConfig, rows: Rows) -> list[Job]:
    """The work of each stage on one GPU: pairs are two sequences a row, and sampling may fill model.max_length."""
    from alignkit.models.jobs import Job

    common = Job(
        "sft",
        config.model,
        config.model.max_length if config.train.packing else rows.longest,
        config.lora,
        config.train,
        config.sampling,
        reference=config.reference,
        processes=config.hardware.gpus,
    )
    changes: dict[str, dict[str, Any]] = {
        "sft": {},
        "reward": {"longest": rows.longest, "sequences_per_row": 2},
        "dpo": {"longest": rows.longest, "sequences_per_row": 2},
        "rejection_sampling": {"longest": config.model.max_length},
    }
    return [replace(common, stage=stage, **changes[stage]) for stage in config.stages]


def examine(job: Job, machine: Machine, rows: Rows, epochs: float, command: str) -> dict[str, Any]:
    """Everything that is said about one stage, as numbers and texts."""
    from alignkit.models.refusals import known_problems
    from alignkit.models.remedies import find_remedies, largest_length
    from alignkit.models.speed import speed

    memory, rate = job.memory(), speed(job, machine, rows.mean)
    if job.stage == "rejection_sampling":
        tokens = float(rows.count * job.sampling.n * job.sampling.max_new_tokens)
    else:
        tokens = rows.count * job.sequences_per_row * rows.mean * epochs
    remedies = find_remedies(job, machine)
    return {
        "stage": job.stage,
        "sequences": job.sequences,
        "longest": job.longest,
        "parts": memory.parts,
        "moment": memory.moment,
        "peak_bytes": memory.peak,
        "needed_bytes": machine.needed(memory),
        "spare_bytes": machine.spare(memory),
        "fits": machine.spare(memory) >= 0,
        "tokens_per_second": [rate.low, rate.high] if rate else None,
        "hours": [tokens / rate.high / 3600, tokens / rate.low / 3600] if rate else None,
        "times_policy_alone": job.times_policy_alone if job.stage == "rejection_sampling" else None,
        "largest_max_length": largest_length(job, machine),
        "context": job.base.shape.context,
        "overrides": remedies,
        "command": ready_command(job, command, remedies) if remedies else None,
        "problems": [f"{rule.name}: {rule.advice}" for rule in known_problems(job)],
    }


def ready_command(job: Job, command: str, remedies: Sequence[str]) -> str:
    """The stage's command with what was typed here, as far as the stage knows it, and the remedies."""
    from alignkit.core.help import stage_keys
    from alignkit.core.stages import default_groups

    words = shlex.split(command)
    typed = words[2:] if words[:2] == ["alignkit", "preflight"] else [f"model={job.model.name}"]
    ours = {"name", "output_dir", "force", *(_key(each) for each in remedies)}
    known = {key.name for key in stage_keys(job.stage)} | set(default_groups(job.stage)) | {"experiment"}
    known -= set() if job.stage == "sft" else {"data.path", "data.skip", "data.limit"}
    kept = [each for each in typed if _key(each) in known - ours]
    return shlex.join(["python", "-m", f"alignkit.{job.stage}", *kept, *remedies])


def as_text(report: dict[str, Any]) -> str:
    """The table for a terminal, and under it what to do."""
    gib = 2**30
    machine, rows = report["machine"], report["rows"]
    lines = [
        f"{report['model']} on {machine['name']}: {machine['memory_bytes'] / gib:.1f} GiB; {rows['count']} rows "
        f"of {rows['mean']:.0f} tokens, {report['epochs']:g} epochs. All of this is an estimate.",
        f"{'stage':20s} {'batch':>12s} {'weights':>8s} {'trained':>8s} {'passing':>8s} {'peak':>7s} {'needed':>7s} "
        f"{'spare':>7s}  {'':4s} {'tokens/s':>13s} {'hours':>11s} {'longest that fits':>18s}",
    ]
    for each in report["stages"]:
        groups = [value / gib for value in grouped(each["parts"]).values()]
        rate, hours = each["tokens_per_second"], each["hours"]
        longest = each["largest_max_length"]
        lines.append(
            f"{each['stage']:20s} {each['sequences']:>5d} x {each['longest']:<4d} "
            + " ".join(f"{value:8.2f}" for value in groups)
            + f" {each['peak_bytes'] / gib:7.2f} {each['needed_bytes'] / gib:7.2f} {each['spare_bytes'] / gib:7.2f}  "
            + f"{'fits' if each['fits'] else 'NO':4s} "
            + f"{f'{rate[0]:.0f} - {rate[1]:.0f}' if rate else '-':>13s} "
            + f"{f'{hours[0]:.1f} - {hours[1]:.1f}' if hours else '-':>11s} "
            + f"{'-' if longest is None else f'{longest} (context)' if longest == each['context'] else longest:>18}"
        )
    for each in report["stages"]:
        if each["times_policy_alone"]:
            lines.append(
                f"{each['stage']}: policy, previous version and reward model as adapters on one base: "
                f"{each['times_policy_alone']:.3f} times the policy alone"
            )
        lines += [f"{each['stage']}: known to fail: {problem}" for problem in each["problems"]]
        if each["command"]:
            lines += [f"{each['stage']}: estimated to fit:", f"  {each['command']}"]
        elif not each["fits"]:
            lines.append(f"{each['stage']}: no setting that is known here makes it fit")
    return "\n".join(lines)


def grouped(parts: dict[str, int]) -> dict[str, int]:
    """Parts as weights, what is trained, and what comes and goes within a step."""
    groups = {"weights": 0, "trained": 0, "passing": 0}
    for name, size in parts.items():
        if name in ("base weights", "embeddings and head"):
            groups["weights"] += size
        elif name in ("adapters", "optimizer", "gradients"):
            groups["trained"] += size
        else:
            groups["passing"] += size
    return groups


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("preflight")
