"""Errors whose cause is the user's to mend."""

from __future__ import annotations

import errno
import os
import re

_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # not allowed
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR),  # something else is in the way
)
_SQLITE = ("disk I/O error", "database or disk is full", "attempt to write a readonly", "unable to open database file")


class UserError(Exception):
    """Bad input or configuration: one clear message that says where (`file:line` or config key) and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """What a foreign error says, on one line; its type when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def disk_problem(error: Exception) -> str | None:
    """What an error says about the disk (full, read-only, in the way), or None when it is about something else.

    Libraries written in Rust and C++ do not raise `OSError`: safetensors and tokenizers put the system's error number
    into their text, SQLite has texts of its own, and `torch.save` on a full disk only says that its position is off.
    """
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"\(os error (\d+)\)", text)):
        number = int(match[1])
    if number in _UNWRITABLE:
        assert number is not None
        file = error.filename if isinstance(error, OSError) else None
        return f"{file}: {os.strerror(number)}" if file else os.strerror(number)
    if type(error).__module__ == "sqlite3" and text.startswith(_SQLITE):
        return f"{text} (SQLite)"
    if isinstance(error, RuntimeError) and "inline_container.cc" in text:
        return "a checkpoint could not be written"
    return None
