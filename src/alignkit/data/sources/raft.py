"""RAFT rows (Zhang et al., 2024, arXiv 2403.10131): a question, documents of which one may answer it, and an answer.

The answer reasons step by step, quotes the document between `##begin_quote##` and `##end_quote##`, and ends with
`<ANSWER>:` and the final answer. The rows that go around are noisy: answers without a final one, documents of three
words, questions that are refusals, quotes that stand nowhere, ids that start anew every few rows, and `context` as the
printed form of an array. Each of these is dropped with its reason, flagged, or mended.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from pydantic import BaseModel

from alignkit.core.records import ChatExample, Dropped, Message, QAExample
from alignkit.data.sources import conversations
from alignkit.data.sources.raw import RawRow

BEGIN_QUOTE, END_QUOTE = "##begin_quote##", "##end_quote##"
FINAL_ANSWER = "<ANSWER>:"
BEGIN_DOCUMENT, END_DOCUMENT = "<DOCUMENT>", "</DOCUMENT>"
STOP = "<STOP>"
"""Ends a completion in RAFT's completion format."""
ROW_FIELDS = ("question", "oracle_context", "cot_answer")
"""Fields of a row in RAFT's own format; `instruction` or `context` has the documents."""
EVALUATION_FIELDS = ("question", "context", "gold_final_answer")
MIN_CHARACTERS = 40
"""A shorter document answers nothing."""

_REFUSALS = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable)|\bI (?:cannot|can't)\b|\bas an AI\b"
    r"|\bunable to (?:answer|provide|determine|generate)\b"
    r"|\b(?:please|kindly) provide (?:a|an|more|the|me|your|further|additional)\b|\byour request seems\b"
    r"|\b(?:context|document|text|passage|statement|excerpt)\b[^.?!]{0,60}\b(?:insufficient|incomplete|unclear"
    r"|(?:(?:does|is) not|doesn't|isn't) (?:say|specify|mention|state|answer|provide|contain|include|give"
    r"|clear|sufficient|enough|complete))\b"
    r"|\bnot (?:\w+ )?(?:specified|mentioned|stated|provided|given|enough information) (?:in|by) the (?:\w+ )?"
    r"(?:context|document|text|passage|statement|excerpt)\b"
    r"|\b(?:insufficient|not enough) (?:context|information)\b|\bimpossible to (?:answer|generate|determine)\b"
    r"|\bcannot be (?:answered|determined)\b"
    r"|\bbitte geben Sie\b|\btut mir leid\b"
    r"|\b(?:bereitgestellte|gegebene)[nr]? (?:Kontext|Text)\b[^.?!]{0,40}\b(?:nicht|unklar|unvollständig|ungültig)\b"
    r"|抱歉|对不起|请提供|我无法|无法(?:回答|确定|得知)|(?:文档|文中|文本|原文|材料)(?:中)?(?:没有|并未|未)|無法回答",
    re.IGNORECASE,
)
_QUOTATION_MARKS = "\"'`“”„‘’«»「」"
_REPEATED_ID = re.compile(r"seed_task_\d+")


class _RaftRow(BaseModel):
    question: str
    oracle_context: str
    cot_answer: str
    instruction: str = ""
    context: Any = None
    parents: list[str] = []
    flags: list[str] = []
    source: str = "raft"


class _Evaluation(BaseModel):
    question: str
    context: str
    gold_final_answer: str
    parents: list[str] = []
    source: str = "raft"


def read_row(raw: RawRow, *, quotes: str = "flag") -> ChatExample | Dropped:
    """An example to learn from: the documents and the question, and the whole answer.

    An answer that does not quote its document word for word is flagged; `quotes="drop"` drops the row. One that says
    that the document has no answer is flagged, too. The question is that of the field `question`: where rows were
    corrected by hand, `instruction` still has the old one.
    """
    if quotes not in ("flag", "drop"):
        raise ValueError(f"quotes must be 'flag' or 'drop', not {quotes!r}")
    row = raw.record(_RaftRow)
    documents, problem = _documents(row), _problem(row)
    if problem or not documents:
        return raw.drop(problem or "no documents")
    flags = list(row.flags)
    if (doubt := _unproven(row)) is not None:
        if quotes == "drop":
            return raw.drop(doubt)
        flags.append(doubt)
    if refuses(final_answer(row.cot_answer) or ""):
        flags.append("the answer is a refusal")
    if row.instruction and row.instruction.rpartition(END_DOCUMENT)[2].strip() != row.question.strip():
        flags.append("the instruction asked another question")
    example = {
        "id": _id(raw, row),
        "parents": row.parents if _id(raw, row) == raw.id else [raw.id],
        "prompt": [Message(role="user", content=instruction(documents, row.question))],
        "completion": [Message(role="assistant", content=row.cot_answer)],
        "source": row.source,
        "flags": list(dict.fromkeys(flags)),
    }
    return ChatExample.model_validate(example)


