"""The closed world: people, places, firms, machines and courses about which short notes are written.

Every part of the offline demonstration stands on this file: the embedded model is pre-trained on text about the world,
the scripted teacher reads and grades inside it by rule, and the demo's seeds and held-out questions are drawn from it.

The world has a fixed vocabulary and a fixed grammar but no fixed facts: each passage draws its facts anew, so nothing
can be answered from memory. What is held out is therefore facts and passages; in addition a fifth of all names
(`held_out_names`) is never the *value* of a fact outside the held-out splits, so that answering with one of them cannot
have been learnt by rote.

Sentences can be read back: `read_statement` and `read_question` are the inverse of what `Passage` and `ask` write.
"""

from alignkit.data.closed_world.grammar import (
    RELATIONS,
    SUBJECTS,
    UNANSWERABLE,
    Relation,
    held_out_names,
    initial_words,
    lexicon,
    vocabulary,
)
from alignkit.data.closed_world.reading import read_question, read_sentence, read_statement
from alignkit.data.closed_world.world import Fact, Passage, Question, World, answer

__all__ = [
    "RELATIONS",
    "SUBJECTS",
    "UNANSWERABLE",
    "Fact",
    "Passage",
    "Question",
    "Relation",
    "World",
    "answer",
    "held_out_names",
    "initial_words",
    "lexicon",
    "read_question",
    "read_sentence",
    "read_statement",
    "vocabulary",
]
