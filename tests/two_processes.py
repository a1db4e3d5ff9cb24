"""Two real processes on this machine, started by torchrun, that run the kit's commands one after the other.

As a program (in each process): `two_processes.py FOLDER COMMANDS`, where COMMANDS is a JSON list of [stage, override,
...]. It writes ended-<rank>.json: the exit codes, and the files in FOLDER/runs that the process has opened to write.
A command that starts with "fail:<rank>:<step>" fails in that process at the end of that step; with
"signal:<rank>:<step>" that process alone gets a SIGTERM before it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Ended:
    """How both processes ended, by rank: exit codes of the commands, files written, and what was printed."""

    code: int
    said: str
    codes: list[list[int]]
    written: list[set[str]]
    out: list[str]
    err: list[str]


def torchrun(folder: Path, *program: str) -> subprocess.Popen[str]:
    """Start two processes in `folder`; what they print goes to log/, what torchrun says to a pipe."""
    shutil.rmtree(folder / "log", ignore_errors=True)
    options = ["--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, "--log-dir=log", "--redirects=3", *program],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], folder: Path, timeout: float = 180) -> Ended:
    """Wait for both processes."""
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    ended = [folder / f"ended-{rank}.json" for rank in range(2)]
    reports: list[Any] = [json.loads(path.read_text()) if path.exists() else ([], []) for path in ended]
    out, err = ([_printed(folder, rank, name) for rank in range(2)] for name in ("stdout", "stderr"))
    codes, written = [report[0] for report in reports], [set(report[1]) for report in reports]
    return Ended(process.returncode, said, codes, written, out, err)


def _printed(folder: Path, rank: int, name: str) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob(f"log/*/attempt_0/{rank}/{name}.log")))


def run_in_two(folder: Path, *commands: Sequence[str]) -> Ended:
    """Run commands in two processes to their end."""
    return finish(torchrun(folder, __file__, str(folder), json.dumps(commands)), folder)


def main(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run the commands in this process."""
    import torch.distributed

    from alignkit.core.app import run_command

    codes: list[int] = []
    written: set[str] = set()
    runs = str(folder / "runs")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and os.path.abspath(arguments[0]).startswith(runs):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                written.add(os.path.relpath(arguments[0], runs))
        elif event in ("os.rename", "os.remove", "os.mkdir") and os.path.abspath(str(arguments[0])).startswith(runs):
            written.add(f"{event} {os.path.relpath(str(arguments[0]), runs)}")

    sys.addaudithook(watch)
    for stage, *overrides in commands:
        if overrides and overrides[0].startswith(("fail:", "signal:")):
            what, rank, step = overrides.pop(0).split(":")
            _disturb(what, int(rank), int(step))
        codes.append(run_command(stage, overrides))
        if torch.distributed.is_initialized() and codes[-1] == 0:
            torch.distributed.barrier()  # the next command reads what the main process still writes
        report = folder / f"ended-{os.environ['RANK']}.json"
        report.write_text(json.dumps([codes, sorted(written)]), encoding="utf-8")
    sys.exit(codes[-1])


def _disturb(what: str, rank: int, at: int) -> None:
    """Let the training of one process fail at the end of a step, or be told to stop."""
    from alignkit.core.errors import UserError
    from alignkit.training.callbacks import StepReport

    original = StepReport.on_step_end

    def on_step_end(self: StepReport, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if args.process_index == rank and state.global_step == at:
            if what == "fail":
                raise UserError("this process had enough")
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **keywords)

    StepReport.on_step_end = on_step_end  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
