"""What can be examined: adapters and models on this machine, servers, and answers that were written elsewhere.

A system has a name and a source, and what stands at the source says what it is:

    ""                               the base alone
    runs/mine/sft/adapter            an adapter on the base
    runs/mine/export/merged          a whole model: a folder with config.json, or `owner/name` on a hub
    model-q8_0.gguf                  a GGUF file, its weights read back into 16 or 32 bits
    http://127.0.0.1:8000/v1#name    a model behind an OpenAI-compatible server
    answers.jsonl                    answers by row id
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.config import ModelConfig, TeacherConfig, TeacherMode
from alignkit.core.errors import UserError, first_line
from alignkit.core.manifest import is_address, is_hub_name, read_manifest
from alignkit.core.names import check_names
from alignkit.teacher.address import Keys, split_url

if TYPE_CHECKING:
    from alignkit.generation.hf import HFGenerator

ANSWER_FILES = (".jsonl", ".json", ".parquet", ".arrow")


class SystemKind(Enum):
    """What a system is."""

    base = "base"
    adapter = "adapter"
    model = "model"
    gguf = "gguf"
    server = "server"
    answers = "answers"

    @property
    def runs_here(self) -> bool:
        """Whether its weights come into the memory of this machine."""
        return self not in (SystemKind.server, SystemKind.answers)


@dataclass(frozen=True)
class System:
    """Something that answers questions. `source` is a folder, a file, or the address of a server without its `#`."""

    name: str
    kind: SystemKind
    source: str = ""
    served_as: str = ""
    """Of a server: the name that it has the model under."""


@dataclass
class ServersConfig:
    """How servers among the systems are asked."""

    api_key_env: dict[str, str] = field(default_factory=dict)
    """Name of a system -> NAME of the environment variable that holds its server's key; none: it asks for no key."""
    concurrency: int = 32
    """Most requests under way at once."""
    timeout_seconds: float = 300.0
    allow_http: bool = False
    """Send a key over plain http to another machine."""


def identify(models: Mapping[str, str]) -> list[System]:
    """The systems that `models` (name -> source) names. Raises `UserError` for a source that is none."""
    if not models:
        raise UserError("models: name at least one, e.g. 'models={sft: runs/demo/sft/adapter}'")
    check_names("models", models)
    return [_identify(name, source) for name, source in models.items()]


def check_servers(systems: Sequence[System], servers: ServersConfig) -> None:
    """Raise `UserError` for the key of a system that is no server."""
    asked = [system.name for system in systems if system.kind is SystemKind.server]
    for name in servers.api_key_env:
        if name not in asked:
            known = ", ".join(asked) or "none"
            raise UserError(f"servers.api_key_env.{name}: no server among the models has this name (servers: {known})")


def _identify(name: str, source: str) -> System:
    key, path = f"models.{name}", Path(source)
    if not source:
        return System(name, SystemKind.base)
    if is_address(source):
        return _server(name, source)
    if path.is_dir():
        return System(name, _folder_kind(f"{key}={source}", path), source)
    if path.is_file():
        return System(name, _file_kind(f"{key}={source}", path), source)
    if is_hub_name(source):
        return System(name, SystemKind.model, source)
    raise UserError(f"{key}={source}: no such file or folder. Run the stage that writes it, or set {key}.")


def _server(name: str, source: str) -> System:
    parts = split_url(f"models.{name}", source)
    if parts.username or parts.password or parts.query:  # not shown: it may hold a key
        raise UserError(
            f"models.{name}: an address must hold no user, password or query; servers.api_key_env.{name} takes the "
            "NAME of an environment variable with the key"
        )
    address = source.partition("#")[0].rstrip("/")
    if not parts.hostname or not parts.fragment:
        raise UserError(
            f"models.{name}={source}: name the model that the server has, behind a '#': {address}#<model>. "
            f"{address}/models lists them."
        )
    return System(name, SystemKind.server, address, parts.fragment)


def _folder_kind(setting: str, folder: Path) -> SystemKind:
    if (folder / "adapter_config.json").is_file():
        return SystemKind.adapter
    if (folder / "config.json").is_file():
        return SystemKind.model
    inside = [name for name in ("adapter", "merged") if (folder / name).is_dir()]
    inside += sorted(file.name for file in folder.glob("*.gguf"))
    hint = f"Did you mean {', '.join(str(folder / name) for name in inside)}?" if inside else "Correct the path."
    raise UserError(
        f"{setting}: neither an adapter (no adapter_config.json) nor a model (no config.json) is in this folder. {hint}"
    )


