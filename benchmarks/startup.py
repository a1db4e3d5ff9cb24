"""What a command costs before it does anything, against `trl sft --help`: `python benchmarks/startup.py`.

CPU seconds of the child process, the lowest of `REPEATS` runs each, all measured in this one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPEATS = 3
PYTHON = sys.executable
COMMANDS = {
    "python -c pass": [PYTHON, "-c", "pass"],
    "import alignkit": [PYTHON, "-c", "import alignkit"],
    "from alignkit import RewardModel": [PYTHON, "-c", "from alignkit import RewardModel"],
    "python -m alignkit.sft --help": [PYTHON, "-m", "alignkit.sft", "--help"],
    "python -m alignkit.sft --cfg job": [PYTHON, "-m", "alignkit.sft", "--cfg", "job"],
    "trl sft --help": [str(Path(PYTHON).parent / "trl"), "sft", "--help"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of a command."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print the table."""
    found = {name: min(cpu_seconds(command) for _ in range(REPEATS)) for name, command in COMMANDS.items()}
    reference = found["trl sft --help"]
    print(f"{'command':36s} {'CPU s':>7s} {'trl sft --help is':>20s}")
    for name, seconds in found.items():
        print(f"{name:36s} {seconds:7.2f} {reference / max(seconds, 0.01):18.1f} x")


if __name__ == "__main__":
    main()
