"""Settings that every test shares; they must stand before torch or the Hugging Face libraries are imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from alignkit.teacher.server import TeacherServer

# One thread each: the runs are parallel already, and torch on more threads than idle cores is many times slower.
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[threads] = "1"

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

# A developer's own account must be out of reach of a test that forgets to name its server.
for account in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HF_TOKEN"):
    os.environ.pop(account, None)


def pytest_configure() -> None:
    """Collect no garbage while modules are imported, nothing of which is any."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what has been imported out of every later collection; each training asks for a full one."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """A folder in which `pipeline=smoke run=demo` has run, once for all the processes that share the tests."""
    from filelock import FileLock
    from smoke import pipeline

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"smoke-{testrun_uid}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "console.txt").exists():
            folder.mkdir(exist_ok=True)
            done = pipeline(folder)
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "console.txt").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    """The scripted teacher, served on loopback."""
    from served import serving

    from alignkit.teacher.scripted import ScriptedTeacher

    with serving(ScriptedTeacher()) as served:
        yield served
