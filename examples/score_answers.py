"""Score answers with a reward model, after the demo: `python examples/score_answers.py [run folder]`."""

from __future__ import annotations

import sys

from alignkit import RewardModel

NOTES = "Notes: The head of Bakoco is Tovin. Bakoco makes clocks. Bakoco has twelve workers."
QUESTION = "Who leads Bakoco?"
ANSWERS = ["The head of Bakoco is Tovin.", "The product of Bakoco is clocks.", "The statement does not say."]


def main() -> None:
    """Print the answers, best first."""
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/reward"
    user = {"role": "user", "content": f"{NOTES}\n\n{QUESTION}"}
    rows = [{"messages": [user, {"role": "assistant", "content": answer}]} for answer in ANSWERS]
    scores = RewardModel.from_pretrained(folder).score(rows)
    for score, answer in sorted(zip(scores, ANSWERS, strict=True), reverse=True):
        print(f"{score:6.2f}  {answer}")


if __name__ == "__main__":
    main()
