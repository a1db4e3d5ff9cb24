"""The scripted teacher served on loopback, for as long as a block lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from alignkit.teacher.scripted import ScriptedTeacher
from alignkit.teacher.server import TeacherServer


@contextmanager
def serving(teacher: ScriptedTeacher) -> Iterator[TeacherServer]:
    with TeacherServer(teacher) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
