"""WikiBigEdit: field by field, eight files in order, and the order behind the published numbers."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horen_bench.cases import EditCase, Probe
from horen_bench.datasets.wikibigedit import TIME_STEPS, WikiBigEdit

NAN = float("nan")
FETCH = "run python -m horen_bench.datasets fetch wikibigedit, or name your folder or file with dataset.path="
PUBLISHED_HEAD = [
    "What is the family name of Thomas A. Szlezák?",
    "Who is Tyson Fury married to?",
    "What is the given name of Buddy Richard?",
    "What is Buddy Richard's family name?",
    "In which country did the Battle of Cape Finisterre take place?",
]

Refusal = Callable[[Callable[[], object]], str]

# The published schema, with white space around the texts and a decomposed "á".
FURY = {
    "tag": "new",
    "subject": "Tyson Fury",
    "relation": "spouse",
    "object": "Paris Fury",
    "subject_id": "Q1000592",
    "update": "Who is Tyson Fury married to?",
    "rephrase": "Who is the spouse of Tyson Fury? ",
    "ans": " Pa\u0301ris Fury",
    "loc": "Who is Tyson Gay married to?",
    "loc_ans": "Nobody ",
    "personas": "Hey mate, who's Tyson Fury hitched to?",
    "personas_2": "ignored",
    "mhop": "What is the citizenship of the spouse of Tyson Fury?",
    "mhop_ans": "United Kingdom",
}


def update(i: int, **changes: Any) -> dict[str, Any]:
    """A record without probes whose texts say its number."""
    return {"update": f"U{i}?", "ans": f"a{i}", "subject": f"S{i}", **changes}


def wikibigedit(path: Path, conflicts: Any = "keep") -> WikiBigEdit:
    return WikiBigEdit(path=str(path), conflicts=conflicts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight files of two records each; U0 is the first of the first file, U15 the last of the last."""
    for number, step in enumerate(TIME_STEPS):
        records = [update(2 * number), update(2 * number + 1)]
        (tmp_path / f"wiki_big_edit_{step}.json").write_text(json.dumps(records))
    return tmp_path


# --- Fields ------------------------------------------------------------------------------------------------


def test_every_field_goes_where_the_published_loader_puts_it(written: Callable[..., Path]) -> None:
    assert wikibigedit(written([FURY])).cases(1) == [
        EditCase(
            id="0",
            prompt="Who is Tyson Fury married to?",
            target="P\u00e1ris Fury",
            subject="Tyson Fury",
            paraphrases=(Probe("Who is the spouse of Tyson Fury?", "P\u00e1ris Fury"),),
            locality=(Probe("Who is Tyson Gay married to?", "Nobody"),),
            extras={
                "personas": (Probe("Hey mate, who's Tyson Fury hitched to?", "P\u00e1ris Fury"),),
                "mhop": (Probe("What is the citizenship of the spouse of Tyson Fury?", "United Kingdom"),),
            },
        )
    ]


@pytest.mark.parametrize("missing", [None, "", " ", NAN])
def test_a_missing_null_empty_or_nan_probe_means_that_there_is_none(
    missing: object, written: Callable[..., Path]
) -> None:
    probes = dict.fromkeys(("rephrase", "loc", "personas", "mhop", "loc_ans", "mhop_ans"), missing)
    bare = EditCase(id="0", prompt="U0?", target="a0", subject="S0")
    assert wikibigedit(written([update(0, **probes)])).cases(1) == [bare]
    assert wikibigedit(written([update(0)])).cases(1) == [bare]


def test_only_the_records_with_a_second_hop_have_that_probe(written: Callable[..., Path]) -> None:
    records = [update(0), update(1, mhop="M?", mhop_ans="m"), update(2, personas="P?"), update(3)]
    cases = wikibigedit(written(records)).cases(4)
    assert [dict(case.extras) for case in cases] == [
        {},
        {"mhop": (Probe("M?", "m"),)},
        {"personas": (Probe("P?", "a2"),)},
        {},
    ]


