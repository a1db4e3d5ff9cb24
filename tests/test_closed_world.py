"""The closed world: what is written can be read back, and what is right is decided by rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from alignkit.data.closed_world import (
    RELATIONS,
    SUBJECTS,
    UNANSWERABLE,
    Fact,
    Passage,
    Question,
    Relation,
    World,
    answer,
    held_out_names,
    initial_words,
    lexicon,
    read_question,
    read_sentence,
    read_statement,
    vocabulary,
)

DRAWS = 2000


def relation(subject: str, noun: str) -> Relation:
    (found,) = (each for each in RELATIONS if (each.subject, each.noun) == (subject, noun))
    return found


def draws(
    seed: int, split: str, count: int = DRAWS, hard_share: float = 0.5
) -> Iterator[tuple[World, Passage, Question]]:
    """Passages of two and three facts, with a question about each."""
    world = World(seed, split=split, hard_share=hard_share)
    for number in range(count):
        passage = world.passage(2 + number % 2)
        yield world, passage, world.ask(passage)


# -- reading back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_reading_inverts_writing(split: str) -> None:
    for _, passage, question in draws(1, split):
        assert read_statement(passage.statement) == passage.facts
        assert read_question(question.text) == question


def test_every_template_says_one_thing() -> None:
    """No sentence of the world states two facts, no question asks two things: each template reads back as its own."""
    words = lexicon()
    for each in RELATIONS:
        entity = words[each.subject][0]
        value = words[each.value][1]
        for template in each.sentences:
            assert read_sentence(template.format(e=entity, v=value)) == Fact(entity, each, value), template
        for template in each.questions:
            text = template.format(e=entity)
            assert read_question(text) == Question(text, entity, each), template
        for template in each.verdict_questions:
            text = template.format(e=entity, v=value)
            assert read_question(text) == Question(text, entity, each, value), template


def test_what_is_not_of_the_world_is_not_read() -> None:
    person, city = lexicon()["person"][0], lexicon()["city"][0]
    good = f"{person} lives in {city}."
    assert read_statement(f"Notes: {good}") == (Fact(person, relation("person", "home"), city),)
    assert read_statement(good) is not None
    assert read_statement("") is None
    assert read_statement("Notes:") is None
    assert read_statement(f"Notes: {good} The weather is fine.") is None
    assert read_statement(f"Notes: {city} lives in {person}.") is None  # a city does not live in a person
    assert read_sentence(f"{person} lives in Atlantis.") is None
    assert read_question(f"Where does {city} live?") is None
    assert read_question(f"Where does {person} live") is None
    assert read_question("") is None


# -- libraries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_notes_of_a_library_agree_and_tell_each_fact_once(split: str) -> None:
    """340 names, two notes each, and between them all 4 or 5 facts that a name of its kind has."""
    passages = World(9, split=split).library()
    told = Counter((fact.entity, fact.relation) for passage in passages for fact in passage.facts)
    assert set(told.values()) == {1}
    words = lexicon()
    assert set(told) == {(entity, each) for each in RELATIONS for entity in words[each.subject]}
    assert Counter(passage.entities for passage in passages) == {(e,): 2 for kind in SUBJECTS for e in words[kind]}
    assert all(read_statement(passage.statement) == passage.facts for passage in passages)
    values = {fact.value for passage in passages for fact in passage.facts}
    assert bool(values & held_out_names()) == (split == "held_out")
    assert World(9, split=split).library() == passages


# -- the right answer -------------------------------------------------------------------------------------------------


def test_the_right_answer_by_hand() -> None:
    anna, bo = lexicon()["person"][:2]
    rome, oslo, lima = lexicon()["city"][:3]
    home, birthplace = relation("person", "home"), relation("person", "birthplace")
    facts = [Fact(anna, home, rome), Fact(bo, home, oslo), Fact(anna, birthplace, lima)]

    def asked(entity: str, of: Relation, proposed: str | None = None) -> str:
        return answer(facts, Question("", entity, of, proposed))

    assert asked(anna, home) == f"The home of {anna} is {rome}."
    assert asked(bo, home) == f"The home of {bo} is {oslo}."
    assert asked(anna, birthplace) == f"The birthplace of {anna} is {lima}."
    assert asked(bo, birthplace) == UNANSWERABLE
    assert asked(anna, home, rome) == f"The home of {anna} is {rome}, so yes."
    assert asked(anna, home, oslo) == f"The home of {anna} is {rome}, so no."
    assert asked(bo, birthplace, lima) == UNANSWERABLE
    assert answer([], Question("", anna, home)) == UNANSWERABLE


@pytest.mark.parametrize(
    ("form", "ending"), [("value", "."), ("yes", ", so yes."), ("no", ", so no."), ("unanswerable", UNANSWERABLE)]
)
def test_the_form_asked_for_decides_the_answer(form: str, ending: str) -> None:
    world = World(4)
    for _ in range(200):
        passage = world.passage()
        question = world.ask(passage, form)
        right = answer(passage.facts, question)
        assert right.endswith(ending)
        assert (right == UNANSWERABLE) == (form == "unanswerable")
        if form in ("value", "yes", "no"):
            assert question.kind == ("non_judgmental" if form == "value" else "judgmental")


def test_the_forms_come_in_their_shares() -> None:
    """40 value, 23 yes, 23 no, 14 unanswerable in a hundred; each within four standard errors of 2,000 draws."""
    counts: Counter[str] = Counter()
    for _, passage, question in draws(5, "train"):
        right = answer(passage.facts, question)
        kinds = {"yes.": "yes", "no.": "no", "say.": "unanswerable"}
        counts["value" if question.proposed is None and right != UNANSWERABLE else kinds[right.split()[-1]]] += 1
    for form, share in (("value", 0.40), ("yes", 0.23), ("no", 0.23), ("unanswerable", 0.14)):
        assert abs(counts[form] / DRAWS - share) < 4 * (share * (1 - share) / DRAWS) ** 0.5


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_corrupted_answer_is_never_the_right_one(split: str) -> None:
    wrong = Counter[bool]()
    for world, passage, question in draws(6, split):
        right = answer(passage.facts, question)
        for _ in range(3):
            corrupted = world.corrupt(passage, question)
            assert corrupted != right
            assert corrupted.endswith(".")
            wrong[corrupted == UNANSWERABLE] += 1
    assert min(wrong.values()) > 300  # both inventions and refusals occur


# -- what is held out -------------------------------------------------------------------------------------------------


def test_a_fifth_of_each_kind_of_name_is_held_out() -> None:
    for kind in SUBJECTS:
        words = lexicon()[kind]
        assert len(held_out_names() & set(words)) * 5 == len(words)


def test_held_out_names_are_never_values_nor_proposed_nor_answered_in_training() -> None:
    for world, passage, question in draws(7, "train"):
        assert held_out_names().isdisjoint(fact.value for fact in passage.facts)
        assert question.proposed not in held_out_names()
        corrupted = read_sentence(world.corrupt(passage, question).split(",")[0].rstrip(".") + ".")
        assert corrupted is None or corrupted.value not in held_out_names()


def test_held_out_names_are_values_where_they_may_be() -> None:
    values = Counter(fact.value in held_out_names() for _, passage, _ in draws(8, "held_out") for fact in passage.facts)
    named = Counter(fact.relation.value in SUBJECTS for _, passage, _ in draws(8, "held_out") for fact in passage.facts)
    assert 0.15 < values[True] / named[True] < 0.25


def test_training_and_held_out_statements_are_disjoint() -> None:
    train, held_out = ({passage.statement for _, passage, _ in draws(9, split)} for split in ("train", "held_out"))
    assert len(train) > 0.99 * DRAWS
    assert train.isdisjoint(held_out)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        World(1, split="test")


# -- passages ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_one_stream() -> None:
    def stream(seed: int, split: str) -> list[tuple[str, str]]:
        return [(passage.statement, question.text) for _, passage, question in draws(seed, split, 50)]

    assert stream(3, "train") == stream(3, "train")
    assert stream(3, "train") != stream(4, "train")
    assert stream(3, "train") != stream(3, "held_out")


def test_a_passage_never_contradicts_itself() -> None:
    """A relation of an entity is stated once, a value stands for one fact, and nothing is its own value."""
    for _, passage, _ in draws(10, "train"):
        slots = [(fact.entity, fact.relation.noun) for fact in passage.facts]
        values = [fact.value for fact in passage.facts]
        assert len(set(slots)) == len(slots)
        assert len(set(values)) == len(values)
        assert set(values).isdisjoint(passage.entities)
        assert {fact.entity for fact in passage.facts} <= set(passage.entities)
        assert len({fact.relation.subject for fact in passage.facts}) == 1


def test_in_a_hard_passage_two_entities_share_a_relation() -> None:
    for _, passage, _ in draws(11, "train", 300, hard_share=1.0):
        assert passage.hard
        stated = Counter(fact.relation.noun for fact in passage.facts)
        assert stated.most_common(1)[0][1] == 2
    assert not any(passage.hard for _, passage, _ in draws(11, "train", 300, hard_share=0.0))


@pytest.mark.parametrize(("entities", "shared", "facts"), [(3, 1, 3), (4, 1, 4), (2, 2, 4), (3, 2, 6)])
def test_shared_relations_are_stated_of_every_entity(entities: int, shared: int, facts: int) -> None:
    world = World(13)
    for _ in range(100):
        passage = world.passage(facts, entities=entities, shared=shared)
        stated = Counter(fact.relation.noun for fact in passage.facts)
        assert list(stated.values()) == [entities] * shared
        assert len(passage.entities) == entities == len({fact.entity for fact in passage.facts})


def test_the_lexicon_holds_each_word_once() -> None:
    words = [word for group in lexicon().values() for word in group]
    assert len(words) == len(set(words))
    assert {kind: len(lexicon()[kind]) for kind in SUBJECTS} == {
        "person": 100, "city": 100, "firm": 60, "machine": 40, "course": 40,
    }  # fmt: skip


def test_the_vocabulary_covers_all_that_is_written() -> None:
    known = set(vocabulary())
    for world, passage, question in draws(12, "held_out", 300):
        texts = [passage.statement, question.text, answer(passage.facts, question), world.corrupt(passage, question)]
        for text in texts:
            words = text.replace(",", "").replace(".", "").replace("?", "").replace(":", "").split()
            assert set(words) <= known
            first = words[0]
            assert first in initial_words() or first in {name for kind in SUBJECTS for name in lexicon()[kind]}
