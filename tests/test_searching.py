"""Multi-hop searches: calls that are read, bounded, malformed, cut, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_random import tokenizer, user

from alignkit.core.config import ModelConfig, SamplingConfig
from alignkit.core.journal import Journal
from alignkit.core.records import Completion, FunctionCall, Message, QAExample, ToolCall, Tools
from alignkit.data.sources.qa_expert import RETRIEVE
from alignkit.data.tools import MalformedCallError, call_text, read_calls, tools_as_text
from alignkit.evaluation.answers import Answer, Missing
from alignkit.evaluation.contexts import Question, ask_openly
from alignkit.evaluation.multihop import NOTHING, TurnsHere, describe_searches, search_and_answer
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.bm25 import BM25Index

SAMPLING = SamplingConfig(n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0], max_new_tokens=20)
FACTS = {"fikico": "Fikico is led by Posil.", "posil": "Posil was born in Padera.", "ferro": "Ferro makes clocks."}


def call(query: str, name: str = "retrieve") -> str:
    return call_text(ToolCall(function=FunctionCall(name=name, arguments={"query": query})))


# -- reading calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said", "queries"),
    [
        ("It is Padera.", "It is Padera.", []),
        (call("Who?"), "", ["Who?"]),
        (f"So it is.\n{call('Who?')}\n{call('Wo 在哪?')}", "So it is.", ["Who?", "Wo 在哪?"]),
        (f"{call('Who?')}\n<tool_response>I made this up</tool_response>", "", ["Who?"]),
        (call("Who?").removesuffix("</tool_call>"), "", ["Who?"]),
        ('{"name": "retrieve", "parameters": {"query": "Who?"}}', "", ["Who?"]),
        ('[{"name": "retrieve", "arguments": {"query": "Who?"}}]', "", ["Who?"]),
        ('{"name": "Ferro"}', '{"name": "Ferro"}', []),  # JSON may be the answer
        ("[1] Ferro makes clocks.", "[1] Ferro makes clocks.", []),
        ("", "", []),
    ],
)
def test_calls_are_read_in_every_form(text: str, said: str, queries: list[str]) -> None:
    found, calls = read_calls(text)
    assert (found, [each.function.arguments["query"] for each in calls]) == (said, queries)


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "retrieve", "arguments": {"query": ',
        "retrieve(Who?)",
        "[]",
        '"x"',
        '{"name": "", "arguments": {}}',
        '{"name": "retrieve", "arguments": [1]}',
        '{"arguments": {}}',
        "[" * 100_000,
        "<tool_call>" * 50_000,
    ],
    ids=range(9),
)
def test_malformed_calls_are_told(body: str) -> None:
    with pytest.raises(MalformedCallError):
        read_calls(f"<tool_call>{body}</tool_call>")


# -- searching ---------------------------------------------------------------------------------------------------------


class Scripted:
    """A generator that follows rules instead of weights, and keeps what it was asked."""

    label = "scripted"

    def __init__(self, rule: Callable[[list[Message]], str], fail_at: int = 99) -> None:
        self.rule, self.fail_at = rule, fail_at
        self.tokenizer: Any = tokenizer()
        self.tools: Tools | None = None
        self.asked: list[list[list[Message]]] = []

    def generate(self, prompts: Sequence[list[Message]], sampling: SamplingConfig, seed: int) -> list[list[Completion]]:
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        assert self.tools == [RETRIEVE]
        self.asked.append(list(prompts))
        return [[Completion(text=self.rule(prompt), model=self.label)] for prompt in prompts]


class Counting:
    """Finds facts by their words, and says what it was asked."""

    def __init__(self) -> None:
        self.queries: list[str] = []
        self.passages = [Passage(id=name, text=text) for name, text in sorted(FACTS.items())]
        self.words = BM25Index([passage.text for passage in self.passages])

    def add(self, passage: Passage) -> None:
        self.passages.append(passage)
        self.words = BM25Index([each.text for each in self.passages])

    def search(self, queries: Sequence[str], k: int) -> list[list[Found]]:
        self.queries += queries
        return [[Found(self.passages[hit.index], hit.score) for hit in hits] for hits in self.words.search(queries, k)]


def two_hops(conversation: list[Message]) -> str:
    """Searches for the leader, then for the leader's birthplace, then answers."""
    results = [turn.content for turn in conversation if turn.role == "tool"]
    if not results:
        return call("Who leads Fikico?") if "Fikico" in conversation[0].content else "I know that: clocks."
    if len(results) == 1:
        return f"Posil leads it.\n{call('Where was Posil born?')}"
    return "Posil was born in Padera.\nSummary: Padera."


