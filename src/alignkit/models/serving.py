"""What servers want beside the weights: an adapter that names its base, and a Modelfile for Ollama."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.core.config import ModelConfig
from alignkit.data.chat import end_of_turn_id
from alignkit.models.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, model_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_adapter_for_serving(
    adapter: Path, folder: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Copy an adapter so that PEFT and vLLM load it by themselves; returns its adapter_config.json.

    `base_model_name_or_path` becomes what transformers can load: a hub name, or the absolute path of a folder (of the
    conversion, for a model of the first Qwen architecture).
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    source = model_source(model)
    config["base_model_name_or_path"] = str(Path(source).resolve()) if Path(source).is_dir() else source
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name in (ADAPTER_WEIGHTS, BASE_RECORD):
        if (adapter / name).exists():
            shutil.copyfile(adapter / name, folder / name)
    tokenizer.save_pretrained(str(folder))
    return config


# -- Ollama ------------------------------------------------------------------------------------------------------------


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf: str, context: int) -> str:
    """A Modelfile for the GGUF file of that name beside it.

    Ollama does not run a file's own chat template; it looks for one that it knows. So the template is written out in
    its language, wherever our template is the same few words around every message; where not, a comment says so.
    """
    stop = str(tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)))
    lines = [f"FROM ./{gguf}"]
    turns = _turns(tokenizer)
    if turns is None:
        lines.append("# The chat template is more than words around each message: compare Ollama's rendering of it.")
    else:
        lines.append(f'TEMPLATE """{turns.as_go()}"""')
        if turns.system:
            lines.append(f'SYSTEM """{turns.system}"""')
    lines += [f'PARAMETER stop "{stop}"', f"PARAMETER num_ctx {context}"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Turns:
    """The words before and after a message of each role, those that open an answer, and the default system message."""

    around: dict[str, tuple[str, str]]
    opening: str
    system: str

    def render(self, messages: list[tuple[str, str]]) -> str:
        """A conversation (role, content) up to where the answer begins."""
        if self.system and messages[0][0] != "system":
            messages = [("system", self.system), *messages]
        texts = (f"{self.around[role][0]}{content}{self.around[role][1]}" for role, content in messages)
        return "".join(texts) + self.opening

    def as_go(self) -> str:
        """The same as a Go template, Ollama's language."""
        cases = [
            f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{{{{- range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def _turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The template's words, read off rendered conversations; None when they do not make up others, too."""

    def rendered(*messages: tuple[str, str], opened: bool = False) -> str:
        plain = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=opened, enable_thinking=False)
        return str(text).removeprefix(str(tokenizer.bos_token or ""))  # which the server puts there itself

    system, user, answer, again = ("system", "@S@"), ("user", "@U@"), ("assistant", "@A@"), ("user", "@V@")
    try:
        one = rendered(user)
        head, after_user = one.split("@U@")
        before_answer, after_answer = rendered(user, answer).removeprefix(one).split("@A@")
        before_user = rendered(user, answer, again).removeprefix(rendered(user, answer)).partition("@V@")[0]
        before_system, between = rendered(system, user).partition("@U@")[0].split("@S@")
        after_system = between.removesuffix(before_user)
        around = {
            "system": (before_system, after_system),
            "user": (before_user, after_user),
            "assistant": (before_answer, after_answer),
        }
        default = head.removesuffix(before_user).removeprefix(before_system).removesuffix(after_system)
        turns = Turns(around, rendered(user, opened=True).removeprefix(one), default)
        probes: tuple[list[tuple[str, str]], ...] = (
            [("user", "x")],
            [("system", "a b"), ("user", "x\ny")],
            [("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w"), ("user", "v")],
        )
        same = all(turns.render(probe) == rendered(*probe, opened=True) for probe in probes)
    except Exception:  # a template that knows no system role raises what it likes
        return None
    return turns if same and '"""' not in turns.as_go() + default else None
