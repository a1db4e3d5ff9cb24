"""What the recipe `documents` asks for: questions about pages, their scores, and answers; and what is no question."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, Field

from alignkit.core.records import DocumentPage, Message
from alignkit.data.wording import QUESTION_MARKS
from alignkit.teacher.client import Request
from alignkit.teacher.prompts import render

QUESTION_CHARACTERS = 500
OUTLINE_CHARACTERS = 80
"""Of a page, at least, in an outline; where there is no room for so much of every page, some pages are left out."""

_NUMBERING = re.compile(r"^\s*(?:\(?\d{1,3}[.):]|[-*•])\s+")
_REFUSAL = re.compile(
    r"\W*(i'?m sorry|i’m sorry|i am sorry|sorry\b|i apologi[sz]e|as an ai\b|your request\b|please provide\b"
    r"|i (cannot|can't|can’t|am unable to|am not able to) (help|assist|provide|generate|write|answer|create|comply|do)"
    r"|could you (please )?(clarify|provide|specify|rephrase|share)|mi dispiace|es tut mir leid|désolé|lo siento"
    r"|很?抱歉|对不起|不好意思|我(无法|不能)(回答|提供|帮助|完成|生成)|作为(一个|一名)?(ai|人工智能|语言模型))",
    re.IGNORECASE,
)


class Questions(BaseModel):
    """The questions about a window."""

    questions: list[str]


class Score(BaseModel):
    """How much a question is about the pages, and how much of its answer they hold, 1 to 10."""

    relevance: int = Field(ge=1, le=10, strict=True)
    coverage: int = Field(ge=1, le=10, strict=True)


class Scores(BaseModel):
    """One score a question, in their order."""

    scores: list[Score]


class GlobalScore(BaseModel):
    """How much a question matters to the document as a whole, 1 to 10."""

    global_relevance: int = Field(ge=1, le=10, strict=True)


class PageAnswer(BaseModel):
    """An answer, empty where the pages hold none, and the pages it rests on."""

    answer: str
    cited: list[int] = []


def questions_request(pages: Sequence[DocumentPage], topic: str, count: int) -> Request:
    """Ask for at most `count` questions about the pages, all on `topic` unless it is empty."""
    return _request("documents_questions", Questions, pages=_shown(pages), topic=topic, count=count)


def scores_request(pages: Sequence[DocumentPage], questions: Sequence[str]) -> Request:
    """Ask for the relevance and coverage of the questions about the pages, on the text of the pages."""

    def check(found: Scores) -> str | None:
        if len(found.scores) == len(questions):
            return None
        return f"not one score a question: {len(found.scores)} for {len(questions)}"

    request = _request("documents_scores", Scores, pages=_shown(pages), questions=list(questions))
    return replace(request, temperature=0.0, check=check)


def global_request(document: str, outline: Sequence[dict[str, str | int]], question: str) -> Request:
    """Ask for the global relevance of a question."""
    request = _request("documents_global", GlobalScore, document=document, outline=list(outline), question=question)
    return replace(request, temperature=0.0)


def answer_request(pages: Sequence[DocumentPage], question: str) -> Request:
    """Ask for the answer that the pages give."""
    numbers = {page.page for page in pages}

    def check(found: PageAnswer) -> str | None:
        if strange := sorted(set(found.cited) - numbers):
            return f"cites a page that was not shown: {', '.join(map(str, strange))}"
        if found.answer.strip() and not found.cited:
            return "cites no page"
        return None

    request = _request("documents_answer", PageAnswer, pages=_shown(pages), question=question)
    return replace(request, temperature=0.0, check=check)


def outline(pages: Sequence[DocumentPage], characters: int) -> list[dict[str, str | int]]:
    """How the pages begin, in about `characters` in all: every page, or as many as there is room for, evenly spaced."""
    count = max(1, min(len(pages), characters // OUTLINE_CHARACTERS))
    chosen = [pages[index * len(pages) // count] for index in range(count)]
    return [{"page": page.page, "begins": " ".join(page.text.split())[: characters // count]} for page in chosen]


def clean_question(text: str) -> str:
    """A question in one line, without the number or bullet that a teacher put before it."""
    return _NUMBERING.sub("", " ".join(text.split()))


def question_problem(question: str, text: str) -> str | None:
    """Why `question` is not one about `text`; None when it is."""
    if not question:
        return "empty question"
    if _REFUSAL.match(question):
        return "refusal"
    if not any(mark in question for mark in QUESTION_MARKS):
        return "no question mark"
    if len(question) > QUESTION_CHARACTERS:
        return "question too long"
    return None if same_script(question, text) else "another language than the text"


def answer_problem(answer: str, text: str) -> str | None:
    """Why `answer` cannot be one from `text`; None when it can."""
    if not answer:
        return "not answered by the text"
    if _REFUSAL.match(answer):
        return "refusal"
    return None if same_script(answer, text) else "another language than the text"


def same_script(written: str, text: str) -> bool:
    """Whether a fifth of the letters of `written` at least is of the script that `text` is mostly in.

    Only scripts are told apart: an English question about a German text passes, a Chinese one does not.
    """
    scripts = _scripts(text[:20_000])
    letters = _scripts(written)
    if not scripts or not letters:
        return True
    main = max(scripts, key=lambda script: scripts[script])
    return letters[main] >= 0.2 * letters.total()


def _scripts(text: str) -> Counter[str]:
    """How many letters there are of each script; Chinese and Japanese count as one."""
    scripts: Counter[str] = Counter()
    for letter, times in Counter(text).items():
        if letter.isalpha():
            script = unicodedata.name(letter, "UNKNOWN").split()[0]
            scripts["CJK" if script in ("HIRAGANA", "KATAKANA") else script] += times
    return scripts


def _shown(pages: Sequence[DocumentPage]) -> list[dict[str, str | int]]:
    return [{"page": page.page, "text": page.text} for page in pages]


def _request(prompt: str, shape: type[BaseModel], **shown: object) -> Request:
    system = Message(role="system", content=render("documents_system"))
    return Request([system, Message(role="user", content=render(prompt, **shown))], shape=shape)