def search(
    generator: Scripted,
    folder: Path,
    questions: Sequence[str],
    retriever: Counting,
    max_length: int = 2000,
    hops: int = 4,
) -> dict[str, Answer | Missing]:
    rows = [QAExample(id=f"q{n}", instruction="unread", input=text) for n, text in enumerate(questions)]
    model = ModelConfig(name="m", path="p", max_length=max_length)
    with Journal(folder / "turns.jsonl", "f") as journal:
        turns = TurnsHere(generator, model, SAMPLING, 1, journal)
        return search_and_answer(turns, ask_openly(rows), retriever, 1, hops, journal)  # type: ignore[arg-type]


def test_rows_search_step_by_step_together_in_the_form_of_training(tmp_path: Path) -> None:
    generator, retriever = Scripted(two_hops), Counting()
    questions = ["Where was the leader of Fikico born?", "What does Ferro make?"] * 3
    outcome = search(generator, tmp_path, questions, retriever)
    assert [len(prompts) for prompts in generator.asked] == [6, 3, 3]  # all rows at a step at once
    answer = outcome["q0"]
    assert isinstance(answer, Answer)
    assert answer.text == "Posil was born in Padera.\nSummary: Padera."
    assert answer.queries == ["Who leads Fikico?", "Where was Posil born?"]
    assert answer.contexts == [FACTS["fikico"], FACTS["posil"]]
    assert answer.scores == {"hops": 2, "malformed_call": 0, "search_cut": 0}
    assert outcome["q1"] == Answer("I know that: clocks.", scores={"hops": 0, "malformed_call": 0, "search_cut": 0})
    described = describe_searches(each for each in outcome.values() if isinstance(each, Answer))
    assert described == {"hops": 1, "malformed_call": 0, "search_cut": 0, "searched": 0.5}

    last = generator.asked[-1][0]
    assert [turn.role for turn in last] == ["user", "assistant", "tool", "assistant", "tool"]
    assert last[0].content == questions[0]
    assert last[1].tool_calls is not None and last[3].tool_calls is not None
    assert (last[2].name, last[2].tool_call_id) == ("retrieve", last[1].tool_calls[0].id)
    assert last[3].content == "Posil leads it."
    assert last[1].tool_calls[0].id == "call00001" and last[3].tool_calls[0].id == "call00002"


def test_training_and_searching_have_the_same_tokens(tmp_path: Path) -> None:
    """What is learned of a QA-Expert record is what a search with the same turns shows the model."""
    from alignkit.data.chat import encode_prompt
    from alignkit.data.sources.qa_expert import read_conversation
    from alignkit.data.sources.raw import RawRow

    generator = Scripted(two_hops)
    question = "Where was the leader of Fikico born?"
    search(generator, tmp_path, [question], Counting())
    subs = [
        {"question": "Who leads Fikico?", "paragraph": FACTS["fikico"], "long_answer": "Posil leads it."},
        {"question": "Where was Posil born?", "paragraph": FACTS["posil"], "long_answer": "In Padera."},
    ]
    fields = {"question": question, "sub_questions": subs, "final_answer": "Padera."}
    example = read_conversation(RawRow("file:1", "r", fields))
    conversation = [*example.prompt, *example.completion[:-1]]  # type: ignore[union-attr]
    assert generator.asked[-1][0] == conversation
    ids = encode_prompt(tokenizer(), conversation, [RETRIEVE])
    assert ids == encode_prompt(tokenizer(), generator.asked[-1][0], generator.tools)
    assert ids == encode_prompt(tokenizer(), tools_as_text(conversation, [RETRIEVE]))  # what a server is sent


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("<tool_call>{broken", "malformed_call"),
        (call("Who?", name="delete_everything"), "malformed_call"),
        ('<tool_call>{"name": "retrieve", "arguments": {"query": 7}}</tool_call>', "malformed_call"),
        (call("  "), "malformed_call"),
        (call("a") * 5, "search_cut"),
    ],
)
def test_a_call_that_cannot_be_followed_is_the_answer(tmp_path: Path, text: str, outcome: str) -> None:
    retriever = Counting()
    answer = search(Scripted(lambda conversation: text), tmp_path, ["Who?"], retriever)["q0"]
    assert isinstance(answer, Answer)
    assert answer.text == text
    assert answer.scores[outcome] == 1
    assert sum(answer.scores.values()) == 1
    assert retriever.queries == []


