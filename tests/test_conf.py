"""Every configuration file composes, and so do the commands in its head comment and in every stage's help."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from alignkit.core import app
from alignkit.core.app import accept_leading_plus, bracket_lists, load_config, run_command, split_flags, to_dataclass
from alignkit.core.config import StageConfig
from alignkit.core.errors import UserError
from alignkit.core.help import stage_keys
from alignkit.core.stages import conf_dir, config_class, default_groups, group_options, stage_module, stages
from alignkit.core.sweep import plan

CONF = conf_dir()
MODELS = group_options("model")
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
COMMAND = re.compile(r"(?:-m alignkit\.|^\W*alignkit )(\w+)(?: ([^#]*?))?(?:\s+#.*|\s*)$")


def compose(stage: str, *overrides: str) -> StageConfig:
    """The configuration of a stage, with a value made up for every key that has none."""
    composed = app.compose(stage, bracket_lists(stage, overrides))
    for key in OmegaConf.missing_keys(composed):
        OmegaConf.update(composed, key, "made_up")
    config: StageConfig = to_dataclass(stage, composed)
    return config


def with_field(name: str) -> list[str]:
    """The stages whose configuration has this field."""
    return [stage for stage in stages() if name in config_class(stage).__dataclass_fields__]


def crossed(rows: list[str], columns: list[str]) -> list[Any]:
    """Every pair as a case of a test: by default as many as give each row and each column its turn, the others slow."""
    cases = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            turn = j == i % len(columns) or i == j % len(rows)
            cases.append(pytest.param(row, column, marks=[] if turn else [pytest.mark.slow]))
    return cases


def a_few_stages(*named: str) -> list[Any]:
    """Every stage as a case of a test: those named by default, the others, which do the same, slow."""
    return [pytest.param(stage, marks=[] if stage in named else [pytest.mark.slow]) for stage in stages()]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Stage and arguments of every command in a text; what stands in <angle brackets> is made up."""
    found = [match for line in text.splitlines() if (match := COMMAND.search(line))]
    known = [(match[1], shlex.split(re.sub(r"<[^>]*>", "made_up", match[2] or ""))) for match in found]
    return [(stage, arguments) for stage, arguments in known if stage in stages()]


def check_command(stage: str, arguments: list[str]) -> None:
    """Compose what a command line says, or every job of it when it is a sweep."""
    flags, overrides = split_flags(stage, arguments)
    if "-m" in flags:
        assert plan(stage, overrides)
    else:
        compose(stage, *overrides)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes(file: Path) -> None:
    if file.parent == Path():
        assert type(compose(file.stem)) is config_class(file.stem)
        return
    group = str(file.parent)
    users = [stage for stage in stages() if group in default_groups(stage)]
    if not users:  # an appended group, like experiment: for the stages that have its keys
        fields = set(yaml.safe_load((CONF / file).read_text(encoding="utf-8")))
        users = [stage for stage in stages() if fields <= config_class(stage).__dataclass_fields__.keys()]
    assert users, f"no stage uses {file}"
    in_pairs = ("model", "hardware", "teacher")  # below
    for stage in users[:1] if group in in_pairs else users:
        compose(stage, f"{group}={file.stem}")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_starts_with_commands_that_run_it(file: Path) -> None:
    text = (CONF / file).read_text(encoding="utf-8")
    head = "\n".join(line for line in text.split("\n\n")[0].splitlines() if line.startswith("#"))
    found = commands(head)
    assert found, f"{file} does not say which command runs it"
    named = file.stem if file.parent == Path() else f"{file.parent}={file.stem}"
    assert any(named in (stage, *(argument.lstrip("+") for argument in arguments)) for stage, arguments in found)
    for stage, arguments in found:
        check_command(stage, arguments)


@pytest.mark.parametrize(("teacher", "stage"), crossed(group_options("teacher"), with_field("teacher")))
def test_every_stage_takes_every_teacher(teacher: str, stage: str) -> None:
    config: Any = compose(stage, f"teacher={teacher}")
    content = yaml.safe_load((CONF / f"teacher/{teacher}.yaml").read_text(encoding="utf-8"))
    assert config.teacher.mode.value == content["mode"]


@pytest.mark.parametrize(("model", "stage"), crossed(MODELS, with_field("model")))
def test_every_stage_takes_every_model(model: str, stage: str) -> None:
    assert accept_leading_plus(stage, [f"+model={model}"]) == [f"model={model}"]
    config: Any = compose(stage, f"model={model}")
    content = yaml.safe_load((CONF / f"model/{model}.yaml").read_text(encoding="utf-8"))
    assert config.model.name == model
    assert config.model.path == content["path"]
    assert config.model.quantization.name == content["quantization"]
    assert config.model.eos_token != config.model.pad_token


@pytest.mark.parametrize(("hardware", "stage"), crossed(group_options("hardware"), with_field("train")))
def test_hardware_decides_how_every_training_stage_trains(hardware: str, stage: str) -> None:
    assert "hardware" in default_groups(stage), f"conf/{stage}.yaml: add `hardware: null` after `_self_`"
    config: Any = compose(stage, f"hardware={hardware}")
    content = yaml.safe_load((CONF / f"hardware/{hardware}.yaml").read_text(encoding="utf-8"))["train"]
    assert {key: getattr(config.train, key) for key in content} == content
    assert config.train.batch_size * config.train.gradient_accumulation == 16


