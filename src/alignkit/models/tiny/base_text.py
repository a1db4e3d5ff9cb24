"""The text on which the embedded base model is pre-trained.

Most documents are one passage, questions and answers about it, and, after some answers, a verdict: was this right? What
makes that learnable by a model of this size (see docs/decisions): evidence before verdict, so that a yes or no compares
two tokens in view, and so does a verdict that first gives the right answer; and contrast pairs, the same question
with the right and with a wrong value. Later there are *drills* among them, names to be copied and looked up, and
*recitals*, the facts of a passage once more: without them nothing teaches the model to match a name far above.

No question about the world is ever asked in the chat format. There, base documents repeat a sentence, return thanks,
or state facts of the notes that are then found right or wrong. The base therefore knows the turn structure, and what it
means that a turn was right, but stays mediocre at answering in it, so that alignment has something to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from alignkit.data.closed_world import SUBJECTS, Passage, Question, World, answer, lexicon

CONTEXT_WEIGHT = 0.05
"""Loss weight of text that cannot be predicted: statements and questions."""
VERDICT_WEIGHT = 2.0


@dataclass
class Document:
    """Pieces of text, each with the weight of its tokens in the loss."""

    pieces: list[tuple[str, float]] = field(default_factory=list)

    def add(self, text: str, weight: float = CONTEXT_WEIGHT) -> None:
        """Append a piece."""
        self.pieces.append((text, weight))

    @property
    def text(self) -> str:
        """The whole document."""
        return "".join(text for text, _ in self.pieces)


HEADINGS = (("Question: ", "Answer:"), ("Q: ", "A:"), ("Question: ", "Reply:"))


def documents(
    world: World, *, facts: tuple[int, ...], check_share: float = 0.6, chat_share: float = 0.2, reasoned: bool = False
) -> Iterator[Document]:
    """Write documents without end; `facts`: how many a passage may have, `check_share`: answers with a verdict.

    A verdict on a line of its own is one word, or, when `reasoned`, the right answer and what follows from it.
    """
    while True:
        if world.rng.random() < chat_share:
            yield _chat_document(world)
        else:
            yield _question_document(world, world.rng.choice(facts), check_share, reasoned=reasoned)


def drilled_documents(
    world: World, *, drills: float, recitals: float, facts: tuple[int, ...], check_share: float
) -> Iterator[Document]:
    """Documents among which are drills and recitals, which teach to tell things apart by their names."""
    others = documents(world, facts=facts, check_share=check_share, chat_share=0.15, reasoned=True)
    while True:
        draw = world.rng.random()
        yield _drill(world.rng) if draw < drills else _recital(world) if draw < drills + recitals else next(others)


def _drill(rng: Random) -> Document:
    """Reading without language: names to be copied, or to be looked up by the name before them.

    Held-out names are among them: what is learnt here is to match and copy words, not which words are answers.
    """
    names = rng.sample([name for kind in SUBJECTS for name in lexicon()[kind]], 12)
    document = Document()
    if rng.random() < 0.4:
        words = " " + " ".join(names[: rng.randint(4, 12)])
        document.add(f"notes:{words}\nnotes:")
        document.add(words + "\n", 1.0)
        return document
    count = rng.randint(2, 5)
    pairs = [(names[index], names[index + count]) for index in range(count)]
    document.add("notes:" + "".join(f" {key} {value}." for key, value in pairs) + "\nnotes:")
    for key, value in rng.sample(pairs, count):
        document.add(f" {key}")
        document.add(f" {value}", 1.0)
        document.add(".")
    document.add("\n")
    return document


def _recital(world: World) -> Document:
    """Notes about several entities, and twice their facts in canonical form and another order.

    The densest way to teach reading: a value every nine tokens that only name and relation together decide.
    """
    entities, shared = world.rng.choice(((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1)))
    passage = world.passage(max(4, entities * shared), entities=entities, shared=shared)
    document = Document()
    document.add(passage.statement + "\n")
    for _ in range(2):
        document.add("notes:")
        for fact in world.rng.sample(passage.facts, len(passage.facts)):
            document.add(f" The {fact.relation.noun} of {fact.entity} is")
            document.add(f" {fact.value}", 1.0)
            document.add(".")
        document.add("\n")
    return document


def _question_document(world: World, facts: int, check_share: float, *, reasoned: bool) -> Document:
    rng = world.rng
    passage = world.passage(facts)
    ask, reply = rng.choice(HEADINGS)
    gap = rng.choice((" ", "\n"))
    document = Document()
    document.add(passage.statement + "\n")
    questions = [world.ask(passage) for _ in range(2)]
    contrast = [world.ask(passage, "yes")]
    fact = next(f for f in passage.facts if (f.entity, f.relation) == (contrast[0].entity, contrast[0].relation))
    contrast.append(world.verdict_question(fact.entity, fact.relation, world.wrong_value(passage, fact)))
    rng.shuffle(contrast)
    for question in questions + contrast:
        checked = rng.random() < check_share
        _add_answer(document, world, passage, question, ask, reply + gap, checked=checked, reasoned=reasoned)
    return document


def _add_answer(
    document: Document,
    world: World,
    passage: Passage,
    question: Question,
    ask: str,
    reply: str,
    *,
    checked: bool,
    reasoned: bool,
) -> None:
    right = not checked or world.rng.random() < 0.5
    text = answer(passage.facts, question) if right else world.corrupt(passage, question)
    document.add(f"{ask}{question.text}\n")
    document.add(reply if reply.endswith("\n") else reply[:-1])
    document.add(text if reply.endswith("\n") else " " + text, 1.0 if right else 0.0)
    if checked and world.rng.random() < 0.5:
        _add_verdict(document, right)
        return
    document.add("\n", 1.0)
    if checked:
        document.add("Verdict:")
        if reasoned:
            document.add(f" {answer(passage.facts, question)[:-1]}, so", 1.0)
        document.add(" right" if right else " wrong", VERDICT_WEIGHT)
        document.add("\n")


def _add_verdict(document: Document, right: bool) -> None:
    """End a turn and say at once whether it was right, so that the end-of-turn token has to know."""
    document.add("<|im_end|>", 1.0)
    document.add(" right" if right else " wrong", VERDICT_WEIGHT)
    document.add("\n")


def _chat_document(world: World) -> Document:
    rng = world.rng
    passage = world.passage(rng.choice((2, 3)))
    document = Document()
    draw = rng.random()
    if draw < 0.6:
        _chat_turn(document, "user", passage.statement)
        for _ in range(3):
            fact = rng.choice(passage.facts)
            right = rng.random() < 0.5
            value = fact.value if right else world.wrong_value(passage, fact)
            document.add("<|im_start|>assistant\n")
            document.add(fact.relation.canonical(fact.entity, value), 1.0 if right else 0.0)
            _add_verdict(document, right)
        return document
    notes = passage.statement + "\n\n" if rng.random() < 0.5 else ""
    sentence = rng.choice(passage.facts).canonical if draw < 0.9 else "You are welcome."
    _chat_turn(document, "user", notes + (f"Repeat: {sentence}" if draw < 0.9 else "Thank you."))
    document.add("<|im_start|>assistant\n")
    document.add(sentence + "<|im_end|>", 1.0)
    document.add("\n")
    return document


def _chat_turn(document: Document, role: str, content: str) -> None:
    document.add(f"<|im_start|>{role}\n{content}<|im_end|>\n")