@pytest.mark.parametrize(
    ("changes", "field", "complaint"),
    [
        ({"ans": ""}, "ans", "a non-empty string, got ''"),
        ({"ans": NAN}, "ans", "a non-empty string, got nan"),
        ({"update": None}, "update", "a non-empty string, got None"),
        ({"loc": "L?", "loc_ans": None}, "loc_ans", "a non-empty string, got None"),
        ({"mhop": "M?"}, "mhop_ans", "a non-empty string, got nothing; its fields are update, ans, subject, mhop"),
        ({"personas": ["P?"]}, "personas", "a string of valid Unicode, got ['P?']"),
    ],
)
def test_what_is_not_of_the_schema_is_refused_by_record_and_field(
    changes: dict[str, Any], field: str, complaint: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([update(0), update(1, **changes)])
    assert refusal(lambda: wikibigedit(path).cases(2)) == f"{path}: record 1, field '{field}' must be {complaint}"


# --- Files -------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_chronological_order_and_numbered_through(folder: Path) -> None:
    cases = wikibigedit(folder).cases(16)
    assert [case.prompt for case in cases] == [f"U{i}?" for i in range(16)]
    assert [case.id for case in cases] == [str(i) for i in range(16)]


def test_the_time_steps_are_the_published_ones_and_each_begins_where_the_last_one_ends() -> None:
    assert len(TIME_STEPS) == 8
    borders = [step.split("_") for step in TIME_STEPS]
    assert borders[0][0] == "20240201"
    assert borders[-1][1] == "20240701"
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(borders))


def test_one_merged_file_gives_the_same_stream_as_the_folder(folder: Path, written: Callable[..., Path]) -> None:
    merged = written([update(i) for i in range(16)], "merged/wiki_big_edit.json")
    for n in (1, 3, 16):
        assert wikibigedit(merged).cases(n) == wikibigedit(folder).cases(n)


@pytest.mark.parametrize(("n", "n_files"), [(1, 1), (2, 1), (3, 2), (4, 2), (15, 8), (16, 8)])
def test_no_more_files_are_read_than_the_stream_needs(folder: Path, n: int, n_files: int) -> None:
    for step in TIME_STEPS[n_files:]:
        (folder / f"wiki_big_edit_{step}.json").write_text("damaged")
    assert [case.prompt for case in wikibigedit(folder).cases(n)] == [f"U{i}?" for i in range(n)]


def test_a_damaged_file_is_noticed_as_soon_as_the_stream_needs_it(folder: Path, refusal: Refusal) -> None:
    second = folder / f"wiki_big_edit_{TIME_STEPS[1]}.json"
    second.write_text(json.dumps([update(2), update(3, ans=None)]))
    assert refusal(lambda: wikibigedit(folder).cases(3)) == (
        f"{second}: record 1, field 'ans' must be a non-empty string, got None"
    )


def test_a_folder_that_lacks_files_is_refused_by_their_names(folder: Path, refusal: Refusal) -> None:
    for step in (TIME_STEPS[2], TIME_STEPS[7]):
        (folder / f"wiki_big_edit_{step}.json").unlink()
    assert refusal(lambda: wikibigedit(folder).cases(1)) == (
        f"{folder} lacks wiki_big_edit_20240301_20240320.json, wiki_big_edit_20240620_20240701.json; {FETCH}"
    )


def test_a_path_to_nothing_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "wikibigedit"
    assert refusal(lambda: wikibigedit(path).cases(1)) == f"{path} does not exist; {FETCH}"


def test_more_than_all_files_hold_is_refused(folder: Path, refusal: Refusal) -> None:
    assert refusal(lambda: wikibigedit(folder).cases(17)) == f"n=17 is more than {folder} holds; write n=16 or less"


def test_a_rule_on_conflicts_looks_across_files(folder: Path) -> None:
    last = folder / f"wiki_big_edit_{TIME_STEPS[7]}.json"
    last.write_text(json.dumps([update(0, ans="changed"), update(15)]))
    later_wins = wikibigedit(folder, "drop_earlier").cases(15)
    assert [case.id for case in later_wins] == [str(i) for i in range(1, 16)]
    assert later_wins[13].target == "changed"
    assert [case.id for case in wikibigedit(folder, "drop_later").cases(15)] == [str(i) for i in range(16) if i != 14]


# --- The published order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 5, 6])
def test_a_stream_that_begins_as_the_published_one_is_not_remarked_on(n: int, written: Callable[..., Path]) -> None:
    records = [update(i, update=prompt) for i, prompt in enumerate([*PUBLISHED_HEAD, "Another one?"])]
    dataset = wikibigedit(written(records))
    assert dataset.warnings() == []
    dataset.cases(n)
    assert dataset.warnings() == []


@pytest.mark.parametrize("swapped", [0, 4])
def test_another_order_is_pointed_out(swapped: int, written: Callable[..., Path]) -> None:
    prompts = [*PUBLISHED_HEAD, "Another one?"]
    prompts[swapped], prompts[5] = prompts[5], prompts[swapped]
    dataset = wikibigedit(written([update(i, update=prompt) for i, prompt in enumerate(prompts)]))
    dataset.cases(5)
    assert dataset.warnings() == [
        f"this WikiBigEdit stream begins with {prompts[0]!r} and not as the one behind the published numbers "
        "('What is the family name of Thomas A. Szlezák?'); its rows do not compare edit by edit"
    ]
