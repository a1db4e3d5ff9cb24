"""keep_best: of policies that were trained one from the other, keep the best by their answers to the same questions.

A policy helped when the 95 % interval of its gain over the one before lies above zero; differences are paired, and
questions about one statement are resampled together. The last policy before the first that did not help is kept. Since
these questions chose it, its score on them is flattering: evaluate what is kept on others (`evaluate` refuses these).

Reads:   policies                  adapters by name, each trained from the one before
         evaluations               predictions.jsonl of the evaluations that hold their answers
Writes:  adapter/                  the kept adapter, a copy
         manifest.json             metrics: scores and gains by policy, which was kept, and why no later one

Overrides people use:
  'policies={sft: runs/mine/sft/adapter, dpo: runs/mine/dpo/adapter}'   what to choose from
  'evaluations=[runs/mine/evaluate/predictions.jsonl]'                  one or several evaluations
  score=judge                      what decides: exact_match, token_f1 or judge

Examples:
  python -m alignkit.keep_best policies.sft=a/adapter policies.dpo=b/adapter evaluations=predictions.jsonl
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from alignkit.core.artifact import Artifact
from alignkit.core.config import Score, StageConfig
from alignkit.core.errors import UserError


@dataclass
class KeepBestConfig(StageConfig):
    """Configuration of `keep_best`."""

    inputs: ClassVar[tuple[str, ...]] = ("policies", "evaluations")

    policies: dict[str, str] = field(default_factory=dict)
    """Name -> adapter folder, in the order of training; the name is that of the model in its evaluation."""
    evaluations: list[str] = field(default_factory=list)
    """predictions.jsonl files of evaluations of the same questions."""
    score: Score = Score.exact_match
    """What decides; higher is better."""


def run(config: KeepBestConfig) -> Artifact:
    """Compare each policy with the one before, and copy the last one before the first that did not help."""
    from alignkit.evaluation.rounds import compare_policies, decide, join_predictions

    if not config.policies or not config.evaluations:
        raise UserError("keep_best needs policies={name: adapter} and evaluations=[.../predictions.jsonl]")
    with Artifact.open("keep_best", config) as artifact:
        if artifact.up_to_date:
            return artifact
        rows = join_predictions([Path(file) for file in config.evaluations])
        results = compare_policies(rows, list(config.policies), config.score, config.seed)
        decision = decide(results, config.score)
        with artifact.output("adapter") as path:
            shutil.copytree(config.policies[decision.kept], path)
        artifact.metrics = {
            "score": config.score.name,
            "policies": [
                {"name": each.name, "score": each.score, "gain": each.gain, "helped": each.helped} for each in results
            ],
            "kept": decision.kept,
            "reason": decision.reason,
        }
        artifact.summary = f"kept {decision.kept}: {decision.reason}"
    return artifact


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("keep_best")
