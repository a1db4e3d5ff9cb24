"""Held-out questions for other harnesses: a task of lm-evaluation-harness, and the tests of promptfoo.

Both ask with the same prompt as `evaluate`, the one user turn of `qa_prompt`, and compare with the same references.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.core.records import QAExample
from alignkit.core.stages import nearest
from alignkit.data.chat import qa_prompt

LOG = logging.getLogger("alignkit")

HARNESSES = ("lm_eval", "promptfoo")
TASK = "alignkit_held_out"
_TEMPLATE = re.compile(r"\{\{|\{%|\{#|^(?:file|package)://")
"""What promptfoo would take for a template or a file to load, wherever in a text or at its start."""

_LM_EVAL_HELP = f"""\
# A task for lm-evaluation-harness (pip install 'lm-eval[api]'), to be run in this folder. Any model of its will do:
#   lm_eval run --include_path . --tasks {TASK} --apply_chat_template --model local-chat-completions \\
#     --model_args model=<name>,base_url=http://127.0.0.1:8000/v1/chat/completions
"""
_PROMPTFOO_HELP = """\
# For promptfoo (Node.js 22.22 or newer), in this folder: npx promptfoo@0.123.1 eval --no-cache
# Say below which model answers, and put its key into the environment as OPENAI_API_KEY (any word for a server without).
# PROMPTFOO_DISABLE_TELEMETRY=1 keeps it from reporting to its makers.
"""


def check_harnesses(names: Sequence[str]) -> None:
    """Raise `UserError` for a harness that nothing is written for."""
    for name in names:
        if name not in HARNESSES:
            raise UserError(f"export: no harness {name!r}{nearest(name, HARNESSES)}. There are: {', '.join(HARNESSES)}")


def export_questions(
    examples: Sequence[QAExample], names: Sequence[str], max_new_tokens: int, artifact: Artifact
) -> None:
    """Write a folder for each named harness, and how many questions are in it into the artifact's metrics."""
    written: dict[str, int] = {}
    for name in names:
        with artifact.output(name) as folder:
            folder.mkdir()
            write = write_lm_eval if name == "lm_eval" else write_promptfoo
            written[name] = write(folder, examples, max_new_tokens)
        if left_out := len(examples) - written[name]:
            LOG.warning("%s: %d questions left out, whose text it would take for a template", name, left_out)
    if written:
        artifact.metrics["exported"] = written


def write_lm_eval(folder: Path, examples: Sequence[QAExample], max_new_tokens: int) -> int:
    """<task>.yaml and test.jsonl; returns how many questions are in it.

    Scores: exact match (as it stands, as ours), BLEU and chrF of all answers together.
    """
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "reference",
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_new_tokens},
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": True}
            for name, aggregation in (("exact_match", "mean"), ("bleu", "bleu"), ("chrf", "chrf"))
        ],
        "metadata": {"version": 1.0},
    }
    (folder / f"{TASK}.yaml").write_text(_LM_EVAL_HELP + _yaml(task), encoding="utf-8")
    _write_lines(folder / "test.jsonl", [{"id": each.id, **_asked(each), **_tags(each)} for each in examples])
    return len(examples)


def write_promptfoo(folder: Path, examples: Sequence[QAExample], max_new_tokens: int) -> int:
    """promptfooconfig.yaml and tests.jsonl; returns how many questions are in it.

    An answer passes when it is the reference; ROUGE-1 is told beside it. The prompt is a list of messages, since a text
    that is JSON itself would be taken for one. Left out are questions in whose text promptfoo would see a template.
    """
    config = {
        "description": f"{len(examples)} held-out questions",
        "prompts": ['[{"role": "user", "content": {{ prompt | dump }} }]'],
        "providers": [
            {
                "id": "openai:chat:<model>",
                "config": {"apiBaseUrl": "http://127.0.0.1:8000/v1", "temperature": 0, "max_tokens": max_new_tokens},
            }
        ],
        "tests": "file://tests.jsonl",
    }
    tests = [
        {
            "description": example.id,
            "vars": {"prompt": _asked(example)["prompt"]},
            "assert": [
                {"type": "equals", "value": example.output, "metric": "exact_match"},
                {"type": "rouge-n", "value": example.output, "metric": "rouge_1", "threshold": 0},
            ],
            "metadata": _tags(example),
        }
        for example in examples
        if not any(_TEMPLATE.search(text) for text in _asked(example).values())
    ]
    (folder / "promptfooconfig.yaml").write_text(_PROMPTFOO_HELP + _yaml(config), encoding="utf-8")
    _write_lines(folder / "tests.jsonl", tests)
    return len(tests)


def _asked(example: QAExample) -> dict[str, str]:
    return {"prompt": qa_prompt(example)[0].content, "reference": example.output}


def _tags(example: QAExample) -> dict[str, str]:
    return {"kind": example.kind or "", "source": example.source}


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
