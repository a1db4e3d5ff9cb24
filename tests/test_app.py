"""The command line: what is accepted, what is refused and how, exit codes, signals, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from alignkit.core.app import accept_leading_plus, load_config, refuse_secrets
from alignkit.core.errors import UserError, disk_problem

HEAVY = "torch transformers trl peft datasets accelerate matplotlib"

if TYPE_CHECKING:
    from house import House

pytest_plugins = ["house"]


# -- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["+model=qwen7b", "model=qwen7b"])
def test_a_group_is_chosen_with_and_without_a_plus(house: House, override: str) -> None:
    config = load_config("toy", [override])
    assert config.model.path == "Qwen/Qwen-7B-Chat"
    assert config.model.quantization.name == "nf4"
    assert type(config).__module__ == "alignkit.toy"


@pytest.mark.parametrize("command", [["-m", "alignkit.toy"], ["-m", "alignkit", "toy"]])
def test_both_commands_accept_both_spellings(house: House, command: list[str]) -> None:
    for override in ("+model=qwen7b", "model=qwen7b"):
        result = house.call(*command, override, "--cfg", "job")
        assert result.code == 0, result.err
        assert "path: Qwen/Qwen-7B-Chat" in result.out


def test_a_plus_is_moved_to_where_hydra_wants_it(house: House) -> None:
    given = [
        "+model=tiny",
        "hardware=cpu",
        "+hardware=cpu",
        "experiment=smoke",
        "+train.epochs=2",
        "+train.foo=1",
        "seed=2",
    ]
    assert accept_leading_plus("toy", given) == [
        "model=tiny",
        "hardware=cpu",
        "hardware=cpu",
        "+experiment=smoke",
        "train.epochs=2",
        "+train.foo=1",
        "seed=2",
    ]


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_entries_of_a_dictionary_are_added_and_replaced(house: House, plus: str) -> None:
    assert load_config("toy", [f"{plus}names.b=two"]).names == {"a": "one", "b": "two"}
    assert load_config("toy", [plus + "names={b: two}", f"{plus}names.a=new"]).names == {"a": "new", "b": "two"}
    result = house.run("-m", f"{plus}names.b=two,three")
    assert result.code == 0, result.err
    assert house.manifest("runs/default/toy-sweep/jobs/names.b-three")["status"] == "complete"


def test_hardware_and_experiment_change_the_training(house: House) -> None:
    config = load_config("toy", ["hardware=rtx4090_24gb", "+experiment=smoke", "train.logging_steps=7"])
    assert config.train.optimizer == "paged_adamw_8bit"
    assert config.train.max_steps == 2
    assert config.train.logging_steps == 7
    assert config.data.limit == 32


def test_conf_is_found_from_any_directory(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    process = house.start("-c", f"import os; os.chdir({str(elsewhere)!r}); {_IN_PROCESS}", "--cfg", "job")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "path: embedded" in out
    assert list(elsewhere.iterdir()) == []


_IN_PROCESS = "import sys; from alignkit.__main__ import main; sys.exit(main(['toy', *sys.argv[1:]]))"


def test_a_recipe_file_is_found_and_named_from_here(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    override = "data.path=${recipe:seeds.jsonl}"
    assert load_config("toy", [override]).data.path == "dataset_optimization/seeds.jsonl"
    monkeypatch.chdir(house.folder / "src")
    assert load_config("toy", [override]).data.path == str(house.folder / "dataset_optimization/seeds.jsonl")


def test_compose_works_inside_another_hydra_application(house: House) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(house.folder / "conf")):
        outer = GlobalHydra.instance().hydra
        assert load_config("toy", ["factor=3"]).factor == 3.0
        assert GlobalHydra.instance().hydra is outer


# -- what is refused, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("modle=tiny", "unknown key 'modle' (did you mean 'model'?)"),
        ("+modle=tiny", "unknown key 'modle' (did you mean 'model'?)"),
        ("train.learnig_rate=1", "unknown key 'train.learnig_rate' (did you mean 'train.learning_rate'?)"),
        ("learning_rate=1", "unknown key 'learning_rate' (did you mean 'train.learning_rate'?)"),
        ("+train.epoch=1", "unknown key 'train.epoch' (did you mean 'train.epochs'?)"),
        ("+train.foo=1", "unknown key 'train.foo' (did you mean 'train."),
        ("+data.train.foo=1", "unknown key 'data.train"),
        ("model=tinny", "model=tinny: no such option (did you mean 'tiny'?). Options: llama3_8b,"),
        ("+experiment=smok", "experiment=smok: no such option (did you mean 'smoke'?)"),
        ("train.learning_rate=fast", "train.learning_rate: Value 'fast' of type 'str' could not be converted to Float"),
        ("model.quantization=nf5", "model.quantization: Invalid value 'nf5', expected one of [none, nf4]"),
        ("train=3", "train"),
        ("data.path=???", "data.path has no value: add data.path=..."),
        ("repeat=13", "repeat=13 brings bad luck"),
        ("factor=1,2", "factor=1,2: several values are a sweep, which wants -m"),
        ("factor=[1", "factor=[1: cannot be read"),
        ("--factor=2", "unknown option --factor=2: settings are key=value, as in factor=..."),
        ("factor", "factor: not an override"),
        ("-m modle=tiny,qwen7b", "unknown key 'modle' (did you mean 'model'?)"),
        ("-m model=tiny,tinny", "model=tinny: no such option (did you mean 'tiny'?)"),
        ("-m factor=1,fast", "factor: Value 'fast'"),
        ("+train.foo=1 --cfg job", "unknown key 'train.foo'"),
        ("data.path=nowhere.jsonl", "data.path=nowhere.jsonl: no such file or folder"),
        ("fail=user", "the toy cannot do that"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(house: House, arguments: str, message: str) -> None:
    result = house.run(*arguments.split())
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "argument",
    [
        "teacher.api_key=0123456789abcdef",
        "+teacher.api_key=0123456789abcdef",
        "teacher.api_key_env=0123456789abcdef",
        "teacher.model=sk-0123456789abcdef",
        "run=hf_0123456789abcdef",
        "teacher.base_url=https://me:0123456789abcdef@example.org/v1",
        "teacher.base_url=https://0123456789abcdef@example.org/v1",
        "teacher.base_url='https://example.org/v1?key=0123456789abcdef'",
        "teacher.base_url=https://example.org/v1?key=0123456789abcdef",
        "password=0123456789abcdef",
        "sk-0123456789abcdef",
    ],
)
@pytest.mark.parametrize("flag", [(), ("-m",), ("--help",), ("--cfg", "job")])
def test_a_secret_is_refused_and_not_repeated(house: House, argument: str, flag: tuple[str, ...]) -> None:
    result = house.run(*flag, argument)
    assert result.code == 2
    assert "api_key_env" in result.err
    assert "0123456789abcdef" not in result.out + result.err
    assert not (house.folder / "runs").exists()


def test_what_only_looks_like_a_secret_passes() -> None:
    refuse_secrets(
        [
            "teacher.api_key_env=AZURE_OPENAI_API_KEY",
            "teacher.api_key_env=",
            "teacher.api_key_env=''",
            "model.eos_token=<|im_end|>",
            "model.pad_token=<unk>",
            "teacher.base_url=http://127.0.0.1:8000/v1",
            "run=task-list-of-things",
        ]
    )


def test_an_unknown_stage_is_named_with_the_nearest(house: House) -> None:
    result = house.run(stage="tou")
    assert result.code == 2
    assert "unknown command 'tou' (did you mean 'toy'?)" in result.err


def test_load_config_raises_for_programs(house: House) -> None:
    with pytest.raises(UserError, match=r"train\.foo"):
        load_config("toy", ["+train.foo=1"])


def test_a_bug_shows_its_traceback(house: House) -> None:
    result = house.run("fail=bug")
    assert result.code == 1
    assert "RuntimeError: the toy is broken" in result.err
    assert house.manifest()["status"] == "failed"
    assert house.manifest()["error"] == "RuntimeError: the toy is broken"


# -- help and flags ---------------------------------------------------------------------------------------------------


def test_help_says_what_a_person_needs(house: House) -> None:
    result = house.run("--help")
    assert result.code == 0
    assert result.out.startswith("toy: shout every row")
    assert "model=llama3_8b|mistral7b|qwen1_8b|qwen2_5_7b|qwen3_8b|qwen7b|tiny   (default: tiny)" in result.out
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "needed=null" in lines
    assert "force=false Do the work again although the output is up to date" in lines
    assert "factor=1.0 Lengths are multiplied by this" in lines
    assert any(line.startswith("model.quantization=none none|nf4") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--cfg", "job"], ["--info", "defaults"], ["--hydra-help"], ["+train.foo=1"], ["model=tinny"]],
)
def test_help_and_errors_import_nothing_heavy(house: House, arguments: list[str]) -> None:
    program = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", *[name for name in {HEAVY!r}.split() if name in sys.modules]))
sys.argv = ["alignkit", "toy", *{arguments!r}]
from alignkit.__main__ import main
sys.exit(main())
"""
    result = house.call("-c", program)
    assert result.code in (0, 2), result.err
    assert result.out.endswith("heavy:\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("alignkit to", "toy"),
        ("alignkit toy model=qwen7", "model=qwen7b"),
        ("alignkit toy factor=2 train.learn", "train.learning_rate="),
    ],
)
def test_the_shell_is_offered_stages_options_and_keys(house: House, typed: str, offered: str) -> None:
    result = house.call("-m", "alignkit", "-sc", "query=bash", environment={"COMP_LINE": typed})
    assert result.code == 0, result.err
    assert offered in result.out.split()


