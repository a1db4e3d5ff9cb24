"""The command line of every stage: compose, validate, run, exit code. With `_target_`s in conf the only Hydra code.

`python -m alignkit.sft +model=qwen7b train.epochs=2` and `alignkit sft ...` both end in `run_command("sft", ...)`. The
stage is imported by name, so that its config class has one identity although the file also runs as `__main__`. Nothing
here, and nothing before a stage's `run`, imports torch: help, completion and every config error stay fast.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from alignkit.core.artifact import Artifact, recorded_command
from alignkit.core.config import RowsConfig, StageConfig
from alignkit.core.errors import UserError
from alignkit.core.help import help_text, stage_keys
from alignkit.core.process import DONE, guarded, run_process
from alignkit.core.ranks import world_size
from alignkit.core.stages import (
    conf_dir,
    config_class,
    default_groups,
    group_options,
    nearest,
    recipe_file,
    require_stage,
    stage_module,
    stages,
)

__all__ = ["conf_dir", "load_config", "run_command", "run_stage", "stage_main", "stages"]

LOG = logging.getLogger("alignkit")

_FLAGS_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--shell-completion", "-sc")
_HYDRA_FLAGS = (*_FLAGS_WITH_VALUE, "--resolve", "--hydra-help", "-m", "--multirun")
_WITHOUT_HYDRAS_OWN = tuple(
    f"~hydra/{group}"
    for group in ("output", "launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging")
)
"""What says how Hydra runs a program: half the files of a composition, none of which is in its result."""
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{8,}|hf_(?=[A-Za-z]*\d)[A-Za-z0-9]{8,})|://[^/@]*:[^/@]*@"
)
_SECRET_KEY = re.compile(r"(^|[._])(api_key|token|secret|password)$")
_TOKENIZER_KEY = re.compile(r"(^|\.)(eos|pad)_token$")


# -- what users and tests call ----------------------------------------------------------------------------------------


def stage_main(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Run a stage from the command line and leave the process with its exit code."""
    run_process(lambda: run_command(stage, list(sys.argv[1:] if arguments is None else arguments)))


def run_command(stage: str, arguments: list[str]) -> int:
    """Run a stage with command-line arguments and return its exit code; every error becomes one message."""
    return guarded(stage, lambda: _run_command(stage, arguments))


def load_config(stage: str, overrides: Sequence[str] = ()) -> Any:
    """Compose a stage's configuration from conf/ and `overrides`, and return its dataclass.

    Raises `UserError` that names the key for anything unknown, missing or of the wrong type.
    """
    return to_dataclass(stage, compose(stage, bracket_lists(stage, overrides)))


def run_stage(stage: str, config: StageConfig) -> Artifact:
    """Import a stage by name, run it, and log its result in one line."""
    artifact: Artifact = stage_module(stage).run(config)
    if not artifact.up_to_date:
        LOG.info(
            "%s: %s in %.1f s -> %s", stage, artifact.summary or artifact.status, artifact.seconds, artifact.folder
        )
    return artifact


def _run_command(stage: str, arguments: list[str]) -> int:
    require_stage(stage)
    refuse_secrets(arguments)
    if any(argument in ("--help", "-h") for argument in arguments):
        print(help_text(stage, _plain(compose(stage))), end="")
        return DONE
    flags, overrides = split_flags(stage, arguments)
    if any(flag in ("-m", "--multirun") for flag in flags):
        from alignkit.core.sweep import run_sweep

        if world_size() > 1:
            raise UserError("-m runs one job after the other in one process: start each with torchrun, without -m")
        return run_sweep(stage, overrides)
    if flags:
        overrides = bracket_lists(stage, overrides)
        check_keys(stage, compose(stage, overrides))
        hydra_main(stage, [*flags, *overrides], lambda composed: None)
        return DONE
    if world_size() > 1 and "distributed" not in config_class(stage).__dataclass_fields__:
        raise UserError(f"{stage} is the work of one process: start it without torchrun. See {_help(stage)}")
    with recorded_command(shlex.join(["alignkit", stage, *overrides])):
        run_stage(stage, load_config(stage, overrides))
    return DONE


# -- arguments --------------------------------------------------------------------------------------------------------


