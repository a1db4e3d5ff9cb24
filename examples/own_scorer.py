"""A scorer of your own: anything with `score(conversations)` and `reasons`, higher is better.

This one prefers short answers. Its scores go through the same function that rejection sampling uses to find the best
of n: `python examples/own_scorer.py [scored.jsonl]`, after the demo.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from alignkit.core.records import CompletionSet, Message
from alignkit.scoring.best_of_n import ranked


class Brevity:
    """Minus the number of words of the answer."""

    reasons: Sequence[str | None] = ()

    def score(self, conversations: Sequence[list[Message]]) -> list[float | None]:
        """Score conversations that end with an answer; None would mean that one could not be scored."""
        return [-float(len(messages[-1].content.split())) for messages in conversations]


def main() -> None:
    """Print, for three questions, the answer that the reward model chose and the one that brevity chooses."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/rejection_sampling/scored.jsonl")
    scorer = Brevity()
    for line in path.read_text(encoding="utf-8").splitlines()[:3]:
        row = CompletionSet.model_validate(json.loads(line))
        chosen = ranked(row.completions)[0]
        answers = [[*row.prompt, Message(role="assistant", content=each.text)] for each in row.completions]
        scored = zip(row.completions, scorer.score(answers), strict=True)
        shortest = ranked([each.model_copy(update={"score": score}) for each, score in scored])[0]
        print(row.prompt[-1].content.replace("\n\n", "\n"))
        print(f"  reward model: {chosen.text}")
        print(f"  brevity:      {shortest.text}")


if __name__ == "__main__":
    main()
