"""The hand-written QA seed library: its form, its balance, and the agreement of its datasheet with a recount."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

SEED_FOLDER = Path(__file__).resolve().parents[1] / "dataset_optimization" / "seeds"
LONGEST_STRING = 800
UNANSWERABLE_WORDS = {"en": "does not say", "zh": "文中没有说明"}
UNDECIDED = {"en": "it cannot be decided", "zh": "无法判断"}
VERDICT_ENDING = {
    "en": re.compile(r"\w.*, so (yes|no|it cannot be decided)\."),
    "zh": re.compile(r"\w.*，所以(不?(?:是|能|会|可以|需要)|无法判断)。"),
}
SENTENCE_END = {"en": re.compile(r"[.?!](?=\s|$)"), "zh": re.compile(r"[。？！]")}
CHINESE_OR_FULL_WIDTH = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
HALF_WIDTH_PUNCTUATION_AFTER_CHINESE = re.compile(r"[\u4e00-\u9fff][,.?!;:()]")


class Seed(BaseModel):
    """One line of the library; a wrong type, a missing field or an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    instruction: str
    input: str
    output: str
    kind: Literal["judgmental", "non_judgmental"]
    source: Literal["alignkit-seeds"]
    domain: str
    language: Literal["en", "zh"]

    @property
    def unanswerable(self) -> bool:
        """Whether the answer says that the statement leaves the question open."""
        return UNANSWERABLE_WORDS[self.language] in self.output

    @property
    def verdict(self) -> str | None:
        """The verdict that ends the answer after its evidence, or None."""
        match = VERDICT_ENDING[self.language].fullmatch(self.output)
        return match[1] if match else None


@pytest.fixture(scope="module")
def seeds() -> list[Seed]:
    """All seeds, in the order of the file."""
    text = (SEED_FOLDER / "qa_seeds.jsonl").read_bytes().decode("utf-8")  # strict: invalid bytes raise
    assert text.endswith("\n")
    return [Seed.model_validate_json(line) for line in text.removesuffix("\n").split("\n")]


def test_size_and_coverage(seeds: list[Seed]) -> None:
    assert len(seeds) >= 72
    assert len({seed.instruction for seed in seeds}) >= 36
    domains = {seed.domain for seed in seeds}
    assert len(domains) >= 9
    groups = {(seed.domain, seed.language, seed.kind) for seed in seeds}
    assert groups == {
        (domain, language, kind)
        for domain in domains
        for language in ("en", "zh")
        for kind in ("judgmental", "non_judgmental")
    }


def test_ids_and_questions_are_unique(seeds: list[Seed]) -> None:
    assert max(Counter(seed.id for seed in seeds).values()) == 1
    assert max(Counter((seed.instruction, seed.input) for seed in seeds).values()) == 1
    for (domain, language), size in Counter((seed.domain, seed.language) for seed in seeds).items():
        ids = [seed.id for seed in seeds if (seed.domain, seed.language) == (domain, language)]
        assert ids == [f"{domain}-{language}-{number:02d}" for number in range(1, size + 1)]


def test_a_statement_belongs_to_one_domain_and_language(seeds: list[Seed]) -> None:
    owners = {(seed.instruction, seed.domain, seed.language) for seed in seeds}
    assert len(owners) == len({seed.instruction for seed in seeds})


def test_strings_are_clean(seeds: list[Seed]) -> None:
    for seed in seeds:
        for text in seed.model_dump().values():
            assert text and text == text.strip() and text.isprintable(), seed.id
            assert len(text) <= LONGEST_STRING and "\ufffd" not in text and "  " not in text, seed.id


def test_language_and_sentences(seeds: list[Seed]) -> None:
    for seed in seeds:
        ends = SENTENCE_END[seed.language]
        assert 2 <= len(ends.findall(seed.instruction)) <= 6, seed.id
        assert seed.input.endswith("?" if seed.language == "en" else "？"), seed.id
        assert len(ends.findall(seed.output)) == 1 and ends.search(seed.output[-1]), seed.id
        for text in (seed.instruction, seed.input, seed.output):
            if seed.language == "en":
                assert not CHINESE_OR_FULL_WIDTH.search(text), seed.id
            else:
                assert CHINESE_OR_FULL_WIDTH.search(text), seed.id
                assert not HALF_WIDTH_PUNCTUATION_AFTER_CHINESE.search(text), seed.id


def test_judgmental_answers_end_in_a_verdict_after_the_evidence(seeds: list[Seed]) -> None:
    for seed in seeds:
        if seed.kind == "non_judgmental":
            assert seed.verdict is None, seed.id
            continue
        assert seed.verdict is not None, seed.id
        undecided = seed.verdict == UNDECIDED[seed.language]
        assert undecided == seed.unanswerable, seed.id
        if seed.language == "zh" and not undecided:  # the verdict takes up the verb of the question
            assert seed.verdict.removeprefix("不") in seed.input, seed.id


def test_kinds_and_verdicts_are_balanced(seeds: list[Seed]) -> None:
    judgmental = [seed for seed in seeds if seed.kind == "judgmental"]
    assert 0.4 <= len(judgmental) / len(seeds) <= 0.6
    for language, negative in (("en", "no"), ("zh", "不")):
        decided = [seed.verdict or "" for seed in judgmental if seed.language == language and not seed.unanswerable]
        share_of_no = sum(verdict.startswith(negative) for verdict in decided) / len(decided)
        assert 0.4 <= share_of_no <= 0.6, language


def test_every_domain_has_an_unanswerable_question_in_each_language(seeds: list[Seed]) -> None:
    with_unanswerable = {(seed.domain, seed.language) for seed in seeds if seed.unanswerable}
    assert with_unanswerable == {(seed.domain, seed.language) for seed in seeds}


def count_row(head: str, group: list[Seed]) -> str:
    """Format one row of the datasheet's table for the seeds of a group."""
    kinds = Counter(seed.kind for seed in group)
    statements = len({seed.instruction for seed in group})
    unanswerable = sum(seed.unanswerable for seed in group)
    counts = (statements, kinds["judgmental"], kinds["non_judgmental"], unanswerable, len(group))
    return f"| {head} | " + " | ".join(str(count) for count in counts) + " |"


def test_the_table_of_the_datasheet_equals_the_recount(seeds: list[Seed]) -> None:
    groups: dict[tuple[str, str], list[Seed]] = {}
    for seed in seeds:
        groups.setdefault((seed.domain, seed.language), []).append(seed)
    expected = [count_row(f"{domain} | {language}", group) for (domain, language), group in groups.items()]
    expected.append(count_row("all | both", seeds))

    datasheet = (SEED_FOLDER / "DATASHEET.md").read_text(encoding="utf-8")
    table = datasheet.split("|---|---|---:|---:|---:|---:|---:|\n")[1].split("\n\n")[0].splitlines()
    assert table == expected, "the table should read:\n" + "\n".join(expected)
