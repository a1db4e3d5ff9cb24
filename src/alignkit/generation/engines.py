"""The engines that write a policy's completions, and the one function that opens one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional, Protocol

from alignkit.core.config import ModelConfig, TeacherConfig, TeacherMode
from alignkit.generation.base import Generator


class GeneratorKind(Enum):
    """Who answers: transformers in this process, an OpenAI-compatible server, or vLLM in this process."""

    hf = "hf"
    openai = "openai"
    vllm = "vllm"


@dataclass
class ServerConfig:
    """An OpenAI-compatible server of the policy. The key and the checks of its address are as the teacher's."""

    base_url: str = "http://127.0.0.1:8000/v1"
    model: Optional[str] = None  # noqa: UP045
    """Name under which the server has the policy (vLLM: the name of its LoRA module)."""
    previous_model: Optional[str] = None  # noqa: UP045
    """Name under which it has the previous version, in place of previous_adapter."""
    api_key_env: str = ""
    """NAME of the environment variable that holds the key; empty when the server needs none."""
    concurrency: int = 64
    timeout_seconds: float = 300.0
    allow_http: bool = False
    """Send the key over plain http to another machine."""

    def as_teacher(self, model: str | None, teacher: TeacherConfig) -> TeacherConfig:
        """For the client of teachers: this server under the name `model`, with the response store of `teacher`."""
        return TeacherConfig(
            mode=TeacherMode.openai,
            model=str(model),
            base_url=self.base_url,
            api_key_env=self.api_key_env,
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            allow_http=self.allow_http,
            store=teacher.store,
            retry_failed=teacher.retry_failed,
        )


class Engine(Generator, Protocol):
    """A generator that another one may share its base with. `tokens_written` counts what it wrote in this process."""

    tokens_written: int

    @property
    def shared(self) -> Any:
        """What another adapter of the same base can join, so that the base is in memory once; None: nothing."""
        ...


def open_engine(
    kind: GeneratorKind, model: ModelConfig, adapter: str | None, server: TeacherConfig, shared: Any = None
) -> Engine:
    """The engine of this kind for an adapter of a model; `shared` is that of an engine of the same kind and model.

    A server answers as the model that `server` names; `model` and `adapter` are then not read.
    """
    if kind is GeneratorKind.openai:
        from alignkit.generation.openai import OpenAIGenerator
        from alignkit.teacher.client import open_teacher

        return OpenAIGenerator(open_teacher(server), server.model)
    if kind is GeneratorKind.vllm:
        from alignkit.generation.vllm import VLLMGenerator

        return VLLMGenerator(model, adapter, shared)
    from alignkit.generation.hf import load_generator

    return load_generator(model, adapter, shared)
