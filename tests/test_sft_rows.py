"""The stage `sft` on every kind of row: what it shows, learns, counts and drops, by the command that a user types."""

from __future__ import annotations

import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from alignkit.core.app import run_command
from alignkit.models.tiny.tokenizer import build_tokenizer

QUESTION = {"role": "user", "content": "What does Bakoco make?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"name": "Bakoco"}'}}],
}
FOUND = {"role": "tool", "name": "find", "content": "Bakoco makes clocks."}
ANSWER = {"role": "assistant", "content": "Clocks."}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
DOCUMENT = "Applications must be in by 15 January; late ones are not read by the office."
RAFT = {
    "id": "r",
    "question": "When must applications be in?",
    "oracle_context": DOCUMENT,
    "cot_answer": f"It says ##begin_quote##{DOCUMENT[:38]}##end_quote##.\n<ANSWER>: By 15 January.",
    "instruction": f"<DOCUMENT>{DOCUMENT}</DOCUMENT>\nWhen must applications be in?",
}


class Sft:
    """The command `sft` on rows of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def run(self, rows: list[dict[str, Any]], *overrides: str) -> tuple[int, str, str]:
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        fixed = ["model=tiny", f"data.path={path}", f"output_dir={self.folder / 'out'}", "train.max_steps=1"]
        code = run_command("sft", [*fixed, *overrides])
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def learned(self, rows: list[dict[str, Any]], *overrides: str) -> list[str]:
        """What the preview marks as learned."""
        code, out, err = self.run(rows, "preview=true", *overrides)
        assert (code, err) == (0, "")
        assert "FAIL" not in out
        return [part.partition("⟧")[0] for part in out.split("⟦")[1:]]

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out" / "manifest.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture
def sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Sft:
    return Sft(tmp_path, capsys)


def test_the_preview_of_a_search_with_a_tool(sft: Sft) -> None:
    _, out, _ = sft.run([{"prompt": [QUESTION], "completion": [CALL, FOUND, ANSWER], "tools": TOOLS}], "preview=true")
    system, _, rest = out.partition("<|im_end|>\n")
    assert system == (
        f"row 1\n<|im_start|>system\nFunctions that can be called:\n{json.dumps(TOOLS[0])}\n\n"
        'A call is written like this:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )
    assert rest.startswith(
        "<|im_start|>user\nWhat does Bakoco make?<|im_end|>\n"
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "find", "arguments": {"name": "Bakoco"}}\n</tool_call>'
        "<|im_end|>⟧\n"
        "<|im_start|>tool\nBakoco makes clocks.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Clocks.<|im_end|>⟧\n"
        "check every row learns something   pass  1 rows\n"
    )
    assert "turns 2\n" in rest


def test_the_preview_in_the_documentation_is_what_is_printed(sft: Sft) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "labels.md").read_text(encoding="utf-8")
    (row,), (shown,) = (
        re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for kind in ("json", "text")
    )
    assert sft.run([json.loads(row)], "preview=true")[1].startswith(shown)


@pytest.mark.parametrize(("learn", "turns"), [("completion", 1), ("assistant", 2)])
def test_whole_conversations_are_learned_when_asked_for(sft: Sft, learn: str, turns: int) -> None:
    rows = [{"messages": [QUESTION, CALL, FOUND, ANSWER], "tools": TOOLS}]
    learned = sft.learned(rows, f"learn={learn}")
    assert len(learned) == turns
    assert learned[-1] == "Clocks.<|im_end|>"


def test_a_raft_row_learns_its_reasoning_with_the_quotes(sft: Sft) -> None:
    (learned,) = sft.learned([RAFT])
    assert learned == f"{RAFT['cot_answer']}<|im_end|>"
    assert "##begin_quote##Applications must be in by 15 January;##end_quote##" in learned
    completion = {"prompt": RAFT["instruction"], "completion": f"{RAFT['cot_answer']}<STOP>"}
    assert sft.learned([completion]) == [learned]


def test_documents_train_in_pieces_that_are_counted(sft: Sft) -> None:
    pages: list[dict[str, Any]] = [
        {"document": "a.pdf", "page": page, "text": "Bakoco makes clocks. " * page} for page in (1, 30)
    ]
    code, out, _ = sft.run(pages, "overlong=split", "model.max_length=64", "train.warmup_share=0")
    assert code == 0
    assert "<|endoftext|>⟧" in out
    metrics, dropped = sft.manifest()["metrics"], sft.manifest()["dropped"]
    assert dropped == {}
    # the second page has n tokens and its end; a piece of 64 learns 63, so all but the first take ceil(n / 63) pieces
    pieces = 1 + ceil(len(build_tokenizer().encode(pages[1]["text"])) / 63)
    assert pieces > 3
    assert (metrics["documents"], metrics["pieces"], metrics["rows"]) == (2, pieces, pieces)
    checks = {check["name"]: check["passed"] for check in sft.manifest()["checks"]}
    assert checks["end of document is learned"] is checks["first token is not learned"] is True


@pytest.mark.parametrize("overlong", ["drop", "split"])
def test_what_is_too_long_is_dropped_unless_it_is_a_document_to_split(sft: Sft, overlong: str) -> None:
    short, long = {"text": "Bakoco makes clocks."}, {"text": "Bakoco makes clocks. " * 40}
    options = ["preview=true", "model.max_length=64", f"overlong={overlong}"]
    reason = "would drop 1 rows: longer than max_length (64 tokens)"
    assert (reason in sft.run([short, long], *options)[1]) == (overlong == "drop")
    chats = [{"messages": [QUESTION, {**ANSWER, "content": row["text"]}]} for row in (short, long)]
    assert reason in sft.run(chats, *options)[1]


def test_documents_and_conversations_do_not_mix(sft: Sft) -> None:
    code, _, err = sft.run([{"text": "Bakoco makes clocks."}, {"messages": [QUESTION, ANSWER]}])
    assert code == 2
    assert "rows.jsonl:2: text: missing, although the file began with rows of the format text" in err
