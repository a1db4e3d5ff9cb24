"""serve: an OpenAI-compatible server with every adapter of a run as a model, on one base in memory.

POST /v1/chat/completions answers, also as a stream; GET /v1/models lists the adapters under the names of their steps,
and the base; POST /v1/rewards scores conversations with the run's reward model, one more adapter on the same base; GET
/health. Requests for one adapter are batched together as they come. The server is for this machine unless `host` says
otherwise, which takes a key. SIGTERM or Ctrl-C: running requests end within grace_seconds, new ones get 503.

Reads:   the run's adapters, or `models`; the run's reward model, or `reward`
Writes:  manifest.json             metrics: requests and tokens by model. Nothing of what was said is written
         log.txt                   a line a request: model, tokens, time

Overrides people use:
  'models={mine: runs/mine/dpo/adapter}'   these adapters and the base (models.base=null: without the base)
  reward=runs/mine/reward          the reward model; none: without one
  port=8080                        another port; 0: any free one
  api_key_env=ALIGNKIT_SERVE_KEY   ask for the key in this environment variable
  host=0.0.0.0 allow_http=true     other machines, too, in the clear: behind a proxy with TLS, and with a key
  max_answers=64 max_tokens=2048   answers that are written at once, and the longest one

Examples:
  python -m alignkit.serve run=demo
  python -m alignkit.serve +model=qwen7b run=mine port=8080 api_key_env=ALIGNKIT_SERVE_KEY
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig, ModelConfig, SamplingConfig, StageConfig
from alignkit.core.errors import UserError

# ruff: noqa: UP045

if TYPE_CHECKING:
    from alignkit.generation.server import Api

LOG = logging.getLogger("alignkit")


@dataclass
class ServeConfig(StageConfig):
    """Configuration of `serve`."""

    inputs: ClassVar[tuple[str, ...]] = ("models", "reward", "model.path")

    models: dict[str, Optional[str]] = field(default_factory=dict)
    """Name -> adapter folder; "" is the base without an adapter, null leaves one out. None but the base: the run's."""
    reward: Optional[str] = None
    """Run folder of the reward model. None given: the run's, if it has one; `none`: no reward model."""
    host: str = "127.0.0.1"
    """Address to listen at; another machine's requests come only to one that is not the loopback's."""
    port: int = 8000
    api_key_env: str = ""
    """NAME of the environment variable that holds the key that clients must send; empty: none is asked for."""
    allow_http: bool = False
    """Let keys and texts cross the network in the clear, where `host` is not the loopback."""
    max_answers: int = 32
    """Answers that are written at once, over all models; what comes then waits."""
    max_waiting: int = 256
    """Requests that may wait; what comes then is told to try again (503)."""
    max_tokens: int = 1024
    """Most tokens of an answer. A request that asks for more is refused; one that does not say gets what fits."""
    max_body_bytes: int = 1048576
    """Largest request."""
    grace_seconds: float = 30.0
    """How long running requests have to end once the server is told to."""
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


def run(config: ServeConfig) -> Artifact:
    """Load the base and its adapters, listen, answer until told to stop."""
    from alignkit.models.shared_base import SharedBase, choose_models, choose_reward_model
    from alignkit.teacher.address import read_key

    check_config(config)
    key = read_key(config.api_key_env, "api_key_env") if config.api_key_env else None
    folder = Path(config.output_dir).parent
    models, reward_folder = choose_models(config.models, folder), choose_reward_model(config.reward, folder)
    config = replace(config, models=dict(models), reward=reward_folder)
    with Artifact.open("serve", config, always=True) as artifact:
        from alignkit.generation.continuous import Engine
        from alignkit.generation.server import Api, Guard, Limits, Server, open_socket
        from alignkit.models.headroom import require_memory
        from alignkit.models.jobs import SAMPLING, Job

        with open_socket(config.host, config.port) as listener:
            sampling = SamplingConfig(n=1, batch_size=config.max_answers, max_new_tokens=config.max_tokens)
            loaded = len(models) + bool(reward_folder)
            job = Job(
                SAMPLING,
                config.model,
                config.model.max_length,
                sampling=sampling,
                adapters_loaded=loaded,
                at_once_key="max_answers",
                command="serve",
            )
            require_memory(job, config.hardware, artifact)
            base = SharedBase(config.model, models)
            reward = (Path(reward_folder).name, base.add_reward_model(reward_folder)) if reward_folder else None
            limits = Limits(config.max_tokens, config.max_body_bytes, config.grace_seconds)
            with Engine(base, config.max_answers, config.max_waiting) as engine:
                api = Api(base, engine, limits, reward)
                say_where(config, listener.getsockname()[1], api)
                Server(Guard(api, key)).run(sockets=[listener])
        artifact.metrics |= {"models": {name: dict(counts) for name, counts in api.served.items()}}
        artifact.metrics["refused"] = {str(status): count for status, count in sorted(api.refused.items())}
        requests = sum(counts["requests"] for counts in api.served.values())
        artifact.summary = f"{requests} requests answered, {api.refused.total()} refused"
    return artifact


def check_config(config: ServeConfig) -> None:
    """Raise `UserError` for settings that make no sense, or would serve the models to whoever asks."""
    from alignkit.teacher.address import is_loopback

    for name in ("max_answers", "max_waiting", "max_tokens", "max_body_bytes"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)}: must be at least 1")
    if config.grace_seconds < 0:
        raise UserError(f"grace_seconds={config.grace_seconds:g}: must be 0 or more")
    if not is_loopback(config.host) and not config.api_key_env:
        raise UserError(
            f"host={config.host}: other machines could use the models. Ask for a key: api_key_env=<NAME of the "
            "environment variable that holds it>"
        )
    if not is_loopback(config.host) and not config.allow_http:
        raise UserError(
            f"host={config.host}: keys and texts would cross the network in the clear. Put a proxy with TLS before "
            "127.0.0.1, or allow it with allow_http=true"
        )


def say_where(config: ServeConfig, port: int, api: Api) -> None:
    """Log the address and what is served there."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    asks = f"key in {config.api_key_env}" if config.api_key_env else "no key"
    scores = f"; rewards by {api.reward[0]}" if api.reward else ""
    LOG.info("listening at http://%s:%d/v1 (%s): %s%s", host, port, asks, ", ".join(api.base.names), scores)


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("serve")
