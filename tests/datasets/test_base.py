"""What holds for every dataset: n cases or one sentence, whatever is in the file."""

import copy
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horen_bench.cases import EditCase
from horen_bench.config.schema import Dataset
from horen_bench.datasets.akew import Akew
from horen_bench.datasets.base import cases_of_file, stream_head, without_conflicts
from horen_bench.datasets.records import Record
from horen_bench.datasets.unke import Unke
from horen_bench.datasets.wikibigedit import WikiBigEdit
from horen_bench.datasets.zsre import Zsre
from horen_bench.errors import UserError

Refusal = Callable[[Callable[[], object]], str]

# One record of each published schema, all of its fields filled.
ZSRE = {
    "subject": "Ana",
    "src": "Where was Ana born?",
    "pred": "Rome",
    "rephrase": "In what town was Ana born?",
    "alt": "Quito",
    "answers": ["Lima", "Lima, Peru"],
    "loc": "nq question: who painted it",
    "loc_ans": "Rembrandt",
    "cond": "Rome >> Quito",
    "hard_loc": {"same_subject": {"prompt": "Is Ana tall?", "answer": "no"}},
    "extra": {"held_out": {"prompt": "Ana was born where?", "answer": "Lima"}},
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Ana",
    "update": "Who is Ana married to?",
    "rephrase": "Who is the spouse of Ana?",
    "ans": "Bo",
    "loc": "Who is Eva married to?",
    "loc_ans": "Cy",
    "personas": "Who's Ana hitched to, mate?",
    "mhop": "Where is the spouse of Ana from?",
    "mhop_ans": "Lima",
}
UNKE = {
    "id": 7,
    "question": "What does Ana do?",
    "para_question": "What is Ana's work?",
    "answer": "Ana paints. She lives in Lima.",
    "sub_question": ["Where?", "What?"],
    "sub_answer": ["Lima.", "She paints."],
}
REWRITE = {
    "prompt": "{} speaks",
    "prompt_full": "What does Ana speak?",
    "subject": "Ana",
    "question": "Which language does Ana speak?",
    "fact_new_uns": "Ana speaks Dutch at home.",
    "unsfact_triplets_GPT": [{"prompt": "{} is from", "subject": "Ana", "target": "Lima"}],
}
COUNTERFACT = {"case_id": 9, "requested_rewrite": REWRITE, "paraphrase_prompts": ["Ana's language?", "Another?"]}
MQUAKE = {"case_id": 9, "requested_rewrite": [REWRITE]}
WIKIUPDATE = {"requested_rewrite": REWRITE}

RECORDS: dict[str, dict[str, Any]] = {
    "zsre": ZSRE,
    "zsre_alt": ZSRE,
    "wikibigedit": WIKIBIGEDIT,
    "unke": UNKE,
    "counterfact": COUNTERFACT,
    "mquake": MQUAKE,
    "wikiupdate": WIKIUPDATE,
}
FETCHED_AS = {"zsre_alt": "zsre"}

# What of a case a field of a record reaches; fields that are not here reach nothing.
REACHES: dict[str, dict[str, tuple[str, ...]]] = {
    "zsre": {
        "subject": ("subject",),
        "src": ("prompt",),
        "rephrase": ("paraphrases",),
        "answers": ("target", "paraphrases"),
        "loc": ("locality",),
        "loc_ans": ("locality",),
        "hard_loc": ("hard_locality",),
        "extra": ("extras",),
    },
    "wikibigedit": {
        "subject": ("subject",),
        "update": ("prompt",),
        "rephrase": ("paraphrases",),
        "ans": ("target", "paraphrases", "extras.personas"),
        "loc": ("locality",),
        "loc_ans": ("locality",),
        "personas": ("extras.personas",),
        "mhop": ("extras.mhop",),
        "mhop_ans": ("extras.mhop",),
    },
    "unke": {
        "id": ("id",),
        "question": ("prompt",),
        "para_question": ("paraphrases",),
        "answer": ("target", "paraphrases"),
        "sub_question": ("extras",),
        "sub_answer": ("extras",),
    },
    "counterfact": {
        "case_id": ("id",),
        "requested_rewrite.prompt_full": ("prompt",),
        "requested_rewrite.subject": ("subject",),
        "requested_rewrite.fact_new_uns": ("target", "paraphrases"),
        "requested_rewrite.unsfact_triplets_GPT": ("extras",),
        "paraphrase_prompts": ("paraphrases",),
    },
    "wikiupdate": {
        "case_id": ("id",),
        "requested_rewrite.prompt": ("prompt",),
        "requested_rewrite.subject": ("prompt", "subject"),
        "requested_rewrite.question": ("paraphrases",),
        "requested_rewrite.fact_new_uns": ("target", "paraphrases"),
        "requested_rewrite.unsfact_triplets_GPT": ("extras",),
    },
}
REACHES["mquake"] = {
    name.replace("requested_rewrite", "requested_rewrite.0"): reached for name, reached in REACHES["wikiupdate"].items()
}
REACHES["zsre_alt"] = {**REACHES["zsre"], "alt": ("target", "paraphrases")}
del REACHES["zsre_alt"]["answers"]


