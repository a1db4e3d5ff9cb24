"""Answering by searching: the model asks for a passage, reads it, and asks again or answers.

This is how QA-Expert answers questions that no single passage answers, and its records are learned in the same form
(`data.sources.qa_expert`): the question alone, the schema of `retrieve`, a tool turn for each call. All rows are at the
same step together, so that a step is one pass of generation and one of retrieval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import mean
from typing import Any, Protocol

from alignkit.core.config import ModelConfig, SamplingConfig
from alignkit.core.journal import Journal
from alignkit.core.records import Completion, Message, Tools
from alignkit.data.sources.qa_expert import RETRIEVE
from alignkit.data.tools import MalformedCallError, read_calls, to_json
from alignkit.evaluation.answers import Answer, Missing
from alignkit.evaluation.contexts import Question
from alignkit.generation.base import Generator
from alignkit.generation.questions import unfit
from alignkit.generation.resumable import chunk_seed, generate_all
from alignkit.retrieval.base import Retriever

LOG = logging.getLogger("alignkit")

SEARCH_SCORES = ("hops", "malformed_call", "search_cut")
"""What is known of a search: its calls, whether it ended in one that cannot be read, or in one too many."""
NOTHING = "Nothing was found."
"""The result of a search that finds nothing."""


class ToolUser(Generator, Protocol):
    """A generator that offers the functions `tools` in every prompt (`HFGenerator`)."""

    tokenizer: Any
    tools: Tools | None


@dataclass
class Search:
    """The search for one row: the conversation so far, what was searched for, and what was found."""

    id: str
    messages: list[Message]
    queries: list[str] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)

    def answer(self, completion: Completion, *, malformed_call: bool = False, search_cut: bool = False) -> Answer:
        """A turn as the answer, with the trace of the search."""
        outcome = (len(self.queries), malformed_call, search_cut)
        scores = dict(zip(SEARCH_SCORES, map(float, outcome), strict=True))
        return Answer(completion.text, completion.finished, self.contexts, self.queries, scores)


WriteTurns = Callable[[int, Sequence[Search]], Mapping[str, Completion | Missing]]
"""From the number of a step and the searches that go on to their next turns by row id, or why there is none."""


@dataclass(frozen=True)
class Turn:
    """A turn to be generated."""

    id: str
    prompt: list[Message]


@dataclass(frozen=True)
class TurnsHere:
    """Turns of a model on this machine. The journal holds each; one that would outgrow `model.max_length` has none."""

    generator: ToolUser
    model: ModelConfig
    sampling: SamplingConfig
    seed: int
    journal: Journal

    def __call__(self, step: int, going: Sequence[Search]) -> dict[str, Completion | Missing]:
        """The next turn of every search."""
        self.generator.tools = [RETRIEVE]
        found: dict[str, Completion | Missing] = {}
        for search in going:
            if problem := unfit(self.generator.tokenizer, search.messages, self.model, self.sampling, [RETRIEVE]):
                found[search.id] = Missing(*problem)
        turns = [Turn(f"{step}:{each.id}", list(each.messages)) for each in going if each.id not in found]
        written = generate_all(self.generator, turns, self.sampling, chunk_seed(self.seed, step), self.journal)
        return found | {each.id: written[f"{step}:{each.id}"][0] for each in going if each.id not in found}


def search_and_answer(
    write: WriteTurns,
    questions: Sequence[Question],
    retriever: Retriever,
    k: int,
    hops: int,
    journal: Journal,
) -> dict[str, Answer | Missing]:
    """Answers by row id, each after at most `hops` searches for `k` passages, or why there is none.

    The journal holds what every search found, so that a killed search goes on with the same passages.
    """
    going = [Search(question.id, list(question.prompt)) for question in questions]
    outcome: dict[str, Answer | Missing] = {}
    for step in count():
        written = write(step, going)
        for search in going:
            said = written[search.id]
            if isinstance(said, Missing):
                outcome[search.id] = Missing(f"{'after a search: ' * bool(step)}{said.reason}", said.detail)
                continue
            turn = read_turn(search, said, hops)
            if isinstance(turn, Answer):
                outcome[search.id] = turn
            else:
                search.messages.append(turn)
        going = [search for search in going if search.id not in outcome]
        if not going:
            return outcome
        LOG.info("step %d: %d rows are answered, %d search", step + 1, len(outcome), len(going))
        find(going, retriever, k, step, journal)
    raise AssertionError  # every step of a row makes a call, and `hops` bounds them


def read_turn(search: Search, completion: Completion, hops: int) -> Message | Answer:
    """The turn that calls `retrieve`, or the answer.

    A turn without a call is the answer. So is one whose call cannot be read or is not for `retrieve` with a query
    (score `malformed_call`), and one that would search more than `hops` times (score `search_cut`): its text is kept
    as it stands, since nobody would mend it in use either.
    """
    try:
        said, calls = read_calls(completion.text)
    except MalformedCallError:
        return search.answer(completion, malformed_call=True)
    if not calls:
        return search.answer(completion)
    queries = [call.function.arguments.get("query") for call in calls if call.function.name == "retrieve"]
    if len(queries) < len(calls) or not all(isinstance(query, str) and query.strip() for query in queries):
        return search.answer(completion, malformed_call=True)
    if len(search.queries) + len(calls) > hops:
        return search.answer(completion, search_cut=True)
    numbered = [  # nine characters, as some chat templates demand, and as in training
        call.model_copy(update={"id": f"call{number:05d}"})
        for number, call in enumerate(calls, len(search.queries) + 1)
    ]
    return Message(role="assistant", content=said, tool_calls=numbered)


def find(searches: Sequence[Search], retriever: Retriever, k: int, step: int, journal: Journal) -> None:
    """Search for what the last turns ask for, all at once, and put what is found behind them."""
    wanted = [search for search in searches if _key(step, search) not in journal.done]
    found = iter(retriever.search([query for search in wanted for query in _queries(search)], k))
    for search in wanted:
        results = [[hit.passage.text for hit in next(found)] for _ in _queries(search)]
        journal.add(_key(step, search), results)
    for search in searches:
        calls, queries = search.messages[-1].tool_calls or [], _queries(search)
        for call, query, texts in zip(calls, queries, journal.done[_key(step, search)], strict=True):
            content = "\n\n".join(texts) or NOTHING
            search.messages.append(Message(role="tool", content=content, name="retrieve", tool_call_id=call.id))
            search.queries.append(query)
            search.contexts += texts


def describe_searches(answers: Iterable[Answer]) -> dict[str, float]:
    """Means over the answers of one system: searches, and the shares that searched, called wrongly, and were cut."""
    found = list(answers)
    means = {name: mean(answer.scores.get(name, 0.0) for answer in found) for name in SEARCH_SCORES}
    return means | {"searched": mean(float(bool(answer.queries)) for answer in found)}


def _key(step: int, search: Search) -> str:
    """What the journal calls the passages of a step: a turn that was written anew may search for something else."""
    return f"{step}?{search.id}?{to_json(_queries(search))}"


def _queries(search: Search) -> list[str]:
    return [str(call.function.arguments["query"]) for call in search.messages[-1].tool_calls or ()]
