"""What a server turned out to understand, of the ways in which a request can be written.

Servers that call themselves compatible differ: in how they are held to a JSON schema, in the name of the longest
answer's length, in whether a temperature may be given. None of it can be asked for, so the best is tried first and what
was learnt is remembered by server and model, in the response store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from alignkit.core.config import Structured, TeacherApi, TeacherConfig
from alignkit.teacher.failures import REFUSED, Failure

LADDER = (Structured.json_schema, Structured.json_object, Structured.text)
"""From the strictest way to hold a server to JSON down to the words of the prompt alone."""
FEWEST_IGNORED = 3
"""So many replies that do not conform, and more than those that do, show that a server ignores what it accepts."""
_NO_TOOLS = (400, 404, 422, 500, 501)
"""How servers refuse tools; llama.cpp without `--jinja` says 500, gateways that find no model with tools 404."""
_ABOUT_FORMAT = ("response_format", "json_schema", "json_object", "schema", "grammar")


@dataclass
class Dialect:
    """How requests to one model of one server are written."""

    structured: Structured = Structured.json_schema
    max_tokens: str = "max_tokens"
    """The parameter's name; newer models of OpenAI refuse it and want `max_completion_tokens`."""
    temperature: bool = True
    """Whether it may be given; reasoning models have one of their own."""
    tools: bool = True
    """Whether functions may be given as a parameter; else they are written into the prompt."""
    tools_taken: bool = False
    """Whether a request with that parameter has been answered: later trouble with a call is no refusal."""
    fixed: bool = False
    """Whether `structured` stands in the configuration, and is not to be changed."""
    conforming: int = 0
    """Replies on this rung of the ladder that are JSON as asked for."""
    ignored: int = 0
    """Replies that are not."""

    def dump(self) -> str:
        """As JSON, to be remembered."""
        kept = ("max_tokens", "temperature", "tools", "tools_taken")
        return json.dumps({"structured": self.structured.value} | {name: getattr(self, name) for name in kept})

    def correct(self, body: Mapping[str, Any], failure: Failure) -> str | None:
        """Learn from the refusal of a parameter: what has changed, or None.

        A body that was under way while another taught the same is only to be written anew.
        """
        said = f"{failure.parameter} {failure.detail}"
        if "tools" in body and not self.tools_taken and failure.status in _NO_TOOLS and _refuses_tools(said):
            self.tools = False
            return "takes no tools, so they are written into the prompt"
        if failure.status not in (400, 422):
            return None
        if "max_tokens" in body and "max_completion_tokens" in said:
            self.max_tokens = "max_completion_tokens"
            return "takes max_completion_tokens in the place of max_tokens"
        if "temperature" in body and "temperature" in said and "support" in said:
            self.temperature = False
            return "takes no temperature, so it answers at its own"
        return None

    def next_rung(self, rung: Structured | None, failure: Failure) -> Structured | None:
        """The rung on which to repeat a request that was refused on `rung`; None when that was not the reason.

        A server on whose rung nothing has succeeded yet may refuse it in any words; later it has to name the format.
        """
        if rung in (None, Structured.text) or self.fixed or failure.status not in (400, 422, 501):
            return None
        if failure.reason != REFUSED and failure.status != 501:
            return None
        assert rung is not None
        named = any(word in f"{failure.parameter} {failure.detail}" for word in _ABOUT_FORMAT)
        return LADDER[LADDER.index(rung) + 1] if named or not self.conforming else None

    def observe_tools(self, body: Mapping[str, Any]) -> str | None:
        """Note a reply to a request with tools: what has been learnt from it, if anything."""
        if "tools" not in body or self.tools_taken:
            return None
        self.tools_taken = True
        return "takes tools"

    def observe(self, rung: Structured | None, conforms: bool) -> str | None:
        """Count a reply that came on `rung`: what has been learnt from it, if anything.

        A reply on a lower rung shows that the higher one was refused; many that do not conform, that it is ignored.
        """
        if rung is None or self.fixed:
            return None
        if LADDER.index(rung) > LADDER.index(self.structured) and not self.conforming:
            self.structured, self.conforming, self.ignored = rung, int(conforms), int(not conforms)
            return f"refuses more than structured={rung.value}"
        if rung is not self.structured or rung is Structured.text:
            return None
        self.conforming += conforms
        self.ignored += not conforms
        if conforms or self.ignored < FEWEST_IGNORED or self.ignored <= self.conforming:
            return None
        self.structured, self.conforming, self.ignored = LADDER[LADDER.index(rung) + 1], 0, 0
        return f"ignores structured={rung.value}; now structured={self.structured.value}"


def first_dialect(config: TeacherConfig, remembered: str | None = None) -> Dialect:
    """The dialect to begin with: what was remembered, but for what the configuration fixes."""
    dialect = Dialect()
    if remembered:
        known = json.loads(remembered)
        dialect = Dialect(**{**known, "structured": Structured(known["structured"])})
    if config.api is TeacherApi.completions:
        dialect.structured, dialect.fixed = Structured.text, True
    elif config.structured is not Structured.auto:
        dialect.structured, dialect.fixed = config.structured, True
    return dialect


def _refuses_tools(said: str) -> bool:
    """Whether tools as such are refused, not a call that the model wrote (Ollama's "error parsing tool call")."""
    return "tool" in said and "pars" not in said


def response_format(shape: type[BaseModel], rung: Structured) -> dict[str, Any] | None:
    """The parameter of this name; None where there is none to be sent."""
    if rung is Structured.text:
        return None
    if rung is Structured.json_object:
        return {"type": "json_object"}
    described = {"name": shape.__name__, "strict": True, "schema": strict_schema(shape)}
    return {"type": "json_schema", "json_schema": described}


def conforms(text: str, shape: type[BaseModel], rung: Structured) -> bool:
    """Whether a reply is what a server gives that heeds the rung: a JSON object, with the fields of the schema."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    wanted = strict_schema(shape).get("required", []) if rung is Structured.json_schema else []
    return isinstance(value, dict) and value.keys() >= set(wanted)


@cache
def strict_schema(shape: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a shape as strict servers want it: closed objects with every field required, no defaults."""
    schema: dict[str, Any] = _strict(shape.model_json_schema())
    return schema


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {name: _strict(value) for name, value in node.items() if name not in ("default", "title")}
    if isinstance(node.get("properties"), dict):
        kept["properties"] = {name: _strict(value) for name, value in node["properties"].items()}
        kept |= {"required": list(kept["properties"]), "additionalProperties": False}
    return kept