def _file_kind(setting: str, file: Path) -> SystemKind:
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic == b"GGUF":
        return SystemKind.gguf
    if file.suffix == ".gguf":
        raise UserError(f"{setting}: not a GGUF file, whatever its name says. Was it downloaded whole?")
    if file.suffix in ANSWER_FILES:
        return SystemKind.answers
    raise UserError(
        f"{setting}: no adapter or model folder, no .gguf, and no file of answers ({', '.join(ANSWER_FILES)})"
    )


def adapter_behind(system: System) -> str | None:
    """The adapter whose training made a system: itself, or what `export` made it from; None where nobody knows."""
    if system.kind is SystemKind.adapter:
        return system.source
    manifest = read_manifest(Path(system.source).parent) if system.kind in (SystemKind.model, SystemKind.gguf) else None
    inputs = manifest["inputs"] if manifest is not None and manifest["stage"] == "export" else []
    return next((str(entry["path"]) for entry in inputs if entry["key"] == "adapter"), None)


# -- opening -----------------------------------------------------------------------------------------------------------


def open_here(system: System, model: ModelConfig, shared: Any = None) -> HFGenerator:
    """A system on this machine, ready to answer. `shared` is what another adapter of the same base left to join.

    Whole models are held as `model` says, with its chat template and tokens. Raises `UserError` for what cannot be
    loaded.
    """
    from alignkit.generation.hf import load_generator

    if system.kind is SystemKind.gguf:
        generator = _open_gguf(system, model)
    elif system.kind is SystemKind.model:
        try:
            generator = load_generator(replace(model, path=system.source, revision=None), None)
        except UserError as error:
            raise UserError(f"models.{system.name}={system.source}: {error}") from error
    else:
        generator = load_generator(model, system.source or None, shared)
    generator.label = system.name
    return generator


def _open_gguf(system: System, model: ModelConfig) -> HFGenerator:
    """A GGUF file by transformers' reader: its own tokenizer and chat template, its weights in `model.dtype`."""
    from importlib.util import find_spec

    from alignkit.evaluation.parity import load_gguf
    from alignkit.generation.hf import HFGenerator
    from alignkit.models.loading import resolve_dtype

    setting = f"models.{system.name}={system.source}"
    if find_spec("gguf") is None:
        raise UserError(f"{setting}: reading it needs the gguf package: pip install 'alignkit[gguf]'")
    try:
        tokenizer, weights = load_gguf(Path(system.source), resolve_dtype(model.dtype))
    except Exception as error:  # of a reader that is not ours, and may not know the architecture
        raise UserError(
            f"{setting}: transformers cannot read it ({first_line(error)}). Serve it with llama.cpp's llama-server and "
            f"name that: models.{system.name}='http://127.0.0.1:8080/v1#<model>'"
        ) from error
    if tokenizer.pad_token is None:  # what stands there is masked
        tokenizer.pad_token = tokenizer.eos_token
    return HFGenerator(weights, tokenizer, system.name)


def server_keys(system: System) -> Keys:
    """What messages about a server among the systems call it and its settings."""
    return Keys(
        who=f"models.{system.name}",
        model=f"models.{system.name}",
        base_url=f"models.{system.name}",
        api_key_env=f"servers.api_key_env.{system.name}",
        allow_http="servers.allow_http",
        concurrency="servers.concurrency",
        timeout_seconds="servers.timeout_seconds",
        ask_again="force=true, which asks for all anew",
    )


def check_servers_reachable(systems: Sequence[System], servers: ServersConfig, stores: Mapping[str, Path]) -> None:
    """Ask every server once whether it is there, before anything else is done. Raises `UserError` where one is not.

    A server that was asked before the run was interrupted, so that its response store exists, is not asked here: it may
    have answered everything, and be gone since.
    """
    from alignkit.teacher.reach import check_reachable

    for system in systems:
        if system.kind is SystemKind.server and not stores[system.name].exists():
            check_reachable(server_config(system, servers, stores[system.name]), server_keys(system))


def server_config(system: System, servers: ServersConfig, store: Path) -> TeacherConfig:
    """For the client of servers: this system's, with a response store of its own."""
    return TeacherConfig(
        mode=TeacherMode.openai,
        model=system.served_as,
        base_url=system.source,
        api_key_env=servers.api_key_env.get(system.name, ""),
        concurrency=servers.concurrency,
        timeout_seconds=servers.timeout_seconds,
        allow_http=servers.allow_http,
        store=str(store),
    )
