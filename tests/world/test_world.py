"""The made-up world: distinct names, wordings kept apart, the same everywhere."""

import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import horen_bench
from horen_bench.world import RELATIONS, Relation, World
from horen_bench.world.names import NameSpace, subject_names
from horen_bench.world.passages import known_facts, new_facts, passage

SOURCES = Path(horen_bench.__file__).parents[1]

KNOWN_SUBJECTS = """
from horen_bench.world import World
world = World()
print([world.subject(i) for i in (0, 1, 2499, 60_000)], world.questions[:20], world.pools["person"])
"""


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_sixty_thousand_subjects_have_distinct_names(world: World) -> None:
    assert len({world.subject(i).name for i in range(60_000)}) == 60_000


def test_every_name_of_a_space_is_used_once() -> None:
    space = NameSpace(((("A", "B"), ("x", "y", "z")), (("C", "D"), ("u", "v", "w"))), seed=5)
    names = [space.name(i) for i in range(len(space))]
    assert sorted(names) == ["Ax", "Ay", "Az", "Bx", "By", "Bz", "Cu", "Cv", "Cw", "Du", "Dv", "Dw"]
    assert names != sorted(names)


def test_another_seed_gives_names_another_order() -> None:
    assert subject_names("place", 0).name(0) != subject_names("place", 1).name(0)


def test_asking_for_a_name_too_many_says_how_many_there_are() -> None:
    with pytest.raises(IndexError, match="name 6 was asked for, but there are 6 names"):
        NameSpace(((("A", "B"), ("x", "y", "z")),), seed=0).name(6)


def test_a_subject_is_never_an_answer(world: World) -> None:
    answers = {word for pool in world.pools.values() for answer in pool for word in answer.split()}
    names = {world.subject(i).name.split()[0] for i in range(20_000)}
    assert not answers & names


def test_first_words_of_answers_are_distinct(world: World) -> None:
    first_words = [answer.split()[0] for pool in world.pools.values() for answer in pool]
    assert len(first_words) == len(set(first_words))


def test_a_world_is_the_same_in_every_process() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", KNOWN_SUBJECTS],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(SOURCES)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_subjects_stay_what_they_were_when_the_data_were_written(world: World) -> None:
    subject = world.subject(0)
    assert subject.name == "Klevel Kodund"
    assert [fact.relation.name for fact in subject.facts] == ["university", "team"]


def test_a_subject_does_not_depend_on_how_many_are_trained(world: World) -> None:
    assert World(n_trained=10, n_questions=5).subject(7) == world.subject(7)


def test_a_subject_has_two_facts_of_different_relations_of_its_kind(world: World) -> None:
    for subject in world.trained():
        first, second = (fact.relation for fact in subject.facts)
        assert first is not second
        assert {first.kind, second.kind} == {subject.kind}
        assert all(fact.answer in world.pools[fact.relation.pool] for fact in subject.facts)


def test_every_relation_has_enough_trained_facts(world: World) -> None:
    counts = Counter(fact.relation.name for subject in world.trained() for fact in subject.facts)
    assert len(counts) == len(RELATIONS) == 28
    assert sum(counts.values()) == 5000
    assert min(counts.values()) > 140


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_held_out_wordings_are_new_combinations_of_known_words(relation: Relation) -> None:
    trained, held_out = set(relation.trained), set(relation.held_out)
    assert not trained & held_out
    assert len(trained | held_out) == len(relation.words) * len(relation.frames)
    assert 0.2 <= len(held_out) / len(trained | held_out) <= 0.3
    assert set(re.findall(r"\w+", " ".join(held_out))) <= set(re.findall(r"\w+", " ".join(trained)))
    for frame in relation.frames:
        assert any(frame.replace("{w}", word) in trained for word in relation.words)


def test_no_wording_belongs_to_two_relations_of_a_kind() -> None:
    wordings = Counter((r.kind, wording) for r in RELATIONS for wording in (*r.trained, *r.held_out))
    assert max(wordings.values()) == 1


def test_neighbours_of_a_wording_are_the_most_similar_ones() -> None:
    spouse = next(relation for relation in RELATIONS if relation.name == "spouse")
    index = spouse.trained.index("Who is the partner of {s}?")
    near = {spouse.trained[i] for i in spouse.neighbours[index]}
    assert "Who was the partner of {s}?" in near
    assert "What was the name of {s}'s spouse?" not in near


def test_unrelated_questions_are_distinct_and_look_like_natural_questions(world: World) -> None:
    prompts = [question.prompt for question in world.questions]
    assert len(prompts) == len(set(prompts)) == 1000
    assert all(prompt.startswith("nq question: ") for prompt in prompts)
    assert all(prompt == prompt.lower() and not prompt.endswith("?") for prompt in prompts)
    assert World(n_questions=7).questions == world.questions[:7]


def test_what_is_told_of_a_subject_agrees_with_what_is_asked_about_it(world: World) -> None:
    again, agreeing = World(), 0
    for subject in world.trained()[:500]:
        told = {fact.relation: fact.answer for fact in known_facts(world, subject)}
        assert len(told) == 3
        assert {relation.kind for relation in told} == {subject.kind}
        assert all(told.get(fact.relation, fact.answer) == fact.answer for fact in subject.facts)
        agreeing += sum(fact.relation in told for fact in subject.facts)
        assert known_facts(world, subject) == known_facts(again, subject)
    assert 400 < agreeing < 700


def test_new_facts_are_other_answers_to_the_same_questions(world: World) -> None:
    rng = random.Random(0)
    for subject in world.trained()[:200]:
        known, new = known_facts(world, subject), new_facts(world, subject, rng)
        assert [fact.relation for fact in new] == [fact.relation for fact in known]
        assert all(fact.answer in world.pools[fact.relation.pool] for fact in new)
        assert not {fact.answer for fact in new} & {fact.answer for fact in known}


def test_a_passage_tells_each_fact_in_a_sentence(world: World) -> None:
    for subject in world.trained()[:200]:
        facts = known_facts(world, subject)
        sentences = passage(subject, facts).split(". ")
        assert len(sentences) == 3
        assert all(fact.answer in sentence for fact, sentence in zip(facts, sentences, strict=True))
        assert all(sentence.startswith("They " if subject.kind == "person" else "It ") for sentence in sentences)