def test_the_shell_is_told_whom_to_ask(house: House) -> None:
    result = house.call("-m", "alignkit", "-sc", "install=bash")
    assert result.code == 0, result.err
    assert result.out.rstrip().endswith("complete -o nospace -o default -F hydra_bash_completion alignkit")


def test_hydra_leaves_nothing_behind(house: House) -> None:
    before = {path.name for path in house.folder.iterdir()}
    assert house.run().code == 0
    assert house.run("--cfg", "job").code == 0
    assert house.run("-m", "factor=1,2").code == 0
    assert {path.name for path in house.folder.iterdir()} - before == {"runs"}
    assert not list(house.folder.rglob(".hydra"))


# -- signals and disks ------------------------------------------------------------------------------------------------


def _wait_for_journal(house: House, rows: int, folder: str = "runs/default/toy") -> None:
    journal = house.folder / folder / "unfinished/journal.jsonl"
    for _ in range(600):
        if journal.exists() and journal.read_text(encoding="utf-8").count("\n") > rows:
            return
        time.sleep(0.05)
    raise AssertionError("the toy did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_ends_with_130_and_saved_state(house: House, number: int) -> None:
    process = house.start("-m", "alignkit.toy", "pause_seconds=1")
    _wait_for_journal(house, rows=1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted: what is finished is saved, the same command continues\n"
    assert house.manifest()["status"] == "failed"
    assert house.manifest()["error"] == "interrupted"
    assert house.run("pause_seconds=1").code == 0
    assert house.manifest()["metrics"]["found"] >= 1
    assert house.shouted() == ["ONE", "TWO", "THREE"]


def test_a_killed_process_leaves_a_clean_resume(house: House) -> None:
    process = house.start("-m", "alignkit.toy", "pause_seconds=0.3")
    _wait_for_journal(house, rows=1)
    process.kill()
    process.communicate()
    assert house.manifest()["status"] == "running"
    assert not (house.folder / "runs/default/toy/shouted.jsonl").exists()
    assert house.run("pause_seconds=0.3").code == 0
    assert house.manifest()["status"] == "complete"
    assert house.manifest()["metrics"]["found"] >= 1
    assert house.shouted() == ["ONE", "TWO", "THREE"]
    assert sorted(path.name for path in (house.folder / "runs/default/toy").iterdir()) == [
        "config.yaml",
        "log.txt",
        "manifest.json",
        "shouted.jsonl",
    ]


def test_a_second_process_in_the_same_folder_is_refused(house: House) -> None:
    process = house.start("-m", "alignkit.toy", "pause_seconds=600")  # it is at work until it is killed
    _wait_for_journal(house, rows=0)
    result = house.run()
    process.kill()
    process.communicate()
    assert result.code == 2
    assert "another process is at work here" in result.err


def test_an_unwritable_output_folder_is_one_message(house: House) -> None:
    result = house.call("-m", "alignkit.toy", "output_dir=rows.jsonl/toy")
    assert result.code == 2
    assert result.err.startswith("error: rows.jsonl")
    assert result.err.count("\n") == 1


def test_an_output_folder_that_is_a_file_is_one_message(house: House) -> None:
    result = house.run("output_dir=rows.jsonl")
    assert result.code == 2
    assert result.err.startswith("error: rows.jsonl")


def test_a_full_disk_is_one_message_and_the_next_run_recovers(house: House) -> None:
    def small_files_only() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = house.call("-m", "alignkit.toy", "repeat=5000", preexec_fn=small_files_only)
    assert result.code == 2, result.err
    assert result.err == ("error: File too large. Make room or mend the permissions, or choose another output_dir.\n")
    assert not (house.folder / "runs/default/toy/shouted.jsonl").exists()
    assert house.run("repeat=5000").code == 0
    assert [len(text) for text in house.shouted()] == [15_000, 15_000, 25_000]


def test_a_full_disk_is_known_from_what_other_libraries_say(tmp_path: Path) -> None:
    program = f"""
import resource, sqlite3, torch
from pathlib import Path
from safetensors.torch import save_file
from alignkit.core.errors import disk_problem

def fill_database() -> None:
    database = sqlite3.connect("{tmp_path}/full.sqlite")
    database.execute("create table rows (text)")
    for _ in range(100):
        database.execute("insert into rows values (?)", ("x" * 1000,))
        database.commit()

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
weights = dict(a=torch.zeros(100_000))
for write in (
    lambda: save_file(weights, "{tmp_path}/full.safetensors"),
    lambda: torch.save(weights, "{tmp_path}/full.pt"),
    lambda: Path("{tmp_path}/full.txt").write_text("x" * 100_000),
    fill_database,
):
    try:
        write()
    except Exception as error:
        print(disk_problem(error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said = ["File too large", "a checkpoint could not be written", "File too large", "disk I/O error (SQLite)"]
    assert done.stdout.splitlines() == said


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone", "a"), RuntimeError("no"), ValueError("(os error 2)")])
def test_other_errors_are_not_about_the_disk(error: Exception) -> None:
    assert disk_problem(error) is None


def test_stdout_may_be_closed(house: House) -> None:
    process = house.start("-m", "alignkit.toy", "pause_seconds=0.1")
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=60)
    assert house.manifest()["status"] == "complete"


def test_every_stage_of_the_real_house_names_its_inputs() -> None:
    from alignkit.core.stages import config_class, stages

    for stage in stages():
        schema = config_class(stage)
        for key in schema.inputs:
            assert hasattr(schema, key.split(".")[0]) or key.split(".")[0] in schema.__dataclass_fields__, (
                f"{stage}: {key}"
            )


def test_the_working_directory_is_kept(house: House) -> None:
    before = os.getcwd()
    house.run("-m", "factor=1,2")
    assert Path(os.getcwd()) == Path(before)
