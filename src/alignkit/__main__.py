"""`alignkit`: list the stages, run one, serve the scripted teacher, or trace where something came from."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from alignkit.core.app import run_command
from alignkit.core.errors import UserError
from alignkit.core.process import DONE, guarded, run_process
from alignkit.core.stages import purpose, require_stage, stages

FLOW = (
    *("expand", "select", "lengths", "preflight"),
    *("sft", "sample", "judge", "reward", "rejection_sampling", "dpo", "evaluate", "report", "serve", "chat"),
)
"""The order in which stages are listed; others follow by name."""
COMMANDS = {
    "lineage": "trace where a model, a file or a row (file.jsonl#id) came from",
    "teacher-server": "serve the scripted teacher as an OpenAI-compatible server on this machine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(overview())
        return DONE
    if command == "--version":
        import alignkit

        print(f"alignkit {alignkit.__version__}")
        return DONE
    if command == "lineage":
        return guarded(command, lambda: _lineage(rest))
    if command == "teacher-server":
        return guarded(command, lambda: _teacher_server(rest))
    if command in ("-sc", "--shell-completion"):
        return _complete(rest)
    if command in stages():
        return run_command(command, rest)
    return guarded(command, lambda: _unknown(command))


def overview() -> str:
    """What `alignkit` alone prints: every command with one line about it."""
    names = sorted(stages(), key=lambda stage: (FLOW.index(stage) if stage in FLOW else len(FLOW), stage))
    lines = [(name, purpose(name)) for name in names] + list(COMMANDS.items())
    width = max(len(name) for name, _ in lines)
    return "\n".join(
        [
            "usage: alignkit <stage> [key=value ...]    alignkit <stage> --help says what it reads, writes and accepts",
            "",
            *(f"  {name:{width}}  {about.rstrip('.')}" for name, about in lines),
            "",
            'Completion in the shell: eval "$(alignkit -sc install=bash)"',
        ]
    )


def _lineage(arguments: Sequence[str]) -> int:
    from alignkit.core.lineage import lineage

    usage = "usage: alignkit lineage PATH, where PATH is a run folder, something in it, or file.jsonl#row-id"
    if arguments and arguments[0] in ("--help", "-h"):
        print(usage)
        return DONE
    if len(arguments) != 1:
        raise UserError(usage)
    print("\n".join(lineage(arguments[0])))
    return DONE


def _teacher_server(arguments: Sequence[str]) -> int:
    import alignkit.teacher.server

    return alignkit.teacher.server.main(list(arguments)) or DONE


def _complete(arguments: Sequence[str]) -> int:
    """Serve `eval "$(alignkit -sc install=bash)"`: complete the command's name here, and its settings by Hydra."""
    typed = os.environ.get("COMP_LINE", "").split(" ")
    if not any(argument.startswith("query=") for argument in arguments):
        return run_command(stages()[0], ["-sc", *arguments])
    if len(typed) < 3:
        print(*stages(), *COMMANDS)
        return DONE
    os.environ["COMP_LINE"] = " ".join([typed[0], *typed[2:]])  # Hydra expects the settings right after the program
    with contextlib.redirect_stderr(io.StringIO()):  # half a command is no reason to complain
        run_command(typed[1], ["-sc", *arguments])
    return DONE


def _unknown(command: str) -> int:
    require_stage(command, also=list(COMMANDS))
    return DONE


def program() -> NoReturn:
    """The program `alignkit`."""
    run_process(main)


if __name__ == "__main__":
    program()
