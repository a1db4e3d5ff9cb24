"""The stage `export`: what it writes, that others load it, what it refuses, and what its checks catch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merging import NF4, TINY, random_adapter
from test_qwen_v1 import OLD_CONFIG, REAL, ROWS, needs_real_files, random_weights, write_checkpoint
from test_sft import write_questions

from alignkit.core.app import run_command
from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig, Quantization, RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.lineage import lineage
from alignkit.export import ExportConfig, MergeInto, run
from alignkit.models.gguf_types import GGUFType

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.evaluation.llama_cpp.is_installed", lambda: False)


@pytest.fixture
def config(tmp_path: Path) -> ExportConfig:
    """An nf4-trained adapter (random) of the embedded model."""
    adapter = random_adapter(NF4, tmp_path / "adapter")
    return ExportConfig(name="export", output_dir=str(tmp_path / "out"), adapter=adapter, model=NF4, gguf_types=["f16"])


def checks(artifact: Artifact) -> dict[str, str]:
    assert all(check.passed for check in artifact.checks)
    return {check.name: check.detail for check in artifact.checks}


def written(artifact: Artifact) -> set[str]:
    return {entry["path"] for entry in artifact.outputs}


# -- the user's commands -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an nf4 adapter was trained and exported by the commands that a user types."""
    folder = tmp_path_factory.mktemp("trained")
    write_questions(folder / "train.jsonl", 16)
    write_questions(folder / "held_out.jsonl", 6, 9)
    before, command = Path.cwd(), ["+model=tiny", "model.quantization=nf4", "run=demo"]
    os.chdir(folder)
    try:
        train = ["data.path=train.jsonl", "train.max_steps=2", "train.learning_rate=2e-3"]
        assert run_command("sft", [*command, *train]) == 0
        export = ["adapter=runs/demo/sft/adapter", "data.path=held_out.jsonl", "gguf_types=[f32,f16,q8_0]"]
        assert run_command("export", [*command, *export]) == 0
    finally:
        os.chdir(before)
    return folder / "runs/demo/export"


def test_the_command_writes_everything_and_checks_it(trained: Path) -> None:
    manifest = json.loads((trained / "manifest.json").read_text())
    names = {check["name"] for check in manifest["checks"] if check["passed"]}
    assert len(names) == len(manifest["checks"])
    kinds = {f"gguf_{kind}_{what}" for kind in ("f32", "f16", "q8_0") for what in ("logits", "greedy", "token_ids")}
    assert kinds | {"adapter_as_trained", "merge_drift", "gguf_f16_chat_template", "gguf_f16_end_of_turn"} <= names
    assert manifest["metrics"]["drift"]["trained_base"]["mean_kl"] < 1e-8
    assert manifest["metrics"]["gguf"]["f32"]["max_logit_difference"] == 0
    assert 0 < manifest["metrics"]["gguf"]["q8_0"]["mean_kl"] < 0.02
    assert {entry["path"] for entry in manifest["outputs"]} == {
        *("merged", "adapter", "model-f32.gguf", "model-f16.gguf", "model-q8_0.gguf", "Modelfile", "README.md")
    }
    assert "FROM ./model-q8_0.gguf" in (trained / "Modelfile").read_text()


