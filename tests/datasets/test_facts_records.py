"""Streams of edit records: schema, truth, and probes that no other edit touches."""

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import horen_bench
from horen_bench.datasets.facts import records, to_json
from horen_bench.paths import resource
from horen_bench.world import RELATIONS, Fact, World

SOURCES = Path(horen_bench.__file__).parents[1]

Question = tuple[str, str]  # subject, relation

DIGEST = """
import hashlib
from horen_bench.datasets.facts import records, to_json
print(hashlib.sha256(to_json(records(3, 2450, 2550)).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def stream() -> list[dict[str, Any]]:
    return list(records(1, 0, 5000))


@pytest.fixture(scope="module")
def facts() -> dict[str, Fact]:
    """Every fact of the first 5000 subjects, by each of its questions."""
    world = World()
    return {
        fact.ask(wording).prompt: fact
        for index in range(5000)
        for fact in world.subject(index).facts
        for wording in (*fact.relation.trained, *fact.relation.held_out)
    }


def question(fact: Fact) -> Question:
    return fact.subject, fact.relation.name


def test_records_have_the_published_schema_and_our_two_keys(stream: list[dict[str, Any]]) -> None:
    published = ["subject", "src", "rephrase", "alt", "answers", "loc", "loc_ans"]
    assert all(list(record) == [*published, "hard_loc", "extra"] for record in stream)
    assert list(stream[0]["hard_loc"]) == ["same_subject", "same_relation"]
    assert list(stream[0]["extra"]) == ["held_out"]


def test_subjects_are_edited_once_and_named_in_their_prompts(stream: list[dict[str, Any]]) -> None:
    assert len({record["subject"] for record in stream}) == len(stream)
    for record in stream:
        prompts = (record["src"], record["rephrase"], record["extra"]["held_out"]["prompt"])
        assert len(set(prompts)) == 3
        assert all(record["subject"] in prompt for prompt in prompts)
        assert record["subject"] not in record["loc"]


def test_first_records_are_about_trained_subjects_and_later_ones_about_new_ones(
    stream: list[dict[str, Any]],
) -> None:
    world = World()
    trained = [subject.name for subject in world.trained()]
    edited = [record["subject"] for record in stream]
    assert sorted(edited[:2500]) == sorted(trained)
    assert edited[:2500] != trained
    assert edited[2500:] == [world.subject(index).name for index in range(2500, 5000)]


def test_an_edit_asks_one_fact_in_trained_wordings_and_changes_its_answer(
    stream: list[dict[str, Any]], facts: dict[str, Fact]
) -> None:
    world = World()
    for record in stream:
        fact = facts[record["src"]]
        assert facts[record["rephrase"]] is fact
        assert facts[record["extra"]["held_out"]["prompt"]] is fact
        assert record["answers"] == [fact.answer]
        assert record["alt"] != fact.answer
        assert record["alt"] in world.pools[fact.relation.pool]
        assert record["extra"]["held_out"]["answer"] == record["alt"]


def test_wordings_are_trained_or_held_out_as_promised(stream: list[dict[str, Any]], facts: dict[str, Fact]) -> None:
    for record in stream:
        relation = facts[record["src"]].relation
        wordings = {key: record[key].replace(record["subject"], "{s}") for key in ("src", "rephrase")}
        assert set(wordings.values()) <= set(relation.trained)
        held_out = record["extra"]["held_out"]["prompt"].replace(record["subject"], "{s}")
        assert held_out in relation.held_out


@pytest.mark.parametrize("seed", [1, 2])
def test_no_locality_probe_is_touched_by_any_edit(seed: int, facts: dict[str, Fact]) -> None:
    stream = list(records(seed, 0, 5000))
    edited = {question(facts[record["src"]]) for record in stream}
    assert len(edited) == 5000
    for record in stream:
        for probe in record["hard_loc"].values():
            assert question(facts[probe["prompt"]]) not in edited
            assert facts[probe["prompt"]].answer == probe["answer"]


def test_hard_probes_share_the_subject_or_the_relation_and_nothing_else(
    stream: list[dict[str, Any]], facts: dict[str, Fact]
) -> None:
    trained = {subject.name for subject in World().trained()}
    for record in stream:
        edited = facts[record["src"]]
        same_subject = facts[record["hard_loc"]["same_subject"]["prompt"]]
        same_relation = facts[record["hard_loc"]["same_relation"]["prompt"]]
        assert same_subject.subject == edited.subject
        assert same_subject.relation is not edited.relation
        assert same_relation.subject != edited.subject
        assert same_relation.subject in trained
        assert same_relation.relation is edited.relation


def test_unrelated_probes_are_the_worlds_questions(stream: list[dict[str, Any]]) -> None:
    known = {(question.prompt, question.answer) for question in World().questions}
    asked = {(record["loc"], record["loc_ans"]) for record in stream}
    assert asked <= known
    assert len(asked) > 950


def test_about_half_of_the_pairs_are_of_close_wordings(stream: list[dict[str, Any]]) -> None:
    # A random second wording is one of the 4 closest with chance 4 / (n - 1), on average about 0.24.
    relations = {wording: (r, i) for r in RELATIONS for i, wording in enumerate(r.trained)}
    close = Counter[bool]()
    for record in stream:
        src, rephrase = (record[key].replace(record["subject"], "{s}") for key in ("src", "rephrase"))
        relation, index = relations[src]
        close[rephrase in {relation.trained[i] for i in relation.neighbours[index]}] += 1
    assert 0.57 < close[True] / len(stream) < 0.70


@pytest.mark.parametrize("start", [0, 17, 2499, 2500, 4990])
def test_a_record_does_not_depend_on_where_the_stream_starts_or_stops(start: int, stream: list[dict[str, Any]]) -> None:
    assert list(records(1, start, start + 10)) == stream[start : start + 10]


def test_a_stream_without_a_stop_goes_on(stream: list[dict[str, Any]]) -> None:
    assert list(itertools.islice(records(1), 3)) == stream[:3]
    assert next(records(1, 60_000))["subject"] == World().subject(60_000).name


def test_seeds_give_different_streams(stream: list[dict[str, Any]]) -> None:
    other = list(records(2, 0, 2500))
    edited = {(record["subject"], record["answers"][0]) for record in stream[:2500]}
    shared = sum((record["subject"], record["answers"][0]) in edited for record in other)
    assert 1000 < shared < 1500  # each subject loses one of two facts
    assert [record["subject"] for record in other] != [record["subject"] for record in stream[:2500]]


def test_a_stream_is_the_same_in_every_process() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(SOURCES)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_generation_is_fast() -> None:
    begun = time.process_time()
    assert sum(1 for _ in records(4, 0, 5000)) == 5000
    assert time.process_time() - begun < 5  # measured: 0.5 s


def test_the_shipped_file_is_the_head_of_stream_one(stream: list[dict[str, Any]]) -> None:
    text = (resource("data") / "facts.json").read_text(encoding="utf-8")
    assert len(json.loads(text)) == 1000
    assert text == to_json(stream[:1000]), "write it again: to_json(records(1, 0, 1000))"