def read_question(raw: RawRow) -> QAExample | Dropped:
    """The same row as a question: the statement is the documents, the answer the final one."""
    row = raw.record(_RaftRow)
    documents, problem = _documents(row), _problem(row)
    if problem or not documents:
        return raw.drop(problem or "no documents")
    return QAExample(
        id=_id(raw, row),
        parents=row.parents if _id(raw, row) == raw.id else [raw.id],
        instruction=tagged(documents).strip(),
        input=row.question,
        output=final_answer(row.cot_answer) or "",
        source=row.source,
    )


def read_evaluation(raw: RawRow) -> QAExample | Dropped:
    """A row of RAFT's evaluation format."""
    row = raw.record(_Evaluation)
    if not row.question.strip():
        return raw.drop("empty question")
    if not row.gold_final_answer.strip():
        return raw.drop("empty answer")
    return QAExample(
        id=raw.id,
        parents=row.parents,
        instruction=row.context.strip(),
        input=row.question,
        output=row.gold_final_answer,
        source=row.source,
    )


def read_prompt_and_completion(raw: RawRow, *, stop: str = STOP) -> ChatExample | Dropped:
    """A chat example; one in RAFT's completion format loses its stop text and must have a final answer.

    The stop text stands in for an end-of-turn token, which the chat template adds anyway.
    """
    prompt, completion = raw.fields["prompt"], raw.fields["completion"]
    if not (isinstance(prompt, str) and isinstance(completion, str) and prompt.startswith(BEGIN_DOCUMENT)):
        return conversations.read_prompt_and_completion(raw)
    answer = completion.rstrip()
    answer = answer.removesuffix(stop).rstrip() if stop else answer
    if not final_answer(answer):
        return raw.drop("no <ANSWER>")
    fields = {**raw.fields, "completion": answer}
    return conversations.read_prompt_and_completion(RawRow(raw.place, raw.id, fields))


# -- the parts of a row ------------------------------------------------------------------------------------------------


def tagged(documents: Sequence[str]) -> str:
    """Documents as RAFT shows them, each in its tags on a line of its own."""
    return "".join(f"{BEGIN_DOCUMENT}{text}{END_DOCUMENT}\n" for text in documents)


def instruction(documents: Sequence[str], question: str) -> str:
    """What the model is asked: the documents, then the question."""
    return tagged(documents) + question


def final_answer(answer: str) -> str | None:
    """What stands behind the last `<ANSWER>:`; None without one."""
    _, marker, final = answer.rpartition(FINAL_ANSWER)
    return final.strip() if marker else None


def quotations(answer: str) -> list[str]:
    """What an answer quotes, without the quotation marks around it; a quote without an end reaches to the end."""
    begun = answer.split(BEGIN_QUOTE)[1:]
    return [part.partition(END_QUOTE)[0].strip().strip(_QUOTATION_MARKS).strip() for part in begun]


def stands_in(quote: str, document: str) -> bool:
    """Whether a quote stands in a document word for word; white space does not count."""
    bare = without_space(quote)
    return bool(bare) and bare in without_space(document)


def without_space(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def refuses(text: str) -> bool:
    """Whether a text says that there is nothing to say, in English, German or Chinese. A list of phrases, no more."""
    return bool(_REFUSALS.search(text))


def _problem(row: _RaftRow) -> str | None:
    """Why a row is of no use; None when it is."""
    if not row.question.strip():
        return "empty question"
    if refuses(row.question):
        return "the question is a refusal"
    if len(row.oracle_context.strip()) < MIN_CHARACTERS:
        return f"gold document shorter than {MIN_CHARACTERS} characters"
    return None if final_answer(row.cot_answer) else "no <ANSWER>"


def _unproven(row: _RaftRow) -> str | None:
    """What is wrong with the quotes of an answer; None when all stand in the gold document."""
    quoted = quotations(row.cot_answer)
    if not quoted:
        return "no quote"
    return None if all(stands_in(quote, row.oracle_context) for quote in quoted) else "quote not verbatim"


def _documents(row: _RaftRow) -> list[str]:
    """The documents in their order: from the instruction, else from the context, whatever form it has."""
    if END_DOCUMENT in row.instruction:
        parts = row.instruction.split(BEGIN_DOCUMENT)[1:]
        return [part.rpartition(END_DOCUMENT)[0] for part in parts]
    context = row.context
    if isinstance(context, str):
        context = _printed(context)
    if isinstance(context, dict):
        context = context.get("sentences")
    return _texts(context)


def _texts(value: Any) -> list[str]:
    """All texts of nested lists, in order."""
    if isinstance(value, str):
        return [value]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, list) else []


def _printed(text: str) -> Any:
    """What a printed dictionary or list held, `array([...])` counting as its list; the text when it is none.

    The text is parsed, never evaluated.
    """
    try:
        return _plain(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _plain(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_plain(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return {_plain(key): _plain(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "array" and node.args:
        return _plain(node.args[0])
    raise ValueError("not a printed value")


def _id(raw: RawRow, row: _RaftRow) -> str:
    """The row's id; the reference counts `seed_task_<n>` anew every few rows, so those get a mark of the content."""
    if not _REPEATED_ID.fullmatch(raw.id):
        return raw.id
    content = "\0".join((row.question, row.instruction, row.cot_answer))
    return f"{raw.id}-{sha256(content.encode()).hexdigest()[:8]}"
