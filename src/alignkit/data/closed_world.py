"""The closed world: people, places, firms, machines and courses about which short notes are written.

Every part of the offline demonstration stands on this file: the embedded model is pre-trained on text about the world,
the scripted teacher reads and grades inside it by rule, and the demo's seeds and held-out questions are drawn from it.

The world has a fixed vocabulary and a fixed grammar but no fixed facts: each passage draws its facts anew, so nothing
can be answered from memory. What is held out is therefore facts and passages; in addition a fifth of all names
(`held_out_names`) is never the *value* of a fact outside the held-out splits, so that answering with one of them cannot
have been learnt by rote.

Sentences can be read back: `read_statement` and `read_question` are the inverse of what `Passage` and `ask` write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

UNANSWERABLE = "The statement does not say."

_MONTHS = "January February March April May June July August September October November December"
_NUMBERS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `noun` names it in the canonical sentence "The <noun> of <entity> is <value>."."""

    subject: str
    noun: str
    value: str
    paraphrases: tuple[str, ...]
    questions: tuple[str, ...]
    verdict_questions: tuple[str, ...]

    def canonical(self, entity: str, value: str) -> str:
        """The one sentence in which answers state this fact."""
        return f"The {self.noun} of {entity} is {value}."

    @property
    def sentences(self) -> tuple[str, ...]:
        """All templates that state this fact, the canonical one first."""
        return (self.canonical("{e}", "{v}"), *self.paraphrases)


def _relation(subject: str, noun: str, value: str, paraphrases: str, questions: str, verdicts: str) -> Relation:
    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split("|"))

    return Relation(subject, noun, value, split(paraphrases), split(questions), split(verdicts))


RELATIONS: tuple[Relation, ...] = (
    _relation(
        "person", "birthplace", "city", "{e} was born in {v}.",
        "Where was {e} born?|What is the birthplace of {e}?",
        "Was {e} born in {v}?|Is {v} the birthplace of {e}?",
    ),
    _relation(
        "person", "employer", "firm", "{e} works for {v}.|{v} employs {e}.",
        "Who employs {e}?|Where does {e} work?",
        "Does {e} work for {v}?|Does {v} employ {e}?",
    ),
    _relation(
        "person", "job", "job", "{e} earns a living as a {v}.",
        "What is the job of {e}?|What does {e} do for a living?",
        "Is {e} a {v}?|Does {e} earn a living as a {v}?",
    ),
    _relation(
        "person", "home", "city", "{e} lives in {v}.",
        "Where does {e} live?|What is the home of {e}?",
        "Does {e} live in {v}?|Is {v} the home of {e}?",
    ),
    _relation(
        "person", "manager", "person", "{e} reports to {v}.|{v} manages {e}.",
        "Who manages {e}?|Who is the manager of {e}?",
        "Does {e} report to {v}?|Does {v} manage {e}?",
    ),
    _relation(
        "city", "mayor", "person", "{v} governs {e}.",
        "Who governs {e}?|Who is the mayor of {e}?",
        "Does {v} govern {e}?|Is {v} the mayor of {e}?",
    ),
    _relation(
        "city", "twin", "city", "{e} is twinned with {v}.",
        "Which city is {e} twinned with?|What is the twin of {e}?",
        "Is {e} twinned with {v}?|Is {v} the twin of {e}?",
    ),
    _relation(
        "city", "bus", "number", "Bus {v} serves {e}.",
        "Which bus serves {e}?|What is the bus of {e}?",
        "Does bus {v} serve {e}?|Is {v} the bus of {e}?",
    ),
    _relation(
        "city", "festival", "month", "{e} has a festival in {v}.",
        "When is the festival of {e}?|In which month does {e} have a festival?",
        "Is the festival of {e} in {v}?|Does {e} have a festival in {v}?",
    ),
    _relation(
        "firm", "head", "person", "{v} leads {e}.|{e} is led by {v}.",
        "Who leads {e}?|Who is the head of {e}?",
        "Does {v} lead {e}?|Is {e} led by {v}?",
    ),
    _relation(
        "firm", "seat", "city", "{e} is based in {v}.|{v} hosts the offices of {e}.",
        "Where is {e} based?|What is the seat of {e}?",
        "Is {e} based in {v}?|Does {v} host the offices of {e}?",
    ),
    _relation(
        "firm", "product", "product", "{e} makes {v}.",
        "What does {e} make?|What is the product of {e}?",
        "Does {e} make {v}?|Are {v} the product of {e}?",
    ),
    _relation(
        "firm", "staff", "number", "{e} has {v} workers.",
        "How many workers does {e} have?|What is the staff of {e}?",
        "Does {e} have {v} workers?|Is the staff of {e} {v}?",
    ),
    _relation(
        "machine", "maker", "firm", "{v} builds {e}.|{e} is built by {v}.",
        "Who builds {e}?|Who is the maker of {e}?",
        "Does {v} build {e}?|Is {e} built by {v}?",
    ),
    _relation(
        "machine", "weight", "number", "{e} weighs {v} tons.",
        "How many tons does {e} weigh?|What is the weight of {e}?",
        "Does {e} weigh {v} tons?|Is the weight of {e} {v}?",
    ),
    _relation(
        "machine", "colour", "colour", "{e} is painted {v}.",
        "What colour is {e}?|What is the colour of {e}?",
        "Is {e} painted {v}?|Is the colour of {e} {v}?",
    ),
    _relation(
        "machine", "operator", "person", "{v} operates {e}.|{e} is operated by {v}.",
        "Who operates {e}?|Who is the operator of {e}?",
        "Does {v} operate {e}?|Is {e} operated by {v}?",
    ),
    _relation(
        "course", "tutor", "person", "{v} teaches {e}.|{e} is taught by {v}.",
        "Who teaches {e}?|Who is the tutor of {e}?",
        "Does {v} teach {e}?|Is {e} taught by {v}?",
    ),
    _relation(
        "course", "day", "day", "{e} is held on {v}.",
        "On which day is {e} held?|What is the day of {e}?",
        "Is {e} held on {v}?|Is {v} the day of {e}?",
    ),
    _relation(
        "course", "room", "number", "{e} takes place in room {v}.",
        "In which room is {e}?|What is the room of {e}?",
        "Is {e} in room {v}?|Is {v} the room of {e}?",
    ),
    _relation(
        "course", "sponsor", "firm", "{v} pays for {e}.",
        "Who pays for {e}?|Who is the sponsor of {e}?",
        "Does {v} pay for {e}?|Is {v} the sponsor of {e}?",
    ),
)  # fmt: skip

SUBJECTS = ("person", "city", "firm", "machine", "course")
"""Kinds that passages are about."""


def _names(rng: Random, count: int, ending: str, taken: set[str]) -> tuple[str, ...]:
    """Invent `count` pronounceable capitalised names that end in `ending` and are not in `taken` (which grows)."""
    names: list[str] = []
    while len(names) < count:
        syllables = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        name = (syllables + (ending or rng.choice("nrsl"))).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)


@cache
def lexicon() -> dict[str, tuple[str, ...]]:
    """Kind -> its words, the same on every machine. Every word is one token of the embedded tokenizer."""
    rng, taken = Random(20_26), set[str]()
    return {
        "person": _names(rng, 100, "", taken),
        "city": _names(rng, 100, "ra", taken),
        "firm": _names(rng, 60, "co", taken),
        "machine": _names(rng, 40, "x", taken),
        "course": _names(rng, 40, "logy", taken),
        "job": tuple(
            "baker carpenter chemist engineer farmer lawyer nurse painter pilot surgeon tailor teacher".split()
        ),
        "product": tuple(
            "bicycles boats cameras carpets clocks lamps medicines pianos shoes tiles toys watches".split()
        ),
        "colour": tuple("black blue brown green grey orange purple red white yellow".split()),
        "day": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
        "month": tuple(_MONTHS.split()),
        "number": tuple(_NUMBERS.split()),
    }


@cache
def held_out_names() -> frozenset[str]:
    """The last fifth of each kind of name: never the value of a fact in any training text."""
    return frozenset(name for kind in SUBJECTS for name in lexicon()[kind][-len(lexicon()[kind]) // 5 :])


@dataclass(frozen=True)
class Fact:
    """`relation` of `entity` is `value`."""

    entity: str
    relation: Relation
    value: str

    @property
    def canonical(self) -> str:
        """The fact in its canonical sentence."""
        return self.relation.canonical(self.entity, self.value)


@dataclass(frozen=True)
class Question:
    """What a question asks: the value of a relation (`proposed` is None), or whether it is the `proposed` one."""

    text: str
    entity: str
    relation: Relation
    proposed: str | None = None

    @property
    def kind(self) -> str:
        """`judgmental` (a yes or no) or `non_judgmental`, as in `records.QAExample`."""
        return "non_judgmental" if self.proposed is None else "judgmental"


@dataclass(frozen=True)
class Passage:
    """A statement segment and the facts in it; `entities` share their relations in a hard passage (two entities)."""

    statement: str
    facts: tuple[Fact, ...]
    entities: tuple[str, ...]

    @property
    def hard(self) -> bool:
        """Whether two entities share their relations, so that the name alone decides."""
        return len(self.entities) > 1


def answer(facts: Iterable[Fact], question: Question) -> str:
    """The one right answer: the fact as evidence, then the verdict where one is asked for; or that it is not said."""
    for fact in facts:
        if fact.entity == question.entity and fact.relation == question.relation:
            if question.proposed is None:
                return fact.canonical
            verdict = "yes" if fact.value == question.proposed else "no"
            return f"{fact.canonical[:-1]}, so {verdict}."
    return UNANSWERABLE


class World:
    """Draws passages and questions from one seeded stream.

    `split` is "train" or "held_out": in train no held-out name is ever the value of a fact or proposed in a question.
    """

    def __init__(self, seed: int, *, split: str = "train", hard_share: float = 0.5) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
        self.rng = Random(f"{split}-{seed}")
        self.split = split
        self.hard_share = hard_share

    def values(self, kind: str) -> Sequence[str]:
        """Words of a kind that may be values in this split."""
        words = lexicon()[kind]
        return words if self.split == "held_out" else [word for word in words if word not in held_out_names()]

    def passage(self, facts: int = 3) -> Passage:
        """A statement of `facts` facts about one entity, or, in a hard passage, about two that share relations."""
        rng = self.rng
        subject = rng.choice(SUBJECTS)
        relations = [relation for relation in RELATIONS if relation.subject == subject]
        entities = tuple(rng.sample(lexicon()[subject], 2 if rng.random() < self.hard_share else 1))
        if len(entities) == 2:  # the first relation is stated of both, so that the name alone decides
            first, *rest = rng.sample(relations, len(relations))
            slots = [(entity, first) for entity in entities] + [(rng.choice(entities), relation) for relation in rest]
        else:
            slots = [(entities[0], relation) for relation in rng.sample(relations, len(relations))]
        drawn: list[Fact] = []
        for entity, relation in slots[:facts]:
            taken = {fact.value for fact in drawn} | set(entities)
            value = rng.choice([word for word in self.values(relation.value) if word not in taken])
            drawn.append(Fact(entity, relation, value))
        rng.shuffle(drawn)
        sentences = [rng.choice(fact.relation.sentences).format(e=fact.entity, v=fact.value) for fact in drawn]
        return Passage("Notes: " + " ".join(sentences), tuple(drawn), entities)

    def wrong_value(self, passage: Passage, fact: Fact) -> str:
        """A value that `fact` does not have, more often than not another one of the same passage."""
        kind = fact.relation.value
        nearby = [other.value for other in passage.facts if other.relation.value == kind and other.value != fact.value]
        if nearby and self.rng.random() < 0.6:
            return self.rng.choice(nearby)
        return self.rng.choice([word for word in self.values(kind) if word != fact.value])

    def ask(self, passage: Passage, form: str | None = None) -> Question:
        """Ask about a passage. `form`: value, yes, no, unanswerable; drawn 40/23/23/14 when not given."""
        rng = self.rng
        form = form or rng.choices(("value", "yes", "no", "unanswerable"), (40, 23, 23, 14))[0]
        fact = rng.choice(passage.facts)
        if form == "value":
            return self.value_question(fact.entity, fact.relation)
        if form in ("yes", "no"):
            proposed = fact.value if form == "yes" else self.wrong_value(passage, fact)
            return self.verdict_question(fact.entity, fact.relation, proposed)
        said = {(fact.entity, fact.relation) for fact in passage.facts}
        relations = [relation for relation in RELATIONS if relation.subject == fact.relation.subject]
        unsaid = [(entity, r) for entity in passage.entities for r in relations if (entity, r) not in said]
        entity, relation = rng.choice(unsaid)
        if rng.random() < 0.5:
            return self.value_question(entity, relation)
        proposed = rng.choice([word for word in self.values(relation.value) if word not in passage.entities])
        return self.verdict_question(entity, relation, proposed)

    def value_question(self, entity: str, relation: Relation) -> Question:
        """Ask for the value."""
        return Question(self.rng.choice(relation.questions).format(e=entity), entity, relation)

    def verdict_question(self, entity: str, relation: Relation, proposed: str) -> Question:
        """Ask whether the value is `proposed`."""
        text = self.rng.choice(relation.verdict_questions).format(e=entity, v=proposed)
        return Question(text, entity, relation, proposed)

    def corrupt(self, passage: Passage, question: Question) -> str:
        """A wrong answer of the kinds that models give: a wrong value, a flipped verdict, a refusal, an invention."""
        rng = self.rng
        right = answer(passage.facts, question)
        if right == UNANSWERABLE:  # invent: state a value nobody wrote, or another fact of the passage
            nearby = [fact.value for fact in passage.facts if fact.relation.value == question.relation.value]
            value = (
                rng.choice(nearby)
                if nearby and rng.random() < 0.5
                else rng.choice(self.values(question.relation.value))
            )
            invented = question.relation.canonical(question.entity, value)
            if question.proposed is None:
                return invented if rng.random() < 0.7 else rng.choice(passage.facts).canonical
            return f"{invented[:-1]}, so {rng.choice(('yes', 'no'))}."
        fact = next(f for f in passage.facts if f.entity == question.entity and f.relation == question.relation)
        draw = rng.random()
        if draw < 0.15:
            return UNANSWERABLE
        if question.proposed is not None and draw < 0.55:
            flipped = "no" if question.proposed == fact.value else "yes"
            return f"{fact.canonical[:-1]}, so {flipped}."
        others = [other for other in passage.facts if other != fact]
        if question.proposed is None and others and draw < 0.3:  # true, but not what was asked
            return rng.choice(others).canonical
        value = self.wrong_value(passage, fact)
        wrong = fact.relation.canonical(fact.entity, value)
        if question.proposed is None:
            return wrong
        return f"{wrong[:-1]}, so {'yes' if value == question.proposed else 'no'}."


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{e\}", r"(?P<e>\w+)").replace(r"\{v\}", r"(?P<v>\w+)")
    return re.compile(escaped)


@cache
def _sentence_patterns() -> tuple[tuple[re.Pattern[str], Relation], ...]:
    return tuple((_pattern(template), relation) for relation in RELATIONS for template in relation.sentences)


@cache
def _question_patterns() -> tuple[tuple[re.Pattern[str], Relation], ...]:
    return tuple(
        (_pattern(template), relation)
        for relation in RELATIONS
        for template in (*relation.questions, *relation.verdict_questions)
    )


def read_sentence(sentence: str) -> Fact | None:
    """The fact that a sentence of the world states; None when the sentence is not of the world."""
    for pattern, relation in _sentence_patterns():
        if (match := pattern.fullmatch(sentence)) and _well_typed(relation, match["e"], match["v"]):
            return Fact(match["e"], relation, match["v"])
    return None


def read_statement(statement: str) -> tuple[Fact, ...] | None:
    """The facts of a statement segment; None when any of its sentences is not of the world."""
    sentences = re.findall(r"[^.]+\.", statement.removeprefix("Notes:"))
    facts = [read_sentence(sentence.strip()) for sentence in sentences]
    return None if not facts or None in facts else tuple(fact for fact in facts if fact is not None)


def read_question(text: str) -> Question | None:
    """What a question asks; None when it is not a question of the world."""
    for pattern, relation in _question_patterns():
        if match := pattern.fullmatch(text.strip()):
            found = match.groupdict()
            if _well_typed(relation, found["e"], found.get("v")):
                return Question(text.strip(), found["e"], relation, found.get("v"))
    return None


def _well_typed(relation: Relation, entity: str, value: str | None) -> bool:
    words = lexicon()
    return entity in words[relation.subject] and (value is None or value in words[relation.value])


def _templates() -> list[str]:
    templates = [UNANSWERABLE, "Notes: so yes no"]
    for relation in RELATIONS:
        templates += [*relation.sentences, *relation.questions, *relation.verdict_questions]
    return templates


def initial_words() -> list[str]:
    """Words with which a statement, a question or an answer begins, sorted."""
    return sorted({template.split()[0].strip(":") for template in _templates() if template[0] != "{"})


def vocabulary() -> list[str]:
    """Every word of the world's grammar and lexicon, sorted."""
    words = {word for group in lexicon().values() for word in group}
    for template in _templates():
        words |= set(re.findall(r"[A-Za-z]+", template.replace("{e}", " ").replace("{v}", " ")))
    return sorted(words)