def loader(name: str, path: Path, conflicts: Any = "keep") -> Dataset:
    """A dataset that reads one file."""
    if name == "wikibigedit":
        return WikiBigEdit(path=str(path), conflicts=conflicts)
    if name == "unke":
        return Unke(path=str(path), conflicts=conflicts)
    if name in ("counterfact", "mquake", "wikiupdate"):
        part: Any = name
        return Akew(name=part, label=part, part=part, path=str(path), conflicts=conflicts)
    return Zsre(
        path=str(path),
        train_path=None,
        target="alt" if name == "zsre_alt" else "answers",
        locality_source="record",
        strip_nq_prefix=False,
        append_question_mark=False,
        conflicts=conflicts,
    )


def how_to_get(name: str) -> str:
    yours = "your folder or file" if name == "wikibigedit" else "your file"
    fetched_as = FETCHED_AS.get(name, name)
    return f"run python -m horen_bench.datasets fetch {fetched_as}, or name {yours} with dataset.path="


every_dataset = pytest.mark.parametrize("name", list(RECORDS))


# --- The head of a stream ----------------------------------------------------------------------------------


def fact(i: int, prompt: str, target: str) -> EditCase:
    return EditCase(str(i), prompt, target)


# Prompt p is given x, y, x, y; q is given x twice; r once.
TOLD = [fact(i, told[0], told[1]) for i, told in enumerate(["px", "qx", "py", "px", "rz", "qx", "py"])]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("keep", [0, 1, 2, 3, 4, 5, 6]),
        ("drop_earlier", [1, 2, 4, 5, 6]),  # p keeps its last target, y, both times
        ("drop_later", [0, 1, 3, 4, 5]),  # p keeps its first target, x, both times
    ],
)
def test_conflicts_are_kept_or_dropped_by_hand(rule: Any, kept: list[int]) -> None:
    cases = stream_head(lambda enough: TOLD[:enough], len(kept), rule, "F.json")
    assert [int(case.id) for case in cases] == kept
    if rule != "keep":
        assert without_conflicts(TOLD, rule) == cases


@pytest.mark.parametrize(("rule", "asked"), [("keep", 2), ("drop_earlier", None), ("drop_later", None)])
def test_only_a_rule_on_conflicts_needs_the_whole_stream(rule: Any, asked: int | None) -> None:
    seen: list[int | None] = []

    def read(enough: int | None) -> list[EditCase]:
        seen.append(enough)
        return TOLD[:enough]

    assert len(stream_head(read, 2, rule, "F.json")) == 2
    assert seen == [asked]


@pytest.mark.parametrize("rule", ["keep", "drop_earlier", "drop_later"])
def test_never_fewer_cases_than_the_file_holds(rule: Any, refusal: Refusal) -> None:
    assert refusal(lambda: stream_head(lambda enough: TOLD[:enough], 9, rule, "F.json")) == (
        "n=9 is more than F.json holds; write n=7 or less"
    )


@pytest.mark.parametrize("rule", ["drop_earlier", "drop_later"])
@pytest.mark.parametrize("n", [6, 7])
def test_what_a_rule_on_conflicts_leaves_is_not_said_to_be_the_file(n: int, rule: Any, refusal: Refusal) -> None:
    sentence = refusal(lambda: stream_head(lambda enough: TOLD[:enough], n, rule, "F.json"))
    assert "F.json holds" not in sentence
    for fact in (f"n={n} ", f"dataset.conflicts={rule}", "F.json", "5 of 7 cases", "n=5 or less", "conflicts=keep"):
        assert fact in sentence


