"""Processes that begin with the heavy libraries imported: a server imports them once, and each process is its fork.

torch, transformers and peft take seconds to import, which a pipeline of twenty short steps would spend twenty times. A
fork must not happen once an accelerator's driver is in use, and importing these libraries may look for one, so this is
for Linux machines without any; there and elsewhere a step that needs a minute does not miss the seconds.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob
from io import TextIOWrapper
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from types import ModuleType

from alignkit.core.process import PARENT

PRELOADED = (
    "torch",
    "transformers",
    "transformers.trainer",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
    "datasets",
)
ACCELERATORS = ("/dev/nvidia*", "/dev/kfd", "/dev/dxg", "/dev/accel*")
"""Device files of NVIDIA, AMD, Windows' subsystem for Linux, and others."""


def can_fork() -> bool:
    """Whether this is a Linux machine without an accelerator."""
    return sys.platform == "linux" and not any(glob(pattern) for pattern in ACCELERATORS)


class ForkedProcess:
    """A module run as `python -m module arguments` would run it, in a fork of the server; used like a `Popen`.

    The server starts with the first of them and ends with this process. It keeps the environment of its start, so all
    that is read when the libraries are imported (OMP_NUM_THREADS) has to be the same for all.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        set_forkserver_preload(list(PRELOADED))
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(module, list(arguments), dict(environment), str(output))
        )
        with _begins_with(environment, output):
            self._process.start()

    def poll(self) -> int | None:
        """Its exit code; None while it runs, negative when a signal has ended it."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def wait(self) -> None:
        """Return when it has ended."""
        self._process.join()


@contextmanager
def _begins_with(environment: Mapping[str, str], output: Path) -> Iterator[None]:
    """What a process that is started now begins with: this environment, and `output` for what libraries say."""
    saved, console, main = dict(os.environ), os.dup(2), sys.modules["__main__"]
    os.environ.update(environment)
    sys.modules["__main__"] = ModuleType("__main__")  # else the process would run this one's script again
    with output.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        os.dup2(console, 2)
        os.close(console)
        os.environ.clear()
        os.environ.update(saved)


def _run(module: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """In the fork: become that command."""
    gc.freeze()  # what is imported stays: no collection need go through it, nor copy its pages by doing so
    os.environ.update(environment)
    os.environ.pop(PARENT, None)  # that of the process that started the server
    threading.Thread(target=_end_with_parent, daemon=True).start()
    written, nothing = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, written), (2, written)):
        os.dup2(source, target)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """End as when told to once the process that started this one is gone: its successor would find it at work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
