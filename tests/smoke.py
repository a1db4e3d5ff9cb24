"""One small run of the whole pipeline, by the command a user types, shared by the tests that look at its results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, in `folder`."""
    return subprocess.run(arguments, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=570)


def pipeline(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`python -m alignkit.pipeline pipeline=smoke run=demo`, in `folder`."""
    return command(
        [sys.executable, "-m", "alignkit.pipeline", "pipeline=smoke", "run=demo", "workers=1", *overrides], folder
    )
