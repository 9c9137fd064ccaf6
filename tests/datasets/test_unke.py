"""UnKE: field by field, and the thousand published records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.unke import Unke

NAN = float("nan")

Refusal = Callable[[Callable[[], object]], str]

RANKIN = {
    "id": 40,
    "question": " What is George Rankin's occupation?",
    "para_question": "What does George Rankin do for a living? ",
    "answer": "George Rankin is a politician.\nHe serves in Co\u0301rdoba.\n",
    "sub_question": ["Where does he serve? ", "What is he?"],
    "sub_answer": ["Co\u0301rdoba.", " A politician."],
}


def unke(path: Path, conflicts: Any = "keep") -> Unke:
    return Unke(path=str(path), conflicts=conflicts)


def test_every_field_goes_where_the_published_loader_puts_it(written: Callable[..., Path]) -> None:
    assert unke(written([RANKIN])).cases(1) == [
        EditCase(
            id="40",
            prompt="What is George Rankin's occupation?",
            target="George Rankin is a politician.\nHe serves in C\u00f3rdoba.",
            paraphrases=(
                Probe(
                    "What does George Rankin do for a living?",
                    "George Rankin is a politician.\nHe serves in C\u00f3rdoba.",
                ),
            ),
            extras={
                "sub_question": (
                    Probe("Where does he serve?", "C\u00f3rdoba."),
                    Probe("What is he?", "A politician."),
                )
            },
        )
    ]


@pytest.mark.parametrize("changes", [{"para_question": None}, {"para_question": " "}, {"para_question": NAN}])
def test_without_a_paraphrase_the_question_stands_for_it(changes: dict[str, Any], written: Callable[..., Path]) -> None:
    (case,) = unke(written([{**RANKIN, **changes}])).cases(1)
    assert [probe.prompt for probe in case.paraphrases] == ["What is George Rankin's occupation?"]


def test_nothing_but_question_and_answer_is_needed(written: Callable[..., Path]) -> None:
    records = [{"question": "Q0", "answer": "A0"}, {"question": "Q1", "answer": "A1"}]
    assert unke(written(records)).cases(2) == [
        EditCase(id="0", prompt="Q0", target="A0", paraphrases=(Probe("Q0", "A0"),), extras={"sub_question": ()}),
        EditCase(id="1", prompt="Q1", target="A1", paraphrases=(Probe("Q1", "A1"),), extras={"sub_question": ()}),
    ]


@pytest.mark.parametrize("missing", [None, NAN, []])
def test_sub_questions_may_be_missing(missing: object, written: Callable[..., Path]) -> None:
    (case,) = unke(written([{**RANKIN, "sub_question": missing, "sub_answer": missing}])).cases(1)
    assert case.extras == {"sub_question": ()}


@pytest.mark.parametrize(
    ("changes", "field", "complaint"),
    [
        ({"sub_answer": ["one"]}, "sub_answer", "a list of 2 answers, one for each sub_question, got ['one']"),
        (
            {"sub_question": ["one"]},
            "sub_answer",
            "a list of 1 answers, one for each sub_question, got ['Co\u0301rdoba.', ' A politician.']",
        ),
        ({"sub_answer": None}, "sub_answer", "a list of 2 answers, one for each sub_question, got None"),
        ({"sub_answer": ["one", ""]}, "sub_answer", "a list of non-empty strings, got ['one', '']"),
        ({"sub_question": "one"}, "sub_question", "a list, got 'one'"),
        ({"answer": " \n"}, "answer", "a non-empty string, got ' \\n'"),
        ({"answer": NAN}, "answer", "a non-empty string, got nan"),
        ({"question": 5}, "question", "a string of valid Unicode, got 5"),
    ],
)
def test_what_is_not_of_the_schema_is_refused_by_record_and_field(
    changes: dict[str, Any], field: str, complaint: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([RANKIN, {**RANKIN, **changes}])
    assert refusal(lambda: unke(path).cases(2)) == f"{path}: record 1, field '{field}' must be {complaint}"


def test_a_rule_on_conflicts_is_kept(written: Callable[..., Path]) -> None:
    path = written([{"question": "Q", "answer": "old"}, {"question": "Q", "answer": "new"}])
    assert [case.target for case in unke(path).cases(2)] == ["old", "new"]
    assert [case.target for case in unke(path, "drop_earlier").cases(1)] == ["new"]
    assert [case.target for case in unke(path, "drop_later").cases(1)] == ["old"]


# --- Published records -------------------------------------------------------------------------------------


def test_the_thousand_published_records_are_what_they_are_said_to_be(real_records: Path) -> None:
    cases = unke(real_records / "unke_final_data_v2.json").cases(1000)
    assert [case.id for case in cases] == [str(i) for i in range(1000)]
    assert len({case.prompt for case in cases}) == 1000
    assert len({case.target for case in cases}) == 1000
    words = [len(case.target.split()) for case in cases]
    assert (min(words), max(words), round(sum(words) / 1000)) == (53, 157, 91)
    probes = [len(case.extras["sub_question"]) for case in cases]
    assert (sum(probes), min(probes), max(probes)) == (4729, 4, 8)
    assert cases[0].prompt == "What is George Rankin's occupation?"
    assert [probe.prompt for probe in cases[0].paraphrases] == ["What does George Rankin do for a living?"]
    assert cases[0].extras["sub_question"][0] == Probe(
        "How long has George Rankin been involved in politics?", "Over a decade."
    )


def test_there_is_no_record_beyond_the_thousandth(real_records: Path, refusal: Refusal) -> None:
    path = real_records / "unke_final_data_v2.json"
    assert refusal(lambda: unke(path).cases(1001)) == f"n=1001 is more than {path} holds; write n=1000 or less"


def test_an_id_beyond_64_bits_is_kept_digit_by_digit(written: Callable[..., Path]) -> None:
    path = written([{"id": 10**30 + i, "question": f"Q{i}", "answer": "A"} for i in range(2)])
    assert [case.id for case in Unke(path=str(path)).cases(2)] == [str(10**30), str(10**30 + 1)]
