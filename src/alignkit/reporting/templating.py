"""How the pages' templates are opened, and how they write numbers."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.evaluation.statistics import Estimate
from alignkit.reporting.plain import one_line, visible

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"

NO_BREAK, MINUS = "\u00a0", "\u2212"


def open_environment() -> Environment:
    """The templates, with every value escaped, an error for an unknown name, and the filters below."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "difference": difference,
        "duration": duration,
        "gibibytes": gibibytes,
        "count": count,
        "shortened": one_line,
        "visible": visible,
        "number": number,
    }
    environment.globals["policy"] = policy
    return environment


def style() -> Markup:
    """The style sheet that every page carries in itself."""
    from markupsafe import Markup

    return Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))


def script() -> Markup:
    """The one script that a page may carry: the browser of the report's samples."""
    from markupsafe import Markup

    return Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8"))


def policy(script: str = "") -> Markup:
    """The content-security policy of a page: it fetches nothing, goes nowhere, and runs `script` or nothing.

    A script is allowed by the hash of its text, and may not make markup of text (Trusted Types). Styles need
    'unsafe-inline', since a hash does not cover the style attributes of bars and figures; with every source of images
    and fonts forbidden no style can ask for anything.
    """
    from markupsafe import Markup

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    rest = "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return Markup(f"default-src 'none'; {scripts}{rest}; require-trusted-types-for 'script'; trusted-types 'none'")


def as_data(value: Any) -> Markup:
    """JSON for a data block of a page: no text in it can end the block."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage: 0.474 is "47.4 %"."""
    return f"{100 * value:.{digits}f}{NO_BREAK}%"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points, with its interval: "+3.4 [+1.2, +5.6]"."""
    mean, low, high = (f"{100 * estimate[key]:+.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", MINUS)


def difference(estimate: Estimate) -> str:
    """A difference of grades with its interval: "+0.42 [+0.22, +0.62]"."""
    mean, low, high = (f"{estimate[key]:+.2f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", MINUS)


def duration(seconds: float) -> str:
    """A time as one reads it: "4.2 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f}{NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NO_BREAK}min {rest}{NO_BREAK}s"
    return f"{minutes // 60}{NO_BREAK}h {minutes % 60}{NO_BREAK}min"


def gibibytes(size: float) -> str:
    """Bytes as GiB: "1.24 GiB"."""
    return f"{size / 2**30:.2f}{NO_BREAK}GiB"


def count(value: int) -> str:
    """A whole number with thousands set apart: "12,400"."""
    return f"{value:,}"


def number(value: float, digits: int = 2) -> str:
    """A number with so many digits behind the point and a true minus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)