def test_transformers_alone_loads_the_merged_model_and_stops_where_a_turn_ends(trained: Path) -> None:
    """In a process that cannot import alignkit; the last token that it writes is the end of the turn."""
    program = (
        "import sys; sys.modules['alignkit'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))\n"
        "turns = [{'role': 'user', 'content': 'Notes: Bakoco makes clocks.\\n\\nWhat does Bakoco make?'}]\n"
        "inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors='pt')\n"
        "found = model.generate(**inputs, max_new_tokens=200, do_sample=False)[0]\n"
        "print(len(found) - inputs['input_ids'].shape[1], tokenizer.decode(found[-1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(trained / "merged")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    length, last = done.stdout.split()
    assert int(length) < 200 and last == "<|im_end|>"


def test_lineage_reaches_from_the_merged_model_to_the_rows(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parents[2])
    tree = "\n".join(lineage("runs/demo/export/merged"))
    assert "<- export:" in tree and "<- sft:" in tree and "train.jsonl" in tree
    assert "changed" not in tree


def test_the_card_is_valid_and_says_how_it_was_made(trained: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(trained / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["license"] == "other" and "sft" in data["tags"]
    assert "base_model" not in data  # `embedded` is no name on the hub
    for said in ("alignkit sft", "train.learning_rate", "0.002", "merge_drift", "train.jsonl", "No evaluation of this"):
        assert said in card.text, said
    assert str(trained.parents[2]) not in card.text  # no paths of this machine


def test_the_same_export_again_does_nothing(config: ExportConfig) -> None:
    config = replace(config, formats=["adapter"])
    first = run(config)
    assert run(config).up_to_date
    assert written(first) == {"adapter", "README.md"}


# -- merging -----------------------------------------------------------------------------------------------------------


def test_into_the_original_shows_both_drifts(config: ExportConfig) -> None:
    config = replace(config, merge_into=MergeInto.original, formats=["safetensors"], max_drift=10.0)
    artifact = run(config)
    drift = artifact.metrics["drift"]
    assert drift["original"]["mean_kl"] > 1000 * drift["trained_base"]["mean_kl"]
    assert "merged into the trained base: mean KL" in checks(artifact)["merge_drift"]


def test_too_much_drift_stops_and_says_what_to_do(config: ExportConfig) -> None:
    config = replace(config, merge_into=MergeInto.original, max_drift=1e-6)
    with pytest.raises(UserError, match=r"'merge_drift' failed: .*merge_into=trained_base keeps what was trained"):
        run(config)
    assert not (Path(config.output_dir) / "merged").exists()


def test_gguf_alone_leaves_no_checkpoint_behind(config: ExportConfig) -> None:
    artifact = run(replace(config, formats=["gguf"]))
    assert written(artifact) == {"model-f16.gguf", "Modelfile", "README.md"}
    assert not artifact.work_folder.exists()


def test_a_dtype_of_its_own(config: ExportConfig) -> None:
    artifact = run(replace(config, formats=["safetensors"], dtype="bfloat16"))
    weights = load_file(artifact.folder / "merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert 0 < artifact.metrics["drift"]["trained_base"]["mean_kl"] < 0.01


def test_rows_that_cannot_be_measured_are_dropped_or_end_it(config: ExportConfig, tmp_path: Path) -> None:
    data = RowsConfig(path=str(write_questions(tmp_path / "rows.jsonl", 3, input="word " * 600)))
    artifact = run(replace(config, data=data, formats=["safetensors"]))
    assert sum(artifact.dropped.values()) == 1 and "longer than max_length" in str(artifact.dropped)
    short = replace(config, model=replace(NF4, max_length=4), output_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match="no row can be measured on"):
        run(short)


def test_documents_cannot_be_measured_on(config: ExportConfig, tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").write_text(json.dumps({"id": "a", "text": "A page about hats."}) + "\n")
    with pytest.raises(UserError, match=r"pages.jsonl: documents; give rows with a prompt and an answer"):
        run(replace(config, data=RowsConfig(path=str(tmp_path / "pages.jsonl"))))


# -- Qwen of 2023 ------------------------------------------------------------------------------------------------------


def export_qwen(folder: Path, tmp_path: Path) -> Artifact:
    """Train nothing: a random adapter of a random first-Qwen checkpoint over nf4, through to GGUF."""
    model = ModelConfig("qwen", str(folder), quantization=Quantization.nf4, dtype="float32", max_length=256)
    adapter = random_adapter(model, tmp_path / "adapter")
    return run(ExportConfig(name="export", output_dir=str(tmp_path / "out"), adapter=adapter, model=model))


def test_a_first_qwen_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    artifact = export_qwen(write_checkpoint(tmp_path / "source", random_weights()), tmp_path)
    assert {"gguf_f16_greedy", "gguf_q8_0_logits"} <= checks(artifact).keys()
    base = json.loads((artifact.folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert json.loads((Path(base) / "config.json").read_text())["model_type"] == "qwen2"  # that vLLM can load
    generation = json.loads((artifact.folder / "merged/generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2  # a turn's end and a text's end
    assert 'SYSTEM """You are a helpful assistant."""' in (artifact.folder / "Modelfile").read_text()


@needs_real_files
@pytest.mark.slow
def test_the_real_vocabulary_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """151,936 rows of which 151,851 are tokens, 208 of them special."""
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    rows = 151936
    weights = random_weights()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name].repeat(-(-rows // ROWS), 1)[:rows].clone()
        weights[name] += 0.1 * torch.randn(rows, weights[name].shape[1])
    source = write_checkpoint(
        tmp_path / "source", weights, OLD_CONFIG | {"vocab_size": rows, "padded_vocab_size": rows}
    )
    shutil.copyfile(REAL / "qwen.tiktoken", source / "qwen.tiktoken")
    artifact = export_qwen(source, tmp_path)
    assert {"gguf_f16_token_ids", "gguf_f16_greedy", "gguf_q8_0_logits"} <= checks(artifact).keys()


# -- what the checks catch ---------------------------------------------------------------------------------------------


def test_a_wrong_file_does_not_appear(config: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases at half their size: fluent nonsense in the making."""
    from alignkit.models import gguf as module

    read_one = module._read
    monkeypatch.setattr(module, "_read", lambda source: read_one(source) * (0.5 if source[1].endswith("bias") else 1))
    with pytest.raises(UserError, match=r"'gguf_f16_logits' failed: .*a tensor in the wrong place or order"):
        run(config)
    folder = Path(config.output_dir)
    assert not list(folder.glob("*.gguf")) and not list(folder.glob(".*.partial"))
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"


def test_an_adapter_that_was_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    shutil.copytree(trained.parents[2], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    file = Path("runs/demo/sft/adapter/adapter_model.safetensors")
    weights = load_file(file)
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'adapter_as_trained' failed: adapter has changed since it was written"):
        run(ExportConfig(name="export", output_dir="out", adapter="runs/demo/sft/adapter", model=NF4))


# -- bad input ---------------------------------------------------------------------------------------------------------


def truncate(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def other_base(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "other/model"}))


def other_weights(adapter: Path) -> None:
    file = adapter / "base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "adapter_model.safetensors: damaged"),
        (pickle_only, "there is no adapter_model.safetensors"),
        (other_base, "was trained on the base 'other/model', not on 'embedded'"),
        (other_weights, "was trained on other weights than 'embedded' has now"),
    ],
)
def test_an_adapter_that_does_not_fit_ends_with_one_message(
    config: ExportConfig, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(Path(config.adapter))
    given = [f"adapter={config.adapter}", f"output_dir={config.output_dir}", "model.quantization=nf4"]
    assert run_command("export", given) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("formats=[onnx]", "choose from safetensors, adapter, gguf"),
        ("formats=[]", "choose from"),
        ("gguf_types=[q4_k_m]", "llama-quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M"),
        ("gguf_types=[]", "name at least one, or leave gguf out"),
        ("max_drift=0", "must be above 0"),
        ("dtype=int4", "choose auto, float32"),
        ("license='my own: words'", "give a licence's short name"),
        ("push_to_hub=nowhere", "give <owner>/<name>"),
        ("adapter=runs/nowhere/adapter", "adapter=runs/nowhere/adapter: no such file or folder"),
    ],
)
def test_a_wrong_value_ends_with_one_message(
    config: ExportConfig, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"adapter={config.adapter}", f"output_dir={config.output_dir}", "model.quantization=nf4", override]
    assert run_command("export", given) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_template_without_an_end_of_turn_is_refused(config: ExportConfig, tmp_path: Path) -> None:
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(UserError, match="a model could not learn to stop"):
        run(replace(config, model=replace(NF4, chat_template=str(tmp_path / "plain.jinja"))))


def test_another_stage_s_folder_is_left_alone(config: ExportConfig, trained: Path) -> None:
    with pytest.raises(UserError, match=r"holds the output of the stage 'sft'"):
        run(replace(config, output_dir=str(trained.parent / "sft")))


def test_a_full_disk_leaves_nothing_half_written(
    config: ExportConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from alignkit.models import gguf as module

    encode, written_so_far = module._encoded, []

    def full(weight: Any, name: str, kind: GGUFType) -> Any:
        written_so_far.append(name)
        if len(written_so_far) == 5:
            raise OSError(28, "No space left on device")
        return encode(weight, name, kind)

    monkeypatch.setattr(module, "_encoded", full)
    given = [f"adapter={config.adapter}", f"output_dir={config.output_dir}", "model.quantization=nf4"]
    assert run_command("export", [*given, "gguf_types=[f16]"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [file.name for file in Path(config.output_dir).iterdir() if "gguf" in file.name]
    monkeypatch.setattr(module, "_encoded", encode)
    assert run_command("export", [*given, "gguf_types=[f16]"]) == 0


# -- beside it ---------------------------------------------------------------------------------------------------------


def test_the_reward_model_becomes_a_classifier(config: ExportConfig, tmp_path: Path) -> None:
    from alignkit.models.loading import load_policy, load_tokenizer
    from alignkit.models.reward_model import RewardModel
    from alignkit.models.value_head import ValueHeadModel

    reward_model = RewardModel(ValueHeadModel(load_policy(NF4, config.adapter)), load_tokenizer(NF4), NF4)
    reward_model.offset, reward_model.scale = 0.5, 2.0
    reward_model.save_pretrained(tmp_path / "reward")
    artifact = run(replace(config, formats=["adapter"], reward=str(tmp_path / "reward")))
    assert {"classifier_scores", "classifier_scores_padded_left"} <= set(checks(artifact))
    assert artifact.metrics["reward_classifier"]["offset"] == 0.25
    assert json.loads((artifact.folder / "reward_classifier/config.json").read_text())["architectures"] == [
        "Qwen2ForSequenceClassification"
    ]

    alone = run(replace(config, adapter="none", reward=str(tmp_path / "reward"), output_dir=str(tmp_path / "alone")))
    assert written(alone) == {"reward_classifier"}
    expected = reward_model_score(tmp_path / "reward")
    (code,) = re.findall(r"```python\n(.*?)```", (alone.folder / "reward_classifier/README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=alone.folder / "reward_classifier", capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(expected, abs=1e-5)


def reward_model_score(folder: Path) -> float:
    from alignkit.models.reward_model import RewardModel

    return RewardModel.from_pretrained(folder).score([{"prompt": "What is 2 + 2?", "completion": "4"}])[0]


def test_no_adapter_and_no_reward_model_is_nothing_to_export(config: ExportConfig) -> None:
    with pytest.raises(UserError, match="adapter=none exports the reward model alone: name it"):
        run(replace(config, adapter="none"))


def test_a_head_that_was_lost_stops_the_export(
    config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkit.models import merging
    from alignkit.models.loading import load_policy, load_tokenizer
    from alignkit.models.reward_model import RewardModel
    from alignkit.models.value_head import ValueHeadModel

    def with_another_head(reward_model: RewardModel, dtype: torch.dtype) -> Any:
        classifier: Any = of(reward_model, dtype)
        torch.nn.init.normal_(classifier.score.weight)
        return classifier

    of = merging.classifier_of
    monkeypatch.setattr(merging, "classifier_of", with_another_head)
    RewardModel(ValueHeadModel(load_policy(NF4, config.adapter)), load_tokenizer(NF4), NF4).save_pretrained(
        tmp_path / "r"
    )
    with pytest.raises(UserError, match="check 'classifier_scores' failed"):
        run(replace(config, adapter="none", reward=str(tmp_path / "r")))
    assert not (tmp_path / "out/reward_classifier").exists()


def test_it_goes_to_the_hub_with_the_model_at_the_top(config: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit.data import hub

    uploaded: dict[str, Path] = {}

    class Hub:
        def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
            assert (repo_id, repo_type, private, exist_ok) == ("me/mine", "model", True, True)

        def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
            return SimpleNamespace(private=True)

        def create_commit(self, repo_id: str, operations: Any, *, commit_message: str, repo_type: str) -> None:
            uploaded.update({each.path_in_repo: Path(each.path_or_fileobj) for each in operations})

    monkeypatch.setenv("HF_TOKEN", "hf_canary0123456789")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: Hub())
    assert hub.check_push("me/mine") == "hf_canary0123456789"
    artifact = run(replace(config, push_to_hub="me/mine", data=RowsConfig(path="none")))
    assert {"README.md", "config.json", "model.safetensors", "model-f16.gguf", "Modelfile"} <= set(uploaded)
    assert not any(name.startswith("adapter") for name in uploaded)  # its base is a folder of this machine
    assert uploaded["config.json"] == artifact.folder / "merged/config.json"
    assert not {"manifest.json", "log.txt", "dropped.jsonl"} & set(uploaded)
    assert "canary" not in (artifact.folder / "manifest.json").read_text()


def test_an_unquantised_base_needs_no_detour(config: ExportConfig, tmp_path: Path) -> None:
    adapter = random_adapter(TINY, tmp_path / "plain")
    artifact = run(replace(config, adapter=adapter, model=TINY, formats=["safetensors"]))
    assert artifact.metrics["drift"]["trained_base"]["max_logit_difference"] < 1e-3
