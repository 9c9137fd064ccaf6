"""The 50K stress pool: what gets in, where it stops, and the draw."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.pool import ZsrePool

NAN = float("nan")

Refusal = Callable[[Callable[[], object]], str]


def question(i: int, **changes: Any) -> dict[str, Any]:
    """A complete record whose every text says its number."""
    return {
        "subject": f"S{i}",
        "src": f"Who is S{i}?",
        "rephrase": f"S{i} is who?",
        "alt": f"alt {i}",
        "answers": [f"true {i}"],
        "loc": f"nq question: loc {i}",
        "loc_ans": f"loc answer {i}",
        **changes,
    }


def pool(*paths: Path, **settings: Any) -> ZsrePool:
    chosen = {"target": "answers", "pool_size": 1000, "draw": 1000, "draw_seed": 42, **settings}
    return ZsrePool(paths=[str(path) for path in paths], **chosen)


def in_file_order(dataset: ZsrePool, n: int) -> list[EditCase]:
    """The drawn cases by file and position."""
    return sorted(dataset.cases(n), key=lambda case: (case.id.split(":")[0], int(case.id.split(":")[1])))


def test_a_complete_record_is_a_case_named_by_file_and_position(written: Callable[..., Path]) -> None:
    path = written([question(0, extra={"held_out": {"prompt": "E", "answer": "e"}})], "zsre_train_data.json")
    assert pool(path).cases(1) == [
        EditCase(
            id="zsre_train_data:0",
            prompt="Who is S0?",
            target="true 0",
            subject="S0",
            paraphrases=(Probe("S0 is who?", "true 0"),),
            locality=(Probe("nq question: loc 0", "loc answer 0"),),
        )
    ]
    assert pool(path, target="alt").cases(1)[0].target == "alt 0"


@pytest.mark.parametrize(
    "changes",
    [
        {"src": None},
        {"src": "Who is somebody else?"},
        {"subject": ""},
        {"subject": "s1"},
        {"rephrase": NAN},
        {"loc": " "},
        {"loc_ans": None},
        {"answers": []},
        {"answers": None},
    ],
)
def test_an_incomplete_record_is_left_out_and_keeps_its_position_from_others(
    changes: dict[str, Any], written: Callable[..., Path]
) -> None:
    path = written([question(0), question(1, **changes), question(2)])
    assert [case.id for case in in_file_order(pool(path), 2)] == ["records:0", "records:2"]


@pytest.mark.parametrize("field", ["src", "subject", "rephrase", "loc", "loc_ans", "answers"])
def test_each_of_the_needed_fields_is_needed(field: str, written: Callable[..., Path], refusal: Refusal) -> None:
    record = question(0)
    del record[field]
    path = written([record])
    sentence = refusal(lambda: pool(path).cases(1))
    for fact in (str(path), "none of 1 records", f"record 0 has no {field}, ", ", ".join(record), "dataset.paths="):
        assert fact in sentence


def test_a_file_of_another_schema_is_refused_also_behind_a_good_one(
    written: Callable[..., Path], refusal: Refusal
) -> None:
    good = written([question(0)], "good.json")
    other = written([{"question": "Q", "answer": "A"}] * 3, "other.json")
    sentence = refusal(lambda: pool(good, other).cases(1))
    assert sentence.startswith(f"{other}: none of 3 records is complete; record 0 has no src")
    assert "question, answer" in sentence


def test_records_left_out_are_counted_by_what_they_lack(written: Callable[..., Path]) -> None:
    path = written([
        question(0),
        question(1, loc=None),
        question(2, loc=" "),
        question(3, answers=[]),
        question(4, src="Who is somebody else?"),
    ])  # fmt: skip
    dataset = pool(path, pool_size=75_658)
    dataset.cases(1)
    _, left_out = dataset.warnings()
    for fact in ("4 records", "2 without loc", "1 without answers", "1 without its subject in src"):
        assert fact in left_out
    dataset.cases(1)  # read again, counted anew
    assert dataset.warnings()[1] == left_out


def test_the_other_target_is_not_needed(written: Callable[..., Path]) -> None:
    path = written([question(0, alt=None), question(1, answers=None)])
    assert [case.id for case in pool(path).cases(1)] == ["records:0"]
    assert [case.id for case in pool(path, target="alt").cases(1)] == ["records:1"]


def test_of_equal_prompts_the_first_is_kept_across_files(written: Callable[..., Path]) -> None:
    train = written([question(0), question(1), question(0, answers=["again"])], "train.json")
    extra = written([question(1, answers=["other"]), question(2)], "extra.json")
    cases = in_file_order(pool(train, extra), 3)
    assert [(case.id, case.target) for case in cases] == [
        ("extra:1", "true 2"),
        ("train:0", "true 0"),
        ("train:1", "true 1"),
    ]
    assert {case.id for case in pool(extra, train).cases(3)} == {"extra:0", "extra:1", "train:0"}


def test_an_incomplete_first_record_does_not_keep_its_prompt_from_a_complete_one(written: Callable[..., Path]) -> None:
    path = written([question(0, rephrase=None), question(0)])
    assert [case.id for case in pool(path).cases(1)] == ["records:1"]


def test_the_pool_stops_at_its_size_and_reads_no_file_beyond(written: Callable[..., Path], tmp_path: Path) -> None:
    first = written([question(0), question(0), question(1)], "first.json")
    second = written([question(2), question(3), question(4)], "second.json")
    dataset = pool(first, second, tmp_path / "none.json", pool_size=3)
    assert {case.id for case in dataset.cases(3)} == {"first:0", "first:2", "second:0"}
    assert dataset.warnings() == []


def test_a_smaller_pool_is_pointed_out(written: Callable[..., Path]) -> None:
    dataset = pool(written([question(i) for i in range(4)]), pool_size=75_658)
    assert dataset.warnings() == []
    dataset.cases(1)
    assert dataset.warnings() == ["the pool has 4 records, not 75658; the draw is another one"]


@pytest.mark.parametrize("seed", [0, 42])
def test_the_draw_is_numpys_permutation_of_the_whole_pool(seed: int, written: Callable[..., Path]) -> None:
    path = written([question(i) for i in range(100)])
    cases = pool(path, draw=60, draw_seed=seed).cases(60)
    order = np.random.default_rng(seed).permutation(100)[:60]
    assert [case.id for case in cases] == [f"records:{i}" for i in order]
    assert [case.locality[0].answer for case in cases] == [f"loc answer {i}" for i in order]


def test_the_first_cases_of_seed_42_are_these(written: Callable[..., Path]) -> None:
    # numpy promises this stream: default_rng(42).permutation(10) is [5 6 0 7 3 2 4 9 1 8].
    path = written([question(i) for i in range(10)])
    assert [case.id.removeprefix("records:") for case in pool(path).cases(10)] == list("5607324918")


def test_a_short_stream_is_the_head_of_a_long_one(written: Callable[..., Path]) -> None:
    path = written([question(i) for i in range(80)])
    assert pool(path, draw=50).cases(10) == pool(path, draw=50).cases(50)[:10]


@pytest.mark.parametrize(("settings", "most"), [({"draw": 5}, 5), ({"pool_size": 4}, 4), ({}, 8)])
def test_no_more_cases_than_the_draw_or_the_pool_has(
    settings: dict[str, int], most: int, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([question(i) for i in range(8)])
    assert len(pool(path, **settings).cases(most)) == most
    assert refusal(lambda: pool(path, **settings).cases(most + 1)) == (
        f"n={most + 1} is more than the {most} edits of this draw; write n={most} or less"
    )


def test_a_missing_file_is_named_with_the_way_to_get_it(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "none.json"
    assert refusal(lambda: pool(path).cases(1)) == (
        f"{path} does not exist; run python -m horen_bench.datasets fetch zsre, or name your file with dataset.path="
    )


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (3, "record 1 must be an object, got 3"),
        (question(1, src=3), "record 1, field 'src' must be a string of valid Unicode, got 3"),
        (question(1, answers="x"), "record 1, field 'answers' must be a list, got 'x'"),
    ],
)
def test_a_record_of_another_schema_is_refused_and_not_just_left_out(
    record: object, complaint: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([question(0), record])
    assert refusal(lambda: pool(path).cases(1)) == f"{path}: {complaint}"


def test_the_published_head_makes_a_pool_of_sixteen(real_records: Path) -> None:
    path = real_records / "zsre_mend_eval_head.json"
    sources = [record["src"] for record in json.loads(path.read_text(encoding="utf-8"))]
    dataset = pool(path, pool_size=75_658)
    cases = dataset.cases(16)
    order = np.random.default_rng(42).permutation(16)
    assert [case.prompt for case in cases] == [sources[i] for i in order]
    assert dataset.warnings() == ["the pool has 16 records, not 75658; the draw is another one"]
