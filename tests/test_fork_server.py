"""Forked steps behave as commands of their own, and end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from alignkit.core.fork_server import ForkedProcess, can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")

STEP = """
import os, sys, time
print(__name__, sys.argv[1:], os.environ["OMP_NUM_THREADS"], "torch" in sys.modules)
print("said", file=sys.stderr)
if sys.argv[1] == "sleep":
    open("pid", "w").write(str(os.getpid()))
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""

PARENT = """
import time
from pathlib import Path
from alignkit.core import fork_server
fork_server.PRELOADED = ()  # the ending is the same without seconds of imports
fork_server.ForkedProcess("waiting_step", [], {"OMP_NUM_THREADS": "1"}, Path("log"))
time.sleep(60)
"""


def finished(process: ForkedProcess) -> int:
    process.wait()
    code = process.poll()
    assert code is not None
    return code


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_forked_step.py").write_text(STEP, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "a_forked_step"


def test_it_runs_as_the_command_would_with_the_libraries_imported(module: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("from before\n", encoding="utf-8")
    before = dict(os.environ)
    assert finished(ForkedProcess(module, ["3", "k=v"], {"OMP_NUM_THREADS": "1"}, log)) == 3
    assert log.read_text(encoding="utf-8") == "__main__ ['3', 'k=v'] 1 True\nsaid\n"
    assert dict(os.environ) == before


def test_it_can_be_stopped(module: str, tmp_path: Path) -> None:
    process = ForkedProcess(module, ["sleep"], {"OMP_NUM_THREADS": "1"}, tmp_path / "log")
    while not (tmp_path / "pid").exists():
        time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    assert finished(process) == -signal.SIGTERM


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    waiting = (
        "import os, time; from alignkit.core.process import guarded; open('pid', 'w').write(str(os.getpid()))\n"
        "raise SystemExit(guarded('step', lambda: time.sleep(60)))\n"
    )
    (tmp_path / "waiting_step.py").write_text(waiting, encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="utf-8"):
        time.sleep(0.1)
    step = psutil.Process(int((tmp_path / "pid").read_text(encoding="utf-8")))
    time.sleep(2)  # until it watches its parent
    process.kill()
    process.wait()
    step.wait(timeout=10)  # raises when it is still there
    assert not psutil.pid_exists(step.pid)
