"""Reading the JSON that prompts hold."""

from __future__ import annotations

import json
from typing import Any


def read_json(line: str) -> dict[str, Any]:
    """The object on a line of a prompt; empty when there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
