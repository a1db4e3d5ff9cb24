"""README.md of an exported model: what it is, how to run it, how it was made, what was measured, and its limits.

All of it comes from manifests. Whatever stems from rows, paths or commands stands in code spans or blocks: it shows as
text and cannot become markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig
from alignkit.core.hashing import hash_path
from alignkit.core.lineage import Origin, lineage, origin_of
from alignkit.core.manifest import is_hub_name, read_manifest, versions
from alignkit.reporting.plain import code, one_line

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

NAME = "README.md"
SCORES = ("exact_match", "token_f1", "judge", "balanced_verdict_accuracy")


@dataclass(frozen=True)
class Score:
    """A score of this adapter in an evaluation: mean with its 95 % interval over `n` questions."""

    name: str
    mean: float
    low: float
    high: float
    n: int
    data: str
    run: str


def write_model_card(artifact: Artifact, adapter: str, model: ModelConfig, license: str) -> Path:
    """Write the card of what `artifact` holds."""
    from huggingface_hub import ModelCard

    scores = list(find_scores(Path(adapter)))
    name = f"{model.name}-{Path(adapter).parent.name}"
    sections = {
        "What it is": _what_it_is(artifact, adapter, model),
        "How to run it": _how_to_run(artifact, model),
        "How it was made": _how_it_was_made(artifact, adapter),
        "What was measured": _measured(artifact, scores),
        "Limits": _limits(artifact, model),
    }
    body = "\n".join([f"# {name}\n", *(f"## {title}\n\n{text}" for title, text in sections.items())])
    metadata = _metadata(name, model, license, scores, adapter)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")  # reads the metadata back, and refuses what is wrong
    return artifact.write_text(NAME, str(card))


def find_scores(adapter: Path) -> Iterator[Score]:
    """The scores of this very adapter (same hash) in the evaluations of its run."""
    origin = origin_of(adapter)
    if origin is None:
        return
    sha256 = hash_path(adapter)
    for folder in sorted(path.parent for path in origin.folder.parent.glob("*/manifest.json")):
        manifest = read_manifest(folder) or {}
        if manifest["stage"] != "evaluate" or manifest["status"] != "complete":
            continue
        inputs = {entry["key"]: entry for entry in manifest["inputs"]}
        data = Path(inputs["data.path"]["path"]).name
        for key, entry in inputs.items():
            found = manifest["metrics"]["models"].get(key.removeprefix("models."), {})
            if not key.startswith("models.") or entry["sha256"] != sha256:
                continue
            for score in (name for name in SCORES if name in found):
                values = found[score]
                mean, low, high = (float(values[part]) for part in ("mean", "low", "high"))
                yield Score(score, mean, low, high, int(values["n"]), data, folder.name)


def _metadata(name: str, model: ModelConfig, license: str, scores: Sequence[Score], adapter: str) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=score.data,
            metric_type=score.name,
            metric_value=round(score.mean, 4),
        )
        for score in scores
    ]
    hub = [path for path in _sources(adapter) if is_hub_name(path) and path != model.path]
    return ModelCardData(
        base_model=model.path if is_hub_name(model.path) else None,
        datasets=hub or None,
        eval_results=results or None,
        library_name="transformers",
        license=license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=["alignkit", "lora", *sorted({origin.manifest["stage"] for origin in _stages(adapter)})],
    )


# -- sections ----------------------------------------------------------------------------------------------------------


def _what_it_is(artifact: Artifact, adapter: str, model: ModelConfig) -> str:
    stages = [origin.manifest["stage"] for origin in _stages(adapter)]
    lines = [
        f"{code(model.path)} with a LoRA adapter trained by alignkit"
        + (f" ({', '.join(stages[::-1])})." if stages else "."),
        "",
        *(f"- {code(entry['path'])}: {_CONTENTS[entry['path'].partition('-')[0]]}" for entry in _files(artifact)),
    ]
    return "\n".join(lines) + "\n"


_CONTENTS = {
    "merged": "base and adapter in one, safetensors, with tokenizer and chat template",
    "adapter": "the adapter alone, with its base named",
    "model": "the merged model for llama.cpp, Ollama and LM Studio",
    "Modelfile": "for `ollama create`",
    "reward_classifier": "the reward model, one label; a higher logit is a better answer",
}


def _files(artifact: Artifact) -> list[dict[str, Any]]:
    return [entry for entry in artifact.outputs if entry["path"].partition("-")[0] in _CONTENTS]


def _how_to_run(artifact: Artifact, model: ModelConfig) -> str:
    """Commands for the files that are there."""
    paths = [entry["path"] for entry in _files(artifact)]
    lines = []
    if "merged" in paths:
        lines += ["vllm serve merged"]
    if "adapter" in paths:
        about = artifact.metrics["adapter"]
        base = model.path if is_hub_name(model.path) else "<base>"  # a path here means nothing elsewhere
        lines += [f"vllm serve {base} --enable-lora --max-lora-rank {about['rank']} --lora-modules aligned=adapter"]
    files = [path for path in paths if path.endswith(".gguf")]
    if files:
        lines += [f"llama-server -m {files[-1]} --jinja", "ollama create aligned -f Modelfile"]
    text = "\n".join(f"    {line}" for line in lines) + "\n\n" if lines else ""
    return (
        f"{text}Use the chat template of the tokenizer: the model has seen no other form. Prompts of up to "
        f"{model.max_length} tokens, answer included, were trained on.\n"
    )


def _how_it_was_made(artifact: Artifact, adapter: str) -> str:
    parts = [_block(lineage(adapter))]
    for origin in _stages(adapter)[::-1]:
        settings = {"command": origin.manifest.get("command", ""), **_settings(origin)}
        rows = "\n".join(f"- {name}: {code(str(value))}" for name, value in settings.items())
        parts.append(f"{origin.manifest['stage']}:\n\n{rows}\n")
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if version != "not installed")
    return "\n".join([*parts, f"Exported with {used}, by:\n", _block([artifact.command])])


def _measured(artifact: Artifact, scores: Sequence[Score]) -> str:
    text = "No evaluation of this adapter was found in its run.\n"
    if scores:
        rows = [
            [score.name, f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]", str(score.n), score.data, score.run]
            for score in scores
        ]
        text = _table(["score", "mean [95 % interval]", "questions", "data", "run folder"], rows)
    checks = [[check.name, "pass" if check.passed else "FAIL", check.detail] for check in artifact.checks]
    return f"{text}\nOf the export itself:\n\n{_table(['check', 'result', 'detail'], checks)}"


def _limits(artifact: Artifact, model: ModelConfig) -> str:
    lines = [
        "It inherits the habits, gaps and biases of its base, of its data and of whoever wrote and graded them.",
        "It was aligned to one kind of task; outside of it nothing was measured.",
        "The scores say how it does on held-out questions like those it was trained on.",
    ]
    if any(entry["path"].endswith(".gguf") for entry in artifact.outputs):
        lines.append("llama.cpp does not compose characters (NFC) before it reads them: compose decomposed text first.")
    if model.path == "embedded":
        lines.append("The base is alignkit's embedded model of a closed world: good for trying things out only.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


# -- where it came from ------------------------------------------------------------------------------------------------


def _stages(adapter: str) -> list[Origin]:
    """The training runs behind an adapter, the last first."""
    found: list[Origin] = []
    path: Path | None = Path(adapter)
    while path is not None and (origin := origin_of(path)) is not None:
        kept = origin.manifest["metrics"].get("kept") if origin.manifest["stage"] == "keep_best" else None
        if kept is None:
            found.append(origin)
        wanted = f"policies.{kept}" if kept else "init_adapter"
        before = [source for entry, source in origin.inputs() if entry["key"] == wanted and source.exists()]
        path = before[0] if before and len(found) < 20 else None
    return found


def _sources(adapter: str) -> list[str]:
    return [entry["path"] for origin in _stages(adapter) for entry in origin.manifest["inputs"]]


def _settings(origin: Origin) -> Mapping[str, Any]:
    """What decided the training: data, rows, adapter and optimizer."""
    import yaml

    path = origin.folder / "config.yaml"
    config = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}
    shown = {key: config[key] for key in ("beta", "reference", "seed") if key in config}
    for group in ("lora", "train"):
        shown |= {f"{group}.{key}": value for key, value in (config.get(group) or {}).items()}
    rows = {key: origin.manifest["metrics"][key] for key in ("rows", "pairs") if key in origin.manifest["metrics"]}
    return {**rows, "data": (config.get("data") or {}).get("path"), **shown}


def _block(lines: Sequence[str]) -> str:
    return "\n".join(f"    {' ' * (len(line) - len(line.lstrip()))}{one_line(line, 2000)}" for line in lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([code(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