def split_flags(stage: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate Hydra's flags from overrides, and accept groups with and without a leading plus.

    Raises `UserError` for a flag that Hydra would not serve here.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        wants_value = bool(flags) and flags[-1] in _FLAGS_WITH_VALUE
        if argument.startswith("-"):
            if argument.split("=")[0] not in _HYDRA_FLAGS:
                name = argument.lstrip("-").replace("-", "_").split("=")[0]
                raise UserError(
                    f"unknown option {argument}: settings are key=value, as in {name}=... See {_help(stage)}"
                )
            flags.append(argument)
        elif wants_value and (argument.startswith(("install=", "query=", "uninstall=")) or "=" not in argument):
            flags.append(argument)
        elif "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument}: not an override; settings are key=value. See {_help(stage)}")
        else:
            overrides.append(argument)
    return flags, accept_leading_plus(stage, overrides)


def accept_leading_plus(stage: str, overrides: Sequence[str]) -> list[str]:
    """Make `+model=tiny` and `model=tiny` the same thing, and likewise `+experiment=...` and `+train.epochs=...`.

    Hydra insists on a plus for what the stage's defaults do not have, forbids it for what they have, and wants two for
    an entry of a dictionary that may or may not be there.
    """
    known = stage_keys(stage)
    present = {*default_groups(stage), *(key.name for key in known)}
    mappings = tuple(key.name for key in known if key.is_mapping)
    accepted = []
    for override in overrides:
        bare = override.lstrip("+")
        name = bare.split("=", 1)[0]
        if name in mappings or name.startswith(tuple(f"{mapping}." for mapping in mappings)):
            accepted.append(f"++{bare}")
        elif name in present:
            accepted.append(bare)
        elif group_options(name):
            accepted.append(f"+{bare}")
        else:
            accepted.append(override)
    return accepted


def bracket_lists(stage: str, overrides: Sequence[str]) -> list[str]:
    """Let a list be written without brackets, as in `compare=random,mods`; in a sweep the commas mean several jobs."""
    lists = {key.name for key in stage_keys(stage) if isinstance(key.default, list)}
    written = []
    for override in overrides:
        name, equals, value = override.partition("=")
        bare = name.lstrip("+") in lists and value and value[0] not in "[$'\"" and value != "null"
        written.append(f"{name}{equals}[{value}]" if bare else override)
    return written


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuse a literal key on the command line, where it would land in shell histories, process lists and manifests."""
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        secret_key = _SECRET_KEY.search(key) and not _TOKENIZER_KEY.search(key)
        no_name = re.search(r"api_key_env(\.[^.]+)?$", key) and not re.fullmatch(r"(['\"]?)([A-Z][A-Z0-9_]*)?\1", value)
        opens = key.endswith("base_url") and re.search("[@?]", value)  # a user or a query, which are ways to give a key
        if secret_key or no_name or opens or _SECRET_VALUE.search(argument):
            where = "an argument" if _SECRET_VALUE.search(key) else key
            raise UserError(
                f"{where}: a key must not stand on the command line. Put it into an environment variable and give the "
                "variable's NAME, e.g. teacher.api_key_env=OPENAI_API_KEY"
            )


# -- Hydra ------------------------------------------------------------------------------------------------------------


def compose(stage: str, overrides: Sequence[str] = ()) -> Any:
    """Compose a stage's configuration; the result may still have keys that the schema does not know."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    _schema(stage)
    state = GlobalHydra.instance()
    outer, state.hydra = state.hydra, None  # the caller may itself be a Hydra application
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            own = () if any("hydra/" in override for override in overrides) else _WITHOUT_HYDRAS_OWN
            return hydra.compose(config_name=stage, overrides=[*accept_leading_plus(stage, overrides), *own])
    except Exception as error:
        raise explain(stage, error) from error
    finally:
        GlobalHydra.instance().hydra = outer


def to_dataclass(stage: str, composed: Any) -> Any:
    """Turn a composed config into the stage's dataclass, rejecting keys that the dataclass does not have."""
    from omegaconf import OmegaConf

    checked = check_keys(stage, composed)
    try:
        config = OmegaConf.to_object(checked)
    except Exception as error:
        raise explain(stage, error) from error
    for name, rows in vars(config).items():
        if isinstance(rows, RowsConfig):
            check_rows(name, rows)
    return config


