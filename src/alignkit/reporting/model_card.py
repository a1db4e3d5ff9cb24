"""README.md of an exported model: what it is, how to run it, how it was made, what was measured, and its limits.

All of it comes from manifests. Whatever stems from rows, paths or commands stands in code spans or blocks: it shows as
text and cannot become markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignkit.core.artifact import Artifact
from alignkit.core.config import ModelConfig
from alignkit.core.hashing import hash_path
from alignkit.core.lineage import Origin, lineage, origin_of
from alignkit.core.manifest import is_hub_name, read_manifest, versions
from alignkit.reporting.datasheet import markdown_table
from alignkit.reporting.plain import code, one_line

if TYPE_CHECKING:
    from huggingface_hub import CardData, ModelCardData, RepoCard

AnyCard = TypeVar("AnyCard", bound="RepoCard")

NAME = "README.md"
CARD_SCORES = ("exact_match", "token_f1", "judge", "balanced_verdict_accuracy")
"""Scores of an evaluation that a model card tells, in this order."""


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
        "What was measured": _measured(artifact, scores, list(find_gains(Path(adapter)))),
        "Limits": _limits(artifact, model),
        "Licence": _licence(adapter, model, license),
    }
    body = "\n".join([f"# {name}\n", *(f"## {title}\n\n{text}" for title, text in sections.items())])
    metadata = _metadata(name, model, license, scores, adapter)
    card = read_back(ModelCard, metadata, body)
    return artifact.write_text(NAME, str(card))


def read_back(kind: type[AnyCard], metadata: CardData, body: str) -> AnyCard:
    """A card of this metadata and text, made by huggingface_hub from what will be in the file.

    Its own `validate` asks the Hub. What can be told here is told here: the metadata is read as strictly as the library
    can, and must come back as it was. Raises `ValueError` where it does not.
    """
    card = kind(f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    if card.data.to_yaml() != metadata.to_yaml():
        raise ValueError(f"the metadata of {NAME} does not survive its file: {metadata}")
    return card


def find_scores(adapter: Path) -> Iterator[Score]:
    """The scores of this very adapter (same hash) in the evaluations of its run."""
    for name, run, data, metrics in _evaluations(adapter):
        found = metrics["models"].get(name, {})
        for score in (each for each in CARD_SCORES if each in found):
            values = found[score]
            mean, low, high = (float(values[part]) for part in ("mean", "low", "high"))
            yield Score(score, mean, low, high, int(values["n"]), data, run)


def find_gains(adapter: Path) -> Iterator[list[str]]:
    """What this adapter has over others in the same evaluations: a row of the card's table for each score."""
    for name, run, _, metrics in _evaluations(adapter):
        for each in (each for each in metrics.get("comparisons", []) if each["new"] == name):
            for score in (key for key, found in each.items() if isinstance(found, dict) and "p_holm" in found):
                found = each[score]
                gain = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
                least = f"{found['mde']:.3f}" if "mde" in found else ""
                counts = f"{found['n']} / {found['clusters']}"
                yield [score, each["old"], gain, f"{found['p_holm']:.2g}", least, counts, run]


def _evaluations(adapter: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """What the evaluations of its run call this very adapter, their folder, their data, and their metrics."""
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
            if key.startswith("models.") and entry["sha256"] == sha256:
                yield key.removeprefix("models."), folder.name, data, manifest["metrics"]


def _metadata(name: str, model: ModelConfig, license: str, scores: Sequence[Score], adapter: str) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=score.data,
            metric_type=score.name,
            metric_name=f"{score.name.replace('_', ' ')}, 95 % interval {score.low:.3f} to {score.high:.3f}",
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
    parts = [block(lineage(adapter))]
    for origin in _stages(adapter)[::-1]:
        settings = {"command": origin.manifest.get("command", ""), **_settings(origin)}
        rows = "\n".join(f"- {name}: {code(str(value))}" for name, value in settings.items())
        parts.append(f"{origin.manifest['stage']}:\n\n{rows}\n")
    used = ", ".join(f"{name} {version}" for name, version in versions().items() if version != "not installed")
    return "\n".join([*parts, f"Exported with {used}, by:\n", block([artifact.command])])


def _measured(artifact: Artifact, scores: Sequence[Score], gains: Sequence[Sequence[str]]) -> str:
    text = "No evaluation of this adapter was found in its run.\n"
    if scores:
        rows = [
            [score.name, f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]", str(score.n), score.data, score.run]
            for score in scores
        ]
        text = markdown_table(["score", "mean [95 % interval]", "questions", "data", "run folder"], rows)
    if gains:
        header = ["score", "over", "difference [95 % interval]", "p (Holm)", "detectable", "questions / documents"]
        text += (
            "\nDifferences are paired by question and tested by document; p is adjusted for all scores of a comparison."
            " A true difference of what is called detectable would be found four times in five.\n\n"
            + markdown_table([*header, "run folder"], gains)
        )
    checks = [[check.name, "pass" if check.passed else "FAIL", check.detail] for check in artifact.checks]
    return f"{text}\nOf the export itself:\n\n{markdown_table(['check', 'result', 'detail'], checks)}"


def _licence(adapter: str, model: ModelConfig, license: str) -> str:
    """What was said at export, and whose licences it depends on."""
    data = [path for path in dict.fromkeys(_sources(adapter)) if not (Path(path).is_dir() or path == model.path)]
    named = "; ".join(code(path, in_table=False) for path in data) or "not known"
    return (
        f"{code(license)}, as given at export; it was not checked. It cannot allow more than the licence of the base, "
        f"{code(model.path, in_table=False)}, and those of the data do: {named}. Where a teacher wrote or graded data, "
        "its terms count, too.\n"
    )


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


def block(lines: Sequence[str]) -> str:
    """Lines as a code block that keeps their indent: nothing in them is markup."""
    return "\n".join(f"    {' ' * (len(line) - len(line.lstrip()))}{one_line(line, 2000)}" for line in lines) + "\n"
