"""Lengths of rows: the counts by hand, the costs by hand, and the stage on real files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_random import conversation, tokenizer

from alignkit.core.app import load_config, run_command
from alignkit.core.config import ModelConfig, RowsConfig
from alignkit.core.errors import UserError
from alignkit.core.records import ChatExample, Dropped
from alignkit.data.chat import encode_conversation
from alignkit.data.lengths import (
    Cost,
    candidates,
    collect,
    cost,
    counts_by_length,
    packed_sequences,
    padding_share,
    percentile,
    row_lengths,
    suggest,
    summarise,
)
from alignkit.data.sources import read_examples, stream_examples
from alignkit.models.loading import load_tokenizer

DATA = Path(__file__).resolve().parents[1].parent / "shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real files")
LENGTHS = [10, 30, 10, 20, 40]


def in_file_order(lengths: object) -> range:
    return range(len(lengths))  # type: ignore[arg-type]


def write(path: Path, answers: list[str]) -> Path:
    rows = [{"id": f"r{n}", "instruction": "Say it.", "input": "", "output": each} for n, each in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    found = summarise(LENGTHS)
    assert (found.rows, found.tokens, found.mean, found.longest) == (5, 110, 22.0, 40)
    assert (found.median, found.p90, found.p99) == (20, 40, 40)


def test_percentiles_are_the_smallest_that_so_many_do_not_exceed() -> None:
    ordered = list(range(1, 101))
    assert [percentile(ordered, percent) for percent in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert percentile([7], 50) == percentile([7], 99) == 7


def test_counts_by_hand() -> None:
    assert counts_by_length(LENGTHS) == [(10, 2, 2, 0.4), (20, 1, 3, 0.6), (30, 1, 4, 0.8), (40, 1, 5, 1.0)]


def test_cost_by_hand() -> None:
    """Up to 30: 10, 30, 10, 20 stay. Batches of two: [10 30] and [10 20] take 60 + 40 places for 70 tokens."""
    found = cost(LENGTHS, 30, 2, in_file_order)
    assert found.padding_share == pytest.approx(0.3)
    assert replace(found, padding_share=None) == Cost(30, 1, 0.8, 70 / 110, None, 3)
    assert cost(LENGTHS, 5, 2, in_file_order) == Cost(5, 5, 0.0, 0.0, None, 0)


def test_padding_depends_on_the_order() -> None:
    assert padding_share([1, 3, 1, 3], 2, in_file_order) == pytest.approx(4 / 12)
    assert padding_share([1, 3, 1, 3], 2, lambda lengths: [0, 2, 1, 3]) == 0.0
    assert padding_share([5], 8, in_file_order) == 0.0


def test_packing_by_hand() -> None:
    """7 + 3, 6 + 4, 5: the 3 goes to the 7, where it leaves the least room."""
    assert packed_sequences([3, 4, 5, 6, 7], 10) == 3
    assert packed_sequences([10, 10], 10) == 2
    assert packed_sequences([1] * 25, 10) == 3
    assert packed_sequences([], 10) == 0


def test_the_proposed_length_is_the_smallest_multiple_of_64_that_is_enough() -> None:
    lengths = [100] * 98 + [200] + [900]
    assert suggest(lengths, 0.99) == 256
    assert suggest(lengths, 0.98) == 128
    assert suggest(lengths, 1.0) == 960
    assert suggest([64], 1.0) == 64


def test_candidates_end_with_the_first_that_holds_everything() -> None:
    assert candidates(summarise([700])) == [128, 192, 256, 384, 512, 768]
    assert candidates(summarise([768])) == [128, 192, 256, 384, 512, 768]
    assert candidates(summarise([3])) == [128]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_row_is_as_long_as_sft_makes_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["yes", "", "no <|im_end|>"])
    found = list(row_lengths(tokenizer(), RowsConfig(path=str(path)), ModelConfig(name="tiny", path="embedded")))
    assert found[0] == len(encode_conversation(tokenizer(), conversation("Say it.", "yes")))
    assert [each.reason for each in found[1:] if isinstance(each, Dropped)] == [
        "empty answer",
        "the text holds the special token <|im_end|>",
    ]


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["yes", "no"])
    with path.open("a", encoding="utf-8") as file:
        file.write("not json\n")
    stream = stream_examples(RowsConfig(path=str(path)))
    assert [next(stream).id, next(stream).id] == ["r0", "r1"]  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"rows\.jsonl:3"):
        next(stream)
    with pytest.raises(UserError, match=r"rows\.jsonl:3"):
        read_examples(RowsConfig(path=str(path)))


def test_no_usable_row_is_an_error_with_its_reasons() -> None:
    dropped: list[Dropped] = []
    with pytest.raises(UserError, match=r"no row can be used \(empty answer\)"):
        collect([Dropped(reason="empty answer", row={})], dropped.append, "rows.jsonl")
    assert len(dropped) == 1


# -- the stage ---------------------------------------------------------------------------------------------------------


def test_the_stage_writes_tables_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), ["yes", "no", "maybe " * 20, ""])
    assert run_command("lengths", ["+model=tiny", "data.path=rows.jsonl", "candidates=16,1000"]) == 0
    folder = tmp_path / "runs/default/lengths"
    with (folder / "lengths.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert sum(int(line["count"]) for line in table) == int(table[-1]["rows_up_to"]) == 3
    assert float(table[-1]["share"]) == 1.0
    assert [int(line["length"]) for line in table] == sorted(int(line["length"]) for line in table)
    with (folder / "max_length.csv").open(encoding="utf-8") as file:
        costs = list(csv.DictReader(file))
    assert [line["max_length"] for line in costs] == ["16", "1000"]
    assert int(costs[1]["rows_dropped"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["rows"] == 3
    assert manifest["dropped"] == {"empty answer": 1}
    page = (folder / "lengths.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<script" not in page
    out = capsys.readouterr().out
    assert "model.max_length=64 keeps" in out or "model.max_length=128 keeps" in out


def test_bad_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("lengths", ["data.path=x.jsonl", "batch_size=0"]) == 2
    assert "batch_size" in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("hotpotqa/dev-distractor-350.jsonl", 80),
        pytest.param("mods/example.json", 80, marks=pytest.mark.slow),  # loads the tokenizer twice more
    ],
)
def test_real_rows_with_the_real_tokenizer_of_qwen_7b(
    file: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["+model=qwen7b", f"model.path={DATA / 'qwen-7b-chat'}"]  # a tokenizer and a config.json: no weights
    given = [*model, f"data.path={DATA / file}", f"data.limit={rows}"]
    assert run_command("lengths", [*given, "name=counted"]) == 0
    found = json.loads((tmp_path / "runs/default/counted/manifest.json").read_text(encoding="utf-8"))["metrics"]
    config: Any = load_config("lengths", given)
    examples, _ = read_examples(config.data)
    real = load_tokenizer(config.model)
    turns = [[*each.prompt, *each.completion] for each in examples if isinstance(each, ChatExample)]
    counted = [len(encode_conversation(real, each)) for each in turns]
    assert found["rows"] == len(counted) == rows
    assert (found["longest"], found["tokens"]) == (max(counted), sum(counted))