def check_rows(key: str, rows: RowsConfig) -> None:
    """Raise `UserError` for numbers of rows that make no sense, before anything is read."""
    if rows.skip < 0:
        raise UserError(f"{key}.skip={rows.skip}: must not be negative; 0 reads from the first row")
    if rows.limit is not None and rows.limit < 1:
        raise UserError(f"{key}.limit={rows.limit}: must be at least 1; null reads all rows")


def hydra_main(
    stage: str, arguments: Sequence[str], task: Callable[[Any], None], sweep_dir: Path | None = None
) -> None:
    """Run `task` on composed configs as Hydra's own command line does; it leaves no folders of its own behind."""
    import hydra

    quiet = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.run.dir=."]
    folders = [f"hydra.sweep.dir={sweep_dir or '.'}", "hydra.sweep.subdir=."]
    _schema(stage)
    saved, sys.argv = sys.argv, ["alignkit", *arguments, *quiet, *folders]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them and leaving
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=stage)(task)()
    except Exception as error:
        raise explain(stage, error) from error
    finally:
        sys.argv = saved


def job_overrides() -> dict[str, str]:
    """Key -> value of the overrides of the sweep job that is running."""
    from hydra.core.hydra_config import HydraConfig

    return dict(override.lstrip("+").split("=", 1) for override in HydraConfig.get().overrides.task if "=" in override)


def check_keys(stage: str, composed: Any) -> Any:
    """A composed config as an instance of the stage's schema, without keys that the schema does not have.

    Hydra accepts `+train.foo=1`, and `OmegaConf.to_object` would silently drop it: merging the plain values into a
    fresh structured schema is what finds it.
    """
    from omegaconf import OmegaConf

    try:
        return OmegaConf.merge(_schema(stage), OmegaConf.to_container(composed))
    except Exception as error:
        raise explain(stage, error) from error


@cache
def _schema(stage: str) -> Any:
    """The stage's dataclass with OmegaConf's types, made once. Not to be changed: `merge` copies it.

    Making it also tells Hydra of it, and of what `${recipe:seeds.jsonl}` means: a file of dataset_optimization/.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    schema = config_class(stage)
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)
    OmegaConf.register_new_resolver("recipe", recipe_file, replace=True)
    return OmegaConf.structured(schema)


def _plain(composed: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(composed, enum_to_str=True)
    return dict(plain)


def explain(stage: str, error: Exception) -> Exception:
    """Say what is wrong with a configuration in one sentence, with the nearest valid key or option.

    Errors that are not about configuration are returned as they are.
    """
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, UserError) or not any(isinstance(e, HydraException | OmegaConfBaseException) for e in chain):
        return error
    text = str(error)
    known = [key.name for key in stage_keys(stage)]
    if match := re.search(r"Could not override '\+?([^'@]+)", text):
        return UserError(_unknown_key(stage, match[1], [*known, *default_groups(stage)]))
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return UserError(f"{match[1]}: several values are a sweep, which wants -m; a list is written [a,b]")
    for found in chain:
        if isinstance(found, OverrideParseException):
            return UserError(
                f"{found.override}: cannot be read; quote values with special characters, as in 'key=\"a=b\"'"
            )
        if isinstance(found, MissingConfigException) and found.options is not None:
            group, _, option = str(found.missing_cfg_file).rpartition("/")
            options = ", ".join(found.options)
            return UserError(
                f"{group}={option}: no such option{nearest(option, list(found.options))}. Options: {options}"
            )
        if isinstance(found, MissingMandatoryValue):
            key = found.full_key or str(found).splitlines()[0].split(": ")[-1]
            return UserError(f"{key} has no value: add {key}=... See {_help(stage)}")
        if isinstance(found, ConfigKeyError | ConfigAttributeError) and found.full_key:
            return UserError(_unknown_key(stage, str(found.full_key), [*known, *default_groups(stage)]))
        if isinstance(found, OmegaConfBaseException):
            what = str(found.msg or found).splitlines()[0]
            return UserError(f"{found.full_key}: {what}" if found.full_key else what)
    return UserError(f"{text.splitlines()[0]} See {_help(stage)}")


def _unknown_key(stage: str, key: str, known: Sequence[str]) -> str:
    return f"unknown key '{key}'{nearest(key, known)}. See {_help(stage)}"


def _help(stage: str) -> str:
    return f"alignkit {stage} --help"
