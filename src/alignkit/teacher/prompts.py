"""Prompts: one Jinja template each in dataset_optimization/prompts, rendered in a sandbox with documents as variables.

What is rendered into a prompt was written by others: it enters as a value, never as template text, and the sandbox
keeps a template from reaching anything but the values it is given.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, Template, TemplateError, TemplateNotFound
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignkit.core.errors import UserError


def render(name: str, **variables: Any) -> str:
    """The text of prompt `name`.

    The filter `json` writes a value as one line of JSON with its letters as they are: that is how foreign text is set
    apart from the prompt's own, since no line break or quotation mark in it survives unescaped.
    Raises `UserError` when the template is missing or broken, or uses a variable that it is not given.
    """
    try:
        return _template(name).render(**variables)
    except TemplateNotFound as error:
        known = ", ".join(sorted(path.stem for path in prompts_dir().glob("*.jinja")))
        raise UserError(f"prompt '{name}' is not in {prompts_dir()}. There are: {known}") from error
    except TemplateError as error:
        raise UserError(
            f"{prompts_dir() / name}.jinja: {error}. The comment at its head lists the variables it is given."
        ) from error


def prompts_dir() -> Path:
    """The folder of the templates: inside an installed package, else beside `src` in a clone."""
    package = Path(__file__).resolve().parent.parent
    for home in (package, package.parent.parent):
        if (folder := home / "dataset_optimization" / "prompts").is_dir():
            return folder
    raise UserError(f"dataset_optimization/prompts is neither in {package} nor in {package.parent.parent}; reinstall")


@cache
def _template(name: str) -> Template:
    return _environment().get_template(f"{name}.jinja")


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(prompts_dir()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # prompts are plain text, not HTML
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment
