"""The grammar of the closed world: its relations, and the words that may stand in them."""

from __future__ import annotations

import re
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
