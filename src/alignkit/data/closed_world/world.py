"""Drawing passages and questions, and the one right answer to each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from alignkit.data.closed_world.grammar import RELATIONS, SUBJECTS, UNANSWERABLE, Relation, held_out_names, lexicon


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

    def passage(self, facts: int = 3, entities: int | None = None, shared: int = 1) -> Passage:
        """A statement of `facts` facts about one entity, or, in a hard passage, about several that share relations.

        `entities` says how many; by default two in a share `hard_share` of the passages. The first `shared` relations
        are stated of every entity, so that the name alone decides.
        """
        rng = self.rng
        subject = rng.choice(SUBJECTS)
        relations = [relation for relation in RELATIONS if relation.subject == subject]
        count = entities or (2 if rng.random() < self.hard_share else 1)
        named = tuple(rng.sample(lexicon()[subject], count))
        if count == 1:
            slots = [(named[0], relation) for relation in rng.sample(relations, len(relations))]
        else:
            drawn_relations = rng.sample(relations, len(relations))
            slots = [(entity, relation) for relation in drawn_relations[:shared] for entity in named]
            slots += [(rng.choice(named), relation) for relation in drawn_relations[shared:]]
        drawn: list[Fact] = []
        for entity, relation in slots[:facts]:
            taken = {fact.value for fact in drawn} | set(named)
            value = rng.choice([word for word in self.values(relation.value) if word not in taken])
            drawn.append(Fact(entity, relation, value))
        return self._written(drawn, named)

    def library(self) -> list[Passage]:
        """Two passages about every name of the world, each with half of its facts, in random order.

        Unlike those of `passage`, they agree: whatever is asked of a name, at most one of them says it.
        """
        passages = []
        for subject in SUBJECTS:
            relations = [relation for relation in RELATIONS if relation.subject == subject]
            for entity in lexicon()[subject]:
                facts: list[Fact] = []
                for relation in self.rng.sample(relations, len(relations)):
                    taken = {fact.value for fact in facts} | {entity}
                    value = self.rng.choice([word for word in self.values(relation.value) if word not in taken])
                    facts.append(Fact(entity, relation, value))
                half = len(facts) // 2
                passages += [self._written(each, (entity,)) for each in (facts[:half], facts[half:])]
        self.rng.shuffle(passages)
        return passages

    def _written(self, facts: list[Fact], entities: tuple[str, ...]) -> Passage:
        """The passage that states these facts, which are shuffled."""
        self.rng.shuffle(facts)
        sentences = [self.rng.choice(fact.relation.sentences).format(e=fact.entity, v=fact.value) for fact in facts]
        return Passage("Notes: " + " ".join(sentences), tuple(facts), entities)

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
