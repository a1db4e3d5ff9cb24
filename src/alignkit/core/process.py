"""The process of a command: plain messages, one message for an error, exit codes, and an end when told to stop."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from alignkit.core.errors import UserError, disk_problem
from alignkit.core.ranks import is_main, rank, world_size

LOG = logging.getLogger("alignkit")

DONE, BUG, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done or up to date; a bug; something the user can mend; interrupted with its state saved."""

PARENT = "ALIGNKIT_PARENT"
"""Environment variable: the process that runs this stage as one of its steps; when it is gone, the step ends, too."""


PATIENCE_SECONDS = 10.0
"""How long a process that fails waits to be stopped by its launcher, because another one has failed before it."""


OBJECTS_BEFORE_COLLECTION = 50_000
"""Python's own 700 would search the million objects of the libraries again and again while they are imported."""


def run_process(work: Callable[[], int]) -> NoReturn:
    """Do all the work of this process and leave it with the exit code.

    Nothing is searched for garbage on the way out, which takes seconds after large imports: the system takes it all.
    """
    gc.set_threshold(OBJECTS_BEFORE_COLLECTION)
    code = work()
    gc.freeze()
    sys.exit(code)


def guarded(name: str, work: Callable[[], int]) -> int:
    """Do a command's work with plain messages; an error becomes one message and an exit code."""
    who = "" if is_main() else f"process {rank()} of {world_size()}: "
    try:
        with _command_process(), _first_error_speaks():
            return work()
    except KeyboardInterrupt as error:
        if is_main():
            said = str(error) or "what is finished is saved, the same command continues"
            print(f"interrupted: {said}", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        print(f"error: {who}{error}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        problem = disk_problem(error)
        if problem is None:
            return report_bug(who + name)
        todo = "Make room or mend the permissions, or choose another output_dir."
        print(f"error: {who}{problem}. {todo}", file=sys.stderr)
        return USER_ERROR


def report_bug(name: str) -> int:
    """Print the traceback of the error being handled, and say that it is a bug."""
    traceback.print_exc()
    print(f"error: {name} stopped by a bug; please report the traceback above", file=sys.stderr)
    return BUG


@contextmanager
def _first_error_speaks() -> Iterator[None]:
    """Of several processes, let the one that failed first tell why: the launcher stops the others meanwhile.

    All processes find a mistake in the configuration or the data, which the main process tells at once. When one fails
    alone, the others lose their connection to it, and what they would say about that explains nothing.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1 and not (is_main() and isinstance(error, UserError)):
            time.sleep(PATIENCE_SECONDS)
        raise


class _Console(logging.Handler):
    """Log messages as plain lines on whatever standard output is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


@contextmanager
def _command_process() -> Iterator[None]:
    """Plain messages on standard output; SIGTERM ends like Ctrl-C; libraries quiet, their telemetry off."""
    environment: Mapping[str, str] = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "BITSANDBYTES_NOWELCOME": "1",
        "TORCHDYNAMO_DISABLE": "1",  # nothing here is compiled, and loading the compiler costs a second
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    if world_size() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # which addresses were tried, and the like
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses a kernel that is optional
    if not any(isinstance(handler, _Console) for handler in LOG.handlers):
        LOG.addHandler(_Console())
        LOG.setLevel(logging.INFO)
        LOG.propagate = False

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        if PARENT in os.environ and os.name == "posix":
            if os.environ[PARENT] != str(os.getppid()):
                raise KeyboardInterrupt  # it was killed before this process had begun
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        with contextlib.nullcontext() if is_main() else _only_errors():
            yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Nothing on standard output, and no warnings: the main process says the same."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _end_with_parent(parent: int) -> None:
    """End as by Ctrl-C when the parent has been killed: its successor would find this one still at work."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
