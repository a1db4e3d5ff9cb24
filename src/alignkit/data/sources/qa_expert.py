"""QA-Expert's records: a question, the sub-questions it falls into, and the answer to each from a paragraph of its own.

Two forms are about, and both are read: the older has `src`; the newer has `multihop`, `tag` and `meta_info`, too.
Nothing is lost between reading a record and writing it: fields that are not named here stay in their place.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from alignkit.core.records import ChatExample, Dropped, FunctionCall, Message, QAExample, Row, ToolCall
from alignkit.data.sources.raw import RawRow

FIELDS = ("question", "sub_questions", "final_answer")
VERDICTS = ("yes", "no")
RETRIEVE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "retrieve",
        "description": "Find a paragraph that helps to answer a question.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "The question to find a paragraph for."}},
            "required": ["query"],
        },
    },
}
"""The schema of the function that finds a paragraph."""
_SUMMARY = "Summary:"


class SubQuestion(BaseModel):
    """A question that one paragraph answers, or that `paragraph` leaves open although it was found for it.

    `answer` is the short answer, `long_answer` the whole one.
    """

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)

    question: str
    paragraph: str
    long_answer: str
    answer: str | None = None
    unanswerable: bool | None = None


class MultihopExample(Row):
    """A question that is answered by way of `sub_questions`: `final_answer` whole, `answer` short."""

    question: str
    sub_questions: list[SubQuestion]
    final_answer: str
    answer: str | None = None
    multihop: bool | None = None
    src: str | None = None
    tag: str | None = None
    meta_info: dict[str, Any] = Field(default_factory=dict)

    @property
    def takes_several_steps(self) -> bool:
        """The newer form says so; in the older one it is a question with several sub-questions."""
        return self.multihop if self.multihop is not None else len(self.sub_questions) > 1


def read_record(raw: RawRow) -> MultihopExample | Dropped:
    """A record of either form."""
    example = raw.record(MultihopExample, id=raw.id)
    if not example.question.strip():
        return raw.drop("empty question")
    if not example.sub_questions:
        return raw.drop("no sub-question")
    return example


def read_question(raw: RawRow) -> QAExample | Dropped:
    """The record as one question: the statement is all its paragraphs, the answer the final one."""
    example = read_record(raw)
    if isinstance(example, Dropped):
        return example
    short = (example.answer or "").strip().casefold()
    return QAExample(
        id=example.id,
        parents=example.parents,
        instruction="\n".join(dict.fromkeys(each.paragraph for each in example.sub_questions)),
        input=example.question,
        output=example.final_answer,
        kind="judgmental" if short in VERDICTS else "non_judgmental" if short else None,
        source=_source(example),
    )


def read_conversation(raw: RawRow) -> ChatExample | Dropped:
    """The record as a search in steps, of which everything that the assistant says is to be learned.

    For each sub-question the assistant says what it found out before, if anything, and retrieves; the tool returns the
    paragraph. The last turn gives the last sub-answer and the final answer. A question that is its own only step is
    retrieved as it stands and answered.
    """
    example = read_record(raw)
    if isinstance(example, Dropped):
        return example
    steps = example.sub_questions
    if not example.final_answer.strip():
        return raw.drop("empty answer")
    if any(not step.question.strip() for step in steps):
        return raw.drop("empty sub-question")
    if len(steps) == 1 and not example.takes_several_steps:
        queries, last = [example.question], example.final_answer
    else:
        final = example.final_answer.strip()
        summary = final if final.startswith(_SUMMARY) else f"{_SUMMARY} {final}"
        queries, last = [step.question for step in steps], f"{steps[-1].long_answer}\n{summary}".strip()
    said = ["", *(step.long_answer for step in steps[:-1])]
    completion: list[Message] = []
    for number, (text, query, step) in enumerate(zip(said, queries, steps, strict=True), 1):
        identity = f"call{number:05d}"  # nine characters, as some chat templates demand
        call = ToolCall(id=identity, function=FunctionCall(name="retrieve", arguments={"query": query}))
        completion.append(Message(role="assistant", content=text, tool_calls=[call]))
        completion.append(Message(role="tool", content=step.paragraph, name="retrieve", tool_call_id=identity))
    return ChatExample(
        id=example.id,
        parents=example.parents,
        prompt=[Message(role="user", content=example.question)],
        completion=[*completion, Message(role="assistant", content=last)],
        tools=[RETRIEVE],
        source=_source(example),
    )


def _source(example: MultihopExample) -> str:
    return example.tag or example.src or "qa-expert"


def record(example: MultihopExample) -> dict[str, Any]:
    """The record to write: exactly the fields that were read or set, in QA-Expert's names, and the row's id."""
    return example.model_dump(mode="json", exclude_unset=True)
