"""What the report says about rounds: each policy's score and gain on the deciding questions, what was kept, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.figures import Rung, ladder
from alignkit.reporting.runs import Run


@dataclass(frozen=True)
class Rounds:
    """The rounds of one or several runs of the same pipeline, one a seed: what each `keep_best` measured."""

    seeds: list[str]
    metrics: list[dict[str, Any]]

    @property
    def score(self) -> str:
        """What decided, in words."""
        return str(self.metrics[0]["score"]).replace("_", " ")

    @property
    def percent(self) -> bool:
        """Whether it is a share of 1 rather than a grade."""
        return self.score != "judge"

    @property
    def policies(self) -> list[str]:
        """Names of the policies, as far as any seed came."""
        return list(dict.fromkeys(each["name"] for metrics in self.metrics for each in metrics["policies"]))

    def by_seed(self, policy: str, key: str) -> list[Any]:
        """`score`, `gain` or `helped` of a policy for each seed; None where that seed did not come so far."""
        found = [{each["name"]: each[key] for each in metrics["policies"]} for metrics in self.metrics]
        return [each.get(policy) for each in found]

    def title(self, policy: str) -> str:
        """`round2` as "Round 2"; the first is where they started."""
        said = policy.replace("round", "Round ") if policy.startswith("round") else policy
        return f"{said} (start)" if policy == self.policies[0] else said

    @property
    def endings(self) -> list[str]:
        """For each seed what was kept, and why no later policy."""
        said = [f"kept {metrics['kept']}: {metrics['reason']}" for metrics in self.metrics]
        return [f"seed {seed} {text}" for seed, text in zip(self.seeds, said, strict=True)] if len(said) > 1 else said

    def figure(self) -> str:
        """The score by round, a point with its interval for each seed."""
        rungs = [
            Rung(self.title(policy), f"rung-{place % 6}", self.by_seed(policy, "score"))
            for place, policy in enumerate(self.policies)
        ]
        return ladder("rounds", f"Development {self.score} by round", rungs, self.seeds, percent=self.percent)

    def lines(self) -> list[tuple[str, list[Estimate | None], bool]]:
        """Title, estimates by seed, and whether they are gains: the scores first."""
        scores = [(self.title(policy), self.by_seed(policy, "score"), False) for policy in self.policies]
        later = zip(self.policies, self.policies[1:], strict=False)
        gains = [(f"{self.title(new)} over {self.title(old)}", self.by_seed(new, "gain"), True) for old, new in later]
        return scores + gains


def read_rounds(runs: Sequence[Run]) -> Rounds | None:
    """The rounds of those runs that had any; None when the first had none."""
    found = [(run.seed, step.metrics) for run in runs for step in run.of_stage("keep_best")[:1]]
    if not runs[0].of_stage("keep_best"):
        return None
    return Rounds([seed for seed, _ in found], [metrics for _, metrics in found])