@every_dataset
def test_the_end_of_a_file_is_where_the_sentence_says(
    name: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([RECORDS[name]] * 3)
    assert len(loader(name, path).cases(3)) == 3
    assert refusal(lambda: loader(name, path).cases(4)) == f"n=4 is more than {path} holds; write n=3 or less"


@every_dataset
def test_a_short_stream_is_the_head_of_a_long_one(name: str, written: Callable[..., Path]) -> None:
    path = written([RECORDS[name]] * 5)
    assert loader(name, path).cases(2) == loader(name, path).cases(5)[:2]


def test_a_dataset_has_no_warnings_of_its_own_accord() -> None:
    class Silent(Dataset):
        def cases(self, n: int) -> list[EditCase]:
            return TOLD[:n]

    assert Silent(name="silent", label="Silent").warnings() == []


# --- Files that are not as they should be ------------------------------------------------------------------


@every_dataset
def test_a_missing_file_an_empty_one_and_one_without_records_are_refused(
    name: str, tmp_path: Path, refusal: Refusal
) -> None:
    path = tmp_path / "records.json"
    sentences = []
    for content in (None, b"", b"[]"):
        if content is not None:
            path.write_bytes(content)
        sentences.append(refusal(lambda: loader(name, path).cases(1)))
    assert sentences == [
        f"{path} does not exist; {how_to_get(name)}",
        f"{path} is empty; {how_to_get(name)}",
        f"{path} holds no record; {how_to_get(name)}",
    ]


@every_dataset
def test_a_folder_in_place_of_a_file_is_refused(name: str, tmp_path: Path, refusal: Refusal) -> None:
    sentence = refusal(lambda: loader(name, tmp_path).cases(1))
    if name == "wikibigedit":  # whose path may be a folder
        assert sentence.startswith(f"{tmp_path} lacks wiki_big_edit_20240201_20240220.json, ")
    else:
        assert sentence == f"{tmp_path} cannot be read (Is a directory); {how_to_get(name)}"


@every_dataset
def test_an_object_of_records_is_refused(name: str, written: Callable[..., Path], refusal: Refusal) -> None:
    path = written({"data": [RECORDS[name]]})
    assert refusal(lambda: loader(name, path).cases(1)) == f"{path}: a JSON list of records is needed, got an object"


@every_dataset
def test_a_bad_record_at_the_very_end_is_refused_when_only_the_first_is_wanted(
    name: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([RECORDS[name]] * 99 + ["not a record"])
    assert refusal(lambda: loader(name, path).cases(1)) == f"{path}: record 99 must be an object, got a string"


@every_dataset
def test_a_file_cut_anywhere_is_refused_by_the_record_it_breaks_off_in(
    name: str, tmp_path: Path, refusal: Refusal
) -> None:
    records = [json.dumps(RECORDS[name]).encode() for _ in range(3)]
    content = b"[" + b",".join(records) + b"]"
    path = tmp_path / "records.json"
    ends = [1 + (i + 1) * (len(records[0]) + 1) - 1 for i in range(3)]  # where each record is whole
    for size in range(1, len(content), 7):
        path.write_bytes(content[:size])
        n_whole = sum(size >= end for end in ends)
        sentence = refusal(lambda: loader(name, path).cases(1))
        assert sentence.startswith(f"{path}: JSON breaks off or is damaged in record {n_whole} (")
        assert sentence.endswith("); the file may be incomplete, get it again")


WRONG_FILES = {
    ("zsre", "unke"): "record 0, field 'src' must be a non-empty string",
    ("zsre", "wikibigedit"): "record 0, field 'src' must be a non-empty string",
    ("zsre", "counterfact"): "record 0, field 'src' must be a non-empty string",
    ("wikibigedit", "zsre"): "record 0, field 'ans' must be a non-empty string",
    ("wikibigedit", "unke"): "record 0, field 'ans' must be a non-empty string",
    ("unke", "zsre"): "record 0, field 'question' must be a non-empty string",
    ("unke", "wikibigedit"): "record 0, field 'question' must be a non-empty string",
    ("counterfact", "zsre"): "record 0, field 'requested_rewrite' must be an object",
    ("mquake", "unke"): "record 0, field 'requested_rewrite' must be a list with an object at 0",
    ("wikiupdate", "wikibigedit"): "record 0, field 'requested_rewrite' must be an object",
}


@pytest.mark.parametrize(("name", "other"), list(WRONG_FILES))
def test_the_file_of_another_dataset_is_refused_with_the_fields_that_it_has(
    name: str, other: str, written: Callable[..., Path], refusal: Refusal
) -> None:
    path = written([RECORDS[other]])
    assert refusal(lambda: loader(name, path).cases(1)) == (
        f"{path}: {WRONG_FILES[name, other]}, got nothing; its fields are {', '.join(RECORDS[other])}"
    )


def test_the_collector_is_on_again_after_a_file_good_or_bad(written: Callable[..., Path]) -> None:
    assert gc.isenabled()
    during: list[bool] = []

    def case_of(record: Record) -> EditCase:
        during.append(gc.isenabled())
        return fact(record.index, record.text("p"), "x")

    assert len(cases_of_file(written([{"p": "a"}, {"p": "b"}, {"p": "c"}]), case_of, 2, "")) == 2
    with pytest.raises(UserError):
        cases_of_file(written([{"p": "a"}, {}]), case_of, None, "")
    assert gc.isenabled()
    assert during == [False] * 5


# --- Whatever is in a file ---------------------------------------------------------------------------------

Place = tuple[str | int, ...]


def places(value: object, here: Place = ()) -> list[Place]:
    """Where a record can be changed: every field, item, and field of an item."""
    found: list[Place] = [here] if here else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        found += places(one, (*here, key))
    return found


def changed(record: Mapping[str, Any], place: Place, delete: bool, value: object) -> dict[str, Any]:
    result: Any = copy.deepcopy(record)
    holder = result
    for key in place[:-1]:
        holder = holder[key]
    if delete:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    found: dict[str, Any] = result
    return found


def aspects(case: EditCase) -> dict[str, Any]:
    """Everything that a case says, by name."""
    plain = asdict(case)
    hard, extras = plain.pop("hard_locality"), plain.pop("extras")
    named = {f"hard_locality.{name}": probes for name, probes in hard.items()}
    return {**plain, **named, **{f"extras.{name}": probes for name, probes in extras.items()}}


def reached(name: str, place: Place) -> tuple[str, ...]:
    """Beginnings of the names of what may change with a place."""
    dotted = ".".join(map(str, place))
    return tuple(
        aspect
        for field, several in REACHES[name].items()
        for aspect in several
        if f"{dotted}.".startswith(f"{field}.") or f"{field}.".startswith(f"{dotted}.")
    )


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.sampled_from(
        ["", " \t\n", "\u00a0", "\u200b\ufeff", "x" * 200_000, "e\u0301", "{}", "{0} {x}", "\ud83d", "\x00"]
    )
    | st.text(max_size=20)
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed")


@every_dataset
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_changed_field_changes_only_what_it_is_about_or_is_refused_by_name(
    name: str, folder: Path, data: st.DataObject
) -> None:
    record = RECORDS[name]
    place = data.draw(st.sampled_from(places(record)))
    bad = changed(record, place, data.draw(st.booleans()), data.draw(VALUES))
    path = folder / f"{name}.json"
    path.write_text(json.dumps([record] * 3))
    good = loader(name, path).cases(3)
    path.write_text(json.dumps([record, bad, record]))
    try:
        cases = loader(name, path).cases(3)
    except UserError as error:
        sentence = str(error)
        assert sentence.startswith(f"{path}: record 1, field '")
        assert all(key in sentence for key in place if isinstance(key, str))
        return
    assert [cases[0], cases[2]] == [good[0], good[2]]
    before, after = aspects(good[1]), aspects(cases[1])
    different = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert all(key.startswith(reached(name, place)) for key in different), (place, different)


@every_dataset
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data(), noise=st.binary(max_size=4))
def test_a_file_with_bytes_lost_or_garbled_gives_all_cases_or_one_sentence(
    name: str, folder: Path, data: st.DataObject, noise: bytes
) -> None:
    content = json.dumps([RECORDS[name]] * 3, ensure_ascii=False).encode()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    path = folder / f"{name}.json"
    path.write_bytes(content[:start] + noise + content[end:])
    try:
        assert len(loader(name, path).cases(3)) == 3
    except UserError as error:
        assert str(path) in str(error)
