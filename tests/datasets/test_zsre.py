"""ZsRE: field by field, every option, and the published records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.records import Record
from horen_bench.datasets.zsre import NqWording, Zsre

NAN = float("nan")
FETCH = "run python -m horen_bench.datasets fetch zsre, or name your file with dataset.path="

Refusal = Callable[[Callable[[], object]], str]

# The published schema, with white space around the texts and a decomposed "ö".
RODIN = {
    "subject": "Auguste Rodin ",
    "src": "Where was Auguste Rodin born?",
    "pred": "Rome",
    "rephrase": " In what town was Auguste Rodin born?",
    "alt": "Ko\u0308ln",
    "answers": [" Paris", "Paris, France"],
    "loc": "nq question: who painted the night watch",
    "loc_ans": " Rembrandt",
    "cond": "Rome >> Köln || Where was Auguste Rodin born?",
}


def question(i: int, **changes: Any) -> dict[str, Any]:
    """A record whose every text says its number."""
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


def zsre(path: Path, train_path: Path | None = None, **options: Any) -> Zsre:
    """The loader with the options of conf/dataset/zsre.yaml, less the train file if there is none."""
    chosen = {
        "target": "answers",
        "locality_source": "train" if train_path else "record",
        "strip_nq_prefix": False,
        "append_question_mark": False,
        "conflicts": "keep",
        **options,
    }
    return Zsre(path=str(path), train_path=str(train_path) if train_path else None, **chosen)


# --- Fields ------------------------------------------------------------------------------------------------


def test_every_field_goes_where_the_published_loader_puts_it(written: Callable[..., Path]) -> None:
    assert zsre(written([RODIN])).cases(1) == [
        EditCase(
            id="0",
            prompt="Where was Auguste Rodin born?",
            target="Paris",
            subject="Auguste Rodin",
            paraphrases=(Probe("In what town was Auguste Rodin born?", "Paris"),),
            locality=(Probe("nq question: who painted the night watch", "Rembrandt"),),
        )
    ]


def test_target_alt_writes_the_counterfactual_and_needs_no_answers(written: Callable[..., Path]) -> None:
    record = {key: value for key, value in RODIN.items() if key != "answers"}
    (case,) = zsre(written([record]), target="alt").cases(1)
    assert case.target == "K\u00f6ln"


def test_target_answers_needs_no_alt(written: Callable[..., Path]) -> None:
    (case,) = zsre(written([{**RODIN, "alt": None}])).cases(1)
    assert case.target == "Paris"


@pytest.mark.parametrize("missing", [None, "", " ", NAN])
def test_a_missing_rephrase_subject_or_locality_is_simply_not_there(
    missing: object, written: Callable[..., Path]
) -> None:
    (case,) = zsre(written([{**RODIN, "rephrase": missing, "subject": missing, "loc": missing}])).cases(1)
    assert case == EditCase(id="0", prompt="Where was Auguste Rodin born?", target="Paris")


def test_our_two_keys_become_named_probes(written: Callable[..., Path]) -> None:
    record = question(
        0,
        hard_loc={"same_subject": {"prompt": " H ", "answer": " h"}, "same_relation": {"prompt": "R", "answer": "r"}},
        extra={"held_out": {"prompt": "E", "answer": "e"}},
    )
    (case,) = zsre(written([record])).cases(1)
    assert case.hard_locality == {"same_subject": (Probe("H", "h"),), "same_relation": (Probe("R", "r"),)}
    assert case.extras == {"held_out": (Probe("E", "e"),)}


@pytest.mark.parametrize("missing", [None, NAN])
def test_our_two_keys_may_be_missing(missing: object, written: Callable[..., Path]) -> None:
    (case,) = zsre(written([question(0, hard_loc=missing, extra=missing)])).cases(1)
    assert case.hard_locality == {}
    assert case.extras == {}


def test_a_jsonl_file_has_the_same_cases(written: Callable[..., Path], tmp_path: Path) -> None:
    records = [question(i) for i in range(3)]
    lines = tmp_path / "records.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert zsre(lines).cases(3) == zsre(written(records)).cases(3)


@pytest.mark.parametrize(
    ("options", "changes", "field", "complaint"),
    [
        ({}, {"answers": []}, "answers", "a list with an answer, got []"),
        ({}, {"answers": None}, "answers", "a list with an answer, got None"),
        ({}, {"answers": NAN}, "answers", "a list with an answer, got nan"),
        ({}, {"answers": "true 1"}, "answers", "a list, got 'true 1'"),
        ({}, {"answers": [""]}, "answers", "a list of non-empty strings, got ['']"),
        ({"target": "alt"}, {"alt": " "}, "alt", "a non-empty string, got ' '"),
        ({"target": "alt"}, {"alt": NAN}, "alt", "a non-empty string, got nan"),
        ({}, {"src": ""}, "src", "a non-empty string, got ''"),
        ({}, {"subject": 3}, "subject", "a string of valid Unicode, got 3"),
        ({}, {"rephrase": ["x"]}, "rephrase", "a string of valid Unicode, got ['x']"),
        ({}, {"loc_ans": ""}, "loc_ans", "a non-empty string, got ''"),
        ({}, {"loc_ans": NAN}, "loc_ans", "a non-empty string, got nan"),
        ({}, {"hard_loc": []}, "hard_loc", "an object, got []"),
        ({}, {"extra": {"x": "y"}}, "extra.x", "an object, got 'y'"),
        (
            {},
            {"extra": {"x": {"prompt": "y"}}},
            "extra.x.answer",
            "a non-empty string, got nothing; its fields are prompt",
        ),
    ],
)
def test_what_is_not_of_the_schema_is_refused_by_record_and_field(
    *,
    options: dict[str, Any],
    changes: dict[str, Any],
    field: str,
    complaint: str,
    written: Callable[..., Path],
    refusal: Refusal,
) -> None:
    path = written([question(0), question(1, **changes)])
    assert refusal(lambda: zsre(path, **options).cases(2)) == f"{path}: record 1, field '{field}' must be {complaint}"


# --- Locality ----------------------------------------------------------------------------------------------


def test_locality_comes_from_the_train_record_of_the_same_position(written: Callable[..., Path]) -> None:
    edits = written([question(i) for i in range(3)], "edit.json")
    train = written([question(i) for i in (7, 8, 9, 10)], "train.json")
    cases = zsre(edits, train).cases(3)
    assert [case.prompt for case in cases] == ["Who is S0?", "Who is S1?", "Who is S2?"]
    assert [case.locality for case in cases] == [
        (Probe(f"nq question: loc {i}", f"loc answer {i}"),) for i in (7, 8, 9)
    ]


def test_a_train_record_needs_nothing_but_its_locality_and_not_even_that(written: Callable[..., Path]) -> None:
    edits = written([question(i) for i in range(2)], "edit.json")
    train = written([{"loc": None}, {"loc": "L", "loc_ans": "a"}], "train.json")
    assert [case.locality for case in zsre(edits, train).cases(2)] == [(), (Probe("L", "a"),)]


def test_locality_source_record_leaves_the_train_file_unread(written: Callable[..., Path], tmp_path: Path) -> None:
    edits = written([question(0)], "edit.json")
    (case,) = zsre(edits, tmp_path / "none.json", locality_source="record").cases(1)
    assert case.locality == (Probe("nq question: loc 0", "loc answer 0"),)


def test_a_train_file_that_is_too_short_is_refused(written: Callable[..., Path], refusal: Refusal) -> None:
    edits = written([question(i) for i in range(5)], "edit.json")
    train = written([question(i) for i in range(3)], "train.json")
    assert len(zsre(edits, train).cases(3)) == 3
    assert refusal(lambda: zsre(edits, train).cases(4)) == (
        f"{train} has locality for 3 of 4 edits; write n=3 or less, or dataset.locality_source=record"
    )


def test_a_smaller_n_is_no_advice_where_a_rule_on_conflicts_needs_every_edit(
    written: Callable[..., Path], refusal: Refusal
) -> None:
    edits = written([question(i) for i in range(5)], "edit.json")
    train = written([question(i) for i in range(3)], "train.json")
    assert refusal(lambda: zsre(edits, train, conflicts="drop_later").cases(1)) == (
        f"{train} has locality for 3 of 5 edits; write dataset.locality_source=record"
    )


def test_a_missing_train_file_is_named(written: Callable[..., Path], tmp_path: Path, refusal: Refusal) -> None:
    train = tmp_path / "none.json"
    sentence = refusal(lambda: zsre(written([question(0)]), train).cases(1))
    assert sentence.startswith(f"{train} does not exist; ")
    # The edit file was found: to name it, as dataset.path= does, would not help.
    assert "dataset.path=" not in sentence
    for way_out in ("fetch zsre,", "dataset.train_path=", "dataset.locality_source=record"):
        assert way_out in sentence


@pytest.mark.parametrize("rule", ["drop_earlier", "drop_later"])
def test_locality_stays_with_the_file_position_of_its_edit_when_conflicts_are_dropped(
    rule: str, written: Callable[..., Path]
) -> None:
    # Records 0 and 2 ask the same and are answered differently.
    edits = written([question(0), question(1), question(0, answers=["new"]), question(3)], "edit.json")
    train = written([question(i) for i in (10, 11, 12, 13)], "train.json")
    cases = zsre(edits, train, conflicts=rule).cases(3)
    ids = {"drop_earlier": ["1", "2", "3"], "drop_later": ["0", "1", "3"]}[rule]
    assert [case.id for case in cases] == ids
    assert [case.locality[0].prompt for case in cases] == [f"nq question: loc {10 + int(i)}" for i in ids]


@pytest.mark.parametrize(
    ("strip", "append", "loc", "expected"),
    [
        (False, False, "nq question: who is it", "nq question: who is it"),
        (True, False, "nq question: who is it", "who is it"),
        (False, True, "nq question: who is it", "nq question: who is it?"),
        (True, True, "nq question: who is it", "who is it?"),
        (True, True, "who is it?", "who is it?"),
        (True, False, "the nq question: who", "the nq question: who"),
    ],
)
def test_locality_prompts_are_verbatim_unless_an_option_words_them_otherwise(
    strip: bool, append: bool, loc: str, expected: str, written: Callable[..., Path]
) -> None:
    edits = written([question(0, loc=loc)], "edit.json")
    (own,) = zsre(edits, strip_nq_prefix=strip, append_question_mark=append).cases(1)
    (of_train,) = zsre(edits, edits, strip_nq_prefix=strip, append_question_mark=append).cases(1)
    assert own.locality == of_train.locality == (Probe(expected, "loc answer 0"),)
    assert NqWording(strip, append).of(Record({"loc": loc, "loc_ans": "loc answer 0"}, 0, "")) == own.locality
