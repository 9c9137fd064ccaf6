"""The embedded unstructured set: made-up subjects, new facts, and room for them in the embedded model."""

from collections.abc import Callable
from itertools import islice

import pytest

from horen_bench.cases import EditCase
from horen_bench.datasets.passages import Passages, records
from horen_bench.models.loading import load_tokenizer
from horen_bench.prompts import PromptEncoder
from horen_bench.world import World
from horen_bench.world.passages import known_facts

Refusal = Callable[[Callable[[], object]], str]


@pytest.fixture(scope="module")
def cases() -> list[EditCase]:
    return Passages(stream_seed=1).cases(300)


def test_a_record_is_of_unkebenchs_schema_and_tells_what_it_asks() -> None:
    (record,) = records(1, stop=1)
    assert record == {
        "id": 0,
        "question": "Who or what is East Vakaham?",
        "para_question": "What can be said about East Vakaham?",
        "answer": "It chose Zimpett Zoxel as its mayor. It lay on the river Caxorn. It lay in the country of Warkel.",
        "sub_question": [
            "Who is East Vakaham's mayor?",
            "What river is East Vakaham on?",
            "In what state can East Vakaham be found?",
        ],
        "sub_answer": ["Zimpett Zoxel", "Caxorn", "Warkel"],
    }


def test_each_passage_holds_the_short_answer_of_each_of_its_three_sub_questions(cases: list[EditCase]) -> None:
    for case in cases:
        probes = case.extras["sub_question"]
        assert len({probe.prompt for probe in probes}) == 3
        assert all(probe.answer in case.target for probe in probes)
        assert case.target.count("They ") + case.target.count("It ") == 3
        assert case.paraphrases[0].prompt != case.prompt


def test_no_passage_repeats_what_the_embedded_model_knows(cases: list[EditCase]) -> None:
    world = World()
    known = {(fact.ask(wording).prompt, fact.answer) for s in world.trained() for fact in known_facts(world, s)
             for wording in fact.relation.trained}  # fmt: skip
    told = {(probe.prompt, probe.answer) for case in cases for probe in case.extras["sub_question"]}
    assert not told & known


def test_question_and_passage_leave_room_in_the_embedded_models_context(cases: list[EditCase]) -> None:
    tokenizer = load_tokenizer("embedded:tiny")
    lengths = [len(PromptEncoder(tokenizer).edit(case.prompt, case.target).ids) for case in cases]
    assert min(lengths) > 25
    assert max(lengths) < 64


def test_a_record_depends_on_seed_and_number_alone(cases: list[EditCase]) -> None:
    assert list(records(1, start=7, stop=9)) == list(islice(records(1), 7, 9))
    assert Passages(stream_seed=1).cases(5) == cases[:5]
    assert Passages(stream_seed=2).cases(5) != cases[:5]


def test_the_stream_goes_on_beyond_the_subjects_that_the_model_knows() -> None:
    beyond = World().n_trained
    (record,) = records(1, start=beyond, stop=beyond + 1)
    assert World().subject(beyond).name in record["question"]


def test_there_is_an_end_to_the_names(refusal: Refusal) -> None:
    assert refusal(lambda: Passages(stream_seed=1).cases(700_001)) == (
        "n=700001 is more than passages stream 1 holds; write n=700000 or less"
    )
