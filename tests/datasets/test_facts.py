"""The embedded dataset: the made-up facts as cases."""

from collections.abc import Callable

import pytest

from horen_bench.cases import EditCase
from horen_bench.datasets import facts
from horen_bench.datasets.facts import Facts
from horen_bench.datasets.zsre import Zsre
from horen_bench.paths import resource


@pytest.fixture(scope="module")
def stream() -> list[EditCase]:
    return Facts(stream_seed=1).cases(2000)


def test_a_short_stream_is_the_head_of_a_long_one(stream: list[EditCase]) -> None:
    for n in (0, 1, 17, 1999):
        assert Facts(stream_seed=1).cases(n) == stream[:n]


def test_the_shipped_file_read_as_zsre_gives_the_same_cases(stream: list[EditCase]) -> None:
    shipped = Zsre(
        path=str(resource("data") / "facts.json"),
        train_path=None,
        target="alt",
        locality_source="record",
        strip_nq_prefix=False,
        append_question_mark=False,
        conflicts="keep",
    )
    assert shipped.cases(1000) == stream[:1000]


def test_every_case_has_every_family_of_probes(stream: list[EditCase]) -> None:
    for i, case in enumerate(stream):
        assert case.id == str(i)
        assert str(case.subject) in case.prompt
        assert [len(case.paraphrases), len(case.locality)] == [1, 1]
        assert {name: len(probes) for name, probes in case.hard_locality.items()} == {
            "same_subject": 1,
            "same_relation": 1,
        }
        assert [probe.answer for probe in case.extras["held_out"]] == [case.target]


def test_a_stream_is_longer_than_the_shipped_file_and_another_seed_is_another_stream(stream: list[EditCase]) -> None:
    assert len(Facts(stream_seed=1).cases(2600)) == 2600
    assert Facts(stream_seed=2).cases(10) != stream[:10]


def test_nothing_has_to_be_said_about_them() -> None:
    assert Facts(stream_seed=1).warnings() == []


def test_more_edits_than_the_world_has_subjects_are_refused_at_once(
    refusal: Callable[[Callable[[], object]], str],
) -> None:
    assert refusal(lambda: Facts(stream_seed=3).cases(700_001)) == (
        "n=700001 is more than facts stream 3 holds; write n=700000 or less"
    )


def test_the_last_edit_that_is_promised_can_be_made() -> None:
    (last,) = facts.records(1, 699_999, 700_000)
    assert last["subject"] in last["src"]