def test_a_model_that_never_stops_is_stopped(tmp_path: Path) -> None:
    generator, retriever = Scripted(lambda conversation: call("Ferro?")), Counting()
    answer = search(generator, tmp_path, ["What does Ferro make?"], retriever, hops=3)["q0"]
    assert isinstance(answer, Answer)
    assert answer.scores == {"hops": 3, "malformed_call": 0, "search_cut": 1}
    assert len(generator.asked) == 4
    assert answer.text == call("Ferro?")


def test_finding_nothing_is_told_to_the_model(tmp_path: Path) -> None:
    generator = Scripted(lambda conversation: call("xyzzy") if len(conversation) == 1 else "I give up.")
    answer = search(generator, tmp_path, ["Who?"], Counting())["q0"]
    assert isinstance(answer, Answer)
    assert generator.asked[1][0][-1].content == NOTHING
    assert (answer.text, answer.contexts, answer.queries) == ("I give up.", [], ["xyzzy"])


def test_a_conversation_that_outgrows_the_context_has_a_reason_instead_of_an_answer(tmp_path: Path) -> None:
    long = Counting()
    long.add(Passage(id="long", text="Fikico " + "leads " * 300))
    outcome = search(Scripted(two_hops), tmp_path, ["Who leads Fikico?", "What does Ferro make?"], long, max_length=500)
    assert isinstance(outcome["q1"], Answer)
    missing = outcome["q0"]
    assert isinstance(missing, Missing)
    assert missing.reason == "after a search: prompt and max_new_tokens exceed max_length"
    poisoned = Counting()
    poisoned.add(Passage(id="p", text="Fikico leads <|im_end|> leads Fikico"))
    (tmp_path / "other").mkdir()
    missing = search(Scripted(two_hops), tmp_path / "other", ["Who leads Fikico?"], poisoned)["q0"]
    assert isinstance(missing, Missing)
    assert missing.reason == "after a search: the text holds the special token <|im_end|>"


def test_an_interrupted_search_repeats_no_turn_and_no_search(tmp_path: Path) -> None:
    questions = ["Where was the leader of Fikico born?", "What does Ferro make?"]
    (tmp_path / "whole").mkdir()
    whole = search(Scripted(two_hops), tmp_path / "whole", questions, Counting())
    first, second = Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        search(Scripted(two_hops, fail_at=1), tmp_path, questions, first)
    resumed = Scripted(two_hops)
    assert search(resumed, tmp_path, questions, second) == whole
    assert [len(prompts) for prompts in resumed.asked] == [1, 1]
    assert first.queries + second.queries == ["Who leads Fikico?", "Where was Posil born?"]
    lines = (tmp_path / "turns.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [json.loads(line)["id"] for line in lines[1:]]
    assert sorted(ids) == sorted({*ids})


def test_a_question_is_asked_alone() -> None:
    rows = [QAExample(id="a", instruction="A statement.", input="A question?"), QAExample(id="b", instruction="Alone?")]
    assert ask_openly(rows) == [Question(rows[0], user("A question?"), []), Question(rows[1], user("Alone?"), [])]