def test_the_models_that_need_it_are_quantised() -> None:
    content = {model: yaml.safe_load((CONF / f"model/{model}.yaml").read_text(encoding="utf-8")) for model in MODELS}
    assert {model for model, values in content.items() if values["quantization"] == "nf4"} == {
        "qwen7b",
        "qwen2_5_7b",
        "qwen3_8b",
        "mistral7b",
        "llama3_8b",
    }
    assert content["qwen7b"]["path"] == "Qwen/Qwen-7B-Chat"
    assert content["tiny"]["path"] == "embedded"


def test_no_file_holds_a_key() -> None:
    for file in FILES:
        text = (CONF / file).read_text(encoding="utf-8")
        assert "api_key:" not in text
        assert not re.search(r"\bsk-|\bhf_", text)


@pytest.mark.parametrize("stage", stages())
def test_every_stage_explains_itself(stage: str) -> None:
    doc = stage_module(stage).__doc__ or ""
    assert doc.startswith(f"{stage}: ")
    for heading in ("\nReads:", "\nWrites:", "\nOverrides people use", "\nExamples:\n"):
        assert heading in doc
    examples = commands(doc.split("\nExamples:\n")[1])
    assert any(name == stage for name, _ in examples)
    for name, arguments in examples:
        check_command(name, arguments)


@pytest.mark.parametrize("stage", stages())
def test_the_overrides_that_help_recommends_exist(stage: str) -> None:
    doc = stage_module(stage).__doc__ or ""
    recommended = re.search(r"\nOverrides people use.*?\n((?:  .*\n|\n(?=  ))*)", doc + "\n")
    assert recommended is not None
    known = {key.name for key in stage_keys(stage)} | set(default_groups(stage)) | {"experiment"}
    nested = {name.rsplit(".", depth)[0] for name in known for depth in range(1, 3) if "." in name}
    for name in re.findall(r"^  \+?([a-z_][\w.]*)=", recommended[1], flags=re.MULTILINE):
        assert name in known | nested or any(name.startswith(f"{key}.") for key in known), name


@pytest.mark.parametrize("stage", a_few_stages("pipeline", "select", "sft"))
def test_help_and_configuration_import_nothing_heavy(stage: str) -> None:
    program = """
import contextlib, io, sys
from alignkit.core.app import run_command
stage = sys.argv[1]
for arguments in (["--help"], ["--cfg", "job"], ["+no_such_key=1"]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run_command(stage, arguments)
    assert code == (2 if arguments == ["+no_such_key=1"] else 0), (arguments, err.getvalue())
    assert out.getvalue() or code
heavy = "torch transformers trl peft datasets accelerate bitsandbytes matplotlib".split()
print(*[name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program, stage], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["compare=random,mods"], ["compare=[random,mods]"]),
        (["+compare=random"], ["+compare=[random]"]),
        (["held_out=a.jsonl", "k=2"], ["held_out=[a.jsonl]", "k=2"]),
        (["sampling.temperature=0.5,1"], ["sampling.temperature=[0.5,1]"]),
        (["compare=[random,mods]", "also=", "also=null"], ["compare=[random,mods]", "also=", "also=null"]),
        (["compare=${other}", "also='a,b'", 'also="a,b"'], ["compare=${other}", "also='a,b'", 'also="a,b"']),
        (["run=a,b", "seed=1,2", "data.path=a,b"], ["run=a,b", "seed=1,2", "data.path=a,b"]),
    ],
)
def test_lists_need_no_brackets(given: list[str], written: list[str]) -> None:
    assert bracket_lists("select", given) == written


def test_hydras_own_files_change_nothing_and_may_be_named() -> None:
    """They are left out of a composition, unless an override is about one of them."""
    given = ["data.path=rows.jsonl", "model=qwen7b"]
    assert load_config("sft", given) == load_config("sft", [*given, "hydra/job_logging=none"])


def test_lists_without_brackets_arrive() -> None:
    given = ["compare=random,mods", "also=my rows.jsonl", "held_out=runs/a-b_c.jsonl,x.jsonl"]
    config: Any = load_config("select", given)
    assert config.compare == ["random", "mods"]
    assert config.also == ["my rows.jsonl"]
    assert config.held_out == ["runs/a-b_c.jsonl", "x.jsonl"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=-1", "train.learning_rate=-1.0: must be 0 or more"),
        ("train.batch_size=0", "train.batch_size=0: must be at least 1"),
        ("train.max_steps=0", "train.max_steps=0: must be at least 1, or -1"),
        ("train.warmup_share=7", "train.warmup_share=7.0: must be from 0 to 1"),
        ("train.eval_steps=-1", "train.eval_steps=-1: must be 0 or more"),
        ("lora.rank=-4", "lora.rank=-4: must be at least 1"),
        ("lora.dropout=2", "lora.dropout=2.0: must be from 0 up to, but not, 1"),
        ("hardware.gpus=0", "hardware.gpus=0: must be at least 1"),
    ],
)
def test_numbers_that_mean_nothing_are_named(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("sft", ["data.path=rows.jsonl", override]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "given", "message"),
    [
        ("evaluate", ["data.path=t", "data.limit=0"], r"^data.limit=0: must be at least 1; null reads all rows"),
        ("sft", ["data.path=t", "data.skip=-1"], r"^data.skip=-1: must not be negative"),
        ("search", ["queries.path=t", "queries.limit=-3"], r"^queries.limit=-3: must be at least 1"),
    ],
)
def test_numbers_of_rows_are_refused_by_their_key(stage: str, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(stage, given)
