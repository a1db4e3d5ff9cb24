"""Random adapters and a random reward model on one small base, and a server of them in a thread of this process."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from tiny_random import save_random_base, tokenizer

from alignkit.core.config import LoraConfig, ModelConfig
from alignkit.generation.continuous import Engine
from alignkit.generation.server import Api, Guard, Limits, Server, open_socket
from alignkit.models.loading import load_base, new_adapter, save_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.shared_base import SharedBase
from alignkit.models.value_head import ValueHeadModel

ADAPTERS = ("sft", "sft_best", "dpo")


@dataclass(frozen=True)
class Models:
    """Where the base, its adapters and the reward model are."""

    model: ModelConfig
    models: dict[str, str]
    reward: Path


def save_models(folder: Path) -> Models:
    """Adapters far enough from the base and from each other that every answer tells which one wrote it."""
    model = save_random_base(folder / "base")
    models = {"base": ""}
    for seed, name in enumerate(ADAPTERS, 1):
        policy = _random_adapter(model, seed)
        save_adapter(policy, folder / name / "adapter", model)
        models[name] = str(folder / name / "adapter")
    reward = RewardModel(ValueHeadModel(_random_adapter(model, 9)), tokenizer(), model)
    reward.save_pretrained(folder / "reward")
    return Models(model, models, folder / "reward")


def _random_adapter(model: ModelConfig, seed: int) -> Any:
    torch.manual_seed(seed)
    policy = new_adapter(load_base(model), LoraConfig(rank=4, dropout=0.0), ["all-linear"])
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy


@dataclass
class Served:
    """A running server."""

    url: str
    server: Server
    thread: threading.Thread

    @property
    def api(self) -> Api:
        return self.server.api

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def fetch(
        self, path: str, body: bytes | dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of a reply; what has a body is posted, as JSON unless `headers` say otherwise."""
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        given = {"content-type": "application/json"} | (headers or {})
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, content, given), timeout=60) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def serving(
    base: SharedBase,
    reward: RewardModel | None = None,
    *,
    key: str | None = None,
    max_answers: int = 32,
    max_waiting: int = 256,
    limits: Limits = Limits(max_tokens=200, max_body_bytes=100_000, grace_seconds=120.0),  # noqa: B008
) -> Iterator[Served]:
    with open_socket("127.0.0.1", 0) as listener, Engine(base, max_answers, max_waiting) as engine:
        api = Api(base, engine, limits, None if reward is None else ("reward", reward))
        server = Server(Guard(api, key))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)
            thread.join(timeout=60)
        assert not thread.is_alive()
